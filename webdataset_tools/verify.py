"""`verify`: says whether shards are whole, and what is wrong with which sample.

Checked are the tars' structure, names, every sample's JSON and the SHA-256 of its medium, that pictures, frames and
videos can be decoded, that index and manifest say what the tars hold, that no key and no question id occurs twice, and
with --against that no medium or text of other splits is among them. Exit status 1, with a table of causes, where
anything is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_lstp.data.pictures import DEFAULT_MAX_MEGAPIXELS, open_picture
from lavis_lstp.data.shards import index, sets
from lavis_lstp.data.shards.format import (
    IMAGE_MEMBERS,
    JSON_LIMIT,
    MEDIA_MEMBERS,
    VIDEO_MEMBERS,
    check_sample,
    dump_json,
    parse_flow,
    parse_frames,
    parse_json,
)
from lavis_lstp.data.shards.storage import RETRY, Retry, beside, can_seek, expand, open_stream, read_all, read_at
from lavis_lstp.data.shards.tar import Member, TarScan, samples
from lavis_lstp.errors import LstpError, ShardError
from lavis_lstp.files import no_collection
from lavis_lstp.jobs import how, run_jobs
from webdataset_tools.pack import add_area_argument, whole

HELP = "check shards; exit status 1 and a table of causes where something is wrong"


@dataclass(frozen=True)
class Job:
    """One shard to check.

    Attributes:
        decode: frames of each video that are decoded, 0 = none, also no picture.
        max_megapixels: pictures and videos of a larger area, in millions of pixels, are problems.
    """

    location: str
    decode: int
    retry: Retry
    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS


def check_shard(job: Job) -> dict[str, Any]:
    """What is in a shard and what is wrong with it.

    Returns: "problems", a list of {shard, key, cause, error} (key "" for the shard itself), "samples", a list of
        [key, kind, digest of the content, question ids, members] of the samples that are sound.
    """
    with no_collection():
        return _Checker(job).run()


class _Checker:
    def __init__(self, job: Job):
        self.job = job
        self.problems: list[dict[str, str]] = []
        self.sound: list[list[Any]] = []
        self.seen: dict[str, dict[str, Member]] = {}
        self.end = 0

    def problem(self, key: str, cause: str, error: str) -> None:
        self.problems.append({"shard": self.job.location, "key": key, "cause": cause, "error": error})

    def run(self) -> dict[str, Any]:
        found = self._index()
        whole = self._scan()
        if found is not None:
            self._compare(found, whole)
        return {"shard": self.job.location, "problems": self.problems, "samples": self.sound}

    def _index(self) -> index.ShardIndex | None:
        if not can_seek(self.job.location):
            return None
        place = beside(self.job.location, index.INDEX_SUFFIX)
        try:
            return index.parse(read_all(place, self.job.retry), place)
        except ShardError as error:
            cause = "no index" if error.cause == "not found" else "index"
            self.problem("", cause, str(error))
            return None

    def _scan(self) -> bool:
        """Reads the shard once from beginning to end; False where it breaks off."""
        name = self.job.location
        try:
            with open_stream(name, self.job.retry) as stream:
                tar = TarScan(stream, name)
                for key, group in samples(tar):
                    self._sample(tar, key, group)
        except ShardError as error:
            self.problem("", error.cause, str(error))
            return False
        return True

    def _sample(self, tar: TarScan, key: str, group: Iterator[tuple[str, Member]]) -> None:
        """Reads and checks one; also the last before a place where the tar is damaged."""
        members, content, reason = {}, {}, None
        inside = False
        try:
            for member, place in group:
                inside = True
                try:
                    raw = tar.content(JSON_LIMIT if member.endswith("json") else None)
                    members[member] = place._replace(sha256=hashlib.sha256(raw).digest())
                    content[member] = raw
                    self.end = place.offset + place.size
                except ShardError as error:
                    if error.cause != "json too large":
                        raise
                    reason = error
                inside = False
        except ShardError as error:
            if not inside and error.cause != "duplicate member" and "json" in members:
                self._take(key, members, content, reason)  # what is damaged comes after its last member
            raise
        self._take(key, members, content, reason)

    def _take(self, key: str, members: dict[str, Member], content: Mapping[str, bytes], reason=None) -> None:
        if key in self.seen:
            self.problem(key, "duplicate key", f"{self.job.location}: key {key!r} occurs twice")
        self.seen[key] = members
        try:
            if reason is not None:
                raise reason
            facts = check_content(key, content, f"{self.job.location}, {key}", self.job.decode, self.job.max_megapixels)
            self.sound.append([key, *facts, list(members.values())])
        except LstpError as error:
            self.problem(key, getattr(error, "cause", "undecodable"), str(error))

    def _compare(self, found: index.ShardIndex, whole: bool) -> None:
        """The index against the tar; samples that a break hid are read where the index says they lie."""
        name = self.job.location
        for sample in found.samples():
            members = dict(sample.members)
            if sample.key in self.seen:
                mine = self.seen[sample.key]
                if mine != members and not any(row["key"] == sample.key for row in self.problems):
                    places = [{part: m[:3] for part, m in side.items()} for side in (mine, members)]
                    cause = "hash" if places[0] == places[1] else "index"  # bytes have changed, or the index is another
                    self.problem(sample.key, cause, f"{name}, {sample.key}: is not what the index says")
                continue
            if whole:
                self.problem(sample.key, "index", f"{name}: {sample.key!r} is in the index, not in the tar")
                continue
            try:
                content = {part: self._at(place) for part, place in members.items()}
            except ShardError as error:
                self.problem(sample.key, error.cause, str(error))
                continue
            self._take(sample.key, members, content)
        for key in self.seen.keys() - set(found.keys()):
            self.problem(key, "index", f"{name}: {key!r} is in the tar, not in the index")
        if whole and not self.problems and found.bytes != self.end + -self.end % 512 + 1024:
            self.problem("", "index", f"{name}: the index says {found.bytes} bytes")

    def _at(self, place: Member) -> bytes:
        raw = read_at(self.job.location, place.offset, place.size, self.job.retry)
        if hashlib.sha256(raw).digest() != place.sha256:
            raise ShardError(f"{self.job.location}, {place.name}: its SHA-256 is not the index's", "hash")
        return raw


def check_content(
    key: str, content: Mapping[str, bytes], place: str, decode: int, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS
) -> tuple[str, str, list[str]]:
    """Kind, digest of medium or text, and question ids of a sample.

    Raises:
        ShardError, VideoError: what is wrong with it.
    """
    if "json" not in content:
        if set(content) <= {"flow", "span.json"}:  # of a parallel set
            check_derived(content, place)
            return "none", "", []
        raise ShardError(f"{place}: has no json; it has {', '.join(content)}", "missing member")
    value = parse_json(content["json"], f"{place}.json")
    check_sample(value, f"{place}.json", key)
    kind, ids = value["kind"], [row["question_id"] for row in value["questions"]]
    media = [name for name in content if name in MEDIA_MEMBERS]
    expected = {"video": VIDEO_MEMBERS, "image": IMAGE_MEMBERS, "text": ()}[kind]
    if kind == "text":
        rows = [{k: v for k, v in row.items() if k != "question_id"} for row in value["questions"]]
        digest = hashlib.sha256(dump_json(rows)).hexdigest()
    else:
        digest = value["sha256"]
        if len(media) + ("frames" in content) != 1:
            raise ShardError(f"{place}: expected one {kind}, it has {', '.join(content)}", "missing member")
    if any(name not in expected for name in media):
        raise ShardError(f"{place}: is a {kind}, but has {', '.join(media)}", "schema")
    for name in media:
        if hashlib.sha256(content[name]).hexdigest() != digest:
            raise ShardError(f"{place}.{name}: its SHA-256 is not that of its json", "hash")
        if decode:
            check_decodable(kind, content[name], f"{place}.{name}", decode, max_megapixels)
    check_derived(content, place, decode, digest, max_megapixels)
    return kind, digest, ids


def check_derived(
    content: Mapping[str, bytes],
    place: str,
    decode: int | None = None,
    digest: str = "",
    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS,
) -> None:
    """Raises ShardError or VideoError where frames, flow or spans are not of their form, or frames not of `digest`."""
    count = None
    if "frames" in content:
        frames = parse_frames(content["frames"], f"{place}.frames")
        count = None if frames.folder else len(frames.pictures)
        if frames.folder and hashlib.sha256(b"".join(frames.pictures)).hexdigest() != digest:
            raise ShardError(f"{place}.frames: the SHA-256 of its pictures is not that of its json", "hash")
        for number, picture in enumerate(frames.pictures if decode else ()):
            check_decodable("image", picture, f"{place}.frames, {number}", 1, max_megapixels)
    if "flow" in content:
        flow, _ = parse_flow(content["flow"], f"{place}.flow")
        if count not in (None, len(flow)):
            raise ShardError(f"{place}.flow: {len(flow)} fields for {count} frames", "flow")
    if "span.json" in content:
        parse_json(content["span.json"], f"{place}.span.json")


def check_decodable(
    kind: str, raw: bytes | Path, place: str, decode: int, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS
) -> None:
    """Raises VideoError where `decode` frames of a video, or a picture, cannot be decoded."""
    from lavis_lstp.data.video.reading import read_frames

    if kind == "video":
        read_frames(raw, num=decode, size=64, name=place, max_megapixels=max_megapixels)
        return
    open_picture(raw, place, max_megapixels=max_megapixels)


def verify(
    shards: Sequence[str],
    against: Sequence[str] = (),
    *,
    decode: int = 8,
    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS,
    retry: Retry = RETRY,
    engine: str = "local",
    workers: int = 1,
    address: str = "auto",
) -> dict[str, Any]:
    """Checks a set.

    Args:
        against: shards of other splits, which are only asked for what they hold.

    Returns: failed, shards, samples, questions, causes (cause -> count), problems, notes.
    """
    looking = {"decode": decode, "max_megapixels": max_megapixels, "retry": retry}
    problems, sound = examine(shards, against, **looking, engine=engine, workers=workers, address=address)
    same = Counter(digest for _, _, kind, digest, *_ in sound if kind in ("video", "image"))
    twice = sum(count - 1 for count in same.values() if count > 1)
    return {
        "failed": bool(problems),
        "shards": len(shards),
        "samples": len(sound),
        "questions": sum(len(row[4]) for row in sound),
        "causes": dict(Counter(row["cause"] for row in problems).most_common()),
        "problems": problems,
        "notes": [f"{twice} media have the same bytes as another one"] if twice else [],
    }


def examine(
    shards: Sequence[str],
    against: Sequence[str],
    *,
    decode: int,
    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS,
    retry: Retry = RETRY,
    **how: Any,
) -> tuple[list[dict[str, str]], list[tuple]]:
    """Everything wrong with a set, and (shard, key, kind, digest, question ids, members) of each sound sample."""
    jobs = [Job(location, decode, retry, max_megapixels) for location in shards]
    results = run_jobs(check_shard, jobs, desc="verify", **how)
    problems = [row for result in results for row in result["problems"]]
    sound = [(result["shard"], *row) for result in results for row in result["samples"]]
    problems += _duplicates(sound)
    if against:
        results = run_jobs(check_shard, [Job(location, 0, retry) for location in against], desc="against", **how)
        problems += _leaks(sound, [(result["shard"], *row) for result in results for row in result["samples"]])
    problems += _manifests(shards, retry, {row["shard"] for row in problems})
    return problems, sound


def _duplicates(sound: Sequence[tuple]) -> Iterator[dict[str, str]]:
    keys: dict[str, str] = {}
    ids: dict[tuple[str, str], str] = {}
    for shard, key, kind, _, questions, _ in sound:
        if keys.setdefault(key, shard) != shard:
            yield problem_row(shard, key, "duplicate key", f"{shard}: key {key!r} is also in {keys[key]}")
            continue
        for name in questions:
            if ids.setdefault((kind, name), key) != key:
                text = f"{shard}: question {name!r} of {key!r} is also one of {ids[kind, name]!r}"
                yield problem_row(shard, key, "duplicate question", text)


def _leaks(sound: Sequence[tuple], others: Sequence[tuple]) -> Iterator[dict[str, str]]:
    elsewhere = {(kind, digest): f"{shard}, {key}" for shard, key, kind, digest, *_ in others if digest}
    for shard, key, kind, digest, *_ in sound:
        if (kind, digest) in elsewhere:
            yield problem_row(
                shard, key, "leak", f"{shard}: the {kind} of {key!r} is also in {elsewhere[kind, digest]}"
            )


def _manifests(shards: Sequence[str], retry: Retry, damaged: set[str]) -> Iterator[dict[str, str]]:
    """Manifests against the indexes of shards that are sound themselves."""
    for place in sorted({sets.manifest_location(shard) for shard in shards if can_seek(shard)}):
        try:
            entries = {entry["name"]: entry for entry in sets.read_manifest(place, retry)["shards"]}
        except ShardError as error:
            yield problem_row(place, "", "no manifest" if error.cause == "not found" else error.cause, str(error))
            continue
        mine = [shard for shard in shards if can_seek(shard) and sets.manifest_location(shard) == place]
        for shard in mine:
            name = shard[shard.rfind("/") + 1 :]
            if name not in entries:
                yield problem_row(shard, "", "manifest", f"{shard}: the manifest {place} does not name it")
            elif shard not in damaged:
                raw = read_all(beside(shard, index.INDEX_SUFFIX), retry)
                if sets.shard_entry(name, index.parse(raw, shard)) != entries[name]:
                    yield problem_row(shard, "", "manifest", f"{shard}: is not what the manifest {place} says")
        names = {shard[shard.rfind("/") + 1 :] for shard in mine}
        for name in sorted(entries.keys() - names) if len(mine) > 1 or len(entries) == 1 else ():
            yield problem_row(place, "", "missing shard", f"{place}: names {name}, which was not given")


def problem_row(shard: str, key: str, cause: str, error: str) -> dict[str, str]:
    """A line of a report, and of a quarantine list."""
    return {"shard": shard, "key": key, "cause": cause, "error": error}


# ---------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "example: python -m webdataset_tools verify 'shards/train-{000000..000123}.tar' --against val-000000.tar"
    )
    parser.add_argument("shards", nargs="+", help="paths or addresses of shards, braces allowed; pipe:COMMAND, too")
    add_check_arguments(parser)


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """What decides what counts as wrong, here and in `repair`."""
    parser.add_argument("--against", nargs="+", default=(), help="shards of other splits: nothing may be in both")
    text = "frames decoded of each video; 0 = decode nothing; default: 8"
    parser.add_argument("--decode", type=whole, default=8, help=text)
    add_area_argument(parser)


def checks(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the command line -> those of `verify` and `repair`."""
    looking = {"decode": args.decode, "max_megapixels": args.max_megapixels}
    return {"against": expand(args.against) if args.against else (), **looking, **how(args)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    return verify(expand(args.shards), **checks(args))


def show(report: dict[str, Any], args: argparse.Namespace) -> str:
    counted = f"{report['shards']} shards, {report['samples']} sound samples, {report['questions']} questions"
    lines = [*report["notes"]]
    if not report["failed"]:
        return "\n".join([f"whole: {counted}", *lines])
    width = max(map(len, report["causes"])) + 2
    lines.append(f"{'cause':<{width}}{'count':>6}  first")
    for cause, count in report["causes"].items():
        first = next(row["error"] for row in report["problems"] if row["cause"] == cause)
        lines.append(f"{cause:<{width}}{count:>6}  {first}")
    return "\n".join([f"NOT whole: {counted}", *lines])
