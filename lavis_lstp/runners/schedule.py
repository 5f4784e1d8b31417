"""Learning rates by optimizer step.

In: the optimizer and how many steps there are. Out: `lr` set in each parameter group before each step. The
published recipe steps its scheduler once an epoch with max_steps = -1, and so alternates between 5e-5 and 0 (SPEC 0);
here the rate is a pure function of the optimizer step, which is all that a resumed run needs to know.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lavis.common.registry import registry

from lavis_lstp.errors import ConfigError, unknown_name


def warmup_cosine(
    step: int, *, total_steps: int, warmup_steps: int, init_lr: float, min_lr: float, warmup_lr: float
) -> float:
    """Rate of optimizer step `step`, counted from 0: linear up to init_lr, then a half cosine down to min_lr."""
    if step < warmup_steps:
        return warmup_lr + (init_lr - warmup_lr) * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_lr + (init_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


@registry.register_lr_scheduler("linear_warmup_cosine_step")
class LinearWarmupCosineStep:
    """LAVIS's scheduler interface over `warmup_cosine`; `cur_step` counts optimizer steps within the epoch."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        init_lr: float,
        min_lr: float,
        warmup_steps: int,
        total_steps: int,
        steps_per_epoch: int,
        warmup_start_lr: float = -1.0,
        **unused: Any,
    ):
        self.optimizer = optimizer
        self.steps_per_epoch = steps_per_epoch
        self.curve = {
            "total_steps": total_steps,
            "warmup_steps": warmup_steps,
            "init_lr": init_lr,
            "min_lr": min_lr,
            "warmup_lr": max(0.0, warmup_start_lr),
        }

    def step(self, cur_epoch: int, cur_step: int) -> None:
        lr = warmup_cosine(cur_epoch * self.steps_per_epoch + cur_step, **self.curve)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)


def build_schedule(name: str, optimizer: torch.optim.Optimizer, **options: Any) -> Any:
    """One of LAVIS's registered schedulers or ours; all are given the same options and take what they know.

    LAVIS's own ones warm up within the first epoch only and then step by epoch, by design.
    """
    scheduler = registry.get_lr_scheduler_class(name)
    if scheduler is None:
        raise ConfigError(unknown_name("run.lr_sched", name, registry.list_lr_schedulers()))
    return scheduler(optimizer=optimizer, **options)
