"""A `model` section -> the parts that `LSTP` is made of, and the settings that do not go together.

In: a complete section (`variants.complete`). Out: keyword arguments of `LSTP`. No other code sees a model's config; the
parts take flat arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lavis_lstp.errors import ConfigError, WeightsError, unknown_name
from lavis_lstp.models.answer.fusion import FrameFusion
from lavis_lstp.models.answer.generation import checked
from lavis_lstp.models.answer.loading import DTYPES
from lavis_lstp.models.answer.qformer import Backbone
from lavis_lstp.models.answer.tiny_tokenizer import tiny_tokenizer
from lavis_lstp.models.refinement import Refinement
from lavis_lstp.models.weights.hub import is_missing, local_path, where_from, where_to_put
from lavis_lstp.models.weights.reading import load_bert_into_sampler, weights_file
from lavis_lstp.models.where.flow import UNINITIALISED, build_flow
from lavis_lstp.models.where.frame_selector import build_selector
from lavis_lstp.models.where.temporal_sampler import TemporalSampler

LOSSES = ("lm", "span")
SOURCES = ("hub", "lavis")


def build_parts(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `LSTP`.

    Raises:
        ConfigError, WeightsError: a setting is wrong, or weights are missing or do not fit; one line on which.
    """
    for key in ("train", "losses"):
        if isinstance(cfg[key], str):
            raise ConfigError(f"model.{key} must be a list, got '{cfg[key]}'; write [{cfg[key]}]")
    require_weights(cfg)
    backbone = build_backbone(**cfg["backbone"], lora=cfg["lora"])
    tokenizer = sampler_tokenizer(cfg["sampler"]["tokenizer"], backbone)
    refinement = {key: value for key, value in cfg["refinement"].items() if key != "in_loop"}
    return {
        "flow": build_flow(**cfg["flow"]),
        "sampler": _sampler(cfg["sampler"], len(tokenizer), cfg["backbone"]["seed"]),
        "selector": build_selector(**cfg["selector"], mask_padding=cfg["mask_padding"]),
        "backbone": backbone,
        "fusion": FrameFusion(cfg["fusion"]),
        "sampler_tokenizer": tokenizer,
        "sampler_mode": cfg["sampler"]["mode"],
        "sampler_max_tokens": cfg["sampler"]["max_text_tokens"],
        "prompt": cfg["prompt"],
        "answer_template": cfg["answer_template"],
        "sampler_prompt": cfg["sampler_prompt"],
        "train": cfg["train"] or (),
        "losses": cfg["losses"],
        "refinement": Refinement(**refinement) if cfg["refinement"]["in_loop"] else None,
        "mask_padding": cfg["mask_padding"],
        "frozen_dropout": cfg["frozen_dropout"],
        "generation": cfg["generation"],
        "seed": cfg["selection_seed"],
    }


def require_weights(cfg: Mapping[str, Any]) -> None:
    """Says all that is missing, and before gigabytes of what is there are read.

    Raises:
        WeightsError: weights or tokenizers are not on this machine, and the hub does not answer.
    """
    given = cfg["checkpoint"] or []
    for path in [given] if isinstance(given, str) else given:
        weights_file(path)
    wanted = {"model.sampler.weights": "config.json", "model.sampler.tokenizer": "tokenizer_config.json"}
    if cfg["backbone"]["source"] == "hub":
        wanted["model.backbone.weights"] = "config.json"
    missing = {}
    for key, file in wanted.items():
        _, section, name = key.split(".")
        if cfg[section][name] and is_missing(cfg[section][name], file):
            missing.setdefault(cfg[section][name], []).append(key)
    raft = cfg["flow"]["weights"] if cfg["flow"]["name"].startswith("raft") else None
    if raft not in (None, UNINITIALISED) and local_path(raft) is None:
        missing[raft] = ["model.flow.weights"]
    if missing:
        listed = "; ".join(f"{name} ({', '.join(keys)}): {where_to_put(name)}" for name, keys in missing.items())
        raise WeightsError(
            f"missing weights, neither on this machine nor in the hub's cache, and the hub does not answer: {listed}. "
            "Each is a hub id that is cached or can be reached, or a folder with its files (config.json, "
            "*.safetensors, tokenizer files) downloaded from huggingface.co; raft-sintel.pth is in models.zip of "
            "princeton-vl/RAFT"
        )


