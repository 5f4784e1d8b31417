"""What a resumed run must share with the run it continues, and what may have changed.

In: the checkpoints at hand, the manifest of one, and the facts of the run that is starting. Out: the checkpoint to
continue from and one log line that lists what changed, or an error where going on would mean something else than the
user believes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_lstp.config.load import flatten
from lavis_lstp.errors import ConfigError, WeightsError
from lavis_lstp.runners.checkpoint import CheckpointStore, find

log = logging.getLogger(__name__)

BINDING = (
    "run.seed",
    "run.task",
    "run.train_splits",
    "run.train_dataset_ratios",
    "model.arch",
    "model.model_type",
    "model.train",
    "model.losses",
)
"""Settings without which the rest of a run is not the continuation of its beginning."""

UNIMPORTANT = frozenset(
    f"run.{name}"
    for name in (
        "output_dir resume_ckpt_path evaluate device distributed world_size rank gpu dist_url dist_backend num_workers "
        "log_freq profile keep_last save_every_steps save_every_minutes save_every_epochs"
    ).split()
)
"""Settings that change neither weights nor predictions."""


def choose_source(store: CheckpointStore, wanted: str | None) -> Path | None:
    """The checkpoint folder to continue from; None starts afresh.

    Args:
        wanted: "auto" for the last complete checkpoint in the store, if any; a path; or None.

    Raises:
        ConfigError: the store holds another run, which would be mixed with this one.
        WeightsError: there is no complete checkpoint at the path.
    """
    if wanted == "auto":
        return store.latest()
    own = store.complete()
    source = None if wanted is None else find(wanted)
    if own and source != own[-1].resolve():
        what = "run.resume_ckpt_path is not set" if wanted is None else f"run.resume_ckpt_path is {source}"
        raise ConfigError(
            f"{store.folder.parent} already holds a run ({own[-1].name}) and {what}; set run.resume_ckpt_path=auto to "
            "continue it, or choose another run.output_dir"
        )
    return source


def to_evaluate(store: CheckpointStore, wanted: str) -> Path:
    """The checkpoint folder whose weights to evaluate.

    Args:
        wanted: a checkpoint folder; or a run's folder, or "auto" for the store's, of which the best checkpoint is
            taken, or the last one where none is known to be the best. `model.checkpoint` reads a run's folder alike.

    Raises:
        WeightsError: there is no complete checkpoint.
    """
    run = store if wanted == "auto" else CheckpointStore(Path(wanted) / "checkpoints")
    best = run.best().get("checkpoint")
    if best:
        return run.folder / best
    found = run.latest() if wanted == "auto" else find(wanted)
    if found is None:
        raise WeightsError(f"run.resume_ckpt_path is auto, and there is no complete checkpoint in {store.folder}")
    return found


def important(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flat settings that weights or predictions depend on."""
    return {name: value for name, value in flatten(config).items() if name not in UNIMPORTANT}


def check(saved: Mapping[str, Any], current: Mapping[str, Any], source: object) -> None:
    """Compare the facts of a checkpoint with those of the run that wants to continue it.

    Args:
        saved, current: {"config", "data" (fingerprint by split), "step_samples" (samples per optimizer step)}.

    Raises:
        ConfigError: a binding setting, the training data or the number of samples per step differ.
    """
    if not (isinstance(saved.get("config"), Mapping) and {"data", "step_samples"} <= saved.keys()):
        raise ConfigError(f"cannot continue from {source}: its manifest has no config, data and step_samples of a run")
    before, now = important(saved["config"]), important(current["config"])
    changed = [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    binding = [line for line in changed if line.split(":")[0] in BINDING]
    if saved["step_samples"] != current["step_samples"]:
        binding.append(
            f"samples per optimizer step (batch_size_train x accum_grad_iters x processes): "
            f"{saved['step_samples']} -> {current['step_samples']}"
        )
    if saved["data"] != current["data"]:
        binding.append("the training data, or how its shards are streamed (the fingerprint differs)")
    if binding:
        raise ConfigError(
            f"cannot continue from {source}: {'; '.join(binding)}; restore what it was, or start a new run in another "
            "run.output_dir"
        )
    if changed:
        log.warning("settings that changed since %s was saved: %s", source, "; ".join(changed))
