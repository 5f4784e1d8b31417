"""Tiny weights in the layout of the published ones: `python -m lavis_lstp.testing.tiny_checkpoints OUT`.

Out: folders shaped like the hub's and files like those of LSTP, RAFT, BERT and LAVIS, under the names that the model
configs look for, so that `LAVIS_LSTP_WEIGHTS=OUT` takes the place of the hub. Names, ids and kinds of files are the
published ones, only sizes are small (RAFT's are not): what runs on them runs on the 7B weights by the same code path.
Good for tests, and for debugging a config on a laptop.

The numbers are seeded noise. LSTP's checkpoints hold the tiny Vicuna backbone's own frozen weights and other numbers
for what the published recipe trains.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavis_lstp.errors import ConfigError, LstpError, unknown_name
from lavis_lstp.files import temporary, write_json
from lavis_lstp.models.answer.loading import DTYPES
from lavis_lstp.models.weights.hub import SIZES_FILE
from lavis_lstp.testing.published_layout import bert_shapes, lavis_shapes, raft_shapes, sampler_shapes
from lavis_lstp.testing.tiny_backbones import (
    BACKBONES,
    Sizes,
    backbone_config,
    backbone_weights,
    random_weights,
    write_backbone,
    write_files,
    write_safetensors,
)
from lavis_lstp.testing.tiny_tokenizers import bert_files, bert_vocabulary
from lavis_lstp.testing.tiny_video_llms import VIDEO_LLMS, can_be_written, write_video_llm

MARKER = SIZES_FILE
"""File with the settings and sizes of a folder; only a folder that has it is written to again."""
DEFAULT = Sizes()
NUM_FRAMES = 8
"""Of a video, in the options that are printed."""
STILL = ("lstp_image_instruct", "lstp_text_instruct")
"""Data sets that have no number of frames."""
LORA_RANK = 8
LORA_TARGETS = {"llama": ("q_proj", "v_proj"), "t5": ("q", "v")}
TRAINED = ("qformer.", "query_tokens", "language_projection.")
"""What the published image and video recipe trains of the backbone."""


# ---- BERT, RAFT -----------------------------------------------------------------------------------------------


def write_bert(folder: Path, *, sizes: Sizes, seed: int, dtype: str) -> None:
    """google-bert/bert-base-uncased: of the sampler's sizes, so that a sampler can start from it."""
    width, vocab_size = sizes.sampler_width, len(bert_vocabulary())
    config = {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": sizes.inner(width),
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": sizes.positions,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.sampler_layers,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": vocab_size,
    }
    write_json(folder / "config.json", config)
    shapes = bert_shapes(
        width=width,
        layers=sizes.sampler_layers,
        inner=sizes.inner(width),
        vocab_size=vocab_size,
        positions=sizes.positions,
    )
    write_safetensors(folder, random_weights(shapes, seed), dtype)
    write_files(folder, bert_files())


def raft_weights(seed: int) -> dict[str, Tensor]:
    """Of real size, under princeton-vl's names without `module.`; `norm3` is `downsample.1` under another name."""
    weights = random_weights(raft_shapes(), seed)
    for name in weights:
        if ".norm3." in name:
            weights[name] = weights[name.replace(".norm3.", ".downsample.1.")]
    return weights


def write_raft(path: Path, *, sizes: Sizes, seed: int, dtype: str) -> None:
    """raft-sintel.pth: 21 MB, keys that begin with `module.`, float32 whatever `dtype`."""
    _save(path, {f"module.{name}": value for name, value in raft_weights(seed).items()})


# ---- LSTP -----------------------------------------------------------------------------------------------------


