"""Low-rank adapters on a language model, through peft, and the names that weights have with and without them.

In: a language model. Out: the same with adapters beside its attention projections, or with adapters merged into them.
Adapters rename the weights they lie beside: `q_proj.weight` becomes `base_model.model.[...].q_proj.base_layer.weight`.
The published LoRA checkpoints were written by peft 0.4, which had no `base_layer`. `matched` makes any of these names
those of the model at hand. Source: LoRA, arXiv 2106.09685; settings of SPEC 8.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lavis_lstp.errors import ConfigError, WeightsError, unknown_name

MARK = ".lora_"
"""In the key of an adapter's weight."""
WRAPPER = "base_model.model."
ORIGINAL = ".base_layer."
"""What peft puts before every name, and into the names of the weights that adapters lie beside."""
TARGETS = (("q_proj", "v_proj"), ("q", "v"))
"""Queries and values of the attention: LLaMA's and OPT's names, T5's names."""


def add_lora(
    language_model: nn.Module,
    *,
    r: int = 8,
    alpha: float = 32,
    dropout: float = 0.1,
    targets: Sequence[str] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Puts adapters beside linear layers; fresh ones change no output.

    Args:
        language_model: changed in place.
        r: rank. alpha: adapters are scaled by alpha / r.
        targets: names of linear layers; None = the first of `TARGETS` that the model has.
        seed: of the adapters' random halves.

    Returns:
        peft's wrapper around it.

    Raises:
        ConfigError: a target is no linear layer of the model, or a number makes no sense.
    """
    from peft import LoraConfig, get_peft_model

    linear = {name.rpartition(".")[2] for name, module in language_model.named_modules() if _is_linear(module)}
    targets = targets or next((names for names in TARGETS if linear.issuperset(names)), ())
    if isinstance(targets, str) or not targets:
        raise ConfigError(f"model.lora.targets: expected a list of linear layers of {', '.join(sorted(linear))}")
    for name in targets:
        if name not in linear:
            raise ConfigError(unknown_name("linear layer (model.lora.targets)", name, linear))
    if int(r) != r or r < 1 or not 0 <= dropout < 1:
        raise ConfigError(f"model.lora: expected a rank r >= 1 and 0 <= dropout < 1, got r={r}, dropout={dropout}")
    config = LoraConfig(r=int(r), lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(language_model, config)


def merge_lora(language_model: nn.Module) -> nn.Module:
    """The plain language model, with `alpha / r * B A` added to the weights that adapters lay beside."""
    return language_model.merge_and_unload() if hasattr(language_model, "merge_and_unload") else language_model


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)  # bitsandbytes' 8- and 4-bit layers are subclasses


def matched(
    state_dict: Mapping[str, Tensor], own: Collection[str], prefixes: Iterable[str], source: str
) -> dict[str, Tensor]:
    """The state dict under the names that the model has, with adapters or without.

    Args:
        own: keys of the model.
        prefixes: how the keys of the language model begin, in both.
        source: what is being loaded, for the message.

    Raises:
        WeightsError: adapters that the model has no place for.
    """
    prefixes = tuple(prefixes)
    places = {_plain(key, prefixes): key for key in own if key.startswith(prefixes)}
    adapters = [key for key in state_dict if key.startswith(prefixes) and MARK in key]
    if adapters and not any(MARK in key for key in places):
        rank = next((len(state_dict[key]) for key in adapters if ".lora_A." in key), 8)
        raise WeightsError(
            f"{source} holds LoRA adapters ('{adapters[0]}'), the model has none; "
            f"set model.lora={{r: {rank}, alpha: 32}}"
        )
    return {
        places.get(_plain(key, prefixes), key) if key.startswith(prefixes) else key: value
        for key, value in state_dict.items()
    }


def _plain(key: str, prefixes: Iterable[str]) -> str:
    """The key as it would be without peft."""
    prefix = next(prefix for prefix in prefixes if key.startswith(prefix))
    return prefix + key.removeprefix(prefix).removeprefix(WRAPPER).replace(ORIGINAL, ".")
