"""Sizes of a model read off the shapes of its weights, and from them whether its parts are whole.

In: a state dict under our names. Out: settings of `TemporalSampler`, and what of a part does not fit the module that
such sizes make: keys that are missing, keys that nothing explains, weights of another shape. So a checkpoint of any
size is checked without a config, and a config can be written for it. A size is what most of the weights that have it
say, and a layer counts where it has more than half of the fullest one's keys, so that one damaged weight or one
strange key is named itself and does not make all others look wrong. Modules are built on the meta device.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lavis_lstp.errors import ConfigError, WeightsError
from lavis_lstp.models.answer.lora import MARK, ORIGINAL, WRAPPER
from lavis_lstp.models.weights.parts import part_of
from lavis_lstp.models.weights.reading import misfits
from lavis_lstp.models.weights.shapes import Shapes, below, count, layers_of, most
from lavis_lstp.models.where.temporal_sampler import TemporalSampler, sizes_in

_QUERY_TOKENS = "backbone.model.query_tokens"
_PROJECTION = "backbone.model.language_projection."
_LANGUAGE_MODEL = "backbone.model.language_model."
_PREFIXES = {
    "sampler": "sampler.",
    "flow": "flow.model.",
    "vision": "backbone.model.vision_model.",
    "qformer": "backbone.model.qformer.",
}


def fit(
    state_dict: Mapping[str, Tensor], part: str, *, allowed_missing: Iterable[str] = (), layers_only: bool = False
) -> tuple[list[str], list[str]]:
    """Compares a part with the module of its sizes.

    Args:
        part: sampler, flow, vision, qformer, query_tokens, projection, or language_model, adapters included.
        allowed_missing: keys, or patterns with * and ?.
        layers_only: what lies in no numbered layer may be missing too.

    Returns:
        The keys that are missing and allowed to, and what does not fit, in words; [] = it is whole.
    """
    members = (part, "lora") if part == "language_model" else (part,)
    given = {key: value for key, value in state_dict.items() if part_of(key) in members}
    try:
        with torch.device("meta"):
            own = _expected(state_dict, given, part)
    except (ConfigError, WeightsError) as error:
        return [], [str(error)]
    allowed = [*allowed_missing, *(key for key in own if layers_only and not re.search(r"\.\d+\.", key))]
    return misfits(own, given, allowed)


def _expected(state_dict: Mapping[str, Tensor], given: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Key -> empty tensor of a part, where tied weights are one tensor."""
    if part == "query_tokens":
        shapes = {key: value.shape for key, value in state_dict.items()}
        width = most(shapes, (r"\.qformer\.encoder\..*LayerNorm\.weight", 0), (_QUERY_TOKENS, 2))
        return {_QUERY_TOKENS: torch.empty(1, most(shapes, (_QUERY_TOKENS, 1)) or 1, width or 1)}
    if part == "projection":
        return _named(_PROJECTION, _projection(state_dict))
    if part == "language_model":
        return _language_model(given)
    prefix = _PREFIXES[part]
    build = {"sampler": _sampler, "flow": _raft, "vision": _vision, "qformer": _qformer}[part]
    return _named(prefix, build(below(prefix, given)))


def _named(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in module.state_dict(keep_vars=True).items()}


# ---- sizes off shapes -----------------------------------------------------------------------------------------


def _configured(config_class: type, **sizes: Any) -> Any:
    """A config with the sizes that are known; heads show in few shapes, and one fits all others."""
    return config_class(**{name: size for name, size in sizes.items() if size is not None})


# ---- the modules ----------------------------------------------------------------------------------------------


def _sampler(shapes: Shapes) -> nn.Module:
    # a lone BERT has no flow or cross-attention, so that the defaults stand for them; its heads show in no shape
    sizes = sizes_in(shapes)
    sizes.setdefault("num_heads", 1)
    sizes["fusion_layer"] = min(sizes.get("fusion_layer", 6), sizes["num_layers"])
    return TemporalSampler(**sizes)


def _raft(shapes: Shapes) -> nn.Module:
    from torchvision.models.optical_flow import raft_large

    return raft_large(weights=None, progress=False)


