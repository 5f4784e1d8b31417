"""One pass over an evaluation split: shared among ranks, resumable, and equal to the byte each time.

In: a task, a model and a data set. Out: the task's records in the order of the data set, its files, its metrics.

The split is cut into fixed units, batches in which a video's questions lie together, beside others of like length, and
rank r takes every world_size-th one: nothing is padded, decoded or done twice, and as no unit depends on the number of
ranks, neither does any prediction. A video with more questions than a batch holds is a unit of several batches. Each
rank appends finished units to a file of its own below `.parts`; a process that is killed finds them there. Their header
is a digest of configuration, weights and data, so that no record of another checkpoint is ever taken over. A unit that
lacks a sample, because its video could not be read, is not finished: videos are no part of the digest, and this one may
have been repaired.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import numbers
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lavis.tasks.base_task import BaseTask
from torch.utils.data import ConcatDataset, Dataset

import lavis_lstp
from lavis_lstp import distributed
from lavis_lstp.batch import take_rows
from lavis_lstp.errors import ConfigError, CoverageError
from lavis_lstp.files import read_jsonl, sha256_json, sweep, write_jsonl, writing_to
from lavis_lstp.runners import profile, resume
from lavis_lstp.runners.data_order import Batches, eval_batches, eval_units
from lavis_lstp.runners.engine import WholeModel, autocast
from lavis_lstp.runners.randomness import borrowed
from lavis_lstp.runners.record import progress
from lavis_lstp.schema import Prediction
from lavis_lstp.tasks.base import LSTPTask, question_ids

log = logging.getLogger(__name__)

Records = list[Prediction]


class PartFiles:
    """The finished batches of an evaluation that may not be finished.

    Args:
        folder: of this evaluation alone.
        key: digest of everything the records depend on.
    """

    def __init__(self, folder: Path, key: str):
        self.folder = folder
        self.header = {"format": "lavis_lstp.part", "version": 3, "key": key}
        self.handle = None

    def begin(self) -> set[int]:
        """Collect what earlier attempts finished; a collective. Returns the numbers of those batches."""
        merged = self.folder / "merged.jsonl"
        if distributed.is_main():
            whole = [row for row in self._read() if len(row["records"]) >= row["samples"]]
            write_jsonl(merged, [self.header, *whole])  # first: until it is there, the batches lie in these files alone
            for path in self.folder.glob("rank*.jsonl"):
                path.unlink(missing_ok=True)
            sweep(self.folder)
        distributed.barrier()
        done = {row["batch"] for row in read_jsonl(merged) if "batch" in row}
        self.handle = open(self.folder / f"rank{distributed.rank():05d}.jsonl", "w", encoding="utf-8")
        self._append(self.header)
        return done

    def add(self, batch: int, records: Records, samples: int) -> None:
        """Keep the records of a batch; with fewer than `samples` of them, for this attempt alone."""
        self._append({"batch": batch, "samples": samples, "records": records})

    def end(self) -> Records | None:
        """All records in the order of the batches, on rank 0; a collective."""
        self.handle.close()
        distributed.barrier()
        if not distributed.is_main():
            return None
        return [record for row in self._read() for record in row["records"]]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _append(self, row: Mapping[str, Any]) -> None:
        with writing_to(self.handle.name):
            self.handle.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.handle.flush()

    def _read(self) -> list[dict[str, Any]]:
        """Rows of all files, one per batch, in the order of the batches."""
        found: dict[int, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            rows = read_jsonl(path)
            if next(rows, None) == self.header:
                found.update((row["batch"], row) for row in rows)
        return [row for _, row in sorted(found.items())]


def evaluate_split(
    task: BaseTask,
    engine: WholeModel,
    dataset: Dataset,
    *,
    split: str,
    epoch: int | str,
    config: Mapping[str, Any],
    output_dir: Path,
    device: torch.device,
    precision: str,
    batch_size: int,
    num_workers: int,
    seed: int,
    allow_partial: bool,
    limit_batches: int | None = None,
) -> dict[str, Any]:
    """Records, files and metrics of a split, with the model in eval mode; a collective.

    Args:
        config: the whole configuration as plain containers; what of it matters is part of the key under which
            finished batches are kept.
        limit_batches: evaluate so many batches of the split, in all processes together; the metrics say "partial".

    Returns:
        The metrics, the same on each rank.

    Raises:
        ConfigError: a part of the split, with a task of LAVIS's that would report it as the whole.
    """
    if limit_batches is not None and not isinstance(task, LSTPTask):
        raise ConfigError(
            f"run.limit_batches and run.fast_dev_run: {type(task).__name__} cannot say that its metrics are of a part; "
            "leave them out, or take a task of lavis_lstp"
        )
    engine.model.eval()
    task.before_evaluation(model=engine.bare_model, dataset=dataset)
    name = config["run"].get("task", type(task).__name__)
    key = {
        "config": resume.important(config),
        "weights": engine.weights_digest(),
        "data": fingerprint(dataset),
        "lavis_lstp": lavis_lstp.__version__,
    }
    result_dir = output_dir / "result"
    parts = PartFiles(result_dir / ".parts" / f"{split}_{name}", sha256_json(key))

    def step(samples: Any) -> Records:
        with autocast(device, precision), profile.span("answering"):
            with profile.span("copying to the device"):
                batch = to_device(samples, device)
            return engine.apply(lambda model: task.valid_step(model=model, samples=batch))

    with borrowed(seed):
        records = run_evaluation(
            step,
            dataset,
            parts=parts,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            pin_memory=device.type == "cuda",
            in_step=engine.in_step,
            title=f"evaluating {split}",
            limit=limit_batches,
        )
    if records and isinstance(task, LSTPTask):  # units are in an order of their own
        place = {name: i for i, name in enumerate(question_ids(dataset))}
        records.sort(key=lambda record: place.get(record["question_id"], len(place)))
    finish = functools.partial(task.after_evaluation, val_result=records or [], split_name=split, epoch=epoch)
    if isinstance(task, LSTPTask):
        metrics = distributed.on_main(
            lambda: finish(
                dataset=dataset,
                result_dir=result_dir,
                output_dir=output_dir,
                allow_partial=allow_partial or limit_batches is not None,
                limited=limit_batches is not None,
                model_config=config.get("model", {}),
                digests={name: key[name] for name in ("weights", "data")},
            )
        )
    else:  # LAVIS's own tasks join files of all ranks, behind a barrier of their own
        metrics = distributed.broadcast(finish() or {})
    if distributed.is_main():
        parts.remove()
    return metrics


def run_evaluation(
    step: Callable[[Any], Records],
    dataset: Dataset,
    *,
    parts: PartFiles,
    batch_size: int,
    num_workers: int,
    seed: int,
    pin_memory: bool = False,
    in_step: bool = False,
    title: str = "evaluation",
    limit: int | None = None,
) -> Records | None:
    """Apply `step` to every batch that `parts` does not hold yet; a collective.

    Args:
        step: from a collated batch to one record per sample.
        in_step: every rank makes as many steps as the others, on batches that do not count where its own are done:
            an engine that holds a part of the weights on each rank needs all of them in each step.
        limit: so many of the batches; None = all.

    Returns:
        All records on rank 0, None elsewhere.
    """
    batches = units_of(dataset, batch_size, whole=not in_step)[:limit]
    done = parts.begin()
    if done and distributed.is_main():
        log.info("%s: %d of %d batches were done by an earlier attempt", title, len(done), len(batches))
    todo = [i for i in range(distributed.rank(), len(batches), distributed.world_size()) if i not in done]
    own = len(todo)
    if in_step:
        todo += (todo[-1:] or [0]) * (max(distributed.gather(own)) - own)
    loader = Batches(dataset, seed=seed, num_workers=min(num_workers, len(todo)), pin_memory=pin_memory)
    bar = progress(total=len(todo), title=title, main=distributed.is_main())
    spare = None
    with bar, torch.no_grad():
        given = profile.waiting(loader([batches[i] for i in todo]), "waiting for data")
        for turn, (number, samples) in enumerate(zip(todo, given, strict=True)):
            readable, counts = samples is not None, turn < own
            if in_step:  # the other ranks wait for this one's part of the weights
                samples = spare = samples if readable else spare
                if samples is None:
                    raise CoverageError(f"{title}: no sample of a rank's first batch can be read: {batches[number]}")
            records = steps(step, samples, batch_size) if readable or in_step else []
            if counts:
                parts.add(number, records if readable else [], len(batches[number]))
            bar.update()
            profile.step()
    return parts.end()


def units_of(dataset: Dataset, batch_size: int, *, whole: bool = True) -> list[tuple[int, ...]]:
    """What is loaded together: questions about one video, where the data set says which these are.

    Args:
        whole: a video with more questions than a batch is one unit; False cuts every unit at `batch_size`, where each
            rank must make as many steps as the others.
    """
    if not hasattr(dataset, "eval_groups"):
        return eval_batches(len(dataset), batch_size)
    groups = dataset.eval_groups()
    if whole:
        return eval_units(groups, batch_size)
    order = [index for group in groups for index in group]
    return [tuple(order[i] for i in batch) for batch in eval_batches(len(order), batch_size)]


def steps(step: Callable[[Any], Records], samples: Any, batch_size: int) -> Records:
    """`step` on a unit, in parts of at most `batch_size` rows."""
    names = samples.get("question_id") if isinstance(samples, dict) else None
    if names is None or len(names) <= batch_size:
        return step(samples)
    rows = torch.arange(len(names)).split(batch_size)
    return [record for part in rows for record in step(take_rows(samples, part))]


def metric_value(metrics: Mapping[str, Any], name: str, split: str) -> float:
    """The number by which a checkpoint is compared with others.

    Raises:
        ConfigError: a split's metrics have no such number.
    """
    scalars = {key: value for key, value in metrics.items() if _is_scalar(value)}
    if name not in scalars:
        what = f"is a {type(metrics[name]).__name__}, no number" if name in metrics else "is not among the metrics"
        raise ConfigError(f"run.metric '{name}' {what} of split '{split}'; choose one of {', '.join(sorted(scalars))}")
    return float(scalars[name])


def _is_scalar(value: Any) -> bool:
    if torch.is_tensor(value):
        return value.numel() == 1
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_better(name: str, value: float, before: float | None) -> bool:
    """Higher is better, but lower for a metric whose name ends in "loss"; NaN is never better."""
    if math.isnan(value) or before is None:
        return not math.isnan(value)
    return value < before if name.endswith("loss") else value > before


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors of a nested batch on the device; everything else as it is."""
    if torch.is_tensor(value):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    return value


def fingerprint(dataset: Dataset) -> str:
    """Digest of a data set's content as far as it can be known without opening a video."""
    if hasattr(dataset, "fingerprint"):
        return str(dataset.fingerprint())
    if isinstance(dataset, ConcatDataset):
        return sha256_json([fingerprint(part) for part in dataset.datasets])
    annotation = getattr(dataset, "annotation", None)
    return sha256_json([type(dataset).__name__, len(dataset), annotation])