def lstp_state_dict(
    *, backbone: str = "instructblip-vicuna-7b", sizes: Sizes = DEFAULT, seed: int = 0, lora: bool = False
) -> dict[str, Tensor]:
    """A whole published checkpoint: `model.`, `temporal_encoder.` and `of_extractor.`.

    Args:
        backbone: a name of BACKBONES.
        lora: with adapters on the language model, named as peft 0.4 did (today's peft says `q_proj.base_layer.weight`
            where that said `q_proj.weight`).
    """
    config = backbone_config(backbone, sizes)
    model = backbone_weights(config, seed)
    trained = {name: value.shape for name, value in model.items() if name.startswith(TRAINED)}
    model.update(random_weights(trained, seed + 1))
    unused = {f"temporal_projection.{end}": model[f"language_projection.{end}"].shape for end in ("weight", "bias")}
    model.update(random_weights(unused, seed))
    if lora:
        model = _with_adapters(model, LORA_TARGETS[config["text_config"]["model_type"]], seed)
    sampler = sampler_shapes(
        width=sizes.sampler_width,
        layers=sizes.sampler_layers,
        heads=sizes.heads,
        inner=sizes.inner(sizes.sampler_width),
        vocab_size=len(bert_vocabulary()),
        positions=sizes.positions,
        fusion_layer=sizes.fusion_layer,
        flow_size=sizes.flow_size,
    )
    parts = {"model.": model, "temporal_encoder.": random_weights(sampler, seed), "of_extractor.": raft_weights(seed)}
    return {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}


def _with_adapters(model: dict[str, Tensor], targets: Iterable[str], seed: int) -> dict[str, Tensor]:
    language_model, result = "language_model.", {}
    for name, value in model.items():
        if not name.startswith(language_model):
            result[name] = value
            continue
        name = f"{language_model}base_model.model.{name.removeprefix(language_model)}"
        result[name] = value
        layer = name.removesuffix(".weight")
        if layer.rsplit(".", 1)[-1] in targets:
            size_out, size_in = value.shape
            down, up = f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"
            adapter = random_weights({down: [LORA_RANK, size_in], up: [size_out, LORA_RANK]}, seed)
            result.update({down: adapter[down], up: 0.1 * adapter[up]})
    return result


def write_lstp(path: Path, *, sizes: Sizes, seed: int, dtype: str, kind: str = "bare") -> None:
    """ColorfulAI/LSTP-Chat/LSTP-7B.ckpt, float32 whatever `dtype`.

    `kind` lightning: a training checkpoint, the same keys behind `module.` under "state_dict"; lora: with adapters.
    """
    state_dict = lstp_state_dict(sizes=sizes, seed=seed, lora=kind == "lora")
    if kind == "lightning":
        wrapped = {f"module.{name}": value for name, value in state_dict.items()}
        state_dict = {"epoch": 2, "global_step": 100, "pytorch-lightning_version": "2.1.0", "state_dict": wrapped}
    _save(path, state_dict)


# ---- LAVIS ----------------------------------------------------------------------------------------------------