def _vision(shapes: Shapes) -> nn.Module:
    from transformers import Blip2VisionConfig, Blip2VisionModel  # InstructBLIP's has the same names

    patch = most(shapes, (r"patch_embedding\.weight", 3))
    positions = most(shapes, ("position_embedding", 1))
    config = _configured(
        Blip2VisionConfig,
        hidden_size=most(shapes, (r"layer_?norm\d?\.weight$", 0)),
        intermediate_size=most(shapes, (r"mlp\.fc1\.", 0), (r"mlp\.fc2\.weight", 1)),
        num_hidden_layers=count(layers_of(shapes, r"encoder\.layers\.(\d+)\.")),
        num_attention_heads=1,
        patch_size=patch,
        image_size=patch and positions and patch * math.isqrt(positions - 1),
    )
    return Blip2VisionModel(config)


def _qformer(shapes: Shapes) -> nn.Module:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel, InstructBlipQFormerConfig, InstructBlipQFormerModel

    layers = count(layers_of(shapes, r"encoder\.layer\.(\d+)\."))
    crossed = layers_of(shapes, r"encoder\.layer\.(\d+)\.crossattention\.")
    steps = Counter(after - before for before, after in zip(crossed, crossed[1:], strict=False))
    sizes: dict[str, Any] = {
        "hidden_size": most(shapes, (r"encoder\..*LayerNorm\.weight$", 0)),
        "intermediate_size": most(shapes, (r"intermediate_query\.", 0), (r"output_query\.dense\.weight", 1)),
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "cross_attention_frequency": steps.most_common(1)[0][0] if steps else max(layers, 1),
        "encoder_hidden_size": most(shapes, (r"crossattention\.attention\.(key|value)\.weight", 1)),
    }
    if not any(name.startswith("embeddings.") for name in shapes):
        return Blip2QFormerModel(_configured(Blip2QFormerConfig, **sizes))
    sizes["vocab_size"] = most(shapes, ("word_embeddings", 0))
    sizes["max_position_embeddings"] = most(shapes, ("position_embeddings", 0))
    return InstructBlipQFormerModel(_configured(InstructBlipQFormerConfig, **sizes))


def _projection(state_dict: Mapping[str, Tensor]) -> nn.Module:
    """As wide as the Q-Former and the language model, where they are there."""
    shapes = {key: value.shape for key, value in state_dict.items()}
    size_in = most(shapes, (r"\.qformer\.encoder\..*LayerNorm\.weight", 0), (rf"{_PROJECTION}weight", 1))
    size_out = most(shapes, (rf"{_LANGUAGE_MODEL}.*norm\.weight$", 0), (rf"{_PROJECTION}(weight|bias)", 0))
    return nn.Linear(size_in or 1, size_out or 1)


# ---- the language model, with adapters or without ---------------------------------------------------------------


