"""A parallel set: for each sample of some shards one member, in the same order, so that video need not be touched.

In: shards, and a module-level function that makes the member of a sample. Out: OUT-000000.tar, ... with the same keys;
`reshard --join` makes one set of both, the loader takes them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_lstp.data.shards import index, sets
from lavis_lstp.data.shards.tar import ShardWriter
from lavis_lstp.files import sha256_json
from lavis_lstp.jobs import run_jobs
from webdataset_tools.pack import check_others, finish, finished


@dataclass(frozen=True)
class Job:
    """One shard of the parallel set.

    Attributes:
        make: (json of the sample, reader of its other members, its name, settings) -> bytes of the new member.
    """

    path: str
    location: str
    member: str
    make: Callable[..., bytes]
    settings: Any
    overwrite: bool
    plan: str


def derive_shard(job: Job) -> dict[str, Any]:
    """Writes one shard and its index, unless they are there; returns its line of the manifest."""
    path = Path(job.path)
    found = finished(path, job.plan, job.overwrite)
    if found is None:
        source, samples = sets.ShardSet([job.location]), []
        with ShardWriter(path) as shard:
            for number, one in enumerate(source.index(0).samples()):
                value = source.read_json(0, number)

                def read(*names: str, number: int = number) -> dict[str, bytes]:
                    return source.read(0, number, names)

                made = job.make(value, read, f"{job.location}, {one.key}", job.settings)
                samples.append(index.sample_of(one.key, shard.add(one.key, {job.member: made}), None))
        found = index.build(samples, shard.bytes, job.plan)
        index.write(found, path)
    return sets.shard_entry(path.name, found)


def derive(
    shards: Sequence[str],
    out: str,
    member: str,
    make: Callable[..., bytes],
    settings: Any,
    about: dict[str, Any],
    *,
    overwrite: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """Writes a parallel set; returns its manifest.

    Args:
        about: what decides the members beside the shards' content; goes to the manifest.
    """
    digests = [entry["digest"] for entry in sets.ShardSet(shards).entries]
    paths = [f"{out}-{number:06d}.tar" for number in range(len(shards))]
    jobs = [
        Job(path, location, member, make, settings, overwrite, sha256_json([member, about, digest]))
        for path, location, digest in zip(paths, shards, digests, strict=True)
    ]
    with sets.owned_set(out):
        check_others(out, paths, overwrite)
        entries = run_jobs(derive_shard, jobs, desc=member, **how)
        return finish(out, paths, entries, (), about)
