"""`reshard`: shards of other sizes, in another order, with or without some members; nothing is decoded.

It also joins sets: name several, or a parallel set of flow or spans with --join, whose members become part of each
sample. The same input gives the same bytes; a killed run continues.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from lavis_lstp.data.shards.format import MEMBERS
from lavis_lstp.data.shards.storage import expand
from lavis_lstp.errors import ConfigError
from lavis_lstp.jobs import how
from webdataset_tools.pack import add_size_arguments, plan_shards
from webdataset_tools.rewrite import Kept, about, kept_samples, rewrite

HELP = "other sizes, another order, joined with flow or spans"


def joined(samples: list[Kept], others: list[Kept]) -> list[Kept]:
    """Samples with the members of a parallel set.

    Raises:
        ConfigError: it is not parallel, or has a member that is there already.
    """
    if [one.key for one in samples] != [one.key for one in others]:
        raise ConfigError("--join: the set does not hold the same samples in the same order")
    found = []
    for one, other in zip(samples, others, strict=True):
        names = [member.name for _, member in (*one.members, *other.members)]
        if len(set(names)) < len(names):
            raise ConfigError(f"--join: {one.key!r} would have a member twice of {', '.join(names)}; drop it first")
        found.append(Kept(one.key, (*one.members, *other.members)))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "example: python -m webdataset_tools reshard 'train-{000000..000123}.tar' --out new/train "
        "--join 'flow-{000000..000123}.tar'"
    )
    parser.add_argument("shards", nargs="+", help="paths or addresses of shards, braces allowed")
    parser.add_argument("--out", required=True, help="path and name of the new set")
    parser.add_argument("--join", nargs="+", default=(), help="shards of a parallel set")
    parser.add_argument("--drop", nargs="+", default=(), choices=MEMBERS, metavar="MEMBER", help="members to leave out")
    add_size_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    samples = kept_samples(expand(args.shards), args.drop)
    if args.join:
        samples = joined(samples, kept_samples(expand(args.join)))
    keys = {one.key for one in samples}
    if len(keys) < len(samples):
        raise ConfigError("two of the samples have the same key; `verify` names them, `repair` drops the second")
    if args.shuffle is not None:
        random.Random(f"pack {args.shuffle}").shuffle(samples)
    limits = {"max_size": args.max_size, "max_count": args.max_count, "min_shards": args.min_shards}
    parts = plan_shards([one.size for one in samples], **limits)
    chosen = [[samples[number] for number in part] for part in parts]
    return rewrite(chosen, args.out, about=about("reshard"), overwrite=args.overwrite, **how(args))


def show(report: dict[str, Any], args: argparse.Namespace) -> str:
    totals = report["totals"]
    return f"{args.out}: {len(report['shards'])} shards, {totals['samples']} samples, {totals['bytes'] / 1e6:.1f} MB"