def _language_model(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What it must have under the names that peft, or no peft, gives the weights in `given`."""
    wrapped = any(key.startswith(_LANGUAGE_MODEL + WRAPPER) for key in given if MARK not in key)
    begin = _LANGUAGE_MODEL + (WRAPPER if wrapped else "")
    adapted = {key.partition(MARK)[0] for key in given if MARK in key}
    shapes = below(begin, {key.replace(ORIGINAL, "."): value for key, value in given.items() if MARK not in key})
    if all(MARK in key for key in given):  # the frozen rest is not in the file
        return _adapters(given, dict.fromkeys(_evenly(adapted)))
    module = _of_kind(shapes)
    own, linear = {}, {}
    for name, value in _named(begin, module).items():
        original = f"{name.rpartition('.')[0]}{ORIGINAL}{name.rpartition('.')[2]}"
        own[original if original in given else name] = value
    targets = {layer.rpartition(".")[2] for layer in adapted}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in targets:
            linear[begin + name] = layer.weight.shape
    return own | _adapters(given, linear)


def _adapters(given: Mapping[str, Tensor], layers: Mapping[str, torch.Size | None]) -> dict[str, Tensor]:
    """A and B beside each of the layers; None = of the sizes that they have."""
    halves = {key: value.shape for key, value in given.items() if MARK in key}
    rank = most(halves, (r"\.lora_A\.", 0), (r"\.lora_B\.", 1)) or 1
    own = {}
    for layer, shape in layers.items():
        down, up = f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"
        size_in = shape[1] if shape else most(halves, (re.escape(down), 1))
        size_out = shape[0] if shape else most(halves, (re.escape(up), 0))
        own |= {down: torch.empty(rank, size_in or 1), up: torch.empty(size_out or 1, rank)}
    return own


def _evenly(adapted: Iterable[str]) -> list[str]:
    """The places of adapters, and those that one layer has and another of the same stack has not."""
    stacks: dict[str, tuple[set[int], set[str]]] = {}
    places = set(adapted)
    for place in adapted:
        if match := re.match(r"(.*?\.)(\d+)(\..*)", place):
            numbers, rests = stacks.setdefault(match[1], (set(), set()))
            numbers.add(int(match[2]))
            rests.add(match[3])
    for stack, (numbers, rests) in stacks.items():
        places |= {f"{stack}{number}{rest}" for number in range(max(numbers) + 1) for rest in rests}
    return sorted(places)


def _of_kind(shapes: Shapes) -> nn.Module:
    """LLaMA, T5 or OPT.

    Raises:
        WeightsError: none of them.
    """
    for sign, build in ((r"model\.layers\.\d", _llama), (r"(en|de)coder\.block\.\d", _t5), (r"model\.decoder\.", _opt)):
        if any(re.match(sign, name) for name in shapes):
            return build(shapes)
    raise WeightsError(f"no layers of LLaMA, T5 or OPT among its {len(shapes)} keys, first '{min(shapes)}'")


def _llama(shapes: Shapes) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = _configured(
        LlamaConfig,
        hidden_size=most(shapes, (r"norm\.weight$", 0)),
        intermediate_size=most(shapes, (r"mlp\.(gate|up)_proj\.", 0), (r"mlp\.down_proj\.", 1)),
        num_hidden_layers=count(layers_of(shapes, r"model\.layers\.(\d+)\.")),
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=most(shapes, (r"(embed_tokens|lm_head)\.weight", 0)),
    )
    return LlamaForCausalLM(config)


def _t5(shapes: Shapes) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    from lavis_lstp.models.answer.loading import untie

    inner = most(shapes, (r"SelfAttention\.[qkv]\.weight", 0))
    heads = most(shapes, ("relative_attention_bias", 1))
    if not (inner and heads and inner % heads == 0):
        heads = 1
    gated = any(".wi_0." in name for name in shapes)
    config = _configured(
        T5Config,
        d_model=most(shapes, (r"norm\.weight$", 0)),
        d_kv=inner and inner // heads,
        num_heads=heads,
        d_ff=most(shapes, (r"\.wi(_[01])?\.weight", 0), (r"\.wo\.weight", 1)),
        num_layers=count(layers_of(shapes, r"encoder\.block\.(\d+)\.")),
        num_decoder_layers=count(layers_of(shapes, r"decoder\.block\.(\d+)\.")),
        relative_attention_num_buckets=most(shapes, ("relative_attention_bias", 0)),
        vocab_size=most(shapes, (r"(shared|embed_tokens|lm_head)\.weight", 0)),
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=False,
    )
    model = T5ForConditionalGeneration(config)
    untie(model)  # FLAN-T5's output layer has a weight of its own
    return model


def _opt(shapes: Shapes) -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    hidden = most(shapes, (r"norm\.weight$", 0))
    positions = most(shapes, ("embed_positions", 0))
    config = _configured(
        OPTConfig,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=most(shapes, (r"fc1\.", 0), (r"fc2\.weight", 1)),
        num_hidden_layers=count(layers_of(shapes, r"model\.decoder\.layers\.(\d+)\.")),
        num_attention_heads=1,
        max_position_embeddings=positions and max(positions - 2, 1),  # OPT's table begins with two rows for padding
        vocab_size=most(shapes, (r"(embed_tokens|lm_head)\.weight", 0)),
    )
    return OPTForCausalLM(config)
