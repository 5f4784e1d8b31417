"""Which checkpoint of a run counts: decided by complete checkpoints, not by the links beside them.

In: a run's folder, or its folder `checkpoints`. Out: folders of complete checkpoints, the newest, the best. A process
that is killed between naming a checkpoint and pointing `last` at it leaves a link to an older one, or to nothing.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
BEST = "best.json"
_NAME = re.compile(r"step_(\d{8,})")


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def what_is_torn(path: Path) -> str | None:
    """Why a folder is no complete checkpoint, or None if it is one. Compares sizes, not content."""
    if step_of(path) < 0 or not path.is_dir():
        return "not a folder named step_<number>"
    if not (path / MANIFEST).is_file():
        return f"no {MANIFEST}"
    try:
        sizes = {name: facts["bytes"] for name, facts in read_manifest(path)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"unreadable {MANIFEST}"
    for name, expected in sizes.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        size = (path / name).stat().st_size
        if size != expected:
            return f"{name} has {size} bytes, expected {expected}"
    return None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Folders of complete checkpoints by ascending step; a torn one is named in the log and left out."""
    found = []
    for path in sorted(folder.glob("step_*"), key=step_of):
        reason = what_is_torn(path)
        if reason:
            log.warning("skipping torn checkpoint %s: %s", path, reason)
        else:
            found.append(path)
    return found


def read_best(folder: Path) -> dict[str, Any]:
    """Content of best.json; empty where nothing was validated, or its checkpoint is gone or torn."""
    path = folder / BEST
    try:
        best = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        name = best.get("checkpoint")
        reason = what_is_torn(folder / name) if name else None
    except (ValueError, TypeError, AttributeError) as error:
        log.warning("ignoring %s: not of the form that a run writes (%s)", path, error)
        return {}
    if reason:
        log.warning("ignoring %s: its checkpoint %s is gone or torn", path, name)
        return {}
    return best


def checkpoint_of_run(path: Path) -> Path | None:
    """The checkpoint that a run's folder stands for: its best, else its newest; None where there is none.

    Of a path that ends in checkpoints/last or checkpoints/best it is the newest, and the best.
    """
    named = path.name if path.parent.name == "checkpoints" and path.name in ("best", "last") else None
    folder = path.parent if named else path / "checkpoints"
    if not folder.is_dir() or (named and path.is_dir() and not path.is_symlink()):  # a copy that somebody made by hand
        return None
    best = read_best(folder).get("checkpoint") if named != "last" else None
    if best:
        return folder / best
    complete = complete_checkpoints(folder) if named != "best" else []
    return complete[-1] if complete else None
