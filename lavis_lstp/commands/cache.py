"""`lavis-lstp cache [show | clear [WHAT]]`: what is kept on disk about videos, how much it is, and removing it.

In: the folder of a store (`data/store.py`). Out: a table of its kinds of entries, or what was removed. What is cleared
is computed again when it is asked for.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from lavis_lstp.data.store import Entry, Store, default_folder
from lavis_lstp.errors import ConfigError, unknown_name
from lavis_lstp.redaction import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Show or clear a store."""
    parser = argparse.ArgumentParser(
        prog="lavis-lstp cache", description="Flow, candidates and features that are kept on disk."
    )
    parser.add_argument("action", nargs="?", choices=("show", "clear"), default="show")
    parser.add_argument("what", nargs="?", help="clear only entries of this kind, such as flow")
    parser.add_argument("--folder", help=f"where they are kept (default: {default_folder()})")
    args = parser.parse_args(argv)
    if args.action == "show" and args.what:
        parser.error("show takes no kind")
    store = Store(args.folder)
    if store.folder.exists() and not store.folder.is_dir():
        raise ConfigError(f"--folder {store.folder}: expected a folder, got a file")
    entries = store.entries()
    if args.action == "clear":
        kinds = {entry.what for entry in entries}
        if args.what and entries and args.what not in kinds:
            raise ConfigError(unknown_name("kind of entries", args.what, kinds))
        removed = store.clear(args.what)
        print(printable(f"{store.folder}: removed {_sum(removed)}"))
        return 0
    print(printable(f"{store.folder}: {_sum(entries)}"))
    for what in sorted({entry.what for entry in entries}):
        mine = [entry for entry in entries if entry.what == what]
        print(f"  {what:<12} {_sum(mine)}, last used {_day(mine[-1].used)}, first to go used {_day(mine[0].used)}")
    return 0


def _sum(entries: Sequence[Entry]) -> str:
    plural = "entry" if len(entries) == 1 else "entries"
    return f"{len(entries)} {plural}, {sum(entry.bytes for entry in entries) / 1e6:.1f} MB"


def _day(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
