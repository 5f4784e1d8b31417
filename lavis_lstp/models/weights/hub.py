"""Where weights lie: the name in a config -> a folder or file on this machine, or a hub id for transformers.

Looked for, in this order: the name as a path from where the user stands, the name below the folder that the
environment variable LAVIS_LSTP_WEIGHTS names, and else the hub (its cache first; no network in offline mode).
`hf://owner/name` is a repository that `lavis_lstp.push_to_hub` filled.
"""

from __future__ import annotations

import functools
import os
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_lstp.config.model import SCORERS, used_parts
from lavis_lstp.errors import WeightsError, no_value, shortened
from lavis_lstp.files import expanded, read_record, strict_json
from lavis_lstp.models.weights.saved_runs import checkpoint_of_run

ENVIRONMENT = "LAVIS_LSTP_WEIGHTS"
HUB = "hf://"
"""How the name of a repository with a checkpoint of this package begins; nothing else asks the hub for a folder."""
HUB_MODELS = (
    "Salesforce/instructblip-vicuna-7b",
    "Salesforce/instructblip-flan-t5-xl",
    "Salesforce/blip2-flan-t5-xl",
    "google-bert/bert-base-uncased",
    "ColorfulAI/LSTP-Chat",
    "Qwen/Qwen3-VL-8B-Instruct",
    "Qwen/Qwen2.5-VL-7B-Instruct",
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "OpenGVLab/InternVL3-8B-hf",
    "openai/clip-vit-large-patch14",
    "google/siglip2-so400m-patch14-384",
    "Salesforce/blip2-itm-vit-g",
)
"""Models that this package's own files name."""
SIZES_FILE = "tiny_checkpoints.json"
"""In that folder: sizes of the model that its weights are of, where these are not the published ones."""
BROKEN_FOLDER = (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, AttributeError)
"""Errors that transformers raises for folders whose files are missing, damaged or of unexpected content."""
UNINITIALISED = "checkpoint"
"""`model.flow.weights`: RAFT's come with a checkpoint."""


def local_path(name: str) -> Path | None:
    """The file or folder meant by `name` on this machine; None where there is none, so that it can only be a hub id."""
    given = expanded(name)
    below = os.environ.get(ENVIRONMENT)
    for path in (given, *([expanded(below) / name] if below and not given.is_absolute() else [])):
        if os.path.exists(path):  # unlike Path's, also where a name is too long to be one
            return path
    return None


def as_checkpoint(name: str) -> str:
    """`owner/name` as `hf://owner/name`, unless a file or folder of this machine has that name; others unchanged."""
    return f"{HUB}{name}" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and local_path(name) is None else name


def sizes_of_weights() -> dict[str, dict[str, int]]:
    """Sections of a `model` config, sampler and flow, with the sizes of the weights below LAVIS_LSTP_WEIGHTS.

    Raises:
        WeightsError: the folder's file of sizes is damaged.
    """
    below = os.environ.get(ENVIRONMENT)
    path = expanded(below) / SIZES_FILE if below else None
    if path is None or not path.is_file():
        return {}
    try:
        found = strict_json(path.read_text(encoding="utf-8-sig")).get("model", {})
        sections = {key: dict(found[key]) for key in ("sampler", "flow") if key in found}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: cannot be read as sizes of a model ({error}); write the folder again") from None
    for key, value in ((key, value) for values in sections.values() for key, value in values.items()):
        if not key.isidentifier() or type(value) is not int or value < 1:
            raise WeightsError(f"{path}: expected sizes of at least 1, got {key}: {value!r}; write the folder again")
    return sections


def where_to_put(name: str) -> str:
    """The places where `name` is looked for, for an error message."""
    if expanded(name).is_absolute():
        return "name a path that exists"
    below = os.environ.get(ENVIRONMENT)
    place = str(expanded(below) / name) if below else f"${ENVIRONMENT}/{name} (set {ENVIRONMENT} to a folder)"
    return f"put it at {place}, or name its path"


