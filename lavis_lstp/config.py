"""The configuration of a run: a YAML file and `--options` in, one checked and complete tree out.

Replaces `lavis.common.config.Config`, and is one, so that LAVIS's own `train.py` gets the same treatment. Unlike
LAVIS's, it merges the options before it looks for defaults (so `model.model_type` selects them), rejects names and
keys that nobody knows, and makes `output_dir` absolute from the current folder (LAVIS joins a relative one to
site-packages).

Order of precedence: defaults (`run_keys.py`, the model's YAML, the data sets' YAML) < the user's file < `--options`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import lavis.common.config as lavis_config
import lavis.common.optims  # registers LAVIS's schedules
import lavis.runners  # noqa: F401, registers LAVIS's runners
import yaml
from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_lstp.config_keys import check_dataset, check_model, check_roots, check_run, is_ours
from lavis_lstp.errors import ConfigError, unknown_name
from lavis_lstp.host.plugin import resolve_model
from lavis_lstp.redaction import recordable
from lavis_lstp.run_keys import run_defaults

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent


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


def find_config(path: str | os.PathLike) -> Path:
    """The file meant by `--cfg-path`: as given, else among the recipes of the package or its checkout, else LAVIS's.

    An evaluation, projects/lstp/eval/<benchmark>_<model>.yaml, is no file but composed of two; see `evaluation_parts`.

    Raises:
        ConfigError: it is nowhere; the message names the nearest recipe.
    """
    given = Path(path).expanduser()
    roots = (Path(), PACKAGE, PACKAGE.parent, Path(registry.get_path("library_root")).parent)
    for root in roots:
        if (root / given).is_file() or evaluation_parts(root / given):
            return (root / given).resolve()
    if given.is_dir():
        raise ConfigError(f"config '{path}' is a folder; expected a YAML file")
    raise ConfigError(unknown_name("config file", str(path), recipes()))


def recipes() -> list[str]:
    """The configurations that `--cfg-path` finds without a checkout, such as projects/lstp/tiny_ft.yaml."""
    no_recipes = {name for part in ("chains", *EVALUATION_PARTS) for name in project_files(f"lstp/**/{part}/*.yaml")}
    files = [name for name in project_files("lstp/**/*.yaml") if name not in no_recipes]
    return sorted([*files, *evaluations()])


EVALUATION_PARTS = ("benchmarks", "models")
"""Folders beside which an evaluation may be asked for: what is asked, and who answers."""


def evaluations() -> list[str]:
    """projects/lstp/eval/<benchmark>_<model>.yaml, every pair."""
    names = [[Path(name) for name in project_files(f"lstp/eval/{part}/*.yaml")] for part in EVALUATION_PARTS]
    return [str(one.parent.parent / f"{one.stem}_{other.name}") for one in names[0] for other in names[1]]


def evaluation_parts(path: Path) -> tuple[Path, Path] | None:
    """FOLDER/benchmarks/<benchmark>.yaml and FOLDER/models/<model>.yaml of a path FOLDER/<benchmark>_<model>.yaml."""
    for i, letter in enumerate(path.stem):
        if letter == "_":
            names = path.stem[:i], path.stem[i + 1 :]
            parts = tuple(path.parent / p / (n + path.suffix) for p, n in zip(EVALUATION_PARTS, names, strict=True))
            if all(part.is_file() for part in parts):
                return parts
    return None


def load_recipe(path: Path) -> DictConfig:
    """A file's content; of an evaluation, both its parts' and the folder for its output.

    `datasets: {"*": ...}` of the model's part goes to each data set of the benchmark's.
    """
    if path.is_file():
        return _load(path)
    benchmark, model = map(_load, evaluation_parts(path))
    common = (model.pop("datasets", None) or {}).get("*") or {}
    for name, section in benchmark.datasets.items():
        benchmark.datasets[name] = OmegaConf.merge(section or {}, common)
    output = {"run": {"output_dir": f"output/lstp/eval/{path.stem}"}}
    return OmegaConf.merge(output, benchmark, model)


def project_files(pattern: str) -> list[str]:
    """Files of `projects/` in the package or its checkout, as a user names them."""
    roots = (PACKAGE, PACKAGE.parent)
    return sorted({str(file.relative_to(root)) for root in roots for file in (root / "projects").glob(pattern)})


def options_to_dotlist(options: Sequence[str] | None) -> list[str]:
    """`["a.b=1", "c.d", "2"]` -> `["a.b=1", "c.d=2"]`: both styles of LAVIS, mixed at will.

    Raises:
        ConfigError: a name without a value, or outside of the sections.
    """
    dotlist, rest = [], iter(options or [])
    for option in rest:
        if "=" not in option:
            value = next(rest, None)
            if value is None:
                raise ConfigError(f"option '{option}' has no value; write --options {option}=VALUE")
            option = f"{option}={value}"
        dotlist.append(option)
    return dotlist


def _load(path: Path) -> DictConfig:
    """A YAML file whose root is a mapping; each way to fail gives one line."""
    try:
        config = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read {path}: {reason}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"not YAML: {where}{getattr(error, 'problem', None) or _first_line(error)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    if not isinstance(config, DictConfig):
        raise ConfigError("expected the sections model, datasets and run, got a list")
    return config


def with_options(config: DictConfig, options: Sequence[str] | None) -> DictConfig:
    """`config` with `--options` laid over it.

    Raises:
        ConfigError: an option that is not of the form A.B=C.
    """
    try:
        return OmegaConf.merge(config, OmegaConf.from_dotlist(options_to_dotlist(options)))
    except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"cannot apply --options {' '.join(options or [])}: {_first_line(error)}") from error


def _complete(user: DictConfig) -> DictConfig:
    """Check the user's sections and lay them over their defaults."""
    plain = OmegaConf.to_container(user, resolve=False)
    check_roots(plain)
    for section in ("model", "datasets", "run"):
        if not isinstance(plain.get(section), Mapping):
            raise ConfigError(f"section '{section}' is missing; expected the sections model, datasets and run")
    try:
        config = OmegaConf.merge(
            _complete_run(user, plain["run"]),
            complete_model(user),
            _complete_datasets(user, plain["datasets"]),
        )
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    return config


