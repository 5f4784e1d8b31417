"""Checks of a configuration that need neither torch nor LAVIS, whose import takes seconds.

In: the words of `lavis.train` or `lavis.evaluate`. Out: nothing, or the error that the run would end with: a file that
is missing, a key or a value of this package's own sections, a split that no data set has, weights that are nowhere,
DeepSpeed that is not installed. What only LAVIS's registry or transformers knows is checked by `config.Config` later.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_lstp.config.data import checked_dataset, complete_dataset, settings_of
from lavis_lstp.config.load import find_config, lavis_root, load_recipe, omegaconf_line, sections_of, with_options
from lavis_lstp.config.model import (
    FIGURES,
    SELECTORS,
    check_complete_model,
    checked_model,
    leave_unused_flow_out,
    used_parts,
)
from lavis_lstp.config.run import (
    RUNNERS,
    TASKS,
    WRITTEN,
    RunSettings,
    check_deepspeed_version,
    check_splits,
    checked_run,
    splits_of,
)
from lavis_lstp.errors import AnnotationError, ConfigError, WeightsError, no_value, unknown_name
from lavis_lstp.files import expanded
from lavis_lstp.models.variants import MODEL_TYPES, load_variant
from lavis_lstp.models.weights.hub import require_weights, weights_file


def check(args: argparse.Namespace, evaluate_only: bool = False) -> None:
    """Raise the LstpError that the run would end with, as far as it can be known."""
    path = find_config(args.cfg_path)
    try:
        user = with_options(load_recipe(path), args.options)
        config = _own_sections(user)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{args.cfg_path}: {omegaconf_line(error)}") from error
    except ConfigError as error:
        raise type(error)(f"{args.cfg_path}: {error}") from error
    if config is None:
        return
    run = config["run"]
    run["evaluate"] = evaluate_only or run["evaluate"]
    try:
        _check_run(run)
    except ConfigError as error:
        raise type(error)(f"{args.cfg_path}: {error}") from error
    leave_unused_flow_out(config["model"], config["datasets"])
    _check_data(config["datasets"], run, evaluate_only)
    if run["task"] != "pseudo_span":  # which looks at every frame
        _check_figures(config["model"]["selector"]["name"], config["datasets"])
    require_weights(config["model"])
    _check_shapes(config["model"])


def _own_sections(user: DictConfig) -> dict[str, dict] | None:
    """The configuration, checked and complete; None where LAVIS must be asked what a section means."""
    plain = sections_of(user)
    run, model, datasets = plain["run"], plain["model"], plain["datasets"]
    types = MODEL_TYPES.get(model.get("arch"))
    runner = run.get("runner") or ("runner_lstp" if types or run.get("task") in TASKS else None)
    roles = {*_above(run.get("task")), *_above(runner)}
    own_run = run.get("task") in TASKS and runner in RUNNERS
    if own_run:
        run = {**{name: getattr(RunSettings(), name) for name in WRITTEN}, **checked_run(run, roles), "runner": runner}
    if types:
        kind = model.get("model_type") or "default"
        if kind not in types:
            raise ConfigError(unknown_name(f"model_type of {model['arch']}", kind, types))
        model = OmegaConf.merge(load_variant(types[kind]).model, checked_model(model))
    own = {name: checked_dataset(name, section or {}) for name, section in datasets.items() if settings_of(name)}
    if not (own_run and types and own and len(own) == len(datasets)):
        return None
    complete = {name: complete_dataset(name, section) for name, section in own.items()}
    config = OmegaConf.create({"run": run, "model": model, "datasets": complete})
    found = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    check_complete_model(found["model"])
    datasets = {name: checked_dataset(name, section) for name, section in found["datasets"].items()}
    return {"run": checked_run(found["run"], roles), "model": checked_model(found["model"]), "datasets": datasets}


def _above(role: str | None) -> tuple[str, ...]:
    """A task or runner and what it is a kind of, whose keys it reads, too."""
    kinds = {"video_instruct": "video_qa", "runner_deepspeed": "runner_lstp"}
    return tuple(filter(None, (role, kinds.get(role))))


def _check_run(run: Mapping[str, Any]) -> None:
    if run["runner"] == "runner_deepspeed":
        if run.get("deepspeed") is None:
            raise ConfigError(
                "run.runner=runner_deepspeed needs run.deepspeed, for instance projects/lstp/deepspeed/zero2.json"
            )
        if not run["evaluate"]:
            check_deepspeed()
    else:
        RunSettings.from_config(run)


def check_deepspeed() -> None:
    """Raise ConfigError where DeepSpeed is not installed, or too old."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "run.runner=runner_deepspeed needs DeepSpeed, which is not installed; pip install 'lavis-lstp[deepspeed]'"
        )
    check_deepspeed_version(importlib.metadata.version("deepspeed"))


