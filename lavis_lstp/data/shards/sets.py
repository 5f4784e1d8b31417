"""Sets of shards: the manifest beside a set, and the questions of its shards by number, each read by itself.

In: locations, as `storage.expand` gives them. Out: `ShardSet`, which reads an index when its shard is first needed, and
of a shard no more than the members that are asked for. The manifest is written last; with it no index is read to begin.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lavis_lstp.data.shards.format import JSON_LIMIT, MEDIA_MEMBERS, VERSION, parse_json
from lavis_lstp.data.shards.index import INDEX_SUFFIX, UNKNOWN, ShardIndex, parse, scan
from lavis_lstp.data.shards.storage import RETRY, Retry, beside, read_all, read_at
from lavis_lstp.data.shards.tar import CONTENT_LIMIT, Member
from lavis_lstp.errors import ShardError
from lavis_lstp.files import owned, write_json
from lavis_lstp.redaction import without_secrets_in

logger = logging.getLogger(__name__)

MANIFEST_FORMAT = "lavis_lstp.shards"
MANIFEST_SUFFIX = ".manifest.json"
Read = Callable[[str, int, int, Retry], bytes]
AT_ONCE = 16
"""Shards whose indexes are fetched, or that are scanned, at the same time."""


def manifest_location(shard: str) -> str:
    """The manifest of the set that a shard belongs to: its name without number."""
    named = re.sub(r"(-\d+)?\.tar(?=$|\?)", MANIFEST_SUFFIX, shard)
    return named if named != shard else shard + MANIFEST_SUFFIX


@contextlib.contextmanager
def owned_set(out: str | os.PathLike) -> Iterator[None]:
    """Let no other process write the set `out`, and remove what killed ones left of it; see `files.owned`."""
    parts = re.compile(rf"{re.escape(Path(out).name)}(-\d{{6,}}\.(tar|index)|\.manifest\.json|\.quarantine\.jsonl)?")
    with owned(out, beside=True, leftovers=lambda name: bool(parts.fullmatch(name))):
        yield


def shard_entry(name: str, index: ShardIndex) -> dict[str, Any]:
    """A shard's line in the manifest."""
    return {
        "name": name,
        "bytes": index.bytes,
        "digest": index.digest,
        "samples": index.num_samples,
        "questions": index.num_questions,
        "kinds": index.count_kinds(),
        "members": sorted(index.member_names()),
        "duration_s": round(index.duration_s(), 3),
    }


def write_manifest(first_shard: str | os.PathLike, entries: Iterable[Mapping[str, Any]], about: Mapping[str, Any]):
    """Writes a set's manifest, the last of its files; returns its path and content."""
    entries = list(entries)
    totals = {key: sum(entry[key] for entry in entries) for key in ("bytes", "samples", "questions")}
    totals["duration_s"] = round(sum(entry["duration_s"] for entry in entries), 3)
    content = {"format": MANIFEST_FORMAT, "version": VERSION, **about, "totals": totals, "shards": entries}
    path = Path(manifest_location(os.fspath(first_shard)))
    write_json(path, without_secrets_in(content))
    return path, content