def _complete_run(user: DictConfig, given: Mapping) -> DictConfig:
    if not given.get("task"):
        raise ConfigError(f"run.task is missing; known: {', '.join(registry.list_tasks())}")
    task_cls = _registered("task", given["task"], registry.get_task_class, registry.list_tasks)
    runner = given.get("runner") or _default_runner(task_cls, user.model.get("arch"))
    runner_cls = _registered("runner", runner, registry.get_runner_class, registry.list_runners)
    # LAVIS's files carry keys of other tasks than the one they name, so those of all its tasks are legal.
    lavis_tasks = [cls for cls in map(registry.get_task_class, registry.list_tasks()) if not is_ours(cls)]
    check_run(given, [runner_cls, task_cls, *lavis_tasks])
    schedule = given.get("lr_sched")
    if schedule is not None:
        _registered("lr_sched", schedule, registry.get_lr_scheduler_class, registry.list_lr_schedulers)
    defaults = {**run_defaults(own_runner=is_ours(runner_cls)), "runner": runner}
    run = OmegaConf.merge({"run": defaults}, {"run": user.run})
    for key, default in defaults.items():  # a null in the file means "as if it were not there"
        if given.get(key) is None:
            run.run[key] = default
    run.run.output_dir = os.path.abspath(os.path.expanduser(run.run.output_dir))
    return run


def _default_runner(task_cls: type, arch: str | None) -> str:
    """LAVIS's default stays where all is LAVIS's own; a model or task of this package gets this package's runner."""
    model_cls = registry.get_model_class(arch) if arch else None
    ours = is_ours(task_cls) or (model_cls is not None and is_ours(model_cls))
    return "runner_lstp" if ours else "runner_base"


def complete_model(user: DictConfig) -> DictConfig:
    """`user`'s section `model`, checked and laid over the YAML file of the type it names.

    Raises:
        ConfigError: no such model or type, or a key that nobody reads.
    """
    given = _plain(user.model)
    if not given.get("arch"):
        raise ConfigError(f"model.arch is missing; known: {', '.join(registry.list_models())}")
    model_cls, model_type = resolve_model(given["arch"], given.get("model_type"))
    ours = getattr(model_cls, "default_config", None)
    defaults = ours(model_type) if ours else _load_defaults(model_cls.default_config_path(model_type))
    check_model(given, _plain(defaults.get("model")), model_cls)
    chosen = {"arch": given["arch"], "model_type": model_type}
    return OmegaConf.merge(defaults, {"model": user.model}, {"model": chosen})


def _complete_datasets(user: DictConfig, given: Mapping) -> DictConfig:
    complete = OmegaConf.create({"datasets": {}})
    if not given:
        raise ConfigError(f"section 'datasets' names no data set; known: {', '.join(registry.list_datasets())}")
    for name, section in given.items():
        builder = _registered("dataset", name, registry.get_builder_class, registry.list_datasets)
        section = section or {}
        if not isinstance(section, Mapping):
            raise ConfigError(f"datasets.{name} must be a mapping, got {section!r}")
        kind = section.get("type") or "default"
        if kind not in builder.DATASET_CONFIG_DICT:
            raise ConfigError(unknown_name(f"type of dataset {name}", kind, builder.DATASET_CONFIG_DICT))
        ours = getattr(builder, "default_config", None)
        found = (ours(kind) if ours else _load_defaults(builder.default_config_path(type=kind))).datasets
        # LAVIS's builders may share a file whose only root carries the name of another builder.
        defaults = found.get(name) if name in found else found[next(iter(found))]
        check_dataset(section, _plain(defaults), name, builder)
        _check_processors(section, name)
        complete = OmegaConf.merge(complete, {"datasets": {name: defaults}})
        complete = OmegaConf.merge(complete, {"datasets": {name: user.datasets.get(name) or {}}})
    return complete


def _check_processors(section: Mapping, dataset: str) -> None:
    for kind in ("vis_processor", "text_processor"):
        for split, processor in (section.get(kind) or {}).items():
            place = f"datasets.{dataset}.{kind}.{split}"
            if processor is None:
                continue
            if not isinstance(processor, Mapping) or "name" not in processor:
                raise ConfigError(f"{place} must be a mapping with the key 'name', got {processor!r}")
            if registry.get_processor_class(processor["name"]) is None:
                raise ConfigError(unknown_name(f"processor in {place}:", processor["name"], registry.list_processors()))


def _registered(kind: str, name: str, get, known) -> type:
    cls = get(name)
    if cls is None:
        raise ConfigError(unknown_name(kind, name, known()))
    return cls


def _load_defaults(path: str) -> DictConfig:
    if not Path(path).is_file():
        raise ConfigError(f"the default configuration {path} is missing from the installation; install it again")
    return _load(Path(path))


def _plain(config: DictConfig | None) -> dict:
    return OmegaConf.to_container(config, resolve=False) if config is not None else {}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