# ---- data --------------------------------------------------------------------------------------------------------


def _check_data(datasets: Mapping[str, Mapping], run: Mapping[str, Any], alone: bool) -> None:
    """Raise for splits, annotation files and folders that are not there."""
    check_splits(
        {name: _splits(name, section) for name, section in datasets.items()}, splits_of(run, evaluate_only=alone)
    )
    for name, section in datasets.items():
        if name != "lstp_shapes":
            _check_files(f"datasets.{name}", section["build_info"] or {})


def _check_figures(selector: str, datasets: Mapping[str, Mapping]) -> None:
    """Raise ConfigError where a data set does not bring what the selector needs of the codec."""
    for figure in set(FIGURES) & set(SELECTORS[selector].needs):
        for name, section in datasets.items():
            if section.get(figure) is False:
                raise ConfigError(f"selector '{selector}' needs datasets.{name}.{figure}: true")


def _splits(name: str, section: Mapping[str, Any]) -> list[str]:
    if name == "lstp_shapes":
        counts = section["generate"]
        return [split for split in ("train", "val", "test") if counts[f"{split}_videos"]] + (
            ["train_images"] if counts["train_images"] else []
        )
    return [split for split, value in ((section["build_info"] or {}).get("annotations") or {}).items() if value]


def _check_files(section: str, info: Mapping[str, Any]) -> None:
    storages = [(value or {}).get("storage") or [] for value in (info.get("annotations") or {}).values()]
    paths = [path for storage in storages for path in ([storage] if isinstance(storage, str) else storage)]
    files = [path for path in paths if not (path.startswith("pipe:") or path.partition("?")[0].endswith(".tar"))]
    for media in {"videos", "images"} & info.keys() if files else ():
        folder = (info[media] or {}).get("storage")
        if not folder or not _exists(folder):
            raise ConfigError(f"{section}.build_info.{media}.storage: no such folder: {folder}{no_value(folder)}")
    for path in files:
        if not _exists(path):
            raise AnnotationError(f"{path}: no such annotation file ({section}.build_info.annotations){no_value(path)}")


def _exists(path: str) -> bool:
    """Whether something is there, from where the user stands or in LAVIS's cache."""
    given = expanded(path)
    if os.path.exists(given):
        return True
    if given.is_absolute():
        return False
    for root in lavis_root():
        file = root / "lavis" / "configs" / "default.yaml"
        if file.is_file():
            cache = (yaml.safe_load(file.read_text(encoding="utf-8")).get("env") or {}).get("cache_root")
            return bool(cache) and os.path.exists(Path(cache) / given)
    return False


# ---- weights -----------------------------------------------------------------------------------------------------


def _check_shapes(model: Mapping[str, Any]) -> None:
    """Raise WeightsError for a run's checkpoint of other sizes than the model's; its header alone is read."""
    wanted, given = _shapes(model), model["checkpoint"] or []
    for path in [given] if isinstance(given, str) else given:
        try:
            file = weights_file(path)
        except WeightsError as error:
            raise WeightsError(f"model.checkpoint: {error}") from error
        if file.suffix != ".safetensors":
            continue
        for name, shape in sorted(_header(file).items()):
            if name in wanted and None not in wanted[name] and list(wanted[name]) != shape:
                shapes = f"{shape} in the file, {list(wanted[name])} in the model"
                raise WeightsError(f"'{file}' does not fit the model: '{name}' is {shapes}")


def _header(file: Path) -> dict[str, list[int]]:
    """Key -> shape; empty where the file is damaged, which reading it says better."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as weights:
            return {name: weights.get_slice(name).get_shape() for name in weights.keys()}
    except (OSError, SafetensorError):
        return {}


def _shapes(model: Mapping[str, Any]) -> dict[str, tuple[int | None, ...]]:
    """Shapes that follow from the settings alone; None for a size that only the weights of others say."""
    sampler, backbone = model["sampler"], model["backbone"]
    width, config = sampler["hidden_size"], (backbone["config"] if not backbone["weights"] else None) or {}
    text, qformer = config.get("text_config") or {}, config.get("qformer_config") or {}
    language = text.get("d_model" if text.get("model_type") == "t5" else "hidden_size")
    queries = qformer.get("hidden_size")
    of_sampler = {
        "sampler.head.weight": (2, width),
        "sampler.flow_rotary": (sampler["max_positions"], width // sampler["num_heads"]),
        "sampler.layers.0.feed_forward.up.weight": (sampler["intermediate_size"], width),
    }
    return {
        **(of_sampler if used_parts(model).sampler else {}),
        "backbone.model.query_tokens": (1, config.get("num_query_tokens"), queries),
        "backbone.model.language_projection.weight": (language, queries),
        "backbone.model.language_projection.bias": (language,),
    }
