"""The index beside each shard: a sample's bytes are found without reading others.

    set-000000.tar   set-000000.index   set-000001.tar   set-000001.index   ...   set.manifest.json (see `sets`)

In: what a writer put where, or a scan of a tar. Out: columns of plain arrays in safetensors, about 100 bytes a member,
that are loaded in a millisecond; question n of a shard is found by two look-ups in them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lavis_lstp.data.annotation import MOST_SECONDS
from lavis_lstp.data.shards.format import (
    JSON_LIMIT,
    MEDIA_MEMBERS,
    VERSION,
    check_sample,
    load_tensors,
    parse_json,
)
from lavis_lstp.data.shards.storage import RETRY, Retry, beside, open_scan, open_stream
from lavis_lstp.data.shards.tar import Member, TarScan, samples
from lavis_lstp.errors import ShardError
from lavis_lstp.files import sorted_header, whole_file

INDEX_FORMAT = "lavis_lstp.shard_index"
INDEX_SUFFIX = ".index"
UNKNOWN = bytes(32)
"""In place of the SHA-256 of a member that was not read."""


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

    def _texts_of(self, column: str) -> list[str]:
        """All texts of a column, in one go."""
        raw, start, found = self._columns[column].tobytes(), 0, []
        for end in self._columns[f"{column}_end"].tolist():
            found.append(raw[start:end].decode("utf-8"))
            start = end
        return found

    def key(self, number: int) -> str:
        return self._text("key", number)

    def keys(self) -> list[str]:
        return self._texts_of("key")

    def question_ids(self) -> list[str]:
        return self._texts_of("question_id")

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
        columns = {name: column.tolist() for name, column in self._columns.items() if column.ndim == 1}
        digests = self._columns["member_sha256"].tobytes()
        ids, found, member, question = self.question_ids(), [], 0, 0
        ends = zip(columns["sample_member_end"], columns["sample_question_end"], strict=True)
        for number, (key, (last, after)) in enumerate(zip(self.keys(), ends, strict=True)):
            members = {}
            for at in range(member, last):
                name = self._names[columns["member_name"][at]]
                place = columns["member_offset"][at], columns["member_size"][at]
                members[name] = Member(f"{key}.{name}", *place, digests[32 * at : 32 * at + 32])
            kind = self._kinds[columns["sample_kind"][number]]
            duration_s = columns["sample_duration_s"][number]
            found.append(Sample(key, tuple(members.items()), tuple(ids[question:after]), kind, duration_s))
            member, question = last, after
        return found

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
    try:
        columns, _, facts = load_tensors(raw)
    except ValueError as error:
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
        if length and not (columns[name].min() >= 0 and (not real or columns[name].max() <= MOST_SECONDS)):
            raise ValueError(f"'{name}' holds a number that is negative or none")
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
    with whole_file(path) as partial:
        partial.write_bytes(dump(index))
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
