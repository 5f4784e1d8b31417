"""Weight files -> state dicts of this package, safely and strictly.

In: a file or folder, or a state dict with the published names. Out: tensors under our names, every key accounted
for: used, dropped by name, or an error. Published LSTP checkpoints hold `model.` (the transformers model),
`temporal_encoder.` and `of_extractor.` (RAFT); ours hold `backbone.model.`, `sampler.` and `flow.model.`.
"""

from __future__ import annotations

import fnmatch
import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavis_lstp.errors import WeightsError

logger = logging.getLogger(__name__)

Rules = tuple[tuple[str, str | None], ...]
"""(regular expression for the start of a key, what replaces it); first match counts, None drops the key."""

BACKBONE_RULES: Rules = (
    (r"temporal_projection\.", None),  # in every published state dict, used nowhere
    (r"(.*\.)?(position_ids|rotary_emb\.inv_freq)$", None),  # constants that transformers < 4.31 saved
    (r"(query_tokens$|vision_model\.|qformer\.|language_model\.|language_projection\.)", r"model.\1"),
)
"""transformers' InstructBLIP or BLIP-2 -> Backbone."""

_LAYER = r"encoder\.layer\.(\d+)\."
SAMPLER_RULES: Rules = (
    (r"(temporal_)?embeddings\.position_ids$", None),  # 0, 1, 2, ...
    (r"embeddings\.position_embeddings\.", None),  # exists, used nowhere
    (r"embeddings\.word_embeddings\.", "text_embedding.word."),
    (r"embeddings\.token_type_embeddings\.", "text_embedding.token_type."),
    (r"embeddings\.LayerNorm\.", "text_embedding.norm."),
    (r"temporal_embeddings\.(bos|eos)$", r"flow_embedding.\1"),
    (r"temporal_embeddings\.projection\.", "flow_embedding.patch."),
    (r"temporal_embeddings\.fc\.", "flow_embedding.pool."),
    (r"temporal_embeddings\.frame_pos_embed\.", "flow_embedding.position."),
    (r"temporal_embeddings\.ln\.", "flow_embedding.norm."),
    (r"encoder\.embed_positions\.weight$", "flow_rotary"),
    (r"encoder\.c_embed_positions\.weight$", "text_rotary"),
    (_LAYER + r"attention\.self\.(query|key|value)\.", r"layers.\1.self_attention.\2."),
    (_LAYER + r"attention\.output\.dense\.", r"layers.\1.self_attention.output."),
    (_LAYER + r"attention\.output\.LayerNorm\.", r"layers.\1.self_attention.norm."),
    (_LAYER + r"crossattention\.self\.(query|key|value)\.", r"layers.\1.cross_attention.\2."),
    (_LAYER + r"crossattention\.output\.dense\.", r"layers.\1.cross_attention.output."),
    (_LAYER + r"crossattention\.output\.LayerNorm\.", r"layers.\1.cross_attention.norm."),
    (_LAYER + r"intermediate\.dense\.", r"layers.\1.feed_forward.up."),
    (_LAYER + r"output\.dense\.", r"layers.\1.feed_forward.down."),
    (_LAYER + r"output\.LayerNorm\.", r"layers.\1.feed_forward.norm."),
    (r"mrc_head\.", "head."),
)
"""Published temporal encoder (RopeBertModel) -> TemporalSampler."""


def _encoder_rules(old: str, new: str) -> Rules:
    return (
        (rf"{old}\.layer\d+\.\d+\.norm3\.", None),  # the same module as downsample.1
        (rf"{old}\.conv1\.", f"{new}.convnormrelu.0."),
        (rf"{old}\.norm1\.", f"{new}.convnormrelu.1."),
        (rf"{old}\.conv2\.", f"{new}.conv."),
        (rf"{old}\.(layer\d+\.\d+)\.conv(\d)\.", rf"{new}.\1.convnormrelu\2.0."),
        (rf"{old}\.(layer\d+\.\d+)\.norm(\d)\.", rf"{new}.\1.convnormrelu\2.1."),
        (rf"{old}\.(layer\d+\.\d+)\.downsample\.", rf"{new}.\1.downsample."),
    )


