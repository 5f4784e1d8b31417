"""What can be said of a configuration before torch and LAVIS are imported, which takes seconds.

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
from lavis_lstp.config.load import find_config, first_line, lavis_root, load_recipe, sections_of, with_options
from lavis_lstp.config.model import check_complete_model, checked_model
from lavis_lstp.config.run import RUNNERS, TASKS, RunSettings, check_deepspeed_version, check_splits, checked_run
from lavis_lstp.errors import AnnotationError, ConfigError, unknown_name
from lavis_lstp.models.hub import require_weights
from lavis_lstp.models.variants import MODEL_TYPES, load_variant


def check(args: argparse.Namespace, evaluate_only: bool = False) -> None:
    """Raise the LstpError that the run would end with, as far as it can be known."""
    path = find_config(args.cfg_path)
    try:
        user = with_options(load_recipe(path), args.options)
        model, datasets, run = _own_sections(user)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{args.cfg_path}: {first_line(error)}") from error
    except ConfigError as error:
        raise type(error)(f"{args.cfg_path}: {error}") from error
    if run is not None:
        evaluate = evaluate_only or bool(run.get("evaluate"))
        _check_run({**run, "evaluate": evaluate})
        if datasets is not None and model is not None:  # else a name may be wrong, which says more
            _check_data(datasets, run, evaluate=evaluate, alone=evaluate_only)
    if model is not None:
        require_weights(model)


def _own_sections(user: DictConfig) -> tuple[dict | None, dict | None, dict | None]:
    """model, datasets and run, checked and complete; None where LAVIS must be asked what a section means."""
    plain = sections_of(user)
    run, model, datasets = plain["run"], plain["model"], plain["datasets"]
    ours = model.get("arch") in MODEL_TYPES
    runner = run.get("runner") or ("runner_lstp" if ours or run.get("task") in TASKS else None)
    own_run = run.get("task") in TASKS and runner in RUNNERS
    config = OmegaConf.create({"run": {}, "model": {}, "datasets": {}})
    if own_run:
        config.run = {**checked_run(run, {*_above(run["task"]), *_above(runner)}), "runner": runner}
    if ours:
        types = MODEL_TYPES[model["arch"]]
        kind = model.get("model_type") or "default"
        if kind not in types:
            raise ConfigError(unknown_name(f"model_type of {model['arch']}", kind, types))
        config.model = OmegaConf.merge(load_variant(types[kind]).model, checked_model(model))
    own = {name: section or {} for name, section in datasets.items() if settings_of(str(name))}
    for name, section in own.items():
        config.datasets[name] = complete_dataset(name, checked_dataset(name, section))
    found = OmegaConf.to_container(OmegaConf.merge(user, config), resolve=True, throw_on_missing=True)
    if own_run:
        checked_run(found["run"], {*_above(run["task"]), *_above(runner)})
    if ours:
        check_complete_model(found["model"])
    for name in own:
        checked_dataset(name, found["datasets"][name])
    complete = bool(own) and len(own) == len(datasets)
    return found["model"] if ours else None, found["datasets"] if complete else None, found["run"] if own_run else None


def _above(role: str) -> tuple[str, ...]:
    """A task or runner and what it is a kind of, whose keys it reads, too."""
    kinds = {"video_instruct": "video_qa", "runner_deepspeed": "runner_lstp"}
    return (role, kinds[role]) if role in kinds else (role,)


def _check_run(run: Mapping[str, Any]) -> None:
    if run["runner"] == "runner_deepspeed":
        if run.get("deepspeed") is None:
            raise ConfigError(
                "run.runner=runner_deepspeed needs run.deepspeed, for instance projects/lstp/deepspeed/zero2.json"
            )
        if not run["evaluate"]:
            check_deepspeed()
    else:
        RunSettings.from_config({"output_dir": "output", **run})


def check_deepspeed() -> None:
    """Raise ConfigError where DeepSpeed is not installed, or too old."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "run.runner=runner_deepspeed needs DeepSpeed, which is not installed; pip install 'lavis-lstp[deepspeed]'"
        )
    check_deepspeed_version(importlib.metadata.version("deepspeed"))


# ---- data --------------------------------------------------------------------------------------------------------


def _check_data(datasets: Mapping[str, Mapping], run: Mapping[str, Any], *, evaluate: bool, alone: bool) -> None:
    """Raise for splits, annotation files and folders that are not there."""
    settings = RunSettings()
    keys = ["test_splits"] if alone else ["valid_splits", "test_splits"]
    keys = keys if evaluate else ["train_splits", *keys]
    wanted = {name: run.get(name) if run.get(name) is not None else getattr(settings, name) for name in keys}
    check_splits({name: _splits(name, section) for name, section in datasets.items()}, wanted)
    for name, section in datasets.items():
        if name != "lstp_shapes":
            _check_files(f"datasets.{name}", section["build_info"] or {})


def _splits(name: str, section: Mapping[str, Any]) -> list[str]:
    if name == "lstp_shapes":
        counts = section["generate"]
        return [split for split in ("train", "val", "test") if counts[f"{split}_videos"]] + (
            ["train_images"] if counts["train_images"] else []
        )
    return [split for split, value in ((section["build_info"] or {}).get("annotations") or {}).items() if value]


def _check_files(section: str, info: Mapping[str, Any]) -> None:
    in_files = False
    for value in (info.get("annotations") or {}).values():
        storage = (value or {}).get("storage") or []
        for path in [storage] if isinstance(storage, str) else storage:
            if path.startswith("pipe:") or path.partition("?")[0].endswith(".tar"):
                continue
            in_files = True
            if not _exists(path):
                raise AnnotationError(f"{path}: no such annotation file ({section}.build_info.annotations)")
    for media in ("videos", "images"):
        folder = (info.get(media) or {}).get("storage")
        if in_files and media in info and (not folder or not _exists(folder)):
            raise ConfigError(f"{section}.build_info.{media}.storage: no such folder: {folder}")


def _exists(path: str) -> bool:
    """Whether something is there, from where the user stands or in LAVIS's cache."""
    given = Path(path).expanduser()
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