def build_backbone(
    family: str = "instructblip",
    *,
    source: str = "hub",
    arch: str | None = None,
    model_type: str | None = None,
    weights: str | None = None,
    config: Mapping | None = None,
    dtype: str = "float32",
    seed: int = 0,
    max_text_tokens: int = 128,
    attention: str | None = None,
    quantization: str | None = None,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    lora: Mapping | None = None,
) -> Backbone:
    """From `weights` (hub id or folder), else with random ones of the sizes in `config`.

    Args:
        source: hub, or lavis for one of LAVIS's own models, named by `arch` and `model_type`.
        attention: transformers' attention implementation; None = its own choice.
        quantization: 8bit or 4bit, of the language model.
        lora: arguments of `lora.add_lora`; None = no adapters.

    Raises:
        WeightsError: neither is given, or the weights are missing.
        ConfigError: a setting is not known, or this machine cannot follow it.
    """
    if source not in SOURCES:
        raise ConfigError(unknown_name("source (model.backbone.source)", source, SOURCES))
    if dtype not in DTYPES:
        raise ConfigError(unknown_name("dtype (model.backbone.dtype)", dtype, DTYPES))
    common = {"weights": weights, "config": config, "dtype": dtype, "seed": seed, "max_text_tokens": max_text_tokens}
    if source == "hub":
        backbone = _hub_backbone(family, attention=attention, quantization=quantization, **common)
    else:
        from lavis_lstp.models.answer.lavis_models import build_lavis_backbone

        for key, value in (("attention", attention), ("quantization", quantization)):
            if value:
                raise ConfigError(
                    f"model.backbone.{key} is for source hub; LAVIS's own models have one way, set it to null"
                )
        backbone = build_lavis_backbone(arch, model_type, **common)
    if lora:
        backbone.add_lora(**lora, seed=seed)
    if gradient_checkpointing:
        backbone.checkpoint_gradients()
    if compile:
        backbone.compile_layers()
    return backbone


def _hub_backbone(
    family: str, *, weights: str | None, config: Mapping | None, quantization: str | None, seed: int, **settings
) -> Backbone:
    if weights:
        return Backbone.from_pretrained(weights, family=family, quantization=quantization, **settings)
    if quantization:
        raise ConfigError("model.backbone.quantization needs model.backbone.weights; random ones are not quantised")
    if not config:
        raise WeightsError(
            "model.backbone.weights is empty: expected a hub id or a folder, "
            "or model.backbone.config for random weights"
        )
    return Backbone.from_config_dict(config, family=family, seed=seed, **settings)


def sampler_tokenizer(path: str | None, backbone: Backbone):
    """The temporal sampler's tokenizer, BERT's: from `path`, else the Q-Former's own, else the built-in one.

    The Q-Former's is BERT's too, but cuts long texts at their beginning; the sampler reads the beginning (published).

    Raises:
        WeightsError: there is none at `path`.
    """
    if not path:
        tokenizer = copy.deepcopy(backbone.qformer_tokenizer) or tiny_tokenizer(bos=False)
        tokenizer.truncation_side = "right"
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**where_from(path))
    except (OSError, ValueError, ImportError) as error:
        raise WeightsError(
            f"no tokenizer at '{path}' (model.sampler.tokenizer): expected a hub id or a folder with "
            f"tokenizer files, such as bert-base-uncased; {where_to_put(path)}"
        ) from error


def _sampler(cfg: Mapping[str, Any], vocab_size: int, seed: int) -> TemporalSampler:
    sizes = {key: value for key, value in cfg.items() if key not in ("tokenizer", "mode", "weights", "max_text_tokens")}
    sizes["vocab_size"] = sizes["vocab_size"] or vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sampler = TemporalSampler(**sizes)
    if cfg["weights"]:
        load_bert_into_sampler(sampler, cfg["weights"])
    return sampler


def check_settings(model: nn.Module) -> None:
    """Settings of an `LSTP` that would otherwise fail, or do nothing, in the middle of a run.

    Raises:
        ConfigError: one line on which and why.
    """
    for key, value in (("train", model.train_parts), ("losses", model.losses)):
        if len(set(value)) < len(value):
            raise ConfigError(f"model.{key} names something twice: {list(value)}")
    numbers = {
        "sampler.max_text_tokens": model.sampler_max_tokens,
        "backbone.max_text_tokens": model.backbone.max_text_tokens,
    }
    if model.refinement:
        numbers["refinement.smooth"] = model.refinement.smooth
        numbers["refinement.max_new_tokens"] = model.refinement.max_new_tokens
    for key, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"model.{key} must be a whole number of at least 1, got {value!r}")
    for loss in model.losses:
        if loss not in LOSSES:
            raise ConfigError(unknown_name("loss (model.losses)", loss, LOSSES))
    checked(model.generation, encoder_decoder=model.backbone.is_encoder_decoder)
    if model.refinement and "span" not in model.losses:
        raise ConfigError("model.refinement.in_loop makes spans for the loss 'span'; add it to model.losses")
    learning = set(model.train_parts)
    for loss, trained_by_it in (("span", learning & {"sampler"}), ("lm", learning - {"sampler"})):
        if learning and bool(trained_by_it) != (loss in model.losses):
            parts_named = ", ".join(sorted(trained_by_it)) or "nothing"
            raise ConfigError(
                f"model.losses {list(model.losses)} and model.train {list(model.train_parts)} do not go together: "
                f"the loss '{loss}' trains {parts_named} of these; {'add' if trained_by_it else 'remove'} it"
            )
    model.sampler.mode_layers(model.sampler_mode)
    for key, field in (("prompt", "question"), ("sampler_prompt", "question"), ("answer_template", "answer")):
        if f"{{{field}}}" not in getattr(model, key):
            raise ConfigError(f"model.{key} must contain {{{field}}}, got {getattr(model, key)!r}")