def write_lavis(path: Path, *, sizes: Sizes, seed: int, dtype: str, projection: str) -> None:
    """A checkpoint of LAVIS's runner: BLIP-2 over T5 (`t5_proj`) or InstructBLIP over Vicuna (`llm_proj`)."""
    shapes = lavis_shapes(
        vision_width=sizes.vision_width,
        vision_layers=sizes.layers,
        vision_inner=sizes.inner(sizes.vision_width),
        patch_size=sizes.patch_size,
        patches=(sizes.image_size // sizes.patch_size) ** 2,
        width=sizes.qformer_width,
        layers=sizes.layers,
        inner=sizes.inner(sizes.qformer_width),
        positions=sizes.positions,
        queries=sizes.queries,
        projection=projection,
        text_width=sizes.text_width,
        vocab_size=len(bert_vocabulary()) + 1 if projection == "llm_proj" else None,
    )
    _save(path, {"model": random_weights(shapes, seed)})


# ---- everything -----------------------------------------------------------------------------------------------


def _write_video_llm(folder: Path, *, name: str, sizes: Sizes, seed: int, dtype: str) -> None:
    """Of sizes of its own."""
    write_video_llm(folder, name=name, seed=seed, dtype=dtype)


def _save(path: Path, value: dict[str, Any]) -> None:
    buffer = io.BytesIO()  # torch would put a file's name into the file
    torch.save(value, buffer)
    path.write_bytes(buffer.getvalue())


WRITERS: dict[str, tuple[str, Callable[..., None]]] = {
    **{name: (published.hub_id, partial(write_backbone, name=name)) for name, published in BACKBONES.items()},
    "bert-base-uncased": ("google-bert/bert-base-uncased", write_bert),
    "raft-sintel": ("raft-sintel.pth", write_raft),
    "lstp-7b": ("ColorfulAI/LSTP-Chat/LSTP-7B.ckpt", write_lstp),
    "lstp-7b-lightning": ("ColorfulAI/LSTP-Chat/LSTP-7B-lightning.ckpt", partial(write_lstp, kind="lightning")),
    "lstp-7b-lora": ("ColorfulAI/LSTP-Chat/LSTP-7B-lora.ckpt", partial(write_lstp, kind="lora")),
    "lavis-blip2-t5": ("lavis/blip2_pretrained_flant5xl.pth", partial(write_lavis, projection="t5_proj")),
    "lavis-instructblip-vicuna": (
        "lavis/instruct_blip_vicuna7b_trimmed.pth",
        partial(write_lavis, projection="llm_proj"),
    ),
    **{name: (model.hub_id, partial(_write_video_llm, name=name)) for name, model in VIDEO_LLMS.items()},
}
"""Name -> where below OUT, and what writes it."""


def write_all(
    out: str | os.PathLike,
    *,
    only: Iterable[str] | None = None,
    sizes: Sizes = DEFAULT,
    seed: int = 0,
    dtype: str = "float32",
) -> dict[str, Path]:
    """Writes everything, or the names in `only`, below `out`; each folder and file is complete or absent.

    Returns:
        name -> path.

    Raises:
        ConfigError: an unknown name or dtype, sizes no model can have, or `out` holds something that this function did
            not write.
    """
    out = Path(out)
    names = list(only) if only is not None else [name for name in WRITERS if name not in VIDEO_LLMS or can_be_written()]
    for name in names:
        if name not in WRITERS:
            raise ConfigError(unknown_name("tiny checkpoint", name, WRITERS))
    if dtype not in DTYPES:
        raise ConfigError(unknown_name("dtype", dtype, DTYPES))
    if sizes.image_size < sizes.patch_size or sizes.image_size % sizes.patch_size:
        raise ConfigError(f"expected an image size that is a multiple of {sizes.patch_size}, got {sizes.image_size}")
    if sizes.queries < 1:
        raise ConfigError(f"expected at least 1 query token, got {sizes.queries}")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"'{out}' is a file; expected a folder to write tiny checkpoints to")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise ConfigError(
            f"'{out}' is not empty and has no {MARKER}: expected a new folder or one that has tiny checkpoints; "
            "nothing was written"
        )
    write_json(out / MARKER, {"written_by": "lavis_lstp.testing.tiny_checkpoints", "model": model_sizes(sizes)})
    written = {}
    for name in names:
        place, write = WRITERS[name]
        written[name] = _replace(out / place, partial(write, sizes=sizes, seed=seed, dtype=dtype))
    return written


