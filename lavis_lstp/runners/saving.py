"""The state of a training run to a checkpoint and back: weights, optimizer, generators, and where the run stands.

In: the engine, the store of the run's checkpoints, and facts about the run. Out: a complete checkpoint, written by all
processes together, or after `resume` the same state in each of them. `save` and `resume` are collectives.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lavis_lstp import distributed
from lavis_lstp.errors import WeightsError
from lavis_lstp.files import writing_to
from lavis_lstp.runners import checkpoint, resume
from lavis_lstp.runners.engine import WholeModel
from lavis_lstp.runners.randomness import derived_seed, rng_state, seed_everything, set_rng_state
from lavis_lstp.runners.record import git_revision, versions

log = logging.getLogger(__name__)

TRAINER = "trainer.pt"


@dataclass
class Position:
    """Where a run stands: `consumed` samples into `epoch`, after `step` optimizer steps in all."""

    epoch: int = 0
    consumed: int = 0
    step: int = 0


class Saver:
    """Saves and resumes one run.

    Args:
        facts: what a checkpoint's manifest says of the run, and a resumed run is compared with (`resume.check`).
        keep_last: checkpoints that stay beside the best one.
        seed: of the run, for generators that cannot be restored.
    """

    def __init__(
        self,
        store: checkpoint.CheckpointStore,
        engine: WholeModel,
        *,
        facts: Mapping[str, Any],
        keep_last: int,
        seed: int,
    ):
        self.store, self.engine = store, engine
        self.facts = {"format": "lavis_lstp.checkpoint", "version": 1, **facts}
        self.keep_last, self.seed = keep_last, seed
        self.saved_step = -1
        self.saved_at = time.monotonic()

    def is_due(self, minutes: float | None) -> bool:
        """Whether the last checkpoint is that old; never for None."""
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def save(self, position: Position) -> None:
        """Write a checkpoint of this moment, unless the last one is of it already.

        Raises:
            CheckpointError: it cannot be written. Older checkpoints are untouched.
        """
        step, started = position.step, time.perf_counter()
        if step == self.saved_step:
            return
        weights, shard = self.engine.trained_state(), self.engine.snapshot()
        generators = distributed.gather(rng_state())
        main, folder = distributed.is_main(), distributed.broadcast(self.store.temporary(step))

        def write() -> None:
            if main:
                checkpoint.save_weights(weights, folder / checkpoint.WEIGHTS)
                with writing_to(folder / TRAINER):
                    torch.save({"position": asdict(position), "generators": generators}, folder / TRAINER)
            with writing_to(folder):
                self.engine.save(shard, folder)

        def commit() -> None:
            where = {**asdict(position), "versions": versions(), "git_revision": git_revision()}
            saved = self.store.commit(step, folder, {**self.facts, **where})
            self.store.prune(self.keep_last)
            log.info("saved %s in %.1f s", saved, time.perf_counter() - started)

        for part, here in ((lambda: self.store.begin(folder), main), (write, True), (commit, main)):
            self._together(step, folder, part if here else None)
        self.saved_step, self.saved_at = step, time.monotonic()

    def _together(self, step: int, folder: Path, write: Callable[[], Any] | None) -> None:
        """Let this rank write its part; where one rank cannot, all stop."""
        problem = None
        try:
            if write is not None:
                write()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save calls a full disk a RuntimeError
            problem = error
        said = distributed.gather(problem and str(problem))
        if any(said):
            if distributed.is_main():
                self.store.abandon(folder)
            what = "; ".join(dict.fromkeys(filter(None, said)))
            raise checkpoint.CheckpointError(
                f"cannot write checkpoint {self.store.path(step)}: {what}; earlier checkpoints are intact"
            ) from problem

    def resume(self, source: Path) -> Position:
        """Everything back as it was saved; returns where the run stood.

        Raises:
            ConfigError: the checkpoint is of a run that this one would not continue.
            WeightsError: its weights do not fit the model.
        """
        resume.check(checkpoint.read_manifest(source), self.facts, source)
        self.engine.load_trained_state(checkpoint.load_weights(source), source)
        self.engine.load(source)
        position, states = _read_trainer(source / TRAINER)
        if source.resolve().parent == self.store.folder.resolve():
            self.saved_step = position.step
        if len(states) == distributed.world_size():
            set_rng_state(states[distributed.rank()])
        else:
            log.warning(
                "resuming on %d processes what %d saved: dropout differs", distributed.world_size(), len(states)
            )
            seed_everything(derived_seed(self.seed, "resumed", position.step, distributed.rank()))
        log.info("resumed from %s: epoch %d, %d samples in", source, position.epoch, position.consumed)
        return position


def _read_trainer(path: Path) -> tuple[Position, list[Any]]:
    """Where the run stood, and the states of its processes' generators.

    Raises:
        WeightsError: the file is not one that `Saver.save` wrote.
    """
    try:
        trainer = checkpoint.load_state(path)
        position = Position(**{name: int(value) for name, value in trainer["position"].items()})
        return position, list(trainer["generators"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: not the state of a run ({type(error).__name__}: {str(error)[:80]})") from None
