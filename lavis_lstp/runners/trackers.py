"""The lines of log.jsonl, to TensorBoard, Weights & Biases, Trackio or MLflow as well: `run.track`.

In: names of trackers, and the events of a run. Out: curves named `train/loss`, `eval/<split>/<metric>` by step.
accelerate, a dependency already, knows these services; here stands only how a resumed run goes on with its own curve:
steps that will be done again are dropped, or the run is found again by its id.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_lstp.errors import ConfigError

PROJECT = "lavis_lstp"


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker whose package is not installed, before a run begins."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    there = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in names:
        if name not in there:
            package = "tensorboardX" if name == "tensorboard" else name
            raise ConfigError(f"run.track: '{name}' is not installed; pip install {package}, or leave it out")


class Trackers:
    """Open trackers of one run, on rank 0.

    Args:
        names: of `config.run.TRACKERS`.
        output_dir: of the run; a run that is resumed there continues its curves.
        step: the optimizer step after which the run goes on.
    """

    def __init__(self, names: Sequence[str], output_dir: Path, step: int):
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        check_trackers(names)
        self.open = []
        for name in names:
            tracker = LOGGER_TYPE_TO_CLASS[name](*_place(name, output_dir), **_settings(name, output_dir, step))
            tracker.start()
            self.open.append(tracker)

    def write(self, kind: str, values: Mapping[str, Any]) -> None:
        """An event of log.jsonl: its finite numbers."""
        group = "/".join(filter(None, (kind, str(values.get("split") or ""))))
        skipped = ("step", "epoch")
        numbers = {
            f"{group}/{name}": value
            for name, value in values.items()
            if name not in skipped and isinstance(value, int | float) and math.isfinite(value)
        }
        for tracker in self.open if numbers else ():
            tracker.log(numbers, step=int(values.get("step", 0)))

    def close(self) -> None:
        for tracker in self.open:
            tracker.finish()
        self.open = []


def _place(name: str, output_dir: Path) -> tuple[Any, ...]:
    return ("tracking", output_dir) if name == "tensorboard" else (PROJECT,)


def _settings(name: str, output_dir: Path, step: int) -> dict[str, Any]:
    """How the tracker finds the curve that it is to continue; a run's id is made of its folder."""
    run = f"{output_dir.name}-{hashlib.sha256(str(output_dir).encode()).hexdigest()[:12]}"
    return {
        # a name of its own: files are named by the second they are made in
        "tensorboard": {"purge_step": step + 1, "filename_suffix": f".{step + 1}"},
        "wandb": {"id": run, "name": output_dir.name, "resume": "allow", "dir": str(output_dir)},
        "trackio": {"name": run, "resume": "allow"},
        "mlflow": {"run_name": run},
    }[name]
