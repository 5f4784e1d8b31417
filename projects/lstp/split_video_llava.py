"""Video-LLaVA's annotation files -> the train, val and test files that the recipes name.

    python projects/lstp/split_video_llava.py inputs/ivinstruct/annotations/*.json

In: JSON lists of {id, image | video, conversations}. Out: inputs/ivinstruct/{train,val,test}.json, the same rows, and
inputs/videoinstruct/{train,val,test}.json, the first question about each video in the published video-only form. One
video in a hundred goes to val and one to test, with all its rows: the published splits are not available.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavis_lstp.data.annotation import check_object, parse_rows, read_text
from lavis_lstp.data.prompts import without_tokens
from lavis_lstp.errors import LstpError
from lavis_lstp.files import write_json

SPLITS = ("train", "val", "test")
EVERY = 100
"""Of so many videos, one is held out for each of val and test."""


def split_rows(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{split: rows}, in the order given; rows without a video are for training."""
    videos = sorted({row["video"] for row in rows if "video" in row})
    place = dict.fromkeys(videos[::EVERY], "val") | dict.fromkeys(videos[1::EVERY], "test")
    split: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for row in rows:
        split[place.get(row.get("video"), "train")].append(row)
    return split


def questions(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """{id: {q, a, video_id}} of the rows about videos."""
    found = {}
    for row in rows:
        turns = [turn for turn in row["conversations"] if turn.get("value")]
        if turns and turns[0].get("from") != "human":
            turns = turns[1:]
        if "video" in row and len(turns) > 1:
            name = Path(row["video"]).stem
            texts = {"q": without_tokens(turns[0]["value"]), "a": turns[1]["value"]}
            found[f"{name}_{len(found)}"] = {**texts, "video_id": name}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="annotation files, of images and of videos")
    parser.add_argument("--out", type=Path, default=Path("inputs"), help="default: inputs")
    args = parser.parse_args(argv)
    rows = []
    for file in args.files:
        for where, row in parse_rows(read_text(file), file):
            check_object(row, where, ("id", "conversations"), ("image", "video"))
            rows.append(row)
    for name, own in split_rows(rows).items():
        asked = questions(own)
        write_json(args.out / "ivinstruct" / f"{name}.json", own, indent=None)
        write_json(args.out / "videoinstruct" / f"{name}.json", asked, indent=None)
        print(f"{name}: {len(own)} conversations, {len(asked)} questions about videos")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except LstpError as error:
        raise SystemExit(f"error: {error}") from None