def read_manifest(location: str, retry: Retry = RETRY) -> dict[str, Any]:
    """Raises ShardError where there is none (cause "not found"), or it is not of this version."""
    value = parse_json(read_all(location, retry), location)
    if (value.get("format"), value.get("version")) != (MANIFEST_FORMAT, VERSION):
        got = f"{value.get('format')!r} version {value.get('version')!r}"
        raise ShardError(f"{location}: expected {MANIFEST_FORMAT!r} version {VERSION}, got {got}", "index")
    if not isinstance(value.get("shards"), list):
        raise ShardError(f"{location}: 'shards' must be a list", "index")
    for number, entry in enumerate(value["shards"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ShardError(f"{location}: shard {number} must be an object with a 'name'", "index")
    return value


class ShardSet:
    """Questions of a list of shards by number, each read by itself.

    Args:
        shards: locations, as `storage.expand` gives them. Their indexes lie beside them; a shard without one is
            scanned here, once.
        check: compare what is read with its SHA-256.
        quick: how shards are scanned, see `scan`.
    """

    def __init__(self, shards: Sequence[str], *, retry: Retry = RETRY, check: bool = True, quick: bool = False):
        self.shards = list(shards)
        self.retry = retry
        self.check = check
        self.quick = quick
        self._scanned: dict[int, ShardIndex] = {}  # goes along to other processes, where indexes are read again
        self._load = functools.lru_cache(maxsize=None)(self._index)
        self.entries = self._entries()
        counts = np.array([entry["questions"] for entry in self.entries], dtype=np.int64)
        self.ends = np.cumsum(counts).tolist()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_load": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load = functools.lru_cache(maxsize=None)(self._index)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def _entries(self) -> list[dict[str, Any]]:
        """A line of a manifest for each shard: from manifests where there are, else from indexes."""
        known: dict[str, dict[str, Any]] = {}
        for location in sorted({manifest_location(shard) for shard in self.shards if not shard.startswith("pipe:")}):
            try:
                entries = read_manifest(location, self.retry)["shards"]
            except ShardError as error:
                if error.cause != "not found":
                    raise
                continue
            folder = location[: location.rfind("/") + 1]
            known.update({folder + entry["name"]: entry for entry in entries})
        kinds = {"digest": str, "samples": int, "questions": int, "kinds": dict}
        for shard in self.shards:
            if shard in known and any(type(known[shard].get(name)) is not kind for name, kind in kinds.items()):
                said = f"{manifest_location(shard)}: says not all of {', '.join(kinds)} of {shard}; remove it"
                raise ShardError(said, "index")
        missing = [n for n, shard in enumerate(self.shards) if shard not in known]
        if missing:
            with ThreadPoolExecutor(min(AT_ONCE, len(missing))) as pool:
                list(pool.map(self.index, missing))
        derived = set().union(*(one.member_names() for one in self._scanned.values())) - {"json", *MEDIA_MEMBERS}
        if self.quick and self.check and derived:
            names = ", ".join(sorted(derived))
            logger.warning("%s: no index, so %s cannot be compared with a SHA-256", self.shards[missing[0]], names)
        return [known.get(shard) or shard_entry(shard, self.index(n)) for n, shard in enumerate(self.shards)]

    def index(self, shard: int) -> ShardIndex:
        return self._load(shard)

    def _index(self, shard: int) -> ShardIndex:
        location = self.shards[shard]
        if shard in self._scanned:
            return self._scanned[shard]
        if not location.startswith("pipe:"):
            place = beside(location, INDEX_SUFFIX)
            try:
                return parse(read_all(place, self.retry), place)
            except ShardError as error:
                if error.cause != "not found":
                    raise
        self._scanned[shard] = scan(location, self.retry, quick=self.quick)
        return self._scanned[shard]

    def locate(self, question: int) -> tuple[int, int, int]:
        """(shard, sample, question of the sample)."""
        shard = bisect.bisect_right(self.ends, question)
        before = self.ends[shard - 1] if shard else 0
        return shard, *self.index(shard).of_question(question - before)

    def load_indexes(self) -> None:
        """Fetch the indexes of all shards, several at a time: one after the other, each is a round trip."""
        with ThreadPoolExecutor(min(AT_ONCE, len(self.shards))) as pool:
            list(pool.map(self.index, range(len(self.shards))))

    def question_ids(self) -> list[str]:
        self.load_indexes()
        return [name for shard in range(len(self.shards)) for name in self.index(shard).question_ids()]

    def kinds(self) -> set[str]:
        return {kind for entry in self.entries for kind in entry["kinds"]}

    def digest(self) -> str:
        """SHA-256 of all content."""
        return hashlib.sha256("\n".join(entry["digest"] for entry in self.entries).encode()).hexdigest()

    def read(self, shard: int, sample: int, names: Sequence[str], by: Read = read_at) -> dict[str, bytes]:
        """The members of a sample that are asked for and there; those that lie together come in one read.

        Args:
            by: what reads them: `read_at`, or `ForwardReader.read_at` of this shard.

        Raises:
            ShardError: they cannot be read, or are not what the index says.
        """
        location, members = self.shards[shard], self.index(shard).members(sample)
        wanted = [(name, members[name]) for name in members if name in names]
        for name, member in wanted:
            if name.endswith("json") and member.size > JSON_LIMIT:
                text = f"{member.size} bytes of JSON, at most {JSON_LIMIT} are read"
                raise ShardError(f"{location}, {member.name}: {text}", "json too large")
        content: dict[str, bytes] = {}
        for run in _runs(wanted):
            start, end = run[0][1].offset, run[-1][1].offset + run[-1][1].size
            if end - start > CONTENT_LIMIT:
                text = f"{end - start} bytes of one sample, at most {CONTENT_LIMIT} are read at once"
                raise ShardError(f"{location}, {run[0][1].name}: {text}", "member too large")
            data = by(location, start, end - start, self.retry)
            for name, member in run:
                content[name] = data[member.offset - start : member.offset - start + member.size]
        if self.check:
            for name, raw in content.items():
                if members[name].sha256 not in (UNKNOWN, hashlib.sha256(raw).digest()):
                    raise ShardError(f"{location}, {members[name].name}: its SHA-256 is not the index's", "hash")
        return content

    def read_json(self, shard: int, sample: int) -> dict[str, Any]:
        place = f"{self.shards[shard]}, {self.index(shard).key(sample)}.json"
        content = self.read(shard, sample, ("json",))
        if "json" not in content:
            raise ShardError(f"{place}: there is none; is it a shard of flow or spans alone?", "missing member")
        return parse_json(content["json"], place)


def _runs(wanted: Sequence[tuple[str, Member]], gap: int = 8192) -> list[list[tuple[str, Member]]]:
    """Members that lie together, with at most `gap` bytes between."""
    runs: list[list[tuple[str, Member]]] = []
    for name, member in wanted:
        if runs and member.offset - (runs[-1][-1][1].offset + runs[-1][-1][1].size) <= gap:
            runs[-1].append((name, member))
        else:
            runs.append([(name, member)])
    return runs
