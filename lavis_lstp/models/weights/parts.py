"""The named parts of LSTP: which of them learn, and how they are saved and loaded.

In: the model and part names of a config's `train` list. Out: frozen or learning parameters, and state dicts that
hold whole parts. A checkpoint has the parts that learnt in its run and no others, so several of them, each of another
part, make one model. Where the parts lie in the state dict is the backbone's to say (`Backbone.PARTS`); "lora" is what
adapters add to the language model, and then "language_model" is what was there before.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lavis_lstp.errors import ConfigError, LstpError, unknown_name
from lavis_lstp.models.answer import lora
from lavis_lstp.models.answer.qformer import Backbone
from lavis_lstp.models.weights.reading import convert_published, load_state_dict_file, load_strict, weights_file
from lavis_lstp.models.where.temporal_sampler import TemporalSampler, shown_in

logger = logging.getLogger(__name__)


def _with_own_parts(of_backbone: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    behind = {part: tuple(f"backbone.{prefix}" for prefix in prefixes) for part, prefixes in of_backbone.items()}
    return {"flow": ("flow.",), "sampler": ("sampler.",), **behind}


PREFIXES = _with_own_parts(Backbone.PARTS)
"""Part -> how its keys begin in the state dict, over transformers' models."""
OPTIONAL = {"flow": "RAFT", "sampler": "the temporal sampler"}
"""Parts that a model can do without; a checkpoint's weights of these are left out there."""
CAN_LEARN = (*(part for part in PREFIXES if part != "flow"), "lora")
"""RAFT's BatchNorm and weights are always frozen."""


def prefixes_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Part -> how its keys begin in this model's state dict."""
    return _with_own_parts(model.backbone.PARTS)


def part_of(key: str, prefixes: Mapping[str, tuple[str, ...]] = PREFIXES) -> str | None:
    """The part that a parameter or buffer belongs to."""
    part = next((part for part, begins in prefixes.items() if key.startswith(begins)), None)
    return "lora" if part == "language_model" and lora.MARK in key else part


def freeze_all_but(model: nn.Module, learning: Iterable[str]) -> None:
    """Lets the named parts learn and nothing else.

    Raises:
        ConfigError: a name is not that of a part, or of one that the model does not have.
    """
    learning, prefixes = tuple(learning), prefixes_of(model)
    for name in learning:
        if name not in CAN_LEARN:
            raise ConfigError(unknown_name("part (model.train)", name, CAN_LEARN))
        if name != "lora" and not (name in prefixes and _has(model, prefixes[name])):
            raise ConfigError(
                f"model.train names {name}, which this model has not; it has "
                f"{', '.join(part for part in CAN_LEARN if part in prefixes and _has(model, prefixes[part]))}"
            )
    of_key = {key: part_of(key, prefixes) for key, _ in model.named_parameters()}
    if "lora" in learning and "lora" not in of_key.values():
        raise ConfigError("model.train names lora, but the model has no adapters; set model.lora={r: 8, alpha: 32}")
    for key, parameter in model.named_parameters():
        if parameter.is_floating_point():  # not the 8- or 4-bit weights of a quantised language model
            parameter.requires_grad_(of_key[key] in learning)
        elif of_key[key] in learning:
            raise ConfigError(
                f"model.train names {of_key[key]}, whose quantised weights (model.backbone.quantization) cannot learn; "
                "train lora instead"
            )


def _has(model: nn.Module, prefixes: tuple[str, ...]) -> bool:
    return any(key.startswith(prefixes) for key, _ in model.named_parameters())


def hold_learning_in_float32(model: nn.Module) -> None:
    """Small steps are lost in the 8 bits of bfloat16's mantissa, so what learns is kept in full."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def set_frozen_to_eval(model: nn.Module, learning: Iterable[str]) -> None:
    """Puts parts that do not learn into eval mode: dropout or running statistics there are noise without learning."""
    learning, prefixes = set(learning), prefixes_of(model)
    for part in prefixes.keys() - learning:
        for prefix in prefixes[part]:
            if isinstance(module := _at(model, prefix), nn.Module):
                module.eval()
    for key, module in model.named_modules():
        if part_of(key, prefixes) == "lora":
            module.train(model.training and "lora" in learning)


def _at(model: nn.Module, prefix: str) -> object:
    """The module or parameter whose keys begin so; None where the model does without it."""
    return operator.attrgetter(prefix.rstrip("."))(model)


def count_learning(model: nn.Module, learning: Iterable[str]) -> dict[str, int]:
    """Part -> number of parameters that learn."""
    counts, prefixes = dict.fromkeys(learning, 0), prefixes_of(model)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[part_of(key, prefixes)] += parameter.numel()
    return counts


def load_parts(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> list[str]:
    """Loads whole parts; the others keep what they have. Changes no weight where it raises.

    Weights of the language model may have the names of a model with adapters or of one without.

    Returns:
        The parts that were in `state_dict`.

    Raises:
        WeightsError: a key is not in the model, has another shape, or a part is there only in part.
    """
    prefixes = prefixes_of(model)
    state_dict = model.backbone.matched(state_dict, source, before="backbone.")
    parts = {part_of(key, prefixes) for key in state_dict} - {None}
    others = [key for key in model.state_dict() if part_of(key, prefixes) not in parts]
    load_strict(model, state_dict, allowed_missing=others, what=f"the weights of {source}")
    logger.info("loaded %s from %s", ", ".join(sorted(parts)), source)
    return sorted(parts)


def load_parts_file(model: nn.Module, path: str) -> list[str]:
    """`load_parts` from a run's folder, one of its checkpoints, a safetensors file, or a published checkpoint.

    Raises:
        WeightsError: nothing is there, it is not safe to read, or it does not fit.
    """
    state_dict = load_state_dict_file(weights_file(path))
    prefixes = prefixes_of(model)
    if not all(part_of(key, prefixes) for key in state_dict):
        state_dict = convert_published(state_dict, as_whole=True)
    for part, module in (("flow", getattr(model.flow, "model", None)), ("sampler", model.sampler)):
        unused = {} if module is not None else {key for key in state_dict if part_of(key, prefixes) == part}
        if unused:
            why = f"the model's flow is '{model.flow.name}'" if model.flow is not None else "the model does without"
            logger.info("%s: left out %d weights of %s, %s", path, len(unused), OPTIONAL[part], why)
            state_dict = {key: value for key, value in state_dict.items() if key not in unused}
    loaded = load_parts(model, state_dict, source=str(path))
    if "sampler" in loaded:
        _compare_shown(model.sampler, path)
    return loaded


def _compare_shown(sampler: TemporalSampler, path: str) -> None:
    """Warns where a sampler was trained on flow that it will be shown otherwise; its weights fit all the same."""
    with contextlib.suppress(LstpError):  # a manifest that cannot be read says nothing; who needs it says why
        for key, trained in shown_in(path).items():
            if trained != getattr(sampler, key):
                logger.warning(
                    "%s: its sampler was trained with %s=%s, and this model has %s; set model.sampler.%s=%s",
                    *(path, key, trained, getattr(sampler, key), key, trained),
                )
