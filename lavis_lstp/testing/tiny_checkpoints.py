"""Tiny weights in the layout of the published ones: `python -m lavis_lstp.testing.tiny_checkpoints OUT`.

Out: folders shaped like the hub's (config.json with its odd ids, safetensors in one file or in shards, tokenizers of
the published classes) and files like those of LSTP, RAFT and BERT, with seeded random numbers. Names, ids and file
kinds are the published ones, only sizes are small, so that what runs on them runs on the 7B weights by the same code
path. Good for tests and for debugging a config on a laptop.

Every number is drawn from (seed, name of the weight): the same bytes in every run and under every transformers version.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavis_lstp.errors import ConfigError, LstpError, unknown_name
from lavis_lstp.files import write_json
from lavis_lstp.models.backbone import DTYPES, IMAGE_MEAN, IMAGE_STD
from lavis_lstp.testing.tiny_tokenizers import (
    Files,
    bert_files,
    bert_vocabulary,
    llama_files,
    t5_files,
    vocabulary_size,
)

MARKER = "tiny_checkpoints.json"
"""What a folder was written with; only a folder that has it is written to again."""


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


# ---- numbers --------------------------------------------------------------------------------------------------


def random_weight(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """float32 numbers that depend on seed and name alone: around 1 for norms, else about 1/sqrt(inputs) wide."""
    generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
    values = torch.randn(tuple(shape), generator=generator)
    if name.endswith("running_var") or ("norm" in name.lower() and name.endswith("weight") and len(shape) == 1):
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
        "intermediate_size": 2 * sizes.text_width - 8,
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
        "d_ff": 2 * sizes.text_width - 8,
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


def _backbone_config(family: str, text_config: dict[str, Any], sizes: Sizes, dtype: str) -> dict[str, Any]:
    qformer = {
        "vocab_size": len(bert_vocabulary()) + (family == "instructblip"),  # and [DEC]
        "hidden_size": sizes.qformer_width,
        "intermediate_size": 2 * sizes.qformer_width + 8,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "encoder_hidden_size": sizes.vision_width,
        "cross_attention_frequency": 2,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
    }
    vision = {
        "hidden_size": sizes.vision_width,
        "intermediate_size": 2 * sizes.vision_width + 8,
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
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(
            getattr(transformers, f"{kind}Config").from_dict(json.loads(json.dumps(config)))
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


def _write_backbone(
    folder: Path,
    family: str,
    text_config: Callable[[Sizes, int], dict[str, Any]],
    tokenizer: Files,
    *,
    shards: int,
    sizes: Sizes,
    seed: int,
    dtype: str,
) -> None:
    config = _backbone_config(family, text_config(sizes, vocabulary_size(tokenizer)), sizes, dtype)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    ids = {name: config["text_config"][name] for name in ids if name in config["text_config"]}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    write_json(folder / "preprocessor_config.json", _preprocessor(family, sizes.image_size))
    weights = backbone_weights(config, seed)
    weights = {name: value for name, value in weights.items() if not name.endswith("coder.embed_tokens.weight")}
    _write_safetensors(folder, weights, dtype, shards)
    _write_files(folder, tokenizer)
    if family == "instructblip":
        _write_files(folder / "qformer_tokenizer", bert_files(qformer=True))


def write_instructblip_vicuna(folder: Path, *, sizes: Sizes = Sizes(), seed: int = 0, dtype: str = "float32") -> None:
    """Salesforce/instructblip-vicuna-7b: InstructBLIP over LLaMA, in three shards."""
    settings = {"shards": 3, "sizes": sizes, "seed": seed, "dtype": dtype}
    _write_backbone(folder, "instructblip", _llama_config, llama_files(), **settings)


def write_instructblip_t5(folder: Path, *, sizes: Sizes = Sizes(), seed: int = 0, dtype: str = "float32") -> None:
    """Salesforce/instructblip-flan-t5-xl: InstructBLIP over T5, in two shards."""
    settings = {"shards": 2, "sizes": sizes, "seed": seed, "dtype": dtype}
    _write_backbone(folder, "instructblip", _t5_config, t5_files(truncation_side="left"), **settings)


def write_blip2_t5(folder: Path, *, sizes: Sizes = Sizes(), seed: int = 0, dtype: str = "float32") -> None:
    """Salesforce/blip2-flan-t5-xl: BLIP-2 over T5, in one file; its Q-Former reads no text."""
    settings = {"shards": 1, "sizes": sizes, "seed": seed, "dtype": dtype}
    _write_backbone(folder, "blip2", _t5_config, t5_files(), **settings)


# ---- files ----------------------------------------------------------------------------------------------------


def _write_files(folder: Path, files: Files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _write_safetensors(folder: Path, weights: Mapping[str, Tensor], dtype: str, shards: int = 1) -> None:
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


WRITERS: dict[str, Callable[..., None]] = {
    "instructblip-vicuna-7b": write_instructblip_vicuna,
    "instructblip-flan-t5-xl": write_instructblip_t5,
    "blip2-flan-t5-xl": write_blip2_t5,
}


def write_all(
    out: str | os.PathLike,
    *,
    only: Iterable[str] | None = None,
    sizes: Sizes = Sizes(),
    seed: int = 0,
    dtype: str = "float32",
) -> dict[str, Path]:
    """Writes everything, or what `only` names, under `out`; each folder and file is complete or absent.

    Returns:
        name -> path.

    Raises:
        ConfigError: an unknown name, or `out` holds something that this function did not write.
    """
    out = Path(out)
    names = list(WRITERS) if only is None else list(only)
    for name in names:
        if name not in WRITERS:
            raise ConfigError(unknown_name("tiny checkpoint", name, WRITERS))
    if dtype not in DTYPES:
        raise ConfigError(unknown_name("dtype", dtype, DTYPES))
    if out.exists() and not out.is_dir():
        raise ConfigError(f"'{out}' is a file; expected a folder to write tiny checkpoints to")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise ConfigError(
            f"'{out}' is not empty and has no {MARKER}: expected a new folder or one of tiny checkpoints; nothing "
            "was written"
        )
    write_json(out / MARKER, {"written_by": "lavis_lstp.testing.tiny_checkpoints"})
    return {name: _replace(out / name, WRITERS[name], sizes=sizes, seed=seed, dtype=dtype) for name in names}


def _replace(path: Path, write: Callable[..., None], **settings) -> Path:
    """Lets `write` make a folder or file beside `path` and puts it in its place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(partial, **settings)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
    return path


# ---- command line ---------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lavis_lstp.testing.tiny_checkpoints",
        description="Write tiny random weights in the layout of the published ones.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder, or one that this command wrote")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of {', '.join(WRITERS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", help=", ".join(DTYPES))
    parser.add_argument("--image-size", type=int, default=Sizes.image_size, help="px, a multiple of 14")
    parser.add_argument("--queries", type=int, default=Sizes.queries, help="query tokens; published: 32")
    args = parser.parse_args(argv)
    sizes = Sizes(image_size=args.image_size, queries=args.queries)
    try:
        written = write_all(args.out, only=args.only, sizes=sizes, seed=args.seed, dtype=args.dtype)
    except LstpError as error:
        print(error, file=sys.stderr)
        return 2
    for path in written.values():
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        print(f"{path}  {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
    print(f"use a folder by the option model.backbone.weights={args.out / 'instructblip-vicuna-7b'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
