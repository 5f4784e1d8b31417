"""Sizes of a model read off the shapes of its weights, and from them the keys that it must have.

In: a state dict under our names. Out: settings of `TemporalSampler`, and the keys that are missing from each of its
parts. So a checkpoint of any size is checked without a config, and a config can be written for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lavis_lstp.errors import WeightsError
from lavis_lstp.models.temporal_sampler import PATCH, TemporalSampler

_QFORMER = "backbone.model.qformer."
_SIMPLE_PARTS = {
    "query_tokens": ("backbone.model.query_tokens",),
    "projection": ("backbone.model.language_projection.weight", "backbone.model.language_projection.bias"),
}


def sampler_sizes(state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """Arguments of `TemporalSampler` for weights that begin with `sampler.`; of BERT's alone, those that it fixes."""
    own = {key: tensor for key, tensor in state_dict.items() if key.startswith("sampler.")}
    shapes = {key.removeprefix("sampler."): list(tensor.shape) for key, tensor in own.items()}
    layers = {int(match[1]) for key in shapes if (match := re.match(r"layers\.(\d+)\.", key))}
    crossed = {int(match[1]) for key in shapes if (match := re.match(r"layers\.(\d+)\.cross_attention\.", key))}
    sizes: dict[str, int] = {"num_layers": max(layers, default=-1) + 1}
    for name, key, axis in (
        ("hidden_size", "layers.0.self_attention.query.weight", 0),
        ("intermediate_size", "layers.0.feed_forward.up.weight", 0),
        ("vocab_size", "text_embedding.word.weight", 0),
        ("text_width", "text_embedding.word.weight", 1),
        ("max_positions", "flow_embedding.position.weight", 0),
    ):
        if key in shapes:
            sizes[name] = shapes[key][axis]
    if crossed:
        sizes["fusion_layer"] = min(crossed)
    if "flow_embedding.pool.weight" in shapes:
        sizes["flow_size"] = PATCH * math.isqrt(shapes["flow_embedding.pool.weight"][1])
    if "flow_rotary" in shapes and "hidden_size" in sizes:
        sizes["num_heads"] = sizes["hidden_size"] // shapes["flow_rotary"][1]
    return sizes


def missing_keys(state_dict: Mapping[str, Tensor], part: str) -> list[str]:
    """Keys that a part (sampler, flow, qformer, query_tokens, projection) of these sizes has and `state_dict` has not.

    Raises:
        WeightsError: not even the sizes can be told.
    """
    if part in _SIMPLE_PARTS:
        return [key for key in _SIMPLE_PARTS[part] if key not in state_dict]
    build, prefix = {
        "sampler": (_sampler, "sampler."),
        "flow": (_raft, "flow.model."),
        "qformer": (_qformer, _QFORMER),
    }[part]
    try:
        with torch.device("meta"):
            module = build(state_dict)
    except (KeyError, IndexError) as error:
        raise WeightsError(f"the part {part} is incomplete: not even {error} is there") from None
    return [key for key in (prefix + name for name in module.state_dict()) if key not in state_dict]


def _sampler(state_dict: Mapping[str, Tensor]) -> nn.Module:
    # a lone BERT has no flow or cross-attention, so that the defaults stand for them; its heads show in no shape
    sizes = sampler_sizes(state_dict)
    sizes.setdefault("num_heads", 1)
    sizes["fusion_layer"] = min(sizes.get("fusion_layer", 6), sizes["num_layers"])
    return TemporalSampler(**sizes)


def _raft(state_dict: Mapping[str, Tensor]) -> nn.Module:
    from torchvision.models.optical_flow import raft_large

    return raft_large(weights=None, progress=False)


def _qformer(state_dict: Mapping[str, Tensor]) -> nn.Module:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel, InstructBlipQFormerConfig, InstructBlipQFormerModel

    def shape(key: str) -> list[int]:
        return list(state_dict[_QFORMER + key].shape)

    numbers = {key: int(m[1]) for key in state_dict if (m := re.match(_QFORMER + r"encoder\.layer\.(\d+)\.", key))}
    crossed = sorted({number for key, number in numbers.items() if ".crossattention." in key})
    intermediate, hidden = shape("encoder.layer.0.intermediate_query.dense.weight")
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": max(numbers.values()) + 1,
        "num_attention_heads": 1,
        "cross_attention_frequency": crossed[1] if len(crossed) > 1 else max(numbers.values()) + 1,
        "encoder_hidden_size": shape("encoder.layer.0.crossattention.attention.key.weight")[1],
    }
    if f"{_QFORMER}layernorm.weight" in state_dict:
        return Blip2QFormerModel(Blip2QFormerConfig(**sizes))
    sizes["vocab_size"] = shape("embeddings.word_embeddings.weight")[0]
    sizes["max_position_embeddings"] = shape("embeddings.position_embeddings.weight")[0]
    return InstructBlipQFormerModel(InstructBlipQFormerConfig(**sizes))
