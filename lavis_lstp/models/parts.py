"""The named parts of LSTP: which of them learn, and how they are saved and loaded.

In: the model and part names of a config's `train` list. Out: frozen or learning parameters, and state dicts that
hold whole parts. A checkpoint has the parts that learnt in its run and no others, so several of them, each of another
part, make one model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lavis_lstp.errors import ConfigError, unknown_name
from lavis_lstp.models.weights import convert_published, load_state_dict_file, load_strict, weights_file

logger = logging.getLogger(__name__)

PREFIXES = {
    "flow": "flow.",
    "sampler": "sampler.",
    "vision": "backbone.model.vision_model.",
    "qformer": "backbone.model.qformer.",
    "query_tokens": "backbone.model.query_tokens",
    "projection": "backbone.model.language_projection.",
    "language_model": "backbone.model.language_model.",
}
"""Part -> where it lies in the state dict."""
CAN_LEARN = tuple(part for part in PREFIXES if part != "flow")  # RAFT's BatchNorm and weights are always frozen


def part_of(key: str) -> str | None:
    """The part that a parameter or buffer belongs to."""
    return next((part for part, prefix in PREFIXES.items() if key.startswith(prefix)), None)


def freeze_all_but(model: nn.Module, learning: Iterable[str]) -> None:
    """Lets the named parts learn and nothing else.

    Raises:
        ConfigError: a name is not that of a part.
    """
    learning = tuple(learning)
    for name in learning:
        if name not in CAN_LEARN:
            raise ConfigError(unknown_name("part (model.train)", name, CAN_LEARN))
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(key) in learning)


def hold_learning_in_float32(model: nn.Module) -> None:
    """Small steps are lost in the 8 bits of bfloat16's mantissa, so what learns is kept in full."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def set_frozen_to_eval(model: nn.Module, learning: Iterable[str]) -> None:
    """Puts parts that do not learn into eval mode: dropout or running statistics there are noise without learning."""
    for part in PREFIXES.keys() - set(learning) - {"query_tokens"}:  # query_tokens is a parameter, not a module
        model.get_submodule(PREFIXES[part].rstrip(".")).eval()


def count_learning(model: nn.Module, learning: Iterable[str]) -> dict[str, int]:
    """Part -> number of parameters that learn."""
    counts = dict.fromkeys(learning, 0)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[part_of(key)] += parameter.numel()
    return counts


def load_parts(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> list[str]:
    """Loads whole parts; the others keep what they have. Changes nothing where it raises.

    Returns:
        The parts that were in `state_dict`.

    Raises:
        WeightsError: a key is not in the model, has another shape, or a part is there only in part.
    """
    parts = {part_of(key) for key in state_dict} - {None}
    others = [f"{prefix}*" for part, prefix in PREFIXES.items() if part not in parts]
    load_strict(model, state_dict, allowed_missing=others, what=f"the weights of {source}")
    logger.info("loaded %s from %s", ", ".join(sorted(parts)), source)
    return sorted(parts)


def load_parts_file(model: nn.Module, path: str) -> list[str]:
    """`load_parts` from a run's folder, one of its checkpoints, a safetensors file, or a published checkpoint.

    Raises:
        WeightsError: nothing is there, it is not safe to read, or it does not fit.
    """
    state_dict = load_state_dict_file(weights_file(path))
    if not all(part_of(key) for key in state_dict):
        state_dict = convert_published(state_dict, as_whole=True)
    return load_parts(model, state_dict, source=str(path))
