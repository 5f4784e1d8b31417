"""The index beside each shard, and the manifest beside a set: a sample's bytes are found without reading others.

    set-000000.tar   set-000000.index   set-000001.tar   set-000001.index   ...   set.manifest.json (written last)

In: what a writer put where, or a scan of a tar. Out: columns of plain arrays in safetensors, about 100 bytes a member,
that are loaded in a millisecond; question n of a shard is found by two look-ups in them.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lavis_lstp.errors import ShardError
from lavis_lstp.files import write_json
from webdataset_tools.format import JSON_LIMIT, MEDIA_MEMBERS, VERSION, check_sample, parse_json, sorted_header
from webdataset_tools.storage import RETRY, Retry, beside, open_scan, open_stream, read_all, read_at
from webdataset_tools.tar import Member, TarScan, samples

logger = logging.getLogger(__name__)

INDEX_FORMAT = "lavis_lstp.shard_index"
MANIFEST_FORMAT = "lavis_lstp.shards"
INDEX_SUFFIX = ".index"
MANIFEST_SUFFIX = ".manifest.json"
UNKNOWN = bytes(32)
"""In place of the SHA-256 of a member that was not read."""
AT_ONCE = 16
"""Shards whose indexes are fetched, or that are scanned, at the same time."""


class Sample(NamedTuple):
    """What the index of a shard says about one sample."""

    key: str
    members: tuple[tuple[str, Member], ...]
    question_ids: tuple[str, ...]
    kind: str
    duration_s: float


class ShardIndex:
    """Samples of one shard by number, their questions by number.

    Args:
        columns: as `columns_of` makes them.
        facts: of the whole shard: bytes, digest, plan.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], facts: Mapping[str, str]):
        self._columns = columns
        self.facts = dict(facts)
        self._names = json.loads(facts["members"])
        self._kinds = json.loads(facts["kinds"])

    @property
    def num_samples(self) -> int:
        return len(self._columns["sample_member_end"])

    @property
    def num_questions(self) -> int:
        return len(self._columns["question_id_end"])

    @property
    def bytes(self) -> int:
        return int(self.facts["bytes"])

    @property
    def digest(self) -> str:
        """SHA-256 over the names, sizes and SHA-256 of all members."""
        return self.facts["digest"]

    def _span(self, column: str, number: int) -> tuple[int, int]:
        ends = self._columns[column]
        return (int(ends[number - 1]) if number else 0), int(ends[number])

    def _text(self, column: str, number: int) -> str:
        start, end = self._span(f"{column}_end", number)
        return self._columns[column][start:end].tobytes().decode("utf-8")

    def key(self, number: int) -> str:
        return self._text("key", number)

    def keys(self) -> list[str]:
        return [self.key(number) for number in range(self.num_samples)]

    def question_ids(self) -> list[str]:
        return [self._text("question_id", number) for number in range(self.num_questions)]

    def count_kinds(self) -> dict[str, int]:
        """Samples of each kind, by its name."""
        counts = np.bincount(self._columns["sample_kind"], minlength=len(self._kinds)).tolist()
        return {kind: count for kind, count in sorted(zip(self._kinds, counts, strict=True)) if count}

    def member_names(self) -> set[str]:
        return {self._names[number] for number in np.unique(self._columns["member_name"]).tolist()}

    def duration_s(self) -> float:
        return sum(self._columns["sample_duration_s"].tolist())

    def members(self, number: int) -> dict[str, Member]:
        """The members of a sample by name, in the order of the file."""
        columns, found, key = self._columns, {}, self.key(number)
        for at in range(*self._span("sample_member_end", number)):
            name = self._names[int(columns["member_name"][at])]
            place = int(columns["member_offset"][at]), int(columns["member_size"][at])
            found[name] = Member(f"{key}.{name}", *place, columns["member_sha256"][at].tobytes())
        return found

    def sample(self, number: int) -> Sample:
        rows = range(*self._span("sample_question_end", number))
        ids = tuple(self._text("question_id", row) for row in rows)
        kind = self._kinds[int(self._columns["sample_kind"][number])]
        duration_s = float(self._columns["sample_duration_s"][number])
        return Sample(self.key(number), tuple(self.members(number).items()), ids, kind, duration_s)

    def samples(self) -> list[Sample]:
        return [self.sample(number) for number in range(self.num_samples)]

    def of_question(self, row: int) -> tuple[int, int]:
        """(sample, question of that sample) of the row-th question of the shard."""
        ends = self._columns["sample_question_end"]
        number = int(np.searchsorted(ends, row, side="right"))
        return number, row - self._span("sample_question_end", number)[0]


