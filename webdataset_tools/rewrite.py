"""Samples of some shards -> shards with other samples, members or sizes; no medium is decoded.

In: where each sample's members lie. Out: a new set, complete shards that a continued run finds again. `reshard`,
`repair`, `flow` and `spans` differ in what they hand in here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lavis_lstp.data.shards import index, sets
from lavis_lstp.data.shards.format import parse_json
from lavis_lstp.data.shards.storage import read_at
from lavis_lstp.data.shards.tar import Member, ShardWriter
from lavis_lstp.errors import ShardError
from lavis_lstp.files import sha256_json
from lavis_lstp.jobs import run_jobs
from webdataset_tools.media import Settings, load
from webdataset_tools.pack import check_others, finish, finished
from webdataset_tools.sources import Unit


class Kept(NamedTuple):
    """A sample of the new set: members of one key, each with the shard it lies in."""

    key: str
    members: tuple[tuple[str, Member], ...]

    @property
    def size(self) -> int:
        return sum(member.size + 1024 for _, member in self.members)

    def identity(self) -> list[Any]:
        return [self.key, [[member.name, member.sha256.hex()] for _, member in self.members]]


class Again(NamedTuple):
    """A sample whose medium is fetched again from a folder; its other members are as they were."""

    kept: Kept
    unit: Unit
    settings: Settings

    @property
    def key(self) -> str:
        return self.kept.key

    def identity(self) -> list[Any]:
        return [*self.kept.identity(), asdict(self.settings)]


@dataclass(frozen=True)
class Job:
    """One shard to write; media of `Again` lie in `root`."""

    path: str
    items: tuple[Kept | Again, ...]
    root: str
    overwrite: bool
    plan: str


def read_member(location: str, member: Member) -> bytes:
    """Raises ShardError where it is not what the index said."""
    raw = read_at(location, member.offset, member.size)
    if hashlib.sha256(raw).digest() != member.sha256:
        raise ShardError(f"{location}, {member.name}: its SHA-256 is not the index's", "hash")
    return raw


def rewrite_shard(job: Job) -> dict[str, Any]:
    """Writes one shard and its index, unless they are there; returns its line of the manifest."""
    path = Path(job.path)
    found = finished(path, job.plan, job.overwrite)
    if found is None:
        samples = []
        with ShardWriter(path) as shard:
            for item in job.items:
                kept = item.kept if isinstance(item, Again) else item
                content = {m.name.partition(".")[2]: read_member(place, m) for place, m in kept.members}
                value = parse_json(content["json"], f"{item.key}.json") if "json" in content else None
                if isinstance(item, Again):
                    medium = load(item.unit, Path(job.root), item.settings)
                    content[medium.member] = medium.content
                shard.add(item.key, content)
                key, members = shard.samples[-1]
                samples.append(index.sample_of(key, {m.name.partition(".")[2]: m for m in members}, value))
        found = index.build(samples, shard.bytes, job.plan)
        index.write(found, path)
    return sets.shard_entry(path.name, found)


def rewrite(
    shards: Sequence[Sequence[Kept | Again]],
    out: str,
    *,
    about: dict[str, Any],
    bad: Sequence[dict[str, str]] = (),
    root: str = "",
    overwrite: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """Writes a set whose shards hold these samples; returns its manifest."""
    paths = [f"{out}-{number:06d}.tar" for number in range(len(shards))]
    jobs = []
    for path, items in zip(paths, shards, strict=True):
        identity = [item.identity() for item in items]
        jobs.append(Job(path, tuple(items), root, overwrite, sha256_json([about, identity])))
    with sets.owned_set(out):
        check_others(out, paths, overwrite)
        entries = run_jobs(rewrite_shard, jobs, desc=Path(out).name, **how)
        return finish(out, paths, entries, bad, about)


def kept_samples(shards: Sequence[str], drop: Sequence[str] = ()) -> list[Kept]:
    """All samples of a set, in order, without some members."""
    found = sets.ShardSet(shards)
    samples = []
    for number, location in enumerate(found.shards):
        for one in found.index(number).samples():
            members = tuple((location, member) for name, member in one.members if name not in drop)
            if members:
                samples.append(Kept(one.key, members))
    return samples


def about(verb: str, **facts: Any) -> dict[str, Any]:
    """What the manifest of a rewritten set says about how it was made."""
    return {"made_by": json.loads(json.dumps({"verb": verb, **facts}))}
