"""One of LAVIS's own BLIP-2 or InstructBLIP models as the backbone of LSTP: its parts, its checkpoint, its behaviour.

In: the name and type of a model in LAVIS's registry, and overrides of its YAML. Out: a `Backbone` around it. LAVIS
builds the model and loads its checkpoint by itself. It does so without complaint where the checkpoint lacks weights,
and downloads what it misses; both are looked after here. What learns is LSTP's decision, so what LAVIS froze is let go.
"""

from __future__ import annotations

import inspect
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lavis_lstp.errors import ConfigError, WeightsError, unknown_name
from lavis_lstp.models.answer.language import _left_padded
from lavis_lstp.models.answer.qformer import Backbone
from lavis_lstp.models.weights.hub import local_path, where_to_put

logger = logging.getLogger(__name__)

ARCHS = {"blip2_t5": "t5", "blip2_opt": "opt", "blip2_t5_instruct": "t5", "blip2_vicuna_instruct": "llm"}
"""LAVIS's name of the model -> how the names of its language model, tokenizer and projection begin."""
CHECKPOINT_KEYS = {"image_size", "load_finetuned", "load_pretrained", "finetuned", "pretrained"}
"""What LAVIS reads from a model's YAML beside the arguments of its class."""


class LavisBackbone(Backbone):
    """Around a LAVIS model; only the names of its parts and its casts differ.

    Args:
        model: LAVIS's.
        language: how the names of its language parts begin, a value of `ARCHS`.
        max_text_tokens: prompts and answers are cut to this many tokens.
        fusion: see `Backbone`.
    """

    def __init__(self, model: nn.Module, language: str, *, max_text_tokens: int = 128, fusion: str = "mean"):
        super().__init__(
            model,
            getattr(model, f"{language}_tokenizer"),
            model.tokenizer if getattr(model, "qformer_text_input", False) else None,
            max_text_tokens=max_text_tokens,
            fusion=fusion,
        )
        self.language = language
        self.PARTS = {
            "vision": ("model.visual_encoder.", "model.ln_vision."),
            "qformer": ("model.Qformer.",),
            "query_tokens": ("model.query_tokens",),
            "projection": (f"model.{language}_proj.",),
            "language_model": (f"model.{language}_model.",),
        }
        # LAVIS 1.0.2's copy of OPT; git main has transformers' own
        self._behind_queries = "query_embeds" in inspect.signature(self.language_model.forward).parameters
        begin_as_told(self.tokenizer)
        for module in model.modules():  # LAVIS puts a `train` without effect into a vision tower that it freezes
            vars(module).pop("train", None)

    @property
    def vision_model(self) -> nn.Module:
        return self.model.visual_encoder

    @property
    def qformer(self) -> nn.Module:
        return self.model.Qformer.bert

    @property
    def projection(self) -> nn.Linear:
        return getattr(self.model, f"{self.language}_proj")

    @property
    def language_model(self) -> nn.Module:
        return getattr(self.model, f"{self.language}_model")

    @property
    def image_size(self) -> int:
        tower = self.vision_model
        return tower.image_size if hasattr(tower, "image_size") else tower.input_resolution  # EVA's and CLIP's names

    def _vision(self, pixels: Tensor) -> Tensor:
        return self.model.ln_vision(self.vision_model(pixels))

    @property
    def _end_ids(self) -> list[int]:
        """An OPT ends with a line break, which LAVIS appends to what it trains on."""
        return [self.model.eos_token_id] if self.language == "opt" else super()._end_ids

    @torch.no_grad()
    def _generate(self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str], settings: Mapping):
        """As the parent's; LAVIS's copy of OPT goes on from token ids behind `query_embeds`, not from embeddings."""
        if not self._behind_queries:
            return super()._generate(prefix, prefix_mask, prompts, settings)
        inputs, mask = _left_padded(*self.prompt_inputs(prefix, prefix_mask, prompts))
        last = torch.tensor([ids[-1:] for ids in self._ids(prompts)], device=inputs.device)
        made = self.language_model.generate(
            input_ids=last,
            query_embeds=inputs[:, :-1],
            attention_mask=mask,
            pad_token_id=self._pad_id,
            eos_token_id=self._end_ids,
            **settings,
        )
        if isinstance(made, Tensor):
            return made[:, 1:]
        made.sequences = made.sequences[:, 1:]
        return made

    def layers(self) -> Iterator[nn.Module]:
        return (layer for part in (self.vision_model, self.qformer, self.language_model) for layer in _layers(part))


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """What the outermost lists of modules hold: LAVIS's classes have no base class in common."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList | nn.Sequential) else _layers(child)


def begin_as_told(tokenizer) -> None:
    """Lets texts begin with the tokenizer's begin mark. LAVIS gives Vicuna's tokenizer another one than its files have,
    by which InstructBLIP was trained; transformers 5 takes note and goes on with the old one."""
    begin = tokenizer("").input_ids[:1]
    if begin and tokenizer.bos_token is not None and begin != [tokenizer.bos_token_id]:
        tokenizer.add_bos_token = True  # the setter brings the begin mark up to date


# ---- building -----------------------------------------------------------------------------------------------------


def build_lavis_backbone(
    arch: str | None,
    model_type: str | None,
    *,
    weights: str | None = None,
    config: Mapping | None = None,
    dtype: str = "float32",
    seed: int = 0,
    max_text_tokens: int = 128,
    fusion: str = "mean",
) -> LavisBackbone:
    """From LAVIS's registry, as LAVIS builds and loads it.

    Args:
        weights: a LAVIS checkpoint (.pth) to take in place of the one that the type names.
        config: over the `model` section of the type's YAML.
        dtype: of all weights; LAVIS's own mixture is fp16 vision, bfloat16 T5 and float32 for the rest.
        seed: of what no checkpoint holds.

    Raises:
        ConfigError: LAVIS has no such model or type, or its YAML no such key.
        WeightsError: weights are missing, incomplete, of other shapes or not safe to read.
    """
    model_class = _model_class(arch)
    settings = _settings(model_class, arch, model_type, weights, config)
    language = ARCHS[arch]
    needs = ("bert-base-uncased", settings[f"{language}_model"], _checkpoint(settings))
    with torch.random.fork_rng(devices=[]), _offline_stays_offline():
        torch.manual_seed(seed)
        model = _build(model_class, f"{arch} of type {model_type} (model.backbone)", settings, needs)
    _check_complete(model, arch, settings, from_elsewhere=("visual_encoder.", f"{language}_model."))
    model = model.to(getattr(torch, dtype))
    model.ln_vision.float()  # computes in float32 whatever comes in
    return LavisBackbone(model, language, max_text_tokens=max_text_tokens, fusion=fusion)


def build_matching(
    arch: str, model_type: str | None, weights: str | None
) -> tuple[nn.Module, tuple[Callable, Callable]]:
    """One of LAVIS's models for image-text matching, and its processors of (pictures, texts).

    Args:
        model_type: None = LAVIS's first.
        weights: a LAVIS checkpoint in place of the one that the type names.

    Raises:
        ConfigError: LAVIS has no such type.
        WeightsError: as `build_lavis_backbone`.
    """
    from lavis.common.registry import registry
    from lavis.models import load_preprocess
    from omegaconf import OmegaConf

    import lavis_lstp

    lavis_lstp.register()
    model_class = registry.get_model_class(arch)
    types = model_class.PRETRAINED_MODEL_CONFIG_DICT
    model_type = model_type or next(iter(types))
    if model_type not in types:
        raise ConfigError(unknown_name(f"type of LAVIS's {arch} (model.scorer.model_type)", model_type, types))
    whole = OmegaConf.load(model_class.default_config_path(model_type))
    settings = whole.model
    if weights:
        if (path := local_path(weights)) is None:
            raise WeightsError(
                f"no LAVIS checkpoint at '{weights}' (model.scorer.weights); {where_to_put(weights)}, or leave the key "
                f"empty for LAVIS's own: {_checkpoint(settings)}"
            )
        settings = OmegaConf.merge(settings, {"load_finetuned": False, "pretrained": str(path)})
    needs = ("bert-base-uncased", _checkpoint(settings))
    with torch.random.fork_rng(devices=[]), _offline_stays_offline():
        model = _build(model_class, f"{arch} of type {model_type} (model.scorer)", settings, needs)
    _check_complete(model, arch, settings, from_elsewhere=("visual_encoder.",), key="model.scorer")
    pictures, texts = load_preprocess(whole.preprocess)
    return model, (pictures["eval"], texts["eval"])


def _model_class(arch: str | None) -> type[nn.Module]:
    from lavis.common.registry import registry

    if arch not in ARCHS:
        raise ConfigError(unknown_name("arch (model.backbone.arch, with source lavis)", arch, ARCHS))
    model_class = registry.get_model_class(arch)
    if model_class is None:
        installed = ", ".join(name for name in ARCHS if registry.get_model_class(name))
        raise ConfigError(
            f"the installed LAVIS has no model '{arch}' (model.backbone.arch), it has {installed}; git main has all: "
            "pip install --no-deps git+https://github.com/salesforce/LAVIS, and what its import asks for"
        )
    return model_class


def _settings(model_class, arch: str, model_type: str | None, weights: str | None, config: Mapping | None):
    """The `model` section that LAVIS's `from_config` gets."""
    from omegaconf import OmegaConf

    if model_type not in model_class.PRETRAINED_MODEL_CONFIG_DICT:
        kind = f"type of LAVIS's {arch} (model.backbone.model_type)"
        raise ConfigError(unknown_name(kind, model_type, model_class.PRETRAINED_MODEL_CONFIG_DICT))
    settings = OmegaConf.load(model_class.default_config_path(model_type)).model
    known = {*inspect.signature(model_class).parameters, *CHECKPOINT_KEYS} - {"img_size"}
    for key in config or {}:
        if key not in known:
            raise ConfigError(unknown_name(f"key (model.backbone.config, for LAVIS's {arch})", key, known))
    settings = OmegaConf.merge(settings, dict(config or {}))
    if weights:
        path = local_path(weights)
        if path is None:
            raise WeightsError(
                f"no LAVIS checkpoint at '{weights}' (model.backbone.weights); {where_to_put(weights)}, "
                f"or leave the key empty for LAVIS's own: {_checkpoint(settings)}"
            )
        settings = OmegaConf.merge(settings, {"load_finetuned": False, "pretrained": str(path)})
    language_model = f"{ARCHS[arch]}_model"
    if path := local_path(settings[language_model]):
        settings[language_model] = str(path)
    return settings


