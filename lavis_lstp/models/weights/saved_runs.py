"""Which checkpoint of a run counts: decided by complete checkpoints, not by the links beside them.

In: a run's folder, or its folder `checkpoints`. Out: folders of complete checkpoints, the newest, the best. A process
that is killed between naming a checkpoint and pointing `last` at it leaves a link to an older one, or to nothing.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lavis_lstp.errors import WeightsError
from lavis_lstp.files import read_record
from lavis_lstp.untrusted import why_no_path

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
BEST = "best.json"
_NAME = re.compile(r"step_(\d{8,})")
_BEST_FORM: dict[str, Callable[[Any], bool]] = {
    "checkpoint": lambda value: isinstance(value, str) and _NAME.fullmatch(value) is not None,
    "metric": lambda value: isinstance(value, str),
    "value": lambda value: type(value) in (int, float) and math.isfinite(value),
    "worse_steps": lambda value: isinstance(value, list) and all(type(step) is int for step in value),
    "validated_step": lambda value: type(value) is int,
}
"""Keys of best.json, and what their values must be."""


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def what_is_torn(path: Path) -> str | None:
    """Why a folder is no complete checkpoint, or None if it is one. Compares sizes, not content."""
    if step_of(path) < 0 or not path.is_dir():
        return "not a folder named step_<number>"
    if not (path / MANIFEST).is_file():
        return f"no {MANIFEST}"
    try:
        files = read_manifest(path)["files"]
    except WeightsError as error:
        return f"unreadable {MANIFEST}: {error}"
    for name, facts in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        size = (path / name).stat().st_size
        if size != facts["bytes"]:
            return f"{name} has {size} bytes, expected {facts['bytes']}"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        WeightsError: it cannot be read, or does not list the folder's files.
    """
    return read_record(path / MANIFEST, {"files": _lists_files}, error=WeightsError)


def _lists_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(facts, dict)
        and type(facts.get("bytes")) is int
        and isinstance(facts.get("sha256"), str)
        and why_no_path(name) is None
        for name, facts in value.items()
    )


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
    """Content of best.json; empty where nothing was validated, or its checkpoint is gone or torn.

    Raises:
        WeightsError: the file is not of the form that training writes.
    """
    path = folder / BEST
    best = read_record(path, error=WeightsError) if path.is_file() else {}
    for key, value in best.items():
        if not _BEST_FORM.get(key, lambda _: True)(value):
            raise WeightsError(
                f"{path}: '{key}' is not of the form that training writes: {value!r:.80}; restore the file, or "
                "remove it and validate again"
            )
    if best.get("checkpoint") and what_is_torn(folder / best["checkpoint"]):
        log.warning("ignoring %s: its checkpoint %s is gone or torn", path, best["checkpoint"])
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
