"""`extract`: shards -> files in a folder, and annotation files that name them.

Media come back under the paths they were packed from, byte for byte, chosen frames as `<path>.frames/00000.jpg`, flow
and spans as `<path>.flow` and `<path>.span.json`, subtitles as JSON under the video's name. Questions go to
annotation.json, conversations to conversations.json; `pack` makes the same shards of them again. Nothing is written
outside of the folder: paths that lead out are refused, and so is a folder in which a link stands in the way.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lavis_lstp.data.shards.format import (
    JSON_LIMIT,
    MEDIA_MEMBERS,
    check_sample,
    dump_json,
    media_path,
    parse_frames,
    parse_json,
)
from lavis_lstp.data.shards.storage import expand, open_stream
from lavis_lstp.data.shards.tar import TarScan, samples
from lavis_lstp.errors import ConfigError, ShardError
from lavis_lstp.files import complete_folder, write_json

HELP = "write a set's media and annotations back as files"
SHARD_BY_SHARD = False


def safe_path(root: Path, name: str) -> Path:
    """`root/name`, whose folders are made.

    Raises:
        ShardError: it leads out of root, or through a link.
    """
    path = root / media_path(name)
    for folder in (path, *path.parents):
        if folder == root:
            break
        if folder.is_symlink():
            raise ShardError(f"{folder}: is a link, which could lead anywhere; extract into a new folder", "link")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def extract(shards: Sequence[str], out: str | os.PathLike) -> dict[str, Any]:
    """Writes everything to the new folder `out`; it is complete or absent.

    Raises:
        ShardError: a shard is damaged or unsafe.
        ConfigError: `out` has something in it.
    """
    from tqdm import tqdm

    rows: list[dict[str, Any]] = []
    conversations: list[dict[str, Any]] = []
    files = 0
    with complete_folder(out) as folder:
        for location in tqdm(shards, desc="extract", unit="shard", disable=None):
            with open_stream(location) as stream:
                tar = TarScan(stream, location)
                for key, group in samples(tar):
                    content = {name: tar.content(JSON_LIMIT if name.endswith("json") else None) for name, _ in group}
                    value = parse_json(content.get("json", b""), f"{location}, {key}.json")
                    check_sample(value, f"{location}, {key}.json", key)
                    files += _write_media(folder, value, content, f"{location}, {key}")
                    for row in value["questions"]:
                        (conversations if "conversations" in row else rows).append(_annotation(value, row))
        for name, found in (("annotation", rows), ("conversations", conversations)):
            if found:
                write_json(folder / f"{name}.json", found, indent=1)
    return {"out": os.fspath(out), "files": files, "questions": len(rows) + len(conversations)}


def _write_media(folder: Path, value: Mapping[str, Any], content: Mapping[str, bytes], place: str) -> int:
    written = 0
    for name, raw in content.items():
        if name in MEDIA_MEMBERS:
            written += _write(safe_path(folder, value["source"]), raw)
        elif name == "frames":
            frames = parse_frames(raw, f"{place}.frames")
            ending = "webp" if frames.settings.get("encoding") == "webp" else "jpg"
            names = [f"{value['source']}/{name}" for name in frames.folder]
            names = names or [f"{value['source']}.frames/{n:05d}.{ending}" for n in range(len(frames.pictures))]
            for name, picture in zip(names, frames.pictures, strict=True):
                written += _write(safe_path(folder, name), picture)
        elif name != "json" and value["kind"] != "text":
            written += _write(safe_path(folder, f"{value['source']}.{name}"), raw)
    if value.get("subtitles"):  # where a data set looks for them
        path = safe_path(folder, str(PurePosixPath(value["source"]).with_suffix(".json")))
        written += _write(path, dump_json(value["subtitles"]))
    return written


def _write(path: Path, raw: bytes) -> int:
    try:
        with open(path, "xb") as file:
            file.write(raw)
    except FileExistsError:
        raise ShardError(f"{path.name}: two samples are of this path", "duplicate key") from None
    return 1


def _annotation(value: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    kind = value["kind"]
    media = {kind: value["source"]} if kind != "text" else {}
    if "conversations" in row:
        return {"id": row["question_id"], **media, "conversations": row["conversations"]}
    return {"question_id": row["question_id"], "video_id": value["video_id"], **media, **row}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", help="paths or addresses of shards, braces allowed; pipe:COMMAND, too")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.epilog = "example: python -m webdataset_tools extract 'train-{000000..000123}.tar' --out train"


def run(args: argparse.Namespace) -> dict[str, Any]:
    if Path(args.out).is_symlink():
        raise ConfigError(f"{args.out}: is a link; name a new folder")
    return extract(expand(args.shards), args.out)


def show(report: dict[str, Any], args: argparse.Namespace) -> str:
    return f"{report['out']}: {report['files']} files, {report['questions']} questions"
