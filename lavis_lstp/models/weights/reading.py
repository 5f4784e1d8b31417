"""Weight files -> state dicts of this package, safely and strictly.

In: a file, folder or name on the hub, or a state dict with published names. Out: tensors under our names, every key
accounted for: used, dropped by name, or an error. Published LSTP checkpoints hold `model.` (the transformers model),
`temporal_encoder.` and `of_extractor.` (RAFT); ours hold `backbone.model.`, `sampler.` and `flow.model.`. The tables
of names are in `published_names`.
"""

from __future__ import annotations

import fnmatch
import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavis_lstp.errors import WeightsError
from lavis_lstp.files import expanded, strict_json
from lavis_lstp.models.weights.hub import (
    CHECKPOINT_FILES,
    INDEX,
    hub_file,
    local_path,
    weights_file,
)
from lavis_lstp.models.weights.published_names import ALONE, KINDS, NOT_IN_BERT, Drop, kind_of, rename, today

logger = logging.getLogger(__name__)

OURS = ("flow.", "sampler.", "backbone.")
"""How keys of this package's own checkpoints begin; others are published ones."""


@dataclass
class Conversion:
    """What became of a published state dict.

    Attributes:
        kind: the entry of `published_names.KINDS` it was read as.
        state_dict: under our names.
        dropped: published keys that were left out by name -> why.
        joined: keys of `state_dict` that were made of several -> of how many.
        alone: "sampler" or "flow" where the file held that part alone, None for a whole model.
    """

    kind: str
    state_dict: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    joined: dict[str, int] = field(default_factory=dict)

    @property
    def alone(self) -> str | None:
        return ALONE.get(self.kind)


def convert_published(state_dict: Mapping[str, Any], *, as_whole: bool = False) -> dict[str, Any]:
    """Published names -> ours, for the whole model, the sampler alone or RAFT alone.

    Args:
        state_dict: key -> tensor, or {"state_dict": ...} around it; keys may begin with `module.`.
        as_whole: give a part's own file the names it has inside `LSTP` (`sampler.`, `flow.model.`), instead of
            those that `TemporalSampler` or torchvision's `raft_large` load.

    Raises:
        WeightsError: a key that is neither known nor dropped by name, or weights of another kind.
    """
    conversion = convert_published_with_report(state_dict, as_whole=as_whole)
    if conversion.kind == "bert":
        raise WeightsError("these are BERT's weights, of which a sampler can start: set model.sampler.weights to them")
    if conversion.dropped:
        shown = ", ".join(list(conversion.dropped)[:4]) + (", ..." if len(conversion.dropped) > 4 else "")
        logger.info("dropped %d published keys that are used nowhere: %s", len(conversion.dropped), shown)
    return conversion.state_dict


def convert_published_with_report(
    state_dict: Mapping[str, Any], *, as_whole: bool = False, kind: str | None = None
) -> Conversion:
    """`convert_published` for every kind of file, and what was dropped.

    Args:
        kind: of `published_names.KINDS`; None = recognised by the keys.

    Raises:
        WeightsError: a key that is neither known nor dropped by name.
    """
    state_dict = _unwrap(state_dict)
    bare = [key.removeprefix("module.") for key in state_dict]
    result = Conversion(kind or kind_of(bare) or "lstp")
    parts = KINDS[result.kind]
    if len(parts) == 1 and not as_whole:
        parts = {part: (old, rules, "") for part, (old, rules, _) in parts.items()}
    unexplained = []
    for key, value in state_dict.items():
        key = today(key, result.kind)
        new = rename(key, parts)
        if new is None:
            unexplained.append(key)
        elif isinstance(new, Drop):
            result.dropped[key] = str(new)
        elif new in result.state_dict:
            raise WeightsError(f"published weights: two keys give '{new}', one is '{key}'; the file is damaged")
        else:
            result.state_dict[new] = value
    if unexplained or not state_dict:
        prefixes = ", ".join(f"'{prefix}'" for prefix, _, _ in KINDS["lstp"].values())
        raise WeightsError(
            f"published weights: {_some(unexplained) if state_dict else 'no key'} unknown; expected a whole LSTP "
            f"checkpoint (keys that begin with {prefixes}), its temporal encoder alone, princeton RAFT ('fnet.', "
            "'cnet.', 'update_block.') alone, BERT, or LAVIS's BLIP-2 or InstructBLIP ('Qformer.')"
        )
    result.joined = _fuse_vision_bias(result.state_dict)
    return result