def where_from(name: str) -> dict:
    """Arguments for transformers' `from_pretrained`: a folder of this machine, or a hub id, from the hub's cache alone
    where the hub cannot be reached, because it would be asked again and again, 25 s for each file.

    Raises:
        WeightsError: it is a file, or a folder with a configuration that is no JSON object.
    """
    if path := local_path(name):
        check_configurations(path)
        return {"pretrained_model_name_or_path": str(path)}
    return {"pretrained_model_name_or_path": name, "local_files_only": not hub_answers()}


def check_configurations(folder: Path) -> None:
    """Refuse what transformers would meet with a TypeError deep inside.

    Raises:
        WeightsError: `folder` is a file, or one of its configurations is no JSON object.
    """
    if folder.is_file():
        raise WeightsError(f"'{folder}' is a file; expected a folder in the hub's layout, with config.json or its like")
    for file in sorted([*folder.glob("*config.json"), *folder.glob("*/*config.json")]):
        read_record(file, error=WeightsError)


def is_missing(name: str, file: str) -> bool:
    """Neither on this machine nor, by its `file`, in the hub's cache, and the hub does not answer."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if local_path(name) is not None:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:  # a path of this machine, and nothing is there
        return True
    return not isinstance(try_to_load_from_cache(name, file), str) and not hub_answers()


@functools.lru_cache(maxsize=1)
def hub_answers(timeout_s: float = 5.0) -> bool:
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


# ---- checkpoints and their files -----------------------------------------------------------------------------

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
INDEX = ".index.json"
"""Ending of the file that says which shard of several holds which key."""
CHECKPOINT_FILES = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)
"""Weights in a checkpoint folder, in the order looked for."""
RUN_CHECKPOINTS = ("checkpoints/best", "checkpoints/last", "best", "last")
"""Checkpoint folders in a run's folder, in the order looked for."""


def checkpoint_source(name: str | Path) -> Path:
    """The file or folder that `name` stands for: on this machine, or `owner/repository/file` on the hub.

    A file of the hub comes from its cache, else over the network unless offline mode (HF_HUB_OFFLINE) is on.

    Raises:
        WeightsError: it is neither; the line says what to download, what converts it and where to put it.
    """
    if (found := local_path(str(name))) is not None:
        return found
    parts = str(name).split("/")
    if len(parts) >= 3 and parts[-1].endswith(SUFFIXES) and re.match(r"\w", str(name)) and not os.path.exists(parts[0]):
        return hub_file("/".join(parts[:2]), "/".join(parts[2:]), f"no weights at '{name}'")
    raise WeightsError(
        f"no weights at '{name}': expected a run's folder, one of its checkpoint folders, a file "
        f"({', '.join(SUFFIXES)}), or a file of the hub as owner/repository/file{no_value(name)}"
    )


