"""`pack`: annotation files and media -> shards, their indexes and a manifest.

In: files of the form that --from names, see below. Out: OUT-000000.tar, OUT-000000.index, ..., OUT.manifest.json last;
with --skip-bad also OUT.quarantine.jsonl. The same input gives the same bytes, with any number of workers, on any
engine, in one go or after kills: which sample goes to which shard is decided before anything is written, from the
annotations and the files' sizes, and a shard is there when its index is.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import random
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lavis_lstp.data.pictures import DEFAULT_MAX_MEGAPIXELS
from lavis_lstp.data.shards import index, sets
from lavis_lstp.data.shards.format import SAMPLE_FORMAT, VERSION, check_sample, dump_json
from lavis_lstp.data.shards.storage import beside
from lavis_lstp.data.shards.tar import ShardWriter
from lavis_lstp.data.video.picture_folder import pictures_in
from lavis_lstp.errors import ConfigError, ShardError, VideoError
from lavis_lstp.files import find_path, sha256_json, write_jsonl
from lavis_lstp.jobs import how, run_jobs
from webdataset_tools.media import Medium, Settings, read_ahead
from webdataset_tools.sources import FORMS, Unit, units

HELP = "write shards from annotation files and their videos, images and texts"
DEFAULTS = Settings()
ENCODINGS = ("jpeg", "webp")
QUARANTINE_SUFFIX = ".quarantine.jsonl"


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    path: str
    root: str
    units: tuple[Unit, ...]
    sizes: tuple[int, ...]
    settings: Settings
    skip_bad: bool
    overwrite: bool
    plan: str


def plan_shards(sizes: Sequence[int], *, max_size: int, max_count: int | None, min_shards: int) -> list[range]:
    """Which samples go to which shard, in order.

    >>> plan_shards([4, 4, 4], max_size=8, max_count=None, min_shards=1)
    [range(0, 2), range(2, 3)]

    Args:
        sizes: bytes of each sample.
        max_size: a shard is closed before it would grow past this; a sample greater than it gets its own.
    """
    count = len(sizes)
    if min_shards > count:
        raise ConfigError(f"--min-shards {min_shards}: there are only {count} samples, and a shard holds at least one")
    shards = []
    for part in range(min_shards):
        start, stop = part * count // min_shards, (part + 1) * count // min_shards
        size = 0
        for number in range(start, stop):
            full = size + sizes[number] > max_size or (max_count and number - start >= max_count)
            if number > start and full:
                shards.append(range(start, number))
                start, size = number, 0
            size += sizes[number]
        shards.append(range(start, stop))
    return shards


def pack_shard(job: Job) -> dict[str, Any]:
    """Writes one shard and its index, unless they are there; returns its line of the manifest and what was left out.

    Raises:
        ConfigError: the shard is there and was packed from something else.
        VideoError: a file cannot be decoded, and bad ones are not skipped.
    """
    path = Path(job.path)
    found = finished(path, job.plan, job.overwrite)
    if found is None:
        bad: list[dict[str, str]] = []
        entries = []
        with ShardWriter(path) as shard:
            for unit, medium in read_ahead(job.units, job.sizes, Path(job.root), job.settings):
                if isinstance(medium, VideoError):
                    if not job.skip_bad:
                        raise medium
                    bad.append({"shard": path.name, "key": unit.key, "cause": "undecodable", "error": str(medium)})
                    continue
                value = _write(shard, unit, medium)
                key, members = shard.samples[-1]
                entries.append(index.sample_of(key, {m.name.partition(".")[2]: m for m in members}, value))
        found = index.build(entries, shard.bytes, job.plan)
        found.facts["left_out"] = json.dumps(bad)
        index.write(found, path)
    return {**sets.shard_entry(path.name, found), "left_out": json.loads(found.facts["left_out"])}


def planned(settings: Settings) -> dict[str, Any]:
    """What of the settings decides a shard; the usual limit of pictures is left out, for sets that began without it."""
    facts = asdict(settings)
    if settings.max_megapixels == DEFAULT_MAX_MEGAPIXELS:
        del facts["max_megapixels"]
    return facts


def finished(path: Path, plan: str, overwrite: bool) -> index.ShardIndex | None:
    """The index of a shard that is there already and was made by this plan; None where there is work to do.

    Raises:
        ConfigError: it was made by another plan.
    """
    place = Path(beside(str(path), index.INDEX_SUFFIX))
    if not overwrite and path.is_file() and place.is_file():
        found = index.parse(place.read_bytes(), str(place))
        if found.facts["plan"] != plan:
            raise ConfigError(
                f"{path}: was packed from another input or with other settings; name another output or add --overwrite"
            )
        if path.stat().st_size == found.bytes:
            return found
    place.unlink(missing_ok=True)  # it must not stand beside another shard's content
    return None


def _write(shard: ShardWriter, unit: Unit, medium: Medium | None) -> dict[str, Any]:
    value: dict[str, Any] = {"format": SAMPLE_FORMAT, "version": VERSION, "kind": unit.kind, "video_id": unit.video_id}
    value["questions"] = list(unit.questions)
    if unit.subtitles is not None:
        value["subtitles"] = unit.subtitles
    if medium is not None:
        frames = medium.member == "frames"
        placed = shard.append(unit.key, medium.member, medium.content, None if frames else medium.sha256)
        digest = medium.sha256 or placed.sha256
        value |= {**medium.facts, "source": unit.source, "sha256": digest.hex()}
    check_sample(value, unit.source or unit.key, unit.key)
    shard.append(unit.key, "json", dump_json(value))
    return value


def expected_bytes(unit: Unit, root: Path, settings: Settings) -> int:
    """About what a sample takes, known before it is made; for stored frames a guess of 0.3 bytes a pixel."""
    text = len(dump_json([unit.questions, unit.subtitles])) + 2048
    if unit.kind == "video" and settings.frames:
        return text + int(settings.frames * settings.size**2 * 0.3)
    if unit.kind == "text":
        return text
    status = os.stat(path := find_path(root, unit.source))
    if stat.S_ISDIR(status.st_mode):
        return text + sum(path.stat().st_size for path in pictures_in(path))
    return text + status.st_size


def pack(
    found: Sequence[Unit],
    out: str,
    root: Path,
    *,
    settings: Settings = DEFAULTS,
    max_size: int = 1 << 30,
    max_count: int | None = None,
    min_shards: int = 1,
    shuffle: int | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    engine: str = "local",
    workers: int = 1,
    address: str = "auto",
) -> dict[str, Any]:
    """Writes a set of shards, or what is missing of it; returns the manifest.

    Args:
        out: path and name of the set, without number and ending.
        shuffle: seed by which samples are put into another order first; None keeps the order of the files.
    """
    found = list(found)
    in_part = next((unit for unit in found if any(row.get("clip_s") for row in unit.questions)), None)
    if settings.frames and in_part is not None:
        raise ConfigError(
            f"{in_part.source}: questions are about a part of it (clip_s), which frames of the whole do not show; pack "
            "without --frames"
        )
    if shuffle is not None:
        random.Random(f"pack {shuffle}").shuffle(found)
    sizes = [expected_bytes(unit, root, settings) for unit in found]
    parts = plan_shards(sizes, max_size=max_size, max_count=max_count, min_shards=min_shards)
    paths = [f"{out}-{number:06d}.tar" for number in range(len(parts))]
    jobs = []
    for path, part in zip(paths, parts, strict=True):
        chosen, about = tuple(found[part.start : part.stop]), tuple(sizes[part.start : part.stop])
        facts = [list(unit if unit.subtitles is not None else unit[:-1]) for unit in chosen]
        plan = sha256_json([VERSION, planned(settings), skip_bad, list(about), facts])
        jobs.append(Job(path, str(root), chosen, about, settings, skip_bad, overwrite, plan))
    with sets.owned_set(out):
        check_others(out, paths, overwrite)
        entries = run_jobs(pack_shard, jobs, engine=engine, workers=workers, address=address, desc="pack")
        bad = [row for entry in entries for row in entry.pop("left_out")]
        if not sum(entry["samples"] for entry in entries):
            what = f"none of {len(found)} samples can be decoded; first: {bad[0]['error']}"
            raise ShardError(f"{out}: {what}", "undecodable")
        return finish(out, paths, entries, bad, {"settings": asdict(settings)})


def finish(
    out: str, paths: Sequence[str], entries: Sequence[dict[str, Any]], bad: Sequence[dict[str, str]], about: dict
) -> dict[str, Any]:
    """Writes what comes after all shards: the quarantine list, and the manifest last."""
    quarantine = Path(out + QUARANTINE_SUFFIX)
    if bad:
        write_jsonl(quarantine, bad)
    else:
        quarantine.unlink(missing_ok=True)
    return sets.write_manifest(paths[0], entries, {**about, "left_out": len(bad)})[1]


def check_others(out: str, paths: Sequence[str], overwrite: bool) -> None:
    """Shards of this name that this run will not write: of another set.

    A set that is to be replaced loses its manifest first: with it, it would pass for complete.
    """
    name = Path(out).name
    there = {
        path for path in Path(out).parent.glob(f"{glob.escape(name)}-*.tar") if path.stem[len(name) + 1 :].isdigit()
    }
    others = sorted(there - {Path(path) for path in paths})
    if others and not overwrite:
        raise ConfigError(f"{others[0]}: is of another set of this name; name another output or add --overwrite")
    if overwrite:
        Path(sets.manifest_location(paths[0])).unlink(missing_ok=True)
    for path in others:
        Path(beside(str(path), index.INDEX_SUFFIX)).unlink(missing_ok=True)
        path.unlink()


# ---------------------------------------------------------------- command line


def parse_size(text: str) -> int:
    """Bytes of "500MB", "1GB", "64KiB" or a plain number.

    >>> parse_size("1GB"), parse_size("2KiB")
    (1000000000, 2048)
    """
    units_of = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "b": 1, "": 1}
    number = text.strip().rstrip("KMGTkmgtiIbB")
    unit = text.strip()[len(number) :].lower()
    try:
        size = int(float(number) * units_of[unit])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"expected a size like 1GB or 500MB, got {text!r}") from None
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected a size greater than 0, got {text!r}")
    return size


def positive(text: str) -> int:
    return whole(text, 1)


def whole(text: str, least: int = 0) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)


def percent(text: str) -> int:
    if positive(text) > 100:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 100, got {text!r}")
    return int(text)


def above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number greater than 0, got {text!r}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "forms of --from:\n"
        '  annotation   JSON list or JSON lines: {"question_id", "video" or "image", "question", "answer"}, and what\n'
        "               docs/data_format.md names beside\n"
        "  shapes       a folder written by python -m lavis_lstp.data.shapes.shapes_qa\n"
        "  video-llava  rows of conversations about videos, images or nothing (text), as Video-LLaVA has them\n"
        "  qa           a file of questions and one of answers (--answers), joined by question_id\n"
        "  lstp_...     the files of that benchmark's authors\n\n"
        "examples:\n"
        "  python -m webdataset_tools pack shards/train --from annotation train.json --root videos\n"
        "  python -m webdataset_tools pack shards/val --from shapes ~/shapes_qa --split val --max-count 100\n"
        "  python -m webdataset_tools pack shards/iv --from video-llava iv_tune.json nlp_tune.json --root data\n"
        "  python -m webdataset_tools pack shards/msvd --from qa test_q.json --answers test_a.json --root MSVD\n\n"
        "A run that was killed continues when called again, and ends with the same bytes."
    )
    parser.add_argument("out", help="path and name of the set: shards/train gives shards/train-000000.tar, ...")
    parser.add_argument("files", nargs="+", type=Path, help="annotation files; with --from shapes the folder")
    parser.add_argument("--from", dest="form", choices=FORMS, default="annotation", help="default: annotation")
    parser.add_argument("--root", type=Path, help="folder of the media; default: that of the first file")
    parser.add_argument("--split", default="train", help="of --from shapes; default: train")
    parser.add_argument("--answers", type=Path, help="answer file of --from qa, or of a benchmark")
    parser.add_argument("--video-names", type=Path, help="file of other names of a benchmark's videos")
    parser.add_argument("--subtitles", type=Path, metavar="FOLDER", help="pack the videos' subtitles, too")
    add_size_arguments(parser)
    parser.add_argument("--frames", type=whole, default=0, metavar="N", help="store N frames instead of each video")
    parser.add_argument("--fps", type=above_zero, help="as datasets.<name>.fps, for --frames")
    parser.add_argument("--short-videos", choices=("keep", "double"), default="keep", help="for --frames")
    parser.add_argument("--size", type=positive, default=224, help="px, side of stored frames; default: 224")
    parser.add_argument("--encoding", choices=ENCODINGS, default="jpeg", help="of stored frames; default: jpeg")
    parser.add_argument("--quality", type=percent, default=95, help="of stored frames, 1..100; default: 95")
    parser.add_argument("--no-probe", action="store_true", help="do not look into media, not even into headers")
    add_area_argument(parser)
    parser.add_argument("--skip-bad", action="store_true", help="leave out what cannot be opened, and list it")


def add_area_argument(parser: argparse.ArgumentParser) -> None:
    text = f"as datasets.<name>.max_megapixels; default: {DEFAULT_MAX_MEGAPIXELS}"
    parser.add_argument("--max-megapixels", type=above_zero, default=DEFAULT_MAX_MEGAPIXELS, metavar="N", help=text)


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-size", type=parse_size, default="1GB", help="of a shard; default: 1GB")
    parser.add_argument("--max-count", type=positive, help="samples in a shard; default: as many as fit")
    parser.add_argument("--min-shards", type=positive, default=1, help="at least so many shards, e.g. ranks x workers")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="put samples into another order first")
    parser.add_argument("--overwrite", action="store_true", help="replace a set of other input or settings")


def run(args: argparse.Namespace) -> dict[str, Any]:
    root = args.root or (args.files[0].parent if args.form != "shapes" else args.files[0])
    more = {"split": args.split, "answers": args.answers, "video_names": args.video_names, "subtitles": args.subtitles}
    found = units(args.form, args.files, root=root, **more)
    pictures = args.encoding, args.quality
    chosen = (args.frames, args.fps, args.short_videos, args.size, *pictures)
    settings = Settings(*chosen, probe=not args.no_probe, max_megapixels=args.max_megapixels)
    return pack(
        found,
        args.out,
        root,
        settings=settings,
        max_size=args.max_size,
        max_count=args.max_count,
        min_shards=args.min_shards,
        shuffle=args.shuffle,
        skip_bad=args.skip_bad,
        overwrite=args.overwrite,
        **how(args),
    )


def show(report: dict[str, Any], args: argparse.Namespace) -> str:
    totals = report["totals"]
    text = (
        f"{args.out}: {len(report['shards'])} shards, {totals['samples']} samples, {totals['questions']} questions, "
        f"{totals['bytes'] / 1e6:.1f} MB"
    )
    if report["left_out"]:
        text += f"; {report['left_out']} left out, see {args.out}{QUARANTINE_SUFFIX}"
    return text