def _fuse_vision_bias(state_dict: dict[str, Any]) -> dict[str, int]:
    """EVA-CLIP's biases of queries and values -> transformers' one bias of the fused layer; keys have none."""
    joined = {}
    for key in [key for key in state_dict if key.endswith(".self_attn.q_bias")]:
        stem = key.removesuffix("q_bias")
        if f"{stem}v_bias" in state_dict:
            query, value = state_dict.pop(key), state_dict.pop(f"{stem}v_bias")
            state_dict[f"{stem}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
            joined[f"{stem}qkv.bias"] = 2
    return joined


def load_bert_into_sampler(sampler: nn.Module, path: str) -> list[str]:
    """Starts a fresh sampler from BERT: embeddings, self-attention and feed-forward layers.

    Args:
        path: hub id (bert-base-uncased), a folder or file of BERT, or what `lavis-lstp convert` made of one.

    Returns:
        The sampler's keys that BERT has not, which keep the values they have.

    Raises:
        WeightsError: there is no BERT, or it is of another size.
    """
    state_dict = load_state_dict_file(_bert_file(path))
    if all(key.startswith("sampler.") for key in state_dict):
        state_dict = {key.removeprefix("sampler."): value for key, value in state_dict.items()}
    else:
        state_dict = convert_published_with_report(state_dict, kind="bert").state_dict
    what = f"the weights of '{path}' (model.sampler.weights)"
    return load_strict(sampler, state_dict, allowed_missing=NOT_IN_BERT, what=what)


def _bert_file(name: str) -> Path:
    if local_path(name) is not None:
        return weights_file(name)
    return hub_file(name, CHECKPOINT_FILES[0], f"no BERT at '{name}' (model.sampler.weights)")


def _unwrap(loaded: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict inside a checkpoint of Lightning ("state_dict") or LAVIS ("model")."""
    for key in ("state_dict", "model"):
        if isinstance(loaded.get(key), Mapping):
            return loaded[key]
    return loaded


def _some(names: list[str], count: int = 3) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:count])
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")


# ---- files ----------------------------------------------------------------------------------------------------


def load_as_ours(name: str | Path) -> dict[str, Tensor]:
    """Reads a checkpoint, by any name that `weights_file` knows; published names become those inside `LSTP`.

    Raises:
        WeightsError: nothing is there, it is not safe to read, or it has keys that nobody knows.
    """
    found = load_state_dict_file(weights_file(name))
    return found if all(key.startswith(OURS) for key in found) else convert_published(found, as_whole=True)


def load_state_dict_file(path: str | Path) -> dict[str, Tensor]:
    """Reads a state dict without running code from the file: safetensors, or a pickle of nothing but tensors; or the
    index of several of them.

    A checkpoint with the state dict under "state_dict" or "model" is unwrapped. Tensors are on the CPU and, where
    the format allows, mapped from the file rather than read.

    Raises:
        WeightsError: the file is missing, damaged, holds no state dict, or a pickle that would run code.
    """
    path = expanded(path)
    if not path.is_file():
        raise WeightsError(f"no weights file '{path}'")
    if path.name.endswith(INDEX):
        return _load_shards(path)
    loaded = _load_safetensors(path) if path.suffix == ".safetensors" else load_torch(path, mmap=True)
    state_dict = _unwrap(loaded) if isinstance(loaded, Mapping) else {}
    strangers = [str(key) for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if not state_dict or strangers:
        what = f"{_some(strangers)} are not tensors" if strangers else f"it holds a {type(loaded).__name__}"
        raise WeightsError(
            f"'{path}' is no state dict: {what}; expected name -> tensor, or that under 'state_dict' or 'model'"
        )
    return dict(state_dict)


def _load_shards(index: Path) -> dict[str, Tensor]:
    """The shards named in an index of transformers, as one state dict."""
    try:
        place = strict_json(index.read_text(encoding="utf-8-sig"))["weight_map"]
        shards = {key: index.parent / Path(name).name for key, name in place.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"'{index}' is damaged or no index of shards: {type(error).__name__} {error}") from error
    state_dict = {}
    for shard in sorted(set(shards.values())):
        if shard.name.endswith(INDEX):
            raise WeightsError(f"'{index}' names '{shard.name}', another index; expected files of weights")
        state_dict.update(load_state_dict_file(shard))
    if missing := [key for key in shards if key not in state_dict]:
        raise WeightsError(f"'{index}' names {len(missing)} keys that its shards have not: {_some(missing)}")
    return state_dict


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"'{path}' is damaged or no safetensors file: {error}") from error


SAFE_TORCH = (2, 6)
"""The first release whose `weights_only` keeps a file from running code (CVE-2025-32434)."""
VIEWS = 4
"""Tensors of a file may be views of the same bytes, as tied weights are: so many times the bytes at most."""
SMALL = 64 << 20


def load_torch(path: str | Path, *, mmap: bool = False) -> Any:
    """The content of a file of `torch.save`, on the CPU and without running code from it.

    Args:
        mmap: map the file where its format allows that, rather than read it.

    Raises:
        WeightsError: the file is damaged, would run code, or claims more bytes than it has; or torch is too old.
    """
    path = Path(path)
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < SAFE_TORCH:
        raise WeightsError(
            f"'{path}' is not read: with torch {torch.__version__} such a file can run code (CVE-2025-32434); install "
            "torch 2.6 or later, or convert it to safetensors elsewhere"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"'{path}' is damaged or a pickle of more than tensors, which could run code when read; where you trust "
            "it, save its state dict alone with safetensors or torch.save"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise WeightsError(f"'{path}' is damaged or no torch file: {str(error).splitlines()[:1]}") from error
    _check_bytes(loaded, path)
    return loaded


def _check_bytes(loaded: Any, path: Path) -> None:
    """Raises WeightsError where tensors are not plain memory, or claim more of it than their file has.

    A tensor with stride 0 has any number of values in a few bytes; a copy of it, which loading makes, has them all.
    """
    claimed, stored = 0, {}
    for name, tensor in _tensors(loaded):
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise WeightsError(f"'{path}': {name} is no plain tensor ({tensor.layout} on {tensor.device})")
        storage = tensor.untyped_storage()
        claimed += tensor.numel() * tensor.element_size()
        stored[storage.data_ptr()] = max(stored.get(storage.data_ptr(), 0), storage.nbytes())
        if claimed > VIEWS * sum(stored.values()) + SMALL:
            raise WeightsError(
                f"'{path}': {name} {list(tensor.shape)} makes {claimed} bytes of {sum(stored.values())} in the file; "
                "save plain, contiguous tensors"
            )


def _tensors(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in plain containers, with its place."""
    if isinstance(value, Tensor):
        yield name or "the tensor", value
    elif depth < DEEPEST and isinstance(value, Mapping | list | tuple):
        for key, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(one, f"{name}.{key}".lstrip("."), depth + 1)


DEEPEST = 20


# ---- strict loading -------------------------------------------------------------------------------------------


def load_strict(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    allowed_missing: Iterable[str] = (),
    what: str = "weights",
) -> list[str]:
    """Loads everything or, with an error that names what does not fit, nothing.

    Two names of one tensor in the module (tied weights) need only one key; two keys for it must agree.

    Args:
        allowed_missing: names, or patterns with * and ?, that keep the values they have.
        what: what is being loaded, for the message.

    Returns:
        The keys that were missing and allowed to.

    Raises:
        WeightsError: missing or unexpected keys, other shapes, or tied weights that differ in the file.
    """
    excused, problems = misfits(module.state_dict(keep_vars=True), state_dict, allowed_missing)
    if problems:
        raise WeightsError(f"{what} do not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(dict(state_dict), strict=False)
    return excused


def misfits(
    own: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], allowed_missing: Iterable[str] = ()
) -> tuple[list[str], list[str]]:
    """What a module with the tensors `own` (of `keep_vars`, so that tied ones are one) cannot load of a state dict.

    Returns:
        The keys that are missing and allowed to, and what does not fit, in words.
    """
    tied: dict[int, list[str]] = {}
    for key, tensor in own.items():
        tied.setdefault(id(tensor), []).append(key)
    given = {key for names in tied.values() if any(n in state_dict for n in names) for key in names}
    allowed = tuple(allowed_missing)
    absent = [key for key in own if key not in given]
    excused = [key for key in absent if any(fnmatch.fnmatchcase(key, pattern) for pattern in allowed)]
    missing = [key for key in absent if key not in set(excused)]
    unexpected = [key for key in state_dict if key not in own]
    reshaped = [key for key in state_dict if key in own and own[key].shape != state_dict[key].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(own)} keys missing: {_some(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} keys the model does not have: {_some(unexpected)}")
    if reshaped:
        first = reshaped[0]
        shapes = f"{list(state_dict[first].shape)!r:.80} in the file, {list(own[first].shape)} in the model"
        problems.append(f"{len(reshaped)} of another shape: '{first}' is {shapes}")
    if not reshaped:
        problems += _torn(tied.values(), state_dict)
    return excused, problems


def _torn(groups: Iterable[list[str]], state_dict: Mapping[str, Tensor]) -> list[str]:
    """Problems with tied weights whose keys differ in the file: loading would silently keep the last one."""
    for names in groups:
        present = [name for name in names if name in state_dict]
        for other in present[1:]:
            if not torch.equal(state_dict[present[0]], state_dict[other]):
                return [f"'{present[0]}' and '{other}' differ in the file but are one tensor in the model; untie them"]
    return []
