"""`repair`: a new set without what `verify` finds wrong, and a list of what was left out.

Samples that are sound are copied, shard by shard. One whose medium is damaged and whose JSON is not gets its medium
from --root again, as a file or as the same frames, if what lies there has the SHA-256 that the JSON says. Everything
else goes to OUT.quarantine.jsonl, with shard, key, cause and error; the damaged set is not touched.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavis_lstp.data.pictures import DEFAULT_MAX_MEGAPIXELS
from lavis_lstp.data.shards import sets
from lavis_lstp.data.shards.format import MEDIA_MEMBERS, check_sample, parse_frames
from lavis_lstp.data.shards.storage import expand
from lavis_lstp.data.store import content_digest
from lavis_lstp.errors import ShardError, VideoError
from lavis_lstp.files import find_path
from webdataset_tools.media import Settings, load
from webdataset_tools.rewrite import Again, Kept, about, rewrite
from webdataset_tools.sources import Unit
from webdataset_tools.verify import add_check_arguments, check_decodable, check_derived, checks, examine, problem_row

HELP = "a new set without, or with mended, samples that verify names"
OF_THE_SET = ("no index", "no manifest", "index", "manifest", "missing shard")
"""Causes that a new index and a new manifest mend."""


def repair(
    shards: Sequence[str],
    out: str,
    *,
    against: Sequence[str] = (),
    root: Path | None = None,
    decode: int = 8,
    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS,
    overwrite: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """Writes the sound part of a set as the set `out`; returns its manifest.

    Raises:
        ShardError: nothing of it is sound.
    """
    problems, sound = examine(shards, against, decode=decode, max_megapixels=max_megapixels, **how)
    named: dict[tuple[str, str], dict[str, str]] = {}
    for row in problems:
        if row["key"] and row["cause"] not in (*OF_THE_SET, "duplicate key"):
            named.setdefault((row["shard"], row["key"]), row)
    bad = [row for row in problems if not row["key"] and row["cause"] not in OF_THE_SET]
    new: dict[str, list[Kept | Again]] = {shard: [] for shard in shards}
    taken: set[str] = set()
    for shard, key, _, _, _, members in sound:
        if key in taken:
            bad.append(problem_row(shard, key, "duplicate key", f"{shard}: key {key!r} was there before"))
        elif (shard, key) not in named:
            taken.add(key)
            new[shard].append(Kept(key, tuple((shard, member) for member in members)))
    for (shard, key), row in named.items():
        copies = row["cause"] in ("leak", "duplicate question")
        fetched = None if copies else _again(row, root, bad, decode, max_megapixels)
        if fetched is None or key in taken:
            bad.append(row)
        else:
            taken.add(key)
            new[shard].append(fetched)
    kept = [items for items in new.values() if items]
    if not kept:
        raise ShardError(f"{shards[0]}: nothing of this set is sound; the first cause: {problems[0]['error']}", "empty")
    facts = about("repair", fetched=sum(isinstance(item, Again) for items in kept for item in items))
    return rewrite(kept, out, about=facts, bad=bad, root=str(root or ""), overwrite=overwrite, **how)


def _again(
    row: dict[str, str], root: Path | None, bad: list[dict[str, str]], decode: int, max_megapixels: float
) -> Again | None:
    """The sample with its medium of `root`, where its JSON is whole and what lies there is what it says and sound.

    Members that are not sound are listed in `bad`.
    """
    if root is None:
        return None
    shard, key = row["shard"], row["key"]
    found = sets.ShardSet([shard])
    try:
        number = found.index(0).keys().index(key)
        value = found.read_json(0, number)
        check_sample(value, key, key)
    except (ShardError, ValueError):
        return None
    settings = _settings(found, number, max_megapixels)
    if value["kind"] == "text" or settings is None:
        return None  # what was wrong lies in the JSON itself; or nobody knows which frames there were
    path = find_path(root, value["source"])
    unit = Unit(key, value["kind"], value["video_id"], value["source"], tuple(value["questions"]))
    try:
        if content_digest(path) != value["sha256"]:
            return None
        medium = load(unit, root, settings)
        if decode and medium.member in MEDIA_MEMBERS:
            check_decodable(unit.kind, medium.content, str(path), decode, max_megapixels)
    except (VideoError, OSError):
        return None
    kept, derived = [], []
    for name, member in found.index(0).members(number).items():
        if name in (*MEDIA_MEMBERS, "frames"):
            continue
        try:
            if name == row["cause"]:  # "flow", perhaps for other frames
                raise ShardError(row["error"], name)
            check_derived({name: found.read(0, number, (name,))[name]}, f"{shard}, {key}")
            kept.append((shard, member))
        except ShardError as error:
            derived.append(problem_row(shard, key, error.cause, f"{error}; the sample is kept without it"))
    bad.extend(derived)
    return Again(Kept(key, tuple(kept)), unit, settings)


def _settings(found: sets.ShardSet, number: int, max_megapixels: float) -> Settings | None:
    """How the sample's medium was stored: as it is, or as frames that other samples' tell how to choose."""
    if "frames" not in found.index(0).members(number):
        return Settings(max_megapixels=max_megapixels)
    for other, sample in enumerate(found.index(0).samples()):
        if "frames" in dict(sample.members):
            try:
                stored = parse_frames(found.read(0, other, ("frames",))["frames"], sample.key)
            except ShardError:
                continue
            if stored.folder:
                return Settings(max_megapixels=max_megapixels)
            chosen = stored.settings
            return Settings(
                frames=int(chosen["num_frames"]),
                fps=None if chosen["fps"] == "None" else float(chosen["fps"]),
                short_videos=chosen["short_videos"],
                size=int(chosen["size"]),
                encoding=chosen["encoding"],
                quality=int(chosen["quality"]),
                max_megapixels=max_megapixels,
            )
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "example: python -m webdataset_tools repair 'train-{000000..000123}.tar' --out new/train --root videos"
    )
    parser.add_argument("shards", nargs="+", help="paths or addresses of shards, braces allowed")
    parser.add_argument("--out", required=True, help="path and name of the new set")
    parser.add_argument("--root", type=Path, help="folder of the media, to pack damaged samples again from")
    add_check_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a set of other input")


def run(args: argparse.Namespace) -> dict[str, Any]:
    return repair(expand(args.shards), args.out, root=args.root, overwrite=args.overwrite, **checks(args))


def show(report: dict[str, Any], args: argparse.Namespace) -> str:
    fetched = report["made_by"]["fetched"]
    text = f"{args.out}: {report['totals']['samples']} samples, {fetched} of them packed again"
    return text + (f"; {report['left_out']} causes in {args.out}.quarantine.jsonl" if report["left_out"] else "")