def _texts(values: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    raw = [value.encode("utf-8") for value in values]
    ends = np.cumsum([len(value) for value in raw], dtype=np.int64).astype(np.int64)
    return np.frombuffer(b"".join(raw), dtype=np.uint8), ends


def build(found: Sequence[Sample], size: int, plan: str = "") -> ShardIndex:
    """The index of a shard of `size` bytes; `plan` is a digest of what it was to be packed from."""
    names = sorted({name for sample in found for name, _ in sample.members})
    kinds = sorted({sample.kind for sample in found})
    members = [(name, member) for sample in found for name, member in sample.members]
    digest = hashlib.sha256()
    for _, member in members:
        digest.update(f"{member.name}\0{member.size}\0{member.sha256.hex()}\n".encode())
    key, key_end = _texts([sample.key for sample in found])
    ids, ids_end = _texts([name for sample in found for name in sample.question_ids])
    columns = {
        "key": key,
        "key_end": key_end,
        "question_id": ids,
        "question_id_end": ids_end,
        "sample_member_end": np.cumsum([len(sample.members) for sample in found], dtype=np.int64),
        "sample_question_end": np.cumsum([len(sample.question_ids) for sample in found], dtype=np.int64),
        "sample_kind": np.array([kinds.index(sample.kind) for sample in found], np.uint8),
        "sample_duration_s": np.array([sample.duration_s for sample in found], np.float64),
        "member_name": np.array([names.index(name) for name, _ in members], np.uint8),
        "member_offset": np.array([member.offset for _, member in members], np.int64),
        "member_size": np.array([member.size for _, member in members], np.int64),
        "member_sha256": np.frombuffer(b"".join(m.sha256 for _, m in members), np.uint8).reshape(-1, 32),
    }
    facts = {"bytes": str(size), "digest": digest.hexdigest(), "plan": plan}
    return ShardIndex(columns, {**facts, "members": json.dumps(names), "kinds": json.dumps(kinds)})


def dump(index: ShardIndex) -> bytes:
    from safetensors.numpy import save

    facts = {"format": INDEX_FORMAT, "version": str(VERSION), **index.facts}
    return sorted_header(save({name: np.ascontiguousarray(col) for name, col in index._columns.items()}, facts))


def parse(raw: bytes, place: str) -> ShardIndex:
    """Raises ShardError (cause "index") where `raw` is not an index of this version."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        columns = load(raw)
        facts = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise ShardError(f"{place}: not an index ({error}); remove it, or pack again", "index") from None
    if (facts.get("format"), facts.get("version")) != (INDEX_FORMAT, str(VERSION)):
        got = f"{facts.get('format')!r} version {facts.get('version')!r}"
        raise ShardError(f"{place}: expected {INDEX_FORMAT!r} version {VERSION}, got {got}; make it anew", "index")
    try:
        _check_columns(columns, facts)
    except (ValueError, TypeError, KeyError) as error:
        raise ShardError(f"{place}: a damaged index ({error}); remove it, or pack again", "index") from None
    return ShardIndex(columns, facts)


def _check_columns(columns: Mapping[str, np.ndarray], facts: Mapping[str, str]) -> None:
    """Raises ValueError, TypeError or KeyError where columns are not there or do not go together."""
    names, kinds = json.loads(facts["members"]), json.loads(facts["kinds"])
    facts["digest"], facts["plan"], int(facts["bytes"])
    samples, members, questions = (len(columns[name]) for name in ("key_end", "member_offset", "question_id_end"))
    lengths = {"key_end": samples, "question_id_end": questions}
    lengths |= dict.fromkeys(("sample_member_end", "sample_question_end", "sample_kind", "sample_duration_s"), samples)
    lengths |= dict.fromkeys(("member_name", "member_offset", "member_size", "member_sha256"), members)
    for name, length in lengths.items():
        wanted = (length, 32) if name == "member_sha256" else (length,)
        real = name == "sample_duration_s"
        if columns[name].shape != wanted or columns[name].dtype.kind not in ("f" if real else "iu"):
            raise ValueError(f"'{name}' is {columns[name].dtype} {list(columns[name].shape)}, expected {list(wanted)}")
        if not real and length and columns[name].min() < 0:
            raise ValueError(f"'{name}' holds a negative number")
    totals = {"key": len(columns["key"]), "question_id": len(columns["question_id"])}
    for name, total in {**totals, "sample_member": members, "sample_question": questions}.items():
        ends = columns[f"{name}_end"]
        if (np.diff(ends) < 0).any() or (ends[-1] if len(ends) else 0) != total:
            raise ValueError(f"'{name}_end' does not rise to {total}")
        if name in totals and (columns[name][ends[:-1][ends[:-1] < total]] & 0xC0 == 0x80).any():
            raise ValueError(f"'{name}_end' cuts a letter")
    for name, known in (("member_name", names), ("sample_kind", kinds)):
        if len(columns[name]) and columns[name].max() >= len(known):
            raise ValueError(f"'{name}' holds a number without a name")
    for name in totals:
        columns[name].tobytes().decode("utf-8")


def write(index: ShardIndex, shard: str | os.PathLike) -> Path:
    """Writes the index beside its shard, complete or not at all."""
    path = Path(beside(os.fspath(shard), INDEX_SUFFIX))
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(dump(index))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def sample_of(key: str, members: Mapping[str, Member], value: Mapping[str, Any] | None) -> Sample:
    """What the index keeps of a sample whose json is `value`, None in a shard of flow or spans alone."""
    value = value or {"questions": []}
    ids = tuple(row["question_id"] for row in value["questions"])
    kind = value.get("kind", "none")
    return Sample(key, tuple(members.items()), ids, kind, float(value.get("duration_s", 0.0)))


def scan(location: str, retry: Retry = RETRY, *, quick: bool = False) -> ShardIndex:
    """The index of a shard that has none.

    Args:
        quick: read headers and JSON and skip the rest, which over HTTP is about one request of 16 KiB a sample; a
            medium's SHA-256 is then the one that its JSON states, and that of frames, flow and spans is UNKNOWN. Else
            all of it is read.

    Raises:
        ShardError: the tar is damaged, or a sample's json is not of the form.
    """
    found, size = [], 0
    with (open_scan if quick else open_stream)(location, retry) as stream:
        tar = TarScan(stream, location)
        for key, group in samples(tar):
            members, value = {}, None
            for name, member in group:
                digest = UNKNOWN
                if name == "json":
                    raw = tar.content(JSON_LIMIT)
                    value = parse_json(raw, f"{location}, {member.name}")
                    check_sample(value, f"{location}, {member.name}", key)
                    digest = hashlib.sha256(raw).digest()
                elif not quick:
                    digest = _digest(tar)
                members[name] = member._replace(sha256=digest)
                size = member.offset + member.size
            for name in members.keys() & set(MEDIA_MEMBERS) if quick and value and "sha256" in value else ():
                members[name] = members[name]._replace(sha256=bytes.fromhex(value["sha256"]))
            found.append(sample_of(key, members, value))
    return build(found, size + -size % 512 + 1024)


def _digest(tar: TarScan) -> bytes:
    digest = hashlib.sha256()
    for block in tar.blocks():
        digest.update(block)
    return digest.digest()


# ---------------------------------------------------------------- sets


def manifest_location(shard: str) -> str:
    """The manifest of the set that a shard belongs to: its name without number."""
    named = re.sub(r"(-\d+)?\.tar(?=$|\?)", MANIFEST_SUFFIX, shard)
    return named if named != shard else shard + MANIFEST_SUFFIX


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
    write_json(path, content)
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

    def question_ids(self) -> list[str]:
        return [name for shard in range(len(self.shards)) for name in self.index(shard).question_ids()]

    def kinds(self) -> set[str]:
        return {kind for entry in self.entries for kind in entry["kinds"]}

    def digest(self) -> str:
        """SHA-256 of all content."""
        return hashlib.sha256("\n".join(entry["digest"] for entry in self.entries).encode()).hexdigest()

    def read(self, shard: int, sample: int, names: Sequence[str]) -> dict[str, bytes]:
        """The members of a sample that are asked for and there; those that lie together come in one read.

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
            data = read_at(location, start, end - start, self.retry)
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