def _checkpoint(settings) -> str:
    return str(settings.get("finetuned") if settings.get("load_finetuned", True) else settings.get("pretrained"))


def _build(model_class: type[nn.Module], called: str, settings, needs: Sequence[str]) -> nn.Module:
    """LAVIS's model with its checkpoint; `load_result` says what that lacked, which LAVIS tells nobody.

    Args:
        called, needs: the model, and the files that it is made of, for messages.
    """

    class Recording(model_class):
        load_result = None

        def load_state_dict(self, *args, **kwargs):
            type(self).load_result = super().load_state_dict(*args, **kwargs)
            return self.load_result

    Recording.__name__ = Recording.__qualname__ = model_class.__name__
    try:
        return Recording.from_config(settings)
    except WeightsError:
        raise
    except (OSError, RuntimeError, ValueError, ImportError, KeyError, AssertionError, pickle.UnpicklingError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise WeightsError(
            f"LAVIS cannot build {called}; it needs {', '.join(needs[:-1])} and {needs[-1]}, cached, reachable or, by "
            f"the keys weights and config of that section, on this machine; it says: {' '.join(lines[:2])}"
        ) from error


def _check_complete(
    model: nn.Module, arch: str, settings, from_elsewhere: tuple[str, ...], key: str = "model.backbone"
) -> None:
    """A checkpoint holds everything, but for parts that LAVIS takes from other files: those it may lack as a whole.

    Raises:
        WeightsError: weights are missing.
    """
    if model.load_result is None:
        raise WeightsError(f"LAVIS's {arch} was to load no checkpoint; set load_pretrained: true in {key}.config")
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    missing = set(model.load_result.missing_keys) & set(parameters)
    for prefix in from_elsewhere:
        whole = {name for name in parameters if name.startswith(prefix)}
        if whole <= missing:
            missing -= whole
    if missing:
        raise WeightsError(
            f"'{_checkpoint(settings)}' lacks {len(missing)} weights of LAVIS's {arch} ({key}), "
            f"first {min(missing)}; is it of another arch or model_type?"
        )
    if model.load_result.unexpected_keys:
        unexpected = model.load_result.unexpected_keys
        logger.info("not used by LAVIS's %s: %d weights, first %s", arch, len(unexpected), unexpected[0])


@contextmanager
def _offline_stays_offline() -> Iterator[None]:
    """LAVIS fetches vision tower and checkpoint by plain HTTP; in the hub's offline mode that is an error, too.

    Raises:
        WeightsError: a file is not in LAVIS's cache.
    """
    from huggingface_hub import constants
    from lavis.common import dist_utils

    hub = dist_utils.timm_hub
    download = hub.download_cached_file

    def cached_only(url, *args, **kwargs):
        path = os.path.join(hub.get_cache_dir(), os.path.basename(url))
        if not os.path.exists(path):
            raise WeightsError(
                f"offline (HF_HUB_OFFLINE), and LAVIS's weights are not at {path}: download {url} to there, "
                "or go online; a checkpoint elsewhere is named in model.backbone.weights"
            )
        return download(url, *args, **kwargs)

    if constants.HF_HUB_OFFLINE:
        hub.download_cached_file = cached_only
    try:
        yield
    finally:
        hub.download_cached_file = download
