"""The configuration of a run: a YAML file and `--options` in, one checked and complete tree out.

Replaces `lavis.common.config.Config`, and is one, so that LAVIS's own `train.py` gets the same treatment. Unlike
LAVIS's, it merges the options before it looks for defaults (so `model.model_type` selects them), rejects names and
keys that nobody knows, and makes `output_dir` absolute from the current folder (LAVIS joins a relative one to
site-packages).

Order of precedence: defaults (the settings classes, the model's YAML, the data sets' YAML) < the user's file <
`--options`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lavis.common.config as lavis_config
import lavis.common.optims  # registers LAVIS's schedules
import lavis.runners  # noqa: F401, registers LAVIS's runners
from lavis.common.registry import registry
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_lstp.config.data import checked_dataset, complete_dataset, settings_of
from lavis_lstp.config.load import find_config, load_recipe, omegaconf_line, sections_of, with_options
from lavis_lstp.config.model import check_complete_model, check_recorded, checked_model
from lavis_lstp.config.names import resolve_model
from lavis_lstp.config.other_keys import (
    check_lavis_dataset,
    check_lavis_model,
    check_transformers,
    is_ours,
    run_keys_of,
)
from lavis_lstp.config.run import (
    ANSWERING,
    LAVIS_RUNNER_DEFAULTS,
    WRITTEN,
    RunSettings,
    check_run_generation,
    checked_run,
)
from lavis_lstp.errors import ConfigError, shortened, unknown_name
from lavis_lstp.files import expanded
from lavis_lstp.redaction import recordable

log = logging.getLogger(__name__)


class Config(lavis_config.Config):
    """What LAVIS's tasks and runners read: `run_cfg`, `model_cfg`, `datasets_cfg`, `pretty_print()`, `to_dict()`.

    Args:
        args: has `cfg_path` and `options` (None, ["a.b=c", ...] or ["a.b", "c", ...]).

    Raises:
        ConfigError: the file or an option cannot be used; one line that says what was expected and what came.
    """

    def __init__(self, args):
        self.args = args
        self.cfg_path = find_config(args.cfg_path)
        try:
            self.config = _complete(with_options(load_recipe(self.cfg_path), args.options))
        except ConfigError as error:
            raise type(error)(f"{args.cfg_path}: {error}") from error
        registry.register("configuration", self)

    def pretty_print(self) -> None:
        """Logs the configuration section by section, without what comes out of the environment."""
        sections = recordable(self.config)
        titled = [("Running Parameters", sections["run"]), *sections["datasets"].items()]
        for title, section in (*titled, ("Model Attributes", sections["model"])):
            log.info("=====  %s  =====\n%s", title, json.dumps(section, indent=4, sort_keys=True))


def _complete(user: DictConfig) -> DictConfig:
    """Check the user's sections and lay them over their defaults."""
    plain = sections_of(user)
    try:
        run, roles, others = _complete_run(plain["run"], plain["model"].get("arch"))
        config = OmegaConf.unsafe_merge(run, complete_model(user), _complete_datasets(plain["datasets"]))
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(omegaconf_line(error)) from error
    _take(config, resolved, _checked(resolved, roles, others))
    config.run.output_dir = os.path.abspath(expanded(config.run.output_dir))
    return config


def _checked(resolved: Mapping, roles: set[str], others: set[str]) -> dict[str, Any]:
    """The sections that have rules, each value as its rule has it.

    Raises:
        ConfigError: a value that an interpolation stands for and that cannot be used.
    """
    found = {"run": checked_run(resolved["run"], roles, others)}
    if is_ours(registry.get_model_class(resolved["model"]["arch"])):
        check_complete_model(resolved["model"])
        check_recorded(resolved["model"], resolved["datasets"])
        found["model"] = checked_model(resolved["model"])
        if roles & set(ANSWERING):
            check_run_generation(found["run"], found["model"]["generation"] or {})
    data = resolved["datasets"]
    return found | {"datasets": {name: checked_dataset(name, data[name]) for name in data if settings_of(name)}}


def _take(config: DictConfig | ListConfig, resolved: Mapping | list, checked: Mapping | list) -> None:
    """Put checked values where an interpolation stands for one of another type, such as a number for a text."""
    for key, value in checked.items() if isinstance(checked, Mapping) else enumerate(checked):
        if isinstance(value, (Mapping, list)):
            _take(config[key], resolved[key], value)
        elif type(value) is not type(resolved[key]):
            config[key] = value


