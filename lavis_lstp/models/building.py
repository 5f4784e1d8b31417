"""A `model` section -> the parts that `LSTP` is made of, and the settings that do not go together.

In: a complete section (`variants.complete`). Out: keyword arguments of `LSTP`. No other code sees a model's config; the
parts take flat arguments. A part that the section does not use is not built, and its weights are not asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lavis_lstp.config.model import SEE_FRAMES, check_scorer, check_together, used_parts
from lavis_lstp.data.store import default_store
from lavis_lstp.errors import ConfigError, WeightsError, unknown_name
from lavis_lstp.models.answer.answerer import build_answerer
from lavis_lstp.models.answer.generation import checked
from lavis_lstp.models.answer.tiny_tokenizer import tiny_tokenizer
from lavis_lstp.models.refinement import Refinement
from lavis_lstp.models.weights.hub import require_weights, where_from, where_to_put
from lavis_lstp.models.weights.reading import load_bert_into_sampler
from lavis_lstp.models.where.chooser import Chooser, SamplerScorer
from lavis_lstp.models.where.flow import build_flow
from lavis_lstp.models.where.frame_selector import build_selector
from lavis_lstp.models.where.scorers import Eyes, FrameScorer, build_scorer
from lavis_lstp.models.where.temporal_sampler import TemporalSampler

LOSSES = ("lm", "span")


def build_parts(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `LSTP`.

    Raises:
        ConfigError, WeightsError: a setting is wrong, or weights are missing or do not fit; one line on which.
    """
    for key in ("train", "losses"):
        if isinstance(cfg[key], str):
            raise ConfigError(f"model.{key} must be a list, got '{cfg[key]}'; write [{cfg[key]}]")
    selector = build_selector(**cfg["selector"], mask_padding=cfg["mask_padding"])
    check_scorer(cfg)
    require_weights(cfg)
    answerer = build_backbone(**cfg["backbone"], fusion=cfg["fusion"], lora=cfg["lora"])
    refinement = {key: value for key, value in cfg["refinement"].items() if key != "in_loop"}
    used = used_parts(cfg)
    chooser = Chooser(
        signal=build_flow(**cfg["flow"]) if used.flow else None,
        scorer=_scorer(cfg, answerer) if used.sampler else None,
        frame_scorer=_frame_scorer(cfg, answerer) if used.scorer else None,
        eyes=Eyes(answerer) if cfg["backbone"]["source"] in SEE_FRAMES else None,
        selector=selector,
        seed=cfg["selection_seed"],
    )
    chooser.keep_in(default_store() if cfg["store"] else None)
    return {
        "chooser": chooser,
        "answerer": answerer,
        "prompt": cfg["prompt"],
        "answer_template": cfg["answer_template"],
        "train": cfg["train"] or (),
        "losses": cfg["losses"],
        "refinement": Refinement(**refinement) if cfg["refinement"]["in_loop"] else None,
        "mask_padding": cfg["mask_padding"],
        "frozen_dropout": cfg["frozen_dropout"],
        "generation": cfg["generation"],
    }


def _scorer(cfg: Mapping[str, Any], answerer: nn.Module) -> SamplerScorer:
    section = cfg["sampler"]
    tokenizer = sampler_tokenizer(section["tokenizer"], answerer)
    return SamplerScorer(
        _sampler(section, len(tokenizer), cfg["backbone"]["seed"]),
        tokenizer,
        mode=section["mode"],
        prompt=cfg["sampler_prompt"],
        max_tokens=section["max_text_tokens"],
        window=section["window"],
        overlap=section["overlap"],
    )


def _frame_scorer(cfg: Mapping[str, Any], answerer: nn.Module) -> FrameScorer:
    asked = {"template": cfg["prompt"], "answer_template": cfg["answer_template"]}
    return build_scorer(**cfg["scorer"], answerer=answerer, **asked)


def build_backbone(
    family: str = "instructblip",
    *,
    source: str = "hub",
    gradient_checkpointing: bool = False,
    compile: bool = False,
    lora: Mapping | None = None,
    **settings: Any,
) -> nn.Module:
    """The answerer of a `model.backbone` section.

    Args:
        source: whose model it is, a key of `config.model.SOURCES`.
        lora: arguments of `lora.add_lora`; None = no adapters.
        settings: of the source's builder, see there.

    Raises:
        WeightsError: neither weights nor sizes are given, or the weights are missing.
        ConfigError: a setting is not known, or this machine cannot follow it.
    """
    answerer = build_answerer(source, {"family": family, **settings})
    if lora:
        answerer.add_lora(**lora, seed=settings.get("seed", 0))
    if gradient_checkpointing:
        answerer.checkpoint_gradients()
    if compile:
        answerer.compile_layers()
    return answerer


def sampler_tokenizer(path: str | None, answerer: nn.Module):
    """The temporal sampler's tokenizer, BERT's: from `path`, else the Q-Former's own, else the built-in one.

    The Q-Former's is BERT's too, but cuts long texts at their beginning; the sampler reads the beginning (published).

    Raises:
        WeightsError: there is none at `path`.
    """
    if not path:
        tokenizer = copy.deepcopy(getattr(answerer, "qformer_tokenizer", None)) or tiny_tokenizer(bos=False)
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
    of_others = ("tokenizer", "mode", "weights", "max_text_tokens", "window", "overlap")
    sizes = {key: value for key, value in cfg.items() if key not in of_others}
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
    scorer, sampler_prompt = model.chooser.scorer, "{question}"
    numbers = {"backbone.max_text_tokens": model.backbone.max_text_tokens}
    if scorer is not None:
        numbers["sampler.max_text_tokens"], sampler_prompt = scorer.max_tokens, scorer.prompt
        scorer.sampler.mode_layers(scorer.mode)
        if scorer.window is not None and not model.mask_padding:
            raise ConfigError("model.sampler.window does not go with mask_padding: false; padding has no window")
    if model.refinement:
        numbers["refinement.smooth"] = model.refinement.smooth
        numbers["refinement.max_new_tokens"] = model.refinement.max_new_tokens
    for key, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"model.{key} must be a whole number of at least 1, got {value!r}")
    for loss in model.losses:
        if loss not in LOSSES:
            raise ConfigError(unknown_name("loss (model.losses)", loss, LOSSES))
    own = model.backbone
    checked(model.generation, encoder_decoder=own.is_encoder_decoder, num_tokens=own.num_tokens)
    check_together(
        train=model.train_parts,
        losses=model.losses,
        in_loop=bool(model.refinement),
        prompt=model.prompt,
        sampler_prompt=sampler_prompt,
        answer_template=model.answer_template,
    )