RAFT_RULES: Rules = (
    *_encoder_rules("fnet", "feature_encoder"),
    *_encoder_rules("cnet", "context_encoder"),
    (r"update_block\.encoder\.convc(\d)\.", r"update_block.motion_encoder.convcorr\1.0."),
    (r"update_block\.encoder\.convf(\d)\.", r"update_block.motion_encoder.convflow\1.0."),
    (r"update_block\.encoder\.conv\.", "update_block.motion_encoder.conv.0."),
    (r"update_block\.gru\.conv([zrq])(\d)\.", r"update_block.recurrent_block.convgru\2.conv\1."),
    (r"update_block\.flow_head\.", "update_block.flow_head."),
    (r"update_block\.mask\.0\.", "mask_predictor.convrelu.0."),
    (r"update_block\.mask\.2\.", "mask_predictor.conv."),
)
"""princeton-vl RAFT, "basic" -> torchvision raft_large: 179 keys -> 169."""

PARTS: dict[str, tuple[str, Rules, str]] = {
    "backbone": ("model.", BACKBONE_RULES, "backbone."),
    "sampler": ("temporal_encoder.", SAMPLER_RULES, "sampler."),
    "flow": ("of_extractor.", RAFT_RULES, "flow.model."),
}
"""Part -> prefix in a published whole-model checkpoint, rules behind it, prefix in `LSTP`."""

_ALONE = {
    "sampler": re.compile(r"(embeddings|temporal_embeddings|encoder|mrc_head)\."),
    "flow": re.compile(r"(fnet|cnet|update_block)\."),
}
"""How the keys of a part's own file begin."""


@dataclass
class Conversion:
    """What became of a published state dict.

    Attributes:
        state_dict: under our names.
        dropped: published keys that were left out by name.
        alone: "sampler" or "flow" where the file held that part alone, None for a whole model.
    """

    state_dict: dict[str, Any] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    alone: str | None = None


def convert_published(state_dict: Mapping[str, Any], *, as_whole: bool = False) -> dict[str, Any]:
    """Published names -> ours, for the whole model, the sampler alone or RAFT alone.

    Args:
        state_dict: key -> tensor, or {"state_dict": ...} around it; keys may begin with `module.`.
        as_whole: give a part's own file the names it has inside `LSTP` (`sampler.`, `flow.model.`), instead of
            those that `TemporalSampler` or torchvision's `raft_large` load.

    Raises:
        WeightsError: a key that is neither known nor dropped by name.
    """
    conversion = convert_published_with_report(state_dict, as_whole=as_whole)
    if conversion.dropped:
        shown = ", ".join(conversion.dropped[:4]) + (", ..." if len(conversion.dropped) > 4 else "")
        logger.info("dropped %d published keys that are used nowhere: %s", len(conversion.dropped), shown)
    return conversion.state_dict


def convert_published_with_report(state_dict: Mapping[str, Any], *, as_whole: bool = False) -> Conversion:
    """`convert_published`, and what was dropped."""
    items = [(key.removeprefix("module."), value) for key, value in _unwrap(state_dict).items()]
    result = Conversion(alone=_lone_part(key for key, _ in items))
    parts = {result.alone: ("", PARTS[result.alone][1], "")} if result.alone else PARTS
    if result.alone and as_whole:
        parts = {result.alone: ("", *PARTS[result.alone][1:])}
    unexplained = []
    for key, value in items:
        new = _rename(key, parts)
        if new is _UNKNOWN:
            unexplained.append(key)
        elif new is None:
            result.dropped.append(key)
        elif new in result.state_dict:
            raise WeightsError(f"published weights: two keys give '{new}', one is '{key}'; the file is damaged")
        else:
            result.state_dict[new] = value
    if unexplained or not items:
        prefixes = ", ".join(f"'{prefix}'" for prefix, _, _ in PARTS.values())
        raise WeightsError(
            f"published weights: {_some(unexplained) if items else 'no key'} unknown; expected a whole LSTP checkpoint "
            f"(keys that begin with {prefixes}), its temporal encoder alone, or princeton RAFT ('fnet.', 'cnet.', "
            "'update_block.') alone"
        )
    return result


