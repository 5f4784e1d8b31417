"""Training batches of shards that are streamed: `shards.loader: stream`, a `webdataset.DataPipeline`.

In: the plans of an epoch's steps (`data_order`). Out: their batches, equal to those that `Batches` loads of the same
plans. The stages, in the words of webdataset:

    shard list, shuffle, split by node   the plans: questions of this process, in an order drawn from seed and epoch
    split by worker                      webdataset's own; where the lanes allow it, this also splits the shards
    tar to samples, shuffle buffer       ReadShards
    decode                               the data set
    batch                                in the training process, so that workers may take samples in turns

A plan is known before anything is read, so position (epoch, shard, offset) is a function of the number of samples that
were consumed, and a run goes on to the sample under any number of processes and workers.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import Dataset, default_collate

from lavis_lstp.data.shards.questions import ShardQuestions
from lavis_lstp.data.shards.stream import ReadShards, Wanted
from lavis_lstp.errors import LstpError
from lavis_lstp.runners.data_order import LANE, Batches, SeededDataset, StepPlan, TrainOrder, collated, sampling_of

log = logging.getLogger(__name__)


def build_batches(
    dataset: Dataset, order: TrainOrder, *, seed: int, num_workers: int, pin_memory: bool
) -> Batches | StreamBatches:
    """What loads the batches of training: a stream where a data set says so."""
    options = {"seed": seed, "num_workers": num_workers, "pin_memory": pin_memory}
    if not order.streamed:
        return Batches(dataset, **options)
    readers = order.world_size * max(1, num_workers)
    for lanes in sorted({sampling.used_lanes for sampling in order.sampling if sampling.streamed}):
        if lanes % readers:
            log.warning(
                "shards.loader: stream has %d lanes for %d processes x workers; shards are transferred several times, "
                "unless lanes (and shards) are a multiple of these",
                *(lanes, readers),
            )
    return StreamBatches(dataset, **options)


class StreamBatches:
    """Loads the batches of plans in order; its worker processes are those of one epoch."""

    def __init__(self, dataset: Dataset, *, seed: int, num_workers: int = 0, pin_memory: bool = False):
        self.dataset = dataset
        self.seed = seed
        self.pin_memory = pin_memory
        collater = getattr(dataset, "collater", None) or default_collate
        self._collate = functools.partial(collated, collater)
        self._options = {"num_workers": num_workers, "generator": torch.Generator().manual_seed(seed)}

    def pipeline(self, wanted: Sequence[Wanted], epoch: int) -> webdataset.DataPipeline:
        """The stages that a worker process runs."""
        return webdataset.DataPipeline(
            functools.partial(iter, wanted),
            webdataset.split_by_worker,
            ReadShards(streamed_parts(self.dataset), LANE),
            functools.partial(_decoded, SeededDataset(self.dataset, self.seed), epoch),
        )

    def of_plans(self, plans: Sequence[StepPlan], epoch: int) -> Iterator[Any]:
        """The batches of optimizer steps.

        Raises:
            LstpError: what a sample, or a batch of samples, is refused for.
        """
        rows = [row for plan in plans for row in zip(plan.batches, plan.places, strict=True)]
        wanted = [Wanted(*pair) for batch, places in rows for pair in zip(batch, places, strict=True)]
        sizes = [len(batch) for batch, _ in rows]
        workers = self._options["num_workers"]
        ahead = {"prefetch_factor": max(2, -(-2 * max(sizes) // workers))} if workers else {}  # two batches
        pipeline, send = self.pipeline(wanted, epoch), _small_as_arrays if workers else _as_it_is
        samples = webdataset.WebLoader(pipeline, batch_size=None, collate_fn=send, **ahead, **self._options)
        for batch in samples.compose(functools.partial(_batched, sizes, self._collate)):
            if isinstance(batch, LstpError):
                try:
                    raise batch
                finally:
                    del batch
            yield _pinned(batch) if self.pin_memory else batch


def streamed_parts(dataset: Dataset) -> list[tuple[int, ShardQuestions]]:
    """(number of its first question, questions) of each part of a data set that is streamed."""
    first, found = 0, []
    for part in getattr(dataset, "parts", {"": dataset}).values():
        if sampling_of(part).streamed:
            found.append((first, part.annotation))
        first += len(part)
    return found


def _decoded(dataset: SeededDataset, epoch: int, source: Iterable[int]) -> Iterator[Any]:
    """Samples, None for one that is left out; an error of the user's comes in place of what is left."""
    for index in source:
        (sample,) = dataset.__getitems__([(epoch, index)])
        yield sample
        if isinstance(sample, LstpError):
            return


def _as_it_is(sample: Any) -> Any:
    return sample


SMALL = 1 << 16
"""Bytes; each larger tensor goes from worker to trainer as an open file, of which a process has 1024."""


def _small_as_arrays(sample: Any) -> Any:
    if not isinstance(sample, dict):
        return sample
    known = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float64, torch.float16)
    return {
        name: value.numpy() if torch.is_tensor(value) and value.dtype in known and value.nbytes <= SMALL else value
        for name, value in sample.items()
    }


def _as_tensors(sample: Any) -> Any:
    if not isinstance(sample, dict):
        return sample
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in sample.items()}


def _batched(sizes: Sequence[int], collate: Callable[[list[Any]], Any], source: Iterable[Any]) -> Iterator[Any]:
    samples = iter(source)
    for size in sizes:
        found = list(itertools.islice(samples, size))
        error = next((sample for sample in found if isinstance(sample, LstpError)), None)
        yield error if error is not None else collate([_as_tensors(sample) for sample in found])
        if error is not None:
            return


def _pinned(batch: Any) -> Any:
    if not isinstance(batch, dict):
        return batch
    return {name: value.pin_memory() if torch.is_tensor(value) else value for name, value in batch.items()}
