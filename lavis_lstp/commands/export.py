"""`lavis-lstp export CHECKPOINT... OUT`: a model of ours -> a folder that plain transformers loads.

In: what `model.checkpoint` takes, one or several. Out: OUT/ is a model of transformers (config, safetensors,
tokenizers, processor) with LoRA merged into the language model, and OUT/sampler/ what transformers has not: the
temporal sampler, and RAFT where the model has weights of it, under our names, the sampler's tokenizer, and
in manifest.json the model section, as a checkpoint of a run has it. The way back is `checkpoint: OUT/sampler` with
`backbone.weights: OUT` and `sampler.tokenizer: OUT/sampler`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lavis_lstp.config.model import used_parts
from lavis_lstp.errors import ConfigError, unknown_name
from lavis_lstp.files import complete_folder, write_json
from lavis_lstp.models.answer.loading import DTYPES
from lavis_lstp.models.weights.hub import local_path
from lavis_lstp.models.where.flow import UNINITIALISED
from lavis_lstp.redaction import printable, without_secrets_in

if TYPE_CHECKING:
    from lavis_lstp.models.answer.qformer import Backbone
    from lavis_lstp.models.answer.video_llm import VideoLLM

MAX_SHARD = "5GB"
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


def export(
    checkpoints: Sequence[str],
    out: str | Path,
    *,
    name: str = "lstp_vicuna7b",
    model_type: str | None = None,
    recipe: str | None = None,
    dtype: str | None = None,
    options: Sequence[str] = (),
) -> list[str]:
    """Writes the folder `out`, complete or not at all.

    Args:
        checkpoints: over the base model's weights, the later over the earlier.
        name, model_type: of the model where neither a recipe nor the last checkpoint's manifest says it.
        recipe: a YAML file as for `--cfg-path`; its section `model` is used.
        dtype: of the backbone's weights, base model included; None = `model.backbone.dtype`. The sampler keeps its own.
        options: `model.a.b=c` overrides.

    Returns:
        Lines that say what was written.

    Raises:
        ConfigError: a model that transformers has not, `out` exists, or settings nobody knows.
        WeightsError: weights are missing or do not fit.
    """
    from lavis_lstp.inference.loading import model_config
    from lavis_lstp.models.weights.recorded import recorded_model

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(unknown_name("dtype (--dtype)", dtype, DTYPES))
    with complete_folder(out) as folder:
        if recipe:
            section = _section_of(recipe)
        else:
            section = {"arch": name, **({"model_type": model_type} if model_type else {})}
            section |= recorded_model(checkpoints[-1], options)
        model_class, config = model_config(section, checkpoints, options)
        if config.backbone.source not in ("hub", "transformers"):
            raise ConfigError(
                f"model.backbone.source is '{config.backbone.source}': transformers has no class for LAVIS's models; "
                "`lavis-lstp convert` turns LAVIS's checkpoints into weights for source 'hub'"
            )
        config.backbone.dtype = dtype or config.backbone.dtype
        config.backbone.merge_with({"quantization": None, "compile": False, "gradient_checkpointing": False})
        found = _own_parts_in(config.checkpoint)
        has_flow = config.flow.name.startswith("raft") and (
            "flow" in found or config.flow.weights not in (None, UNINITIALISED)
        )
        if not has_flow and config.flow.name.startswith("raft"):
            config.flow.weights = UNINITIALISED  # nobody has to download RAFT for an export without it
        whole = config.copy()
        if not used_parts(config).sampler:
            whole.selector.name = "lstp"  # the sampler is written, whether or not the run looked through it
            whole.selector.settings = {}
        model = model_class.from_config(whole).eval()
        merged = config.lora is not None
        _save_backbone(model.backbone, folder, config.backbone)
        _save_sampler(model, config, folder / "sampler", has_flow)
    fresh = "" if "sampler" in found else "; no checkpoint holds one, so it is as untrained as it was"
    return [
        f"{out}: {type(model.backbone.model).__name__} in {config.backbone.dtype}{', LoRA merged' if merged else ''}",
        f"{out}/sampler: the temporal sampler{' and RAFT' if has_flow else ''}{fresh}",
        f"to use it here: lavis-lstp ask VIDEO QUESTION --checkpoint {out}/sampler --options "
        f"model.backbone.weights={out} model.sampler.tokenizer={out}/sampler",
    ]


def _section_of(recipe: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from lavis_lstp.config import find_config

    section = OmegaConf.to_container(OmegaConf.load(find_config(recipe))).get("model")
    if not isinstance(section, dict) or not section.get("arch"):
        raise ConfigError(f"{recipe}: expected a section 'model' with the key 'arch'")
    return section


def _own_parts_in(checkpoints: Sequence[str] | str | None) -> set[str]:
    """Which of sampler and flow the checkpoints hold."""
    from lavis_lstp.models.weights.reading import load_state_dict_file, weights_file

    begins = {"sampler": ("sampler.", "temporal_encoder."), "flow": ("flow.", "of_extractor.", "fnet.")}
    paths = [checkpoints] if isinstance(checkpoints, str) else checkpoints or []
    keys = [key.removeprefix("module.") for path in paths for key in load_state_dict_file(weights_file(path))]
    return {part for part, begin in begins.items() if any(key.startswith(begin) for key in keys)}


def _save_backbone(backbone: Backbone | VideoLLM, folder: Path, config: Any) -> None:
    dtype = getattr(torch, config.dtype)
    backbone.merge_lora()  # before the cast: the adapters are held in float32, and so is everything else that learns
    backbone.model.to(dtype)
    model = backbone.model
    for section in model.config.sub_configs:
        getattr(model.config, section).dtype = dtype  # save_pretrained says it of the whole alone
    model.save_pretrained(folder, max_shard_size=MAX_SHARD)
    if hasattr(backbone, "processor"):
        backbone.processor.save_pretrained(folder)
        return
    _save_tokenizer(backbone.tokenizer, folder, config.weights)
    reads_text = backbone.qformer_tokenizer is not None
    if reads_text:
        _save_tokenizer(backbone.qformer_tokenizer, folder / "qformer_tokenizer", config.weights, "qformer_tokenizer")
    processor = type(model).__name__.replace("ForConditionalGeneration", "Processor")
    images = _image_processor(backbone, processor)
    write_json(folder / "preprocessor_config.json", images)
    if processor == "InstructBlipVideoProcessor":
        videos = {**images, "video_processor_type": "InstructBlipVideoVideoProcessor"}
        del videos["image_processor_type"]
        write_json(folder / "video_preprocessor_config.json", videos)
    settings = {"processor_class": processor, "num_query_tokens": backbone.num_query_tokens}
    write_json(folder / "processor_config.json", settings)


def _save_tokenizer(tokenizer: Any, folder: Path, name: str | None, subfolder: str = "") -> None:
    """The very files it was made of, which every release reads; of a built-in one, what this release writes.

    Args:
        name: folder or hub id that it came from; None = built in.
    """
    folder.mkdir(exist_ok=True)
    found = [path for file in TOKENIZER_FILES if name and (path := _cached(name, f"{subfolder}/{file}".lstrip("/")))]
    for path in found:
        shutil.copyfile(path, folder / path.name)
    if found:
        return
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":  # a name of transformers 5 that 4 does not know
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(file, settings)


def _cached(name: str, file: str) -> Path | None:
    """A file of a folder, or of the hub's cache, where `from_pretrained` has put it."""
    from huggingface_hub import try_to_load_from_cache

    if (folder := local_path(name)) is not None:
        return folder / file if (folder / file).is_file() else None
    cached = try_to_load_from_cache(name, file)
    return Path(cached) if isinstance(cached, str) else None


