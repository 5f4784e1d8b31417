"""`run.deepspeed`: what a DeepSpeed JSON says, what LAVIS's keys say, and one configuration of both.

In: the run section, and the file or mapping under `run.deepspeed`. Out: the run settings with what only the JSON says,
and a DeepSpeed configuration with what only the run section says. Where both say something and it differs, the
error names both: whichever was silently taken, someone would train something else than they believe.
"""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lavis_lstp.config.run import RunSettings
from lavis_lstp.errors import ConfigError, unknown_name
from lavis_lstp.files import expanded, strict_json

PACKAGE = Path(__file__).resolve().parents[2]
FOLDER = "projects/lstp/deepspeed"

SHARED = {
    "train_micro_batch_size_per_gpu": "batch_size_train",
    "gradient_accumulation_steps": "accum_grad_iters",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "init_lr",
    "optimizer.params.weight_decay": "weight_decay",
}
"""DeepSpeed's name of a setting, and LAVIS's."""

REFUSED = {
    "scheduler": "run.lr_sched and its settings choose the learning rate",
    "fp16": "bf16 has fp32's range and needs no loss scaling; use run.precision=bf16",
    "torch_autocast": "use run.precision=bf16",
    "elasticity": "any checkpoint can be resumed on another number of processes without it",
}
"""Sections of DeepSpeed's that this runner has another way for."""

OPTIMIZER_KEYS = ("lr", "betas", "weight_decay", "eps", "adam_w_mode", "torch_adam")


