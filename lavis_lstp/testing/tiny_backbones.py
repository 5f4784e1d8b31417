"""Tiny InstructBLIP and BLIP-2 in the hub's layout: config, seeded numbers, folders.

In: sizes, a seed, a dtype. Out: folders with config.json and its odd ids, safetensors in one file or in shards, the
tokenizers of the published classes.

Every number is drawn from (seed, name of the weight): the same bytes in every run and under every transformers version.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavis_lstp.files import write_json
from lavis_lstp.models.pixels import IMAGE_MEAN, IMAGE_STD
from lavis_lstp.testing.published_layout import INTEGERS
from lavis_lstp.testing.tiny_tokenizers import (
    Files,
    bert_files,
    bert_vocabulary,
    llama_files,
    t5_files,
    vocabulary_size,
)


@dataclass(frozen=True)
class Sizes:
    """What is small. Widths differ from each other, so that no two weights fit by accident."""

    image_size: int = 28
    patch_size: int = 14
    layers: int = 2
    heads: int = 4
    vision_width: int = 48
    qformer_width: int = 32
    text_width: int = 64
    queries: int = 4
    sampler_width: int = 40
    sampler_layers: int = 12
    fusion_layer: int = 6
    flow_size: int = 32
    positions: int = 512

    def inner(self, width: int) -> int:
        """Width inside a feed-forward."""
        return 2 * width + 8


_NORM = re.compile(r"(norm[^.]*|\bln\w*|downsample\.1)\.(weight|gamma)$", re.IGNORECASE)


# ---- numbers --------------------------------------------------------------------------------------------------


def random_weight(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """float32 [*shape] by seed and name alone: near 1 for norms, else about 1/sqrt(inputs) wide; counters int64."""
    if name.endswith(INTEGERS):
        return torch.arange(math.prod(shape)).reshape(tuple(shape))
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    values = torch.randn(tuple(shape), generator=generator)
    if name.endswith("running_var") or (_NORM.search(name) and len(shape) == 1):
        return 1 + 0.1 * values.clamp(-3, 3)
    if len(shape) < 2:
        return 0.05 * values
    return values / math.sqrt(math.prod(shape[1:]))


def random_weights(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    return {name: random_weight(name, shape, seed) for name, shape in shapes.items()}


# ---- backbones ------------------------------------------------------------------------------------------------


def _llama_config(sizes: Sizes, vocab_size: int) -> dict[str, Any]:
    """The ids are wrong in the published file too (SPEC 6): the tokenizer's are pad = vocab_size - 1 and eos = 2."""
    return {
        "architectures": ["LLaMAForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": sizes.text_width,
        "intermediate_size": sizes.inner(sizes.text_width),
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": -1,
    }


def _t5_config(sizes: Sizes, vocab_size: int) -> dict[str, Any]:
    """FLAN-T5: gated feed-forward, an output matrix of its own, more rows than the tokenizer has ids."""
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": -(-(vocab_size + 1) // 32) * 32,
        "d_model": sizes.text_width,
        "d_kv": sizes.text_width // sizes.heads,
        "d_ff": sizes.inner(sizes.text_width),
        "num_layers": sizes.layers,
        "num_decoder_layers": sizes.layers,
        "num_heads": sizes.heads,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu",
        "is_gated_act": True,
        "is_encoder_decoder": True,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    }


@dataclass(frozen=True)
class Published:
    """A backbone on the hub, and what the tiny one has of it."""

    hub_id: str
    family: str
    tokenizer: Callable[[], Files]
    text_config: Callable[[Sizes, int], dict[str, Any]]
    shards: int


BACKBONES = {
    "instructblip-vicuna-7b": Published(
        "Salesforce/instructblip-vicuna-7b", "instructblip", llama_files, _llama_config, shards=3
    ),
    "instructblip-flan-t5-xl": Published(
        "Salesforce/instructblip-flan-t5-xl", "instructblip", partial(t5_files, "left"), _t5_config, shards=2
    ),
    "blip2-flan-t5-xl": Published("Salesforce/blip2-flan-t5-xl", "blip2", t5_files, _t5_config, shards=1),
}