def hub_file(repository: str, file: str, problem: str) -> Path:
    """A file of the hub: its place in the cache, where it is put unless it lies there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        offline = where_from(repository).get("local_files_only", False)
        return Path(hf_hub_download(repository, file, local_files_only=offline))
    except (OSError, ValueError, HfHubHTTPError) as error:
        name = f"{repository}/{file}"
        raise WeightsError(
            f"{problem}: neither on this machine nor in the hub's cache, and the hub does not give it "
            f"({str(error).strip().splitlines()[0]}); download {file} from https://huggingface.co/{repository} and "
            f"{where_to_put(name)}; `lavis-lstp convert {file} FOLDER` makes a small folder of it that serves as well"
        ) from error


def weights_file(path: str | Path) -> Path:
    """The weights that a path stands for: a file, a checkpoint folder, or a run's folder (its best, else its newest).

    A name that is no path is looked for as `checkpoint_source` does; `hf://owner/name` is a repository of the hub,
    whose manifest is put beside its weights.

    Raises:
        WeightsError: nothing is there.
    """
    if str(path).startswith(HUB):
        repository = str(path).removeprefix(HUB).strip("/")
        hub_file(repository, "manifest.json", f"no checkpoint at '{path}'")
        return hub_file(repository, "model.safetensors", f"no checkpoint at '{path}'")
    path = checkpoint_of_run(expanded(path)) or checkpoint_source(path)  # a link there may lead nowhere
    path = checkpoint_of_run(path) or path
    if path.is_file():
        return path
    for folder in (path, *(path / name for name in RUN_CHECKPOINTS)):
        for name in CHECKPOINT_FILES:
            if (folder / name).is_file():
                return folder / name
    raise WeightsError(
        f"no weights in folder '{path}': looked for {' or '.join(CHECKPOINT_FILES)} there and in "
        f"{', '.join(RUN_CHECKPOINTS)}; has the run saved a checkpoint?"
    )


def require_weights(cfg: Mapping[str, Any]) -> None:
    """Says all that is missing, and before gigabytes of what is there are read.

    Raises:
        WeightsError: weights or tokenizers are not on this machine, and the hub does not answer.
    """
    given = cfg["checkpoint"] or []
    for path in [given] if isinstance(given, str) else given:
        weights_file(path)
    used = used_parts(cfg)
    wanted = {}
    if used.sampler:
        wanted = {"model.sampler.weights": "config.json", "model.sampler.tokenizer": "tokenizer_config.json"}
    if cfg["backbone"]["source"] in ("hub", "transformers"):
        wanted["model.backbone.weights"] = "config.json"
    missing = {}
    for key, file in wanted.items():
        _, section, name = key.split(".")
        if cfg[section][name] and is_missing(cfg[section][name], file):
            missing.setdefault(cfg[section][name], []).append(key)
    scorer = cfg["scorer"]
    if used.scorer and not scorer["arch"]:
        weights = scorer["weights"] or SCORERS[scorer["name"]].weights
        if weights and is_missing(weights, "config.json"):
            missing.setdefault(weights, []).append("model.scorer.weights")
    raft = cfg["flow"]["weights"] if used.flow and cfg["flow"]["name"].startswith("raft") else None
    if raft not in (None, UNINITIALISED) and local_path(raft) is None:
        missing[raft] = ["model.flow.weights"]
    if missing:
        listed = "; ".join(
            f"{shortened(name)} ({', '.join(keys)}): {where_to_put(shortened(name))}" for name, keys in missing.items()
        )
        raise WeightsError(
            f"missing weights, neither on this machine nor in the hub's cache, and the hub does not answer: {listed}. "
            "Each is a hub id that is cached or can be reached, or a folder with its files (config.json, "
            "*.safetensors, tokenizer files) downloaded from huggingface.co; raft-sintel.pth is in models.zip of "
            "princeton-vl/RAFT"
        )


def model_and_processor(auto: Any, weights: str, key: str, what: str, **settings: Any) -> tuple[Any, Any]:
    """A model and its processor, by transformers.

    Args:
        auto: transformers' class of the model.
        weights: a hub id, or a folder in the hub's layout.
        key: setting that names them, and what: kind of model, for messages.
        settings: further arguments of `from_pretrained`.

    Raises:
        WeightsError: they are not there, damaged or incomplete.
    """
    from safetensors import SafetensorError
    from transformers import AutoProcessor

    where = where_from(weights)
    try:
        processor = AutoProcessor.from_pretrained(**where)
        model, found = auto.from_pretrained(**where, output_loading_info=True, **settings)
    except (*BROKEN_FOLDER, SafetensorError) as error:
        raise WeightsError(
            f"no {what} at '{weights}' ({key}): expected a hub id that is cached or can be reached, or a folder with "
            "its files (config.json, *.safetensors, preprocessor_config.json, tokenizer files) downloaded from "
            f"huggingface.co; {where_to_put(weights)}; "
            f"transformers says: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise WeightsError(f"'{weights}' ({key}) lacks {len(missing)} weights, first {missing[0]}")
    return model, processor