_UNKNOWN = "?"


def _rename(key: str, parts: Mapping[str, tuple[str, Rules, str]]) -> str | None:
    """The key's new name, None where it is dropped, `_UNKNOWN` where no rule fits."""
    for old_prefix, rules, new_prefix in parts.values():
        if not key.startswith(old_prefix):
            continue
        rest = key[len(old_prefix) :]
        for pattern, replacement in rules:
            if match := re.match(pattern, rest):
                if replacement is None:
                    return None
                return new_prefix + match.expand(replacement) + rest[match.end() :]
    return _UNKNOWN


def _lone_part(keys: Iterable[str]) -> str | None:
    keys = list(keys)
    whole = tuple(prefix for prefix, _, _ in PARTS.values())
    if any(key.startswith(whole) for key in keys):
        return None
    return next((part for part, begin in _ALONE.items() if any(begin.match(key) for key in keys)), None)


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

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
CHECKPOINT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Weights in a checkpoint folder, in the order looked for."""
RUN_CHECKPOINTS = ("checkpoints/best", "checkpoints/last", "best", "last")
"""Checkpoint folders in a run's folder, in the order looked for."""


def weights_file(path: str | Path) -> Path:
    """The weights that a path stands for: a file, a checkpoint folder, or a run's folder (its best, else its last).

    Raises:
        WeightsError: nothing is there.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(
            f"no weights at '{path}': expected a run's folder, one of its checkpoint folders, or a file "
            f"({', '.join(SUFFIXES)})"
        )
    for folder in (path, *(path / name for name in RUN_CHECKPOINTS)):
        for name in CHECKPOINT_FILES:
            if (folder / name).is_file():
                return folder / name
    raise WeightsError(
        f"no weights in folder '{path}': looked for {' or '.join(CHECKPOINT_FILES)} there and in "
        f"{', '.join(RUN_CHECKPOINTS)}; has the run saved a checkpoint?"
    )


def load_state_dict_file(path: str | Path) -> dict[str, Tensor]:
    """Reads a state dict without running code from the file: safetensors, or a pickle of nothing but tensors.

    A checkpoint with the state dict under "state_dict" or "model" is unwrapped. Tensors are on the CPU and, where
    the format allows, mapped from the file rather than read.

    Raises:
        WeightsError: the file is missing, damaged, holds no state dict, or a pickle that would run code.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise WeightsError(f"no weights file '{path}'")
    loaded = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
    state_dict = _unwrap(loaded) if isinstance(loaded, Mapping) else {}
    strangers = [str(key) for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if not state_dict or strangers:
        what = f"{_some(strangers)} are not tensors" if strangers else f"it holds a {type(loaded).__name__}"
        raise WeightsError(
            f"'{path}' is no state dict: {what}; expected name -> tensor, or that under 'state_dict' or 'model'"
        )
    return dict(state_dict)


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"'{path}' is damaged or no safetensors file: {error}") from error


def _load_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"'{path}' is damaged or a pickle of more than tensors, which could run code when read; where you trust "
            "it, save its state dict alone with safetensors or torch.save"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise WeightsError(f"'{path}' is damaged or no torch file: {str(error).splitlines()[:1]}") from error


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
    own = module.state_dict(keep_vars=True)
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
        shapes = f"{list(state_dict[first].shape)} in the file, {list(own[first].shape)} in the model"
        problems.append(f"{len(reshaped)} of another shape: '{first}' is {shapes}")
    if not reshaped:
        problems += _torn(tied.values(), state_dict)
    if problems:
        raise WeightsError(f"{what} do not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(dict(state_dict), strict=False)
    return excused


def _torn(groups: Iterable[list[str]], state_dict: Mapping[str, Tensor]) -> list[str]:
    """Problems with tied weights whose keys differ in the file: loading would silently keep the last one."""
    for names in groups:
        present = [name for name in names if name in state_dict]
        for other in present[1:]:
            if not torch.equal(state_dict[present[0]], state_dict[other]):
                return [f"'{present[0]}' and '{other}' differ in the file but are one tensor in the model; untie them"]
    return []