def load(source: str | Mapping[str, Any]) -> dict[str, Any]:
    """The mapping in a JSON file, or itself, without the values "auto", which mean that nothing is said.

    Args:
        source: a mapping, or a path as given, relative to the current folder, or among the files of the package.

    Raises:
        ConfigError: there is no such file, or it holds no JSON object.
    """
    if isinstance(source, Mapping):
        return _said(source)
    given = expanded(str(source))
    roots = (Path(), PACKAGE, PACKAGE.parent)
    found = next((root / given for root in roots if os.path.isfile(root / given)), None)
    if found is None:
        known = {str(file.relative_to(root)) for root in roots[1:] for file in (root / FOLDER).glob("*.json")}
        raise ConfigError(unknown_name("file run.deepspeed", str(source), known))
    try:
        content = strict_json(found.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"run.deepspeed: {found} is not JSON: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"run.deepspeed: expected a JSON object in {found}, got a {type(content).__name__}")
    return _said(content)


def _said(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _said(value) if isinstance(value, Mapping) else value for key, value in mapping.items() if value != "auto"
    }


def settings_with(run: Mapping[str, Any], given: Mapping[str, Any]) -> RunSettings:
    """Run settings, with what the DeepSpeed configuration says where the run section says nothing.

    Raises:
        ConfigError: both say something, and it differs; or a section of DeepSpeed's has no place here.
    """
    for name, instead in REFUSED.items():
        section = given.get(name)
        if section and (not isinstance(section, Mapping) or section.get("enabled", name == "scheduler")):
            raise ConfigError(f"run.deepspeed: remove '{name}'; {instead}")
    filled: dict[str, Any] = {}
    for theirs, ours, value in _shared(given):
        mine = run.get(ours)
        if mine is None and ours == "precision" and run.get("amp") is not None:
            ours, mine = "amp", "bf16" if run["amp"] else "fp32"
        if mine is None:
            filled[ours] = value
        elif not _same(mine, value):
            raise ConfigError(f"run.deepspeed {theirs} ({value}) contradicts run.{ours} ({mine}); remove one of them")
    if filled.get("max_grad_norm") == 0:  # DeepSpeed's word for no clipping
        del filled["max_grad_norm"]
    return RunSettings.from_config({**run, **filled})


def _shared(given: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(DeepSpeed's name, LAVIS's name, value) of each setting that both have and `given` sets."""
    for theirs, ours in SHARED.items():
        value: Any = given
        for key in theirs.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            yield theirs, ours, value
    if "enabled" in (given.get("bf16") or {}):
        yield "bf16.enabled", "precision", "bf16" if given["bf16"]["enabled"] else "fp32"
    optimizer = given.get("optimizer") or {}
    params = optimizer.get("params") or {}
    if "betas" in params:
        yield "optimizer.params.betas[1]", "beta2", params["betas"][1]
    if "type" in optimizer:
        decoupled = optimizer["type"] != "Adam" or params.get("adam_w_mode", True)  # DeepSpeed's Adam is AdamW
        yield "optimizer.type", "optimizer", "adamw" if decoupled else "adam"


def _same(left: Any, right: Any) -> bool:
    try:
        return float(left) == float(right)
    except (TypeError, ValueError):
        return left == right


def complete(given: Mapping[str, Any], settings: RunSettings, world_size: int) -> dict[str, Any]:
    """The whole DeepSpeed configuration, checked; the optimizer is not in it, as the engine makes it.

    Raises:
        ConfigError: an unknown key, with the nearest known one, or settings that do not go together.
    """
    zero = dict(given.get("zero_optimization") or {})
    _check_stage(zero, given.get("optimizer") or {})
    size = settings.batch_size_train * settings.accum_grad_iters * world_size
    if given.get("train_batch_size", size) != size:
        raise ConfigError(
            f"run.deepspeed train_batch_size ({given['train_batch_size']}) contradicts run.batch_size_train "
            f"({settings.batch_size_train}) x run.accum_grad_iters ({settings.accum_grad_iters}) x {world_size} "
            f"processes = {size}; remove it"
        )
    whole = {
        "steps_per_print": None,
        "zero_force_ds_cpu_optimizer": False,
        **{key: value for key, value in given.items() if key not in ("optimizer", *REFUSED)},
        "train_batch_size": size,
        "train_micro_batch_size_per_gpu": settings.batch_size_train,
        "gradient_accumulation_steps": settings.accum_grad_iters,
        "gradient_clipping": settings.max_grad_norm or 0.0,
        "bf16": {
            "check_grad_overflow": True,  # a gradient that is not finite must not reach the weights
            **(given.get("bf16") or {}),
            "enabled": settings.precision == "bf16",
        },
        "zero_optimization": zero,
    }
    if not whole.get("managed_gradient_accumulation", True):
        raise ConfigError("run.deepspeed: remove 'managed_gradient_accumulation'; the runner says when a step ends")
    _check_keys(whole)
    return whole


def _check_stage(zero: Mapping[str, Any], optimizer: Mapping[str, Any]) -> None:
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"run.deepspeed zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    kind, params = optimizer.get("type", "AdamW"), optimizer.get("params") or {}
    if kind not in ("Adam", "AdamW"):
        raise ConfigError(
            f"run.deepspeed optimizer.type '{kind}' does not go with ZeRO stage {stage} here; known: Adam, AdamW"
        )
    for key in params:
        if key not in OPTIMIZER_KEYS:
            raise ConfigError(unknown_name("key in run.deepspeed optimizer.params:", key, OPTIMIZER_KEYS))
    for name, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        device = (zero.get(name) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise ConfigError(f"run.deepspeed zero_optimization.{name}.device must be cpu or none, got {device!r}")
        if device == "cpu" and stage not in stages:
            raise ConfigError(
                f"run.deepspeed zero_optimization.{name} does not go with ZeRO stage {stage}; it needs stage "
                f"{' or '.join(map(str, stages))}"
            )


class _Read(dict):
    """A mapping that knows which keys it was asked for: DeepSpeed ignores top-level keys that it does not know."""

    def __init__(self, content: Mapping[str, Any]):
        super().__init__({key: _Read(value) if isinstance(value, Mapping) else value for key, value in content.items()})
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> _Read:  # DeepSpeed asks `name in mapping.keys()`
        return self


def _check_keys(whole: Mapping[str, Any]) -> None:
    """Let DeepSpeed read the configuration, and see which keys it never asked for.

    Raises:
        ConfigError: there is such a key, or a class of DeepSpeed's refused one or its value.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    read = _Read(
        {key: value for key, value in whole.items() if key != "train_batch_size"}
    )  # it may not know its ranks yet
    try:
        DeepSpeedConfig(read)
    except ValidationError as error:
        first = error.errors()[0]
        *section, key = map(str, first["loc"])
        tops = [name for name, value in whole.items() if _holds(value, [*section, key])]
        place = ".".join(["run.deepspeed", *tops[:1], *section])  # the class knows its own name only
        if first["type"] == "extra_forbidden":
            raise ConfigError(_unknown_key(place, key, _fields(error.title, section))) from None
        raise ConfigError(f"{place}.{key}: {first['msg']}, got {first['input']!r}") from None
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"run.deepspeed: {str(error).splitlines()[0]}") from error
    for name in (None, "data_types", "checkpoint"):
        section = read if name is None else read.get(name) or _Read({})
        for key in section:
            if key not in section.asked:
                place = "run.deepspeed" if name is None else f"run.deepspeed.{name}"
                raise ConfigError(_unknown_key(place, key, section.asked))


def _unknown_key(place: str, key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)  # the whole list has some sixty names
    return unknown_name(f"key in {place}:", key, near or known)


def _model(title: str, section: list[str]) -> Any:
    """The class of DeepSpeed's that reads a section, found by its name and the way down from it."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    waiting = [DeepSpeedConfigModel]
    while waiting and waiting[-1].__name__ != title:
        waiting += waiting.pop().__subclasses__()
    model = waiting[-1] if waiting else DeepSpeedConfigModel
    for name in section:
        kinds = typing.get_args(model.model_fields[name].annotation) or (model.model_fields[name].annotation,)
        model = next(kind for kind in kinds if hasattr(kind, "model_fields"))
    return model


def _fields(title: str, section: list[str]) -> set[str]:
    fields = _model(title, section).model_fields
    return set(fields) | {field.alias for field in fields.values() if field.alias}


def _holds(value: Any, path: list[str]) -> bool:
    return not path or (isinstance(value, Mapping) and path[0] in value and _holds(value[path[0]], path[1:]))
