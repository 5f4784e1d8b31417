"""Numbers of a training step: summed over micro-batches and ranks, checked, averaged for the log.

In: losses as a task gives them. Out: `StepLosses`, means over exactly the samples of an optimizer step, at the price
of one synchronisation with the device and one all-reduce of a few numbers per step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lavis_lstp import distributed
from lavis_lstp.errors import LstpError
from lavis_lstp.runners.record import JsonLog, progress

log = logging.getLogger(__name__)


class TrainingError(LstpError, ArithmeticError):
    """Training cannot go on: a loss or a gradient is not finite."""


def losses_of(given: Any) -> dict[str, torch.Tensor]:
    """The losses in what a task's train_step returns: ours a dict, LAVIS 1.0.2's the loss, its git main's a pair."""
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, tuple):
        loss, parts = given
        return {**{name: value for name, value in parts.items() if torch.is_tensor(value)}, "loss": loss}
    return {"loss": given}


class StepLosses:
    """Mean losses of one optimizer step and what it took."""

    def __init__(self, *, lr: float, samples: int):
        self.lr = lr
        self.samples = samples
        self.counted = 0
        self.sums: dict[str, torch.Tensor] = {}
        self.means: dict[str, float] = {}
        self.own_loss = 0.0
        self.grad_norm = 0.0
        self.data_s = 0.0
        self.step_s = 0.0
        self.stop = False
        self.save = False

    def add(self, losses: Mapping[str, torch.Tensor], count: int) -> None:
        """Add a micro-batch of which `count` samples count; an idle rank's 0 must not turn a NaN into one."""
        self.counted += count
        for name, loss in losses.items():
            term = loss.float() * count if count else torch.zeros_like(loss, dtype=torch.float32)
            self.sums[name] = self.sums[name] + term if name in self.sums else term

    def reduce(self, grad_norm: torch.Tensor, *, stop: bool, save: bool) -> None:
        """Sum over the ranks, and agree whether to stop or save; the same names must come on each rank.

        Args:
            grad_norm: float [].
        """
        names = sorted(self.sums)
        device = grad_norm.device
        own = torch.stack([self.sums[name].to(device) for name in names])
        flags = torch.tensor([float(stop), float(save)], device=device)
        total = distributed.sum_over_ranks(torch.cat([own, flags]))
        numbers = torch.cat([total, grad_norm.float().reshape(1), own[names.index("loss")].reshape(1)]).tolist()
        self.means = {name: value / self.samples for name, value in zip(names, numbers[: len(names)], strict=True)}
        self.stop, self.save = numbers[-4] > 0, numbers[-3] > 0
        self.grad_norm, self.own_loss = numbers[-2:]

    def require_finite(self, step: int, ids: Sequence[str]) -> None:
        """Raise before the optimizer sees what would destroy the weights.

        Raises:
            TrainingError: a loss or the gradient is NaN or infinite, with the step and this rank's questions.
        """
        bad = [f"{name} = {value}" for name, value in self.means.items() if not math.isfinite(value)]
        if not bad and not math.isfinite(self.grad_norm):
            bad = [f"gradient norm = {self.grad_norm}"]
        if not bad:
            return
        here = "" if math.isfinite(self.own_loss) else " on this rank"
        raise TrainingError(
            f"{', '.join(bad)}{here} at optimizer step {step}; questions of the step: {', '.join(ids) or 'unknown'}; "
            "look at those samples, lower run.init_lr, or set run.max_grad_norm"
        )


class StepWindow:
    """Means over the steps since the last line, for log.jsonl.

    Args:
        say: also as a line of the log, for where no bar shows them.
    """

    def __init__(self, json_log: JsonLog, every: int, *, say: bool = True):
        self.json_log = json_log
        self.say = say
        self.every = every
        self.steps: list[StepLosses] = []

    def add(self, step: int, epoch: int, losses: StepLosses, *, flush: bool = False) -> None:
        self.steps.append(losses)
        if step % self.every and not flush:
            return
        count = len(self.steps)
        means = {name: sum(s.means[name] for s in self.steps) / count for name in losses.means}
        step_s = sum(s.step_s for s in self.steps) / count
        row = {
            **means,
            "lr": losses.lr,
            "grad_norm": sum(s.grad_norm for s in self.steps) / count,
            "samples_per_s": round(sum(s.samples for s in self.steps) / max(1e-9, step_s * count), 3),
            "data_s": round(sum(s.data_s for s in self.steps) / count, 6),
            "step_s": round(step_s, 6),
        }
        self.steps.clear()
        self.json_log.write("train", step=step, epoch=epoch, **row)
        parts = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        level = logging.INFO if self.say else logging.DEBUG
        text = "epoch %d step %d: %s, lr %.3g, %.1f samples/s"
        log.log(level, text, epoch, step, parts, row["lr"], row["samples_per_s"])


def epoch_bar(epoch: int, plans: Sequence[Any], steps_per_epoch: int, *, main: bool) -> Any:
    """A progress bar over the optimizer steps of an epoch, standing where a resumed epoch stands."""
    return progress(total=steps_per_epoch, initial=steps_per_epoch - len(plans), title=f"epoch {epoch}", main=main)


def show(bar: Any, losses: StepLosses) -> None:
    """One more step on the bar."""
    if not bar.disable:
        bar.set_postfix(loss=f"{losses.means['loss']:.4f}", lr=f"{losses.lr:.2e}", refresh=False)
    bar.update()