def _image_processor(backbone: Backbone, processor: str) -> dict[str, Any]:
    """Written by hand, because transformers 5 puts it where 4 does not look."""
    from lavis_lstp.models.pixels import IMAGE_MEAN, IMAGE_STD

    return {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": processor,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": backbone.image_size, "width": backbone.image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }


def _save_sampler(model: Any, config: Any, folder: Path, has_flow: bool) -> None:
    from omegaconf import OmegaConf
    from safetensors.torch import save_file

    folder.mkdir()
    parts = ("sampler.", "flow.") if has_flow else ("sampler.",)
    state = {key: value.contiguous() for key, value in model.state_dict().items() if key.startswith(parts)}
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    if config.sampler.tokenizer:
        _save_tokenizer(model.chooser.scorer.tokenizer, folder, config.sampler.tokenizer)
    else:
        _save_tokenizer(model.chooser.scorer.tokenizer, folder, config.backbone.weights, "qformer_tokenizer")
    section = OmegaConf.to_container(config)
    if section["model_type"] == "lora":  # its adapters are merged
        section["model_type"] = "base"
    section |= {"checkpoint": None, "lora": None, "train": [part for part in section["train"] or [] if part != "lora"]}
    section["sampler"] |= {"weights": None, "tokenizer": None}
    section["backbone"] |= {"weights": None, "config": None}
    section["flow"]["weights"] = UNINITIALISED if has_flow else None
    facts = {"written_by": "lavis-lstp export", "config": {"model": without_secrets_in(section)}}
    write_json(folder / "manifest.json", facts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lavis-lstp export",
        description="Write a folder that plain transformers loads, and the temporal sampler beside it.",
    )
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="run, its checkpoint, or a converted folder"
    )
    parser.add_argument("out", metavar="OUT", help="new folder")
    parser.add_argument("--cfg-path", metavar="RECIPE", help="YAML whose section model says what model it is")
    parser.add_argument("--model", default="lstp_vicuna7b", help="where no manifest says it; lstp_vicuna7b")
    parser.add_argument("--model-type", help="its type")
    parser.add_argument("--dtype", help=f"of the backbone: {', '.join(DTYPES)}; default model.backbone.dtype")
    parser.add_argument("--options", nargs="+", default=(), metavar="KEY=VALUE", help="model.a.b=c overrides")
    args = parser.parse_args(argv)
    lines = export(
        args.checkpoints,
        args.out,
        name=args.model,
        model_type=args.model_type,
        recipe=args.cfg_path,
        dtype=args.dtype,
        options=args.options,
    )
    print(printable("\n".join(lines)))
    return 0