def backbone_config(name: str, sizes: Sizes, dtype: str = "float32") -> dict[str, Any]:
    """config.json of the backbone that BACKBONES has under `name`."""
    family = BACKBONES[name].family
    text_config = BACKBONES[name].text_config(sizes, vocabulary_size(BACKBONES[name].tokenizer()))
    qformer = {
        "vocab_size": len(bert_vocabulary()) + (family == "instructblip"),  # and [DEC]
        "hidden_size": sizes.qformer_width,
        "intermediate_size": sizes.inner(sizes.qformer_width),
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "encoder_hidden_size": sizes.vision_width,
        "cross_attention_frequency": 2,
        "max_position_embeddings": sizes.positions,
        "layer_norm_eps": 1e-12,
    }
    vision = {
        "hidden_size": sizes.vision_width,
        "intermediate_size": sizes.inner(sizes.vision_width),
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }
    kind = {"instructblip": "InstructBlip", "blip2": "Blip2"}[family]
    names = {"instructblip": "instructblip", "blip2": "blip_2"}
    return {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "model_type": {"instructblip": "instructblip", "blip2": "blip-2"}[family],
        "image_token_index": None,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "is_encoder_decoder": text_config["model_type"] == "t5",
        "num_query_tokens": sizes.queries,
        "qformer_config": {"model_type": f"{names[family]}_qformer", **qformer},
        "text_config": text_config,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_decoder_only_language_model": text_config["model_type"] != "t5",
        "vision_config": {"model_type": f"{names[family]}_vision_model", **vision},
    }


def backbone_shapes(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of the weights of a backbone, as transformers' class for the config has them."""
    import transformers

    kind = config["architectures"][0].removesuffix("ForConditionalGeneration")
    # a padding id of -1 has no bearing on shapes, and makes transformers warn
    config = {**config, "text_config": {**config["text_config"], "pad_token_id": 0}}
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(
            getattr(transformers, f"{kind}Config").from_dict(config)
        )
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def backbone_weights(config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Weights of a backbone under all names of its state dict; T5's three names of its embeddings are one tensor."""
    weights = random_weights(backbone_shapes(config), seed)
    shared = weights.get("language_model.shared.weight")
    for stack in ("encoder", "decoder"):
        if shared is not None:
            weights[f"language_model.{stack}.embed_tokens.weight"] = shared
    return weights


def _preprocessor(family: str, image_size: int) -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_processor_type": "BlipImageProcessor",
        "image_std": list(IMAGE_STD),
        "processor_class": {"instructblip": "InstructBlipProcessor", "blip2": "Blip2Processor"}[family],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": image_size, "width": image_size},
    }


def write_backbone(folder: Path, *, name: str, sizes: Sizes, seed: int, dtype: str) -> None:
    """The folder of the backbone that BACKBONES has under `name`."""
    published = BACKBONES[name]
    config = backbone_config(name, sizes, dtype)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    ids = {name: config["text_config"][name] for name in ids if name in config["text_config"]}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    write_json(folder / "preprocessor_config.json", _preprocessor(published.family, sizes.image_size))
    weights = backbone_weights(config, seed)
    weights = {name: value for name, value in weights.items() if not name.endswith("coder.embed_tokens.weight")}
    write_safetensors(folder, weights, dtype, published.shards)
    write_files(folder, published.tokenizer())
    if published.family == "instructblip":
        write_files(folder / "qformer_tokenizer", bert_files(qformer=True))


# ---- files ----------------------------------------------------------------------------------------------------


def write_files(folder: Path, files: Files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write_safetensors(folder: Path, weights: Mapping[str, Tensor], dtype: str, shards: int = 1) -> None:
    """`model.safetensors`, or that many shards of about equal size with their index."""
    from safetensors.torch import save_file

    weights = {name: value.to(getattr(torch, dtype)).contiguous() for name, value in weights.items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    total = sum(value.nbytes for value in weights.values())
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    place, index = 0, {}
    for name, value in weights.items():
        part = min(place * shards // total, shards - 1)
        parts[part][name] = value
        index[name] = f"model-{part + 1:05}-of-{shards:05}.safetensors"
        place += value.nbytes
    for part, file in zip(parts, dict.fromkeys(index.values()), strict=True):
        save_file(part, folder / file, metadata={"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