def _replace(path: Path, write: Callable[[Path], None]) -> Path:
    """Lets `write` make a folder or file beside `path`, then puts it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = temporary(path)
    try:
        write(partial_path)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial_path, path)
    finally:
        if partial_path.is_dir():
            shutil.rmtree(partial_path)
        partial_path.unlink(missing_ok=True)
    return path


def model_sizes(sizes: Sizes = DEFAULT) -> dict[str, dict[str, int]]:
    """What a full-size `model` section has otherwise: sizes that no config.json brings.

    RAFT is of real size here, and goes one of its twenty rounds.
    """
    sampler = {
        "hidden_size": sizes.sampler_width,
        "text_width": sizes.sampler_width,
        "num_layers": sizes.sampler_layers,
        "num_heads": sizes.heads,
        "intermediate_size": sizes.inner(sizes.sampler_width),
        "vocab_size": len(bert_vocabulary()),
        "max_positions": sizes.positions,
        "fusion_layer": sizes.fusion_layer,
        "flow_size": sizes.flow_size,
    }
    return {"sampler": sampler, "flow": {"flow_size": sizes.flow_size, "iterations": 1}}


def size_options(sizes: Sizes = DEFAULT) -> list[str]:
    """The same as `--options`, for a folder that is not LAVIS_LSTP_WEIGHTS, whose sizes are read from its own file."""
    sections = model_sizes(sizes).items()
    return [f"model.{section}.{key}={value}" for section, values in sections for key, value in values.items()]


def data_options(datasets: Sequence[str], sizes: Sizes = DEFAULT) -> list[str]:
    """The same of the data sets with these names, and few frames."""
    frames = [f"datasets.{name}.num_frames={NUM_FRAMES}" for name in datasets if name not in STILL]
    return [*(f"datasets.{name}.image_size={sizes.image_size}" for name in datasets), *frames]


def options_for(path: str, sizes: Sizes = DEFAULT) -> list[str]:
    """The `--options` by which a recipe, an evaluation, or each step of a chain takes these weights.

    Raises:
        ConfigError: it is neither.
    """
    from lavis_lstp.commands.chain import find_chain, read_chain
    from lavis_lstp.config import project_files

    if path not in project_files("lstp/chains/*.yaml"):
        return [*size_options(sizes), *data_options(_datasets(path), sizes)]
    steps = [step for step in read_chain(find_chain(path)) if step.recipe]
    own = [f"{step.name}:{option}" for step in steps for option in data_options(_datasets(step.recipe), sizes)]
    return [*size_options(sizes), *own]


def _datasets(recipe: str) -> list[str]:
    from lavis_lstp.config import find_config, load_recipe

    expected = f"{recipe}: expected a recipe, an evaluation or one of the package's chains"
    try:
        found = load_recipe(find_config(recipe)).get("datasets")
    except ConfigError as error:
        raise ConfigError(f"{expected} ({error})") from None
    if not isinstance(found, Mapping):
        raise ConfigError(f"{expected}, with the section 'datasets'")
    return list(found)


# ---- command line ---------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lavis_lstp.testing.tiny_checkpoints",
        description="Write tiny random weights in the layout of the published ones.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder, or one that this command wrote")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of {', '.join(WRITERS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", help=f"of the folders: {', '.join(DTYPES)}")
    parser.add_argument("--image-size", type=int, default=DEFAULT.image_size, help="px, a multiple of 14")
    parser.add_argument("--queries", type=int, default=DEFAULT.queries, help="query tokens; published: 32")
    help_ = "write nothing; print the options that make this recipe, evaluation or chain tiny"
    parser.add_argument("--options-for", metavar="FILE", help=help_)
    args = parser.parse_args(argv)
    sizes = Sizes(image_size=args.image_size, queries=args.queries)
    try:
        if args.options_for:
            print(*options_for(args.options_for, sizes))
            return 0
        written = write_all(args.out, only=args.only, sizes=sizes, seed=args.seed, dtype=args.dtype)
    except LstpError as error:
        print(error, file=sys.stderr)
        return 2
    for path in written.values():
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        print(f"{path}  {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
    every = data_options(["NAME"], sizes)
    print(f"use them: LAVIS_LSTP_WEIGHTS={args.out}, whose sizes come along, with --options {' '.join(every)}")
    print("where NAME is each data set of the recipe; or, written out, --options of --options-for RECIPE")
    print(f"or one alone, such as model.backbone.weights={args.out / BACKBONES['instructblip-vicuna-7b'].hub_id}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
