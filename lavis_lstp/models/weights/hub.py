"""Where weights lie: the name in a config -> a folder or file on this machine, or a hub id for transformers.

Looked for, in this order: the name as a path from where the user stands, the name below the folder that the
environment variable LAVIS_LSTP_WEIGHTS names, and else the hub (its cache first; no network in offline mode).
"""

from __future__ import annotations

import functools
import os
import socket
import urllib.error
import urllib.request
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


def where_from(name: str) -> dict:
    """Arguments for transformers' `from_pretrained`: a folder of this machine, or a hub id, from the hub's cache alone
    where the hub cannot be reached, because it would be asked again and again, 25 s for each file."""
    if path := local_path(name):
        return {"pretrained_model_name_or_path": str(path)}
    return {"pretrained_model_name_or_path": name, "local_files_only": not _hub_answers()}


def is_missing(name: str, file: str) -> bool:
    """Neither on this machine nor, by its `file`, in the hub's cache, and the hub does not answer."""
    from huggingface_hub import try_to_load_from_cache

    if local_path(name) is not None:
        return False
    if Path(name).expanduser().is_absolute():
        return True
    return not isinstance(try_to_load_from_cache(name, file), str) and not _hub_answers()


@functools.lru_cache(maxsize=1)
def _hub_answers(timeout_s: float = 5.0) -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=timeout_s)
    except urllib.error.HTTPError:
        return True
    except TimeoutError:
        return False
    except urllib.error.URLError as error:  # a certificate that only this library does not know is no reason to give up
        return not isinstance(error.reason, ConnectionError | socket.gaierror | TimeoutError)
    return True
