"""Where weights lie: the name in a config -> a folder or file on this machine, or a hub id for transformers.

Looked for, in this order: the name as a path from where the user stands, the name below the folder that the
environment variable LAVIS_LSTP_WEIGHTS names, and else the hub (its cache first; no network in offline mode).
"""

from __future__ import annotations

import functools
import json
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path

from lavis_lstp.errors import WeightsError

ENVIRONMENT = "LAVIS_LSTP_WEIGHTS"
SIZES_FILE = "tiny_checkpoints.json"
"""In that folder: sizes of the model that its weights are of, where these are not the published ones."""


def local_path(name: str) -> Path | None:
    """The file or folder meant by `name` on this machine; None where there is none, so that it can only be a hub id."""
    given = Path(name).expanduser()
    below = os.environ.get(ENVIRONMENT)
    for path in (given, *([Path(below).expanduser() / name] if below and not given.is_absolute() else [])):
        if path.exists():
            return path
    return None


def sizes_of_weights() -> dict[str, dict[str, int]]:
    """Sections of a `model` config, sampler and flow, with the sizes of the weights below LAVIS_LSTP_WEIGHTS.

    Raises:
        WeightsError: the folder's file of sizes is damaged.
    """
    below = os.environ.get(ENVIRONMENT)
    path = Path(below).expanduser() / SIZES_FILE if below else None
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("model", {})
        sections = {key: dict(found[key]) for key in ("sampler", "flow") if key in found}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: cannot be read as sizes of a model ({error}); write the folder again") from None
    for key, value in ((key, value) for values in sections.values() for key, value in values.items()):
        if not key.isidentifier() or type(value) is not int or value < 1:
            raise WeightsError(f"{path}: expected sizes of at least 1, got {key}: {value!r}; write the folder again")
    return sections


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