def _complete_run(given: Mapping, arch: str | None) -> tuple[DictConfig, set[str], set[str]]:
    """The run section over its defaults, the roles whose keys it may have, and keys of other packages."""
    if not given.get("task"):
        raise ConfigError(f"run.task is missing; known: {', '.join(registry.list_tasks())}")
    task_cls = _registered("task", given["task"], registry.get_task_class, registry.list_tasks)
    runner = given.get("runner") or _default_runner(task_cls, arch)
    runner_cls = _registered("runner", runner, registry.get_runner_class, registry.list_runners)
    # LAVIS's files carry keys of other tasks than the one they name, so those of all its tasks are legal.
    lavis_tasks = [cls for cls in map(registry.get_task_class, registry.list_tasks()) if not is_ours(cls)]
    others = run_keys_of([runner_cls, task_cls, *lavis_tasks])
    roles = _roles("task_name_mapping", task_cls) | _roles("runner_name_mapping", runner_cls)
    run = checked_run(given, roles, others)
    if "lr_sched" in run:
        _registered("lr_sched", run["lr_sched"], registry.get_lr_scheduler_class, registry.list_lr_schedulers)
    settings = RunSettings()
    defaults = {name: getattr(settings, name) for name in WRITTEN}
    if not is_ours(runner_cls):
        defaults |= LAVIS_RUNNER_DEFAULTS
    run = {**defaults, **dict.fromkeys(given), **run, "runner": runner}
    nulls = {key: default for key, default in defaults.items() if run[key] is None}  # null: as if it were not there
    run = OmegaConf.create({"run": {**run, **nulls}})
    return run, roles, others


def _roles(kind: str, cls: type) -> set[str]:
    """Names under which a class and its bases are registered: a subclass reads what they read."""
    return {name for name, known in registry.mapping[kind].items() if issubclass(cls, known)}


def _default_runner(task_cls: type, arch: str | None) -> str:
    """LAVIS's default stays where all is LAVIS's own; a model or task of this package gets this package's runner."""
    model_cls = registry.get_model_class(arch) if arch else None
    ours = is_ours(task_cls) or (model_cls is not None and is_ours(model_cls))
    return "runner_lstp" if ours else "runner_base"


def complete_model(user: DictConfig) -> DictConfig:
    """`user`'s section `model`, checked and laid over the defaults of the type it names.

    Raises:
        ConfigError: no such model or type, or a key that nobody reads.
    """
    given = OmegaConf.to_container(user.model, resolve=False)
    if not given.get("arch"):
        raise ConfigError(f"model.arch is missing; known: {', '.join(registry.list_models())}")
    model_cls, model_type = resolve_model(given["arch"], given.get("model_type"))
    if is_ours(model_cls):
        given = checked_model(given)
        defaults = model_cls.default_config(model_type)
        check_transformers(given, OmegaConf.to_container(defaults.model, resolve=False))
    else:
        defaults = _load_defaults(model_cls.default_config_path(model_type))
        check_lavis_model(given, _plain(defaults.get("model")), model_cls)
    chosen = {"arch": given["arch"], "model_type": model_type}
    return OmegaConf.unsafe_merge(defaults, {"model": given}, {"model": chosen})  # nobody else has these defaults


def _complete_datasets(given: Mapping) -> DictConfig:
    complete = {}
    if not given:
        raise ConfigError(f"section 'datasets' names no data set; known: {', '.join(registry.list_datasets())}")
    for name, section in given.items():
        builder = _registered("dataset", name, registry.get_builder_class, registry.list_datasets)
        section = section or {}
        kind = str(section.get("type") or "default")
        if kind not in builder.DATASET_CONFIG_DICT:
            raise ConfigError(unknown_name(f"type of dataset {name}", kind, builder.DATASET_CONFIG_DICT))
        if settings_of(name):
            section = checked_dataset(name, section)
            complete[name] = complete_dataset(name, section)
        else:
            found = _load_defaults(builder.default_config_path(type=kind)).datasets
            # LAVIS's builders may share a file whose only root carries the name of another builder.
            defaults = found.get(name) if name in found else found[next(iter(found))]
            check_lavis_dataset(section, _plain(defaults), name, builder)
            complete[name] = OmegaConf.merge(defaults or {}, section)
        _check_processors(section, name)
    return OmegaConf.create({"datasets": complete})


def _check_processors(section: Mapping, dataset: str) -> None:
    for kind in ("vis_processor", "text_processor"):
        for split, processor in (section.get(kind) or {}).items():
            place = f"datasets.{dataset}.{kind}.{split}"
            if processor is None:
                continue
            if not isinstance(processor, Mapping) or not isinstance(processor.get("name"), str):
                raise ConfigError(f"{place} must be a mapping with the key 'name', got {shortened(repr(processor))}")
            if registry.get_processor_class(processor["name"]) is None:
                raise ConfigError(unknown_name(f"processor in {place}:", processor["name"], registry.list_processors()))


def _registered(kind: str, name: str, get, known) -> type:
    cls = get(name)
    if cls is None:
        raise ConfigError(unknown_name(kind, name, known()))
    return cls


def _load_defaults(path: str) -> DictConfig:
    """A default configuration of LAVIS's."""
    if not Path(path).is_file():
        raise ConfigError(f"the default configuration {path} is missing from the installation; install it again")
    return OmegaConf.load(path)


def _plain(config: DictConfig | None) -> dict:
    return OmegaConf.to_container(config, resolve=False) if config is not None else {}
