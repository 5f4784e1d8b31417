"""`python -m webdataset_tools VERB ...`: a table of verbs, each a module with HELP, add_arguments, run and show.

Exit status: 0; 1 where the verb found what it looks for (`verify`: something wrong); 2, after one line on stderr, where
the input is at fault or a file cannot be written; 130 after Ctrl-C; 141 where nobody reads the output.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from lavis_lstp.errors import run_command
from lavis_lstp.host.hook import sleep_while_waiting
from lavis_lstp.jobs import ENGINES
from lavis_lstp.redaction import printable, without_secrets
from lavis_lstp.untrusted import guard_log

VERBS = ("pack", "verify", "stats", "preview", "flow", "spans", "reshard", "repair", "extract")

SESSION = (
    "pack shards/train train.json --root videos",
    "verify 'shards/train-{000000..000123}.tar'",
    "flow 'shards/train-{000000..000123}.tar' --out shards/flow",
    "preview 'shards/train-{000000..000123}.tar' --flow 'shards/flow-{000000..000123}.tar' --out sheet.html",
)


def build_parser(verb: str) -> argparse.ArgumentParser:
    module = _module(verb)
    about = (module.__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog=f"python -m webdataset_tools {verb}",
        description="\n\n".join(about).replace(f"`{verb}`: ", "", 1),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    common = parser.add_argument_group("how it runs")
    if getattr(module, "SHARD_BY_SHARD", True):
        half = max(1, (os.cpu_count() or 2) // 2)
        text = f"processes, each a shard at a time; default here: {half}"
        positive = _module("pack").positive
        common.add_argument("--workers", type=positive, default=half, help=text)
        common.add_argument("--engine", choices=ENGINES, default="local", help="local processes, or a Ray cluster")
        common.add_argument("--ray-address", default="auto", help="of the cluster; default: auto")
    common.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _module(verb: str):
    return importlib.import_module(f"webdataset_tools.{verb}")


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in VERBS:
        return _table(argv)
    verb = argv[0]
    module = _module(verb)
    parser = build_parser(verb)
    args = parser.parse_args(argv[1:])
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    guard_log()
    sleep_while_waiting()
    return run_command(lambda: _run(module, args))


def _run(module: ModuleType, args: argparse.Namespace) -> int:
    report = module.run(args)
    said = json.dumps(report, indent=2, ensure_ascii=False) if args.json else module.show(report, args)
    print(printable(without_secrets(said)))
    return 1 if report.get("failed") else 0


def _table(argv: Sequence[str]) -> int:
    lines = [f"  {verb:<10}{_module(verb).HELP}" for verb in VERBS]
    text = "usage: python -m webdataset_tools VERB ...\n\nTar shards of questions about videos, images and texts.\n\n"
    text += "\n".join(lines) + "\n\n`python -m webdataset_tools VERB --help` explains one. In the usual order:\n\n"
    text += "\n".join(f"  python -m webdataset_tools {words}" for words in SESSION)
    wrong = bool(argv) and argv[0] not in ("-h", "--help")
    if wrong:
        text = f"error: unknown verb '{argv[0]}'; known: {', '.join(VERBS)}"
    print(text, file=sys.stderr if wrong or not argv else sys.stdout)
    return 2 if wrong or not argv else 0


if __name__ == "__main__":
    sys.exit(main())
