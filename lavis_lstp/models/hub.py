"""Where weights lie: the name in a config -> a folder or file on this machine, or a hub id for transformers.

Looked for, in this order: the name as a path from where the user stands, the name below the folder that the
environment variable LAVIS_LSTP_WEIGHTS names, and else the hub (its cache first; no network in offline mode).
"""

from __future__ import annotations

import os
from pathlib import Path

ENVIRONMENT = "LAVIS_LSTP_WEIGHTS"


def local_path(name: str) -> Path | None:
    """The file or folder meant by `name` on this machine; None where there is none, so that it can only be a hub id."""
    given = Path(name).expanduser()
    below = os.environ.get(ENVIRONMENT)
    for path in (given, *([Path(below).expanduser() / name] if below and not given.is_absolute() else [])):
        if path.exists():
            return path
    return None


def where_to_put(name: str) -> str:
    """The places where `name` is looked for, for an error message."""
    if Path(name).expanduser().is_absolute():
        return "name a path that exists"
    below = os.environ.get(ENVIRONMENT)
    place = str(Path(below).expanduser() / name) if below else f"${ENVIRONMENT}/{name} (set {ENVIRONMENT} to a folder)"
    return f"put it at {place}, or name its path"
