"""`run.*` of a configuration, read once, checked, and turned into plain values.

In: the run section (an OmegaConf node or a dict). Out: `RunSettings`. No other part of the runner reads the
configuration, and nothing below `RunnerLSTP` ever sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lavis_lstp.errors import ConfigError, unknown_name

RUN_KEYS: dict[str, str] = {
    "precision": "fp32 (default) or bf16 autocast; LAVIS's `amp: true` means bf16 here",
    "max_grad_norm": "clip the gradient's global norm to this; null (default) leaves it",
    "optimizer": "adamw (default) or adam, whose weight decay goes through the gradient; LAVIS has no such key",
    "max_steps": "stop after so many optimizer steps; null (default) runs max_epoch epochs",
    "warmup_ratio": "share of all optimizer steps spent warming up when warmup_steps is not given (default 0.05)",
    "save_every_steps": "also save a checkpoint every so many optimizer steps; 0 (default) does not",
    "save_every_minutes": "also save a checkpoint when the last one is so many minutes old; null (default) does not",
    "save_every_epochs": "save a checkpoint every so many epochs (default 1); the last epoch is always saved",
    "keep_last": "how many checkpoints to keep besides the best one (default 2)",
    "eval_every_epochs": "evaluate valid_splits every so many epochs (default 1); the last epoch always",
    "early_stop_epochs": "stop when run.metric has not improved for so many validations; null (default) does not",
    "metric": "which metric of the first valid split picks the best checkpoint (default agg_metrics); higher wins, but "
    "lower for a name that ends in 'loss'; bleu1 (published) is computed where it is asked for, with sacrebleu",
    "resume_ckpt_path": "training: checkpoint to go on from, auto or a run's folder meaning the last complete one; "
    "evaluation: weights to evaluate, auto or a run's folder meaning its best checkpoint, else its last",
    "allow_partial": "report metrics although some questions have no prediction (default false)",
    "find_unused_parameters": "tell DDP that some trained weights get no gradient in some steps (default false)",
    "use_dist_eval_sampler": "kept for LAVIS's configurations; evaluation is always divided, without padding",
    "train_dataset_ratios": "share of each data set in an epoch: {name: number}",
}
"""Run keys that `runner_lstp` reads beyond LAVIS's own, with their meaning."""


OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
"""`run.optimizer`; both keep the same two moments, and differ in how weights decay."""


@dataclass(frozen=True)
class RunSettings:
    output_dir: Path
    device: str = "auto"
    seed: int = 42
    precision: str = "fp32"
    batch_size_train: int = 1
    batch_size_eval: int = 1
    num_workers: int = 0
    accum_grad_iters: int = 1
    max_grad_norm: float | None = None
    max_epoch: int = 1
    max_steps: int | None = None
    lr_sched: str = "linear_warmup_cosine_step"
    init_lr: float = 0.0
    min_lr: float = 0.0
    warmup_lr: float = -1.0
    warmup_steps: int | None = None
    warmup_ratio: float = 0.05
    lr_decay_rate: float | None = None
    lr_layer_decay: float = 1.0
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    beta2: float = 0.999
    log_freq: int = 50
    save_every_steps: int = 0
    save_every_minutes: float | None = None
    save_every_epochs: int = 1
    keep_last: int = 2
    eval_every_epochs: int = 1
    early_stop_epochs: int | None = None
    metric: str = "agg_metrics"
    allow_partial: bool = False
    find_unused_parameters: bool = False
    resume_ckpt_path: str | None = None
    evaluate: bool = False
    train_splits: tuple[str, ...] = ("train",)
    valid_splits: tuple[str, ...] = ()
    test_splits: tuple[str, ...] = ()
    train_dataset_ratios: Mapping[str, float] | None = None

    @classmethod
    def from_config(cls, run: Mapping[str, Any]) -> RunSettings:
        """Read the run section.

        Raises:
            ConfigError: a value is missing, of the wrong type, out of range, or contradicts another.
        """
        values: dict[str, Any] = {}
        for name, field in cls.__dataclass_fields__.items():
            given = run.get(name, None)
            if given is not None:
                values[name] = _convert(name, str(field.type), given)
        if "output_dir" not in values:
            raise ConfigError("run.output_dir is missing; name the folder that checkpoints and results go to")
        values["precision"] = _precision(run)
        settings = cls(**values)
        settings._check()
        return settings

    def _check(self) -> None:
        for name in ("batch_size_train", "batch_size_eval", "accum_grad_iters", "max_epoch", "log_freq", "keep_last"):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("save_every_epochs", "eval_every_epochs", "save_every_steps", "num_workers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"run.{name} must not be negative, got {getattr(self, name)}")
        for name in ("max_steps", "early_stop_epochs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"run.{name} must be at least 1 or null, got {getattr(self, name)}")
        for name in ("max_grad_norm", "save_every_minutes"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ConfigError(f"run.{name} must be above 0 or null, got {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(unknown_name("run.optimizer", self.optimizer, OPTIMIZERS))
        if self.early_stop_epochs is not None and not (self.valid_splits and self.eval_every_epochs):
            raise ConfigError("run.early_stop_epochs needs validations: set run.valid_splits and run.eval_every_epochs")
        if not self.evaluate and self.init_lr <= 0:
            raise ConfigError(f"run.init_lr must be above 0 to train, got {self.init_lr}")

    def torch_device(self, local_rank: int = 0) -> torch.device:
        """The device this process computes on."""
        wanted = self.device
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        kind = wanted.split(":")[0]
        if kind not in ("cpu", "cuda"):
            raise ConfigError(f"run.device must be auto, cpu or cuda, got '{self.device}'")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ConfigError("run.device is cuda, but torch sees no CUDA device; set run.device=cpu or auto")
        return torch.device(f"cuda:{local_rank}" if wanted == "cuda" else wanted)

    def steps_to_warm_up(self, total_steps: int) -> int:
        return self.warmup_steps if self.warmup_steps is not None else int(self.warmup_ratio * total_steps)


def _precision(run: Mapping[str, Any]) -> str:
    """fp32 or bf16, from `precision` or from LAVIS's `amp`; both may be given if they agree."""
    amp, precision = run.get("amp", None), run.get("precision", None)
    if precision is None:
        return "bf16" if amp else "fp32"
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"run.precision must be fp32 or bf16, got '{precision}'")
    if amp is not None and bool(amp) != (precision == "bf16"):
        raise ConfigError(f"run.amp={amp} contradicts run.precision={precision}; remove one of them")
    return precision


def _convert(name: str, kind: str, value: Any) -> Any:
    """A configuration value as the type its field declares."""
    try:
        if kind.startswith("tuple"):
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError("not a list")
            return tuple(str(item) for item in value)
        if kind.startswith("bool"):
            if not isinstance(value, bool):
                raise ValueError("not true or false")
            return value
        if kind.startswith("int"):
            if isinstance(value, bool) or int(value) != float(value):
                raise ValueError("not a whole number")
            return int(value)
        if kind.startswith("float"):
            return float(value)  # YAML 1.1 reads 1e-4 as a string
        if kind.startswith("Mapping"):
            return {str(key): float(share) for key, share in value.items()}
    except (TypeError, ValueError, AttributeError) as error:
        wanted = kind.replace(" | None", "").replace("tuple[str, ...]", "list of names")
        raise ConfigError(f"run.{name} must be a {wanted}, got {value!r} ({error})") from None
    return Path(str(value)) if kind == "Path" else str(value)
