"""Which samples each optimizer step sees, on which rank, in which micro-batch: a pure function of the seed.

In: lengths of the data sets, batch size, accumulation, ranks, seed, epoch and a position (samples already
consumed in that epoch). Out: one `StepPlan` per optimizer step. Nothing is drawn while training, so a run that is
resumed in the middle of an epoch continues with exactly the samples that were still to come, and so does one that
is resumed on another number of ranks.

An epoch is one permutation of all samples. It is cut into groups of `batch_size * world_size * accumulate`, one
per optimizer step; a group is cut into micro-batches of `batch_size * world_size`; of a micro-batch, rank r takes
every world_size-th sample from r on. **No sample is dropped and none counts twice**: the last group of an epoch is
smaller, is divided by its own size, and a rank with nothing left in it runs one sample with weight 0, so that
collectives still match.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from lavis_lstp.errors import ConfigError, LstpError
from lavis_lstp.runners.randomness import derived_seed, host_generators_kept, seed_host


@dataclass(frozen=True)
class Sampling:
    """How an epoch goes through one data set.

    Attributes:
        blocks: ends of runs of samples that lie together, the shards of a set; () = samples lie anywhere.
        window: so many blocks, in a new order each epoch, are shuffled together, and the next ones come when those are
            through, so that reads stay near each other; 0 = all samples are shuffled at once.
        resampled: samples are drawn with replacement: any number of times in an epoch, or not at all. Of streamed
            shards whole ones are drawn.
        lanes: so many shards are streamed side by side, see `stream`; 0 = samples are read each by itself.
        buffer: so many samples of a lane are shuffled together.
    """

    blocks: Sequence[int] = ()
    window: int = 0
    resampled: bool = False
    lanes: int = 0
    buffer: int = 1

    @property
    def local(self) -> bool:
        return bool(self.window and self.blocks and not self.resampled)

    @property
    def streamed(self) -> bool:
        return bool(self.lanes and self.blocks)

    @property
    def used_lanes(self) -> int:
        """`lanes`, halved until there are as many shards."""
        shards, lanes = int((np.diff(self.blocks, prepend=0) > 0).sum()), self.lanes
        while lanes > max(1, shards):
            lanes = -(-lanes // 2)
        return lanes

    def stream(self, slots: np.ndarray, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The samples of an epoch where shards are read from end to end.

        The shards, in a new order each epoch, make one long row of samples, which is cut into lanes. The sample of a
        slot comes from lane `slot % lanes`. Of R processes the r-th takes slots r, r + R, ..., and of its W workers the
        w-th every W-th of those: where R * W divides the number of lanes, each lane is read by one worker alone, and
        the order depends on neither R nor W. Each lane has a shuffle buffer of its own.

        Args:
            slots: positions in the epoch that are this data set's, rising.

        Returns:
            For each slot a sample, and its place in the reading: `LANE` times the lane, plus its number in the row.
        """
        row, lanes = self._row(len(slots), generator), self.used_lanes
        lane = slots % lanes
        ends = np.cumsum(np.bincount(lane, minlength=lanes)).tolist()
        places = np.empty(len(slots), dtype=np.int64)
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            places[lane == number] = _through_buffer(start, end, self.buffer, generator)
        return row[places], lane * LANE + places

    def _row(self, count: int, generator: torch.Generator) -> np.ndarray:
        """Samples of shards in the order of the reading; shards come again where there are fewer samples."""
        starts, parts, left = [0, *self.blocks[:-1]], [], count
        while left > 0:
            number = len(self.blocks)
            draw = torch.randint(number, (number,), generator=generator) if self.resampled else None
            for block in (torch.randperm(number, generator=generator) if draw is None else draw).tolist():
                parts.append(np.arange(starts[block], self.blocks[block]))
                left -= len(parts[-1])
        return np.concatenate(parts)[:count] if parts else np.empty(0, dtype=np.int64)

    def draw(self, length: int, generator: torch.Generator) -> torch.Tensor:
        """int64 [length]: every sample once, or as many drawn with replacement."""
        if self.streamed:
            return torch.arange(length)  # `stream` says which, when it is known where
        if self.resampled:
            return torch.randint(length, (length,), generator=generator)
        if not self.local:
            return torch.randperm(length, generator=generator)
        starts = [0, *self.blocks[:-1]]
        blocks = torch.randperm(len(self.blocks), generator=generator).tolist()
        drawn = []
        for first in range(0, len(blocks), self.window):
            inside = [np.arange(starts[block], self.blocks[block]) for block in blocks[first : first + self.window]]
            pooled = np.concatenate(inside)  # NumPy: 125 small gathers took torch's threads 3 s on a busy machine
            drawn.append(pooled[torch.randperm(len(pooled), generator=generator).numpy()])
        return torch.from_numpy(np.concatenate(drawn))


LANE = 1 << 40
"""More than the samples of any epoch."""


def _through_buffer(start: int, end: int, buffer: int, generator: torch.Generator) -> np.ndarray:
    """The numbers from start to end as they leave a shuffle buffer: one that is drawn goes, the next one comes in."""
    waiting = list(range(start, min(start + buffer, end)))
    drawn = (
        torch.randint(len(waiting), (max(0, end - start - buffer),), generator=generator).tolist() if waiting else []
    )
    order = []
    for following, at in enumerate(drawn, start + buffer):
        order.append(waiting[at])
        waiting[at] = following
    return np.array(order + [waiting[at] for at in torch.randperm(len(waiting), generator=generator).tolist()], int)


def sampling_of(dataset: Any) -> Sampling:
    """What a data set says of itself, if it does."""
    names = ("blocks", "window", "resampled", "lanes", "buffer")
    return Sampling(**{name: getattr(dataset, name) for name in names if hasattr(dataset, name)})


@dataclass(frozen=True)
class StepPlan:
    """One rank's share of one optimizer step.

    Attributes:
        batches: sample indices of each micro-batch, never empty.
        counts: how many of each micro-batch's samples count: all of them, or 0 on an idle rank.
        size: samples that count, over all ranks and micro-batches.
        places: for each sample its place in the reading, see `Sampling.stream`; -1 where it is read by itself.
    """

    batches: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]
    size: int
    places: tuple[tuple[int, ...], ...] = ()


class TrainOrder:
    """The order of training samples.

    Args:
        lengths: samples per data set; indices run through their concatenation.
        ratios: share of each data set in an epoch; by default as many as it has. A data set smaller than its
            share is gone through repeatedly, each sample as often as the others up to one.
        sampling: how each data set is gone through; None = in any order, each sample once.
        limit_steps: an epoch ends after so many optimizer steps; None = when it has seen all samples.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        accumulate: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        ratios: Sequence[float] | None = None,
        sampling: Sequence[Sampling | None] | None = None,
        limit_steps: int | None = None,
    ):
        if sum(lengths) == 0:
            raise ConfigError("the training data set is empty; check datasets.*.build_info.annotations.train")
        if ratios is not None and (len(ratios) != len(lengths) or min(ratios) < 0 or sum(ratios) <= 0):
            raise ConfigError(
                f"run.train_dataset_ratios wants one number >= 0 for each of the {len(lengths)} data sets, got {ratios}"
            )
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.ratios = ratios
        self.limit_steps = limit_steps
        self.sampling = [one or Sampling() for one in sampling or [None] * len(lengths)]
        self.counts = self._counts()

    def _counts(self) -> list[int]:
        total = sum(self.lengths)
        if self.ratios is None:
            return list(self.lengths)
        return [round(total * ratio / sum(self.ratios)) for ratio in self.ratios]

    @property
    def samples_per_epoch(self) -> int:
        total = sum(self.counts)
        return total if self.limit_steps is None else min(total, self.limit_steps * self.group_size)

    @property
    def group_size(self) -> int:
        return self.batch_size * self.world_size * self.accumulate

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples_per_epoch // self.group_size)

    @property
    def streamed(self) -> bool:
        """Whether a data set is read shard by shard."""
        return any(sampling.streamed for sampling in self.sampling)

    def permutation(self, epoch: int) -> torch.Tensor:
        """Indices int64 [N] in the order of this epoch, also those beyond `limit_steps`."""
        return self.drawn(epoch)[0]

    def drawn(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `permutation`, int64 [N], and alike the indices' places in the reading or -1."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
        picked, parts, offset = [], [], 0
        for length, count, sampling in zip(self.lengths, self.counts, self.sampling, strict=True):
            rounds = -(-count // length) if length else 0
            drawn = [sampling.draw(length, generator) for _ in range(rounds)]
            if drawn:
                picked.append(torch.cat(drawn)[:count] + offset)
                parts.append((sampling, offset))
            offset += length
        ordered = any(sampling.local or sampling.streamed for sampling in self.sampling)
        if ordered and len(picked) == 1:
            indices, owner = picked[0], torch.zeros(len(picked[0]), dtype=torch.long)
        else:
            indices = torch.cat(picked)
            shuffled = torch.randperm(len(indices), generator=generator)
            if not ordered:
                return indices[shuffled], torch.full_like(indices, -1)
            # Data sets are mixed by chance, each in its own order.
            owner = torch.cat([torch.full((len(part),), n) for n, part in enumerate(picked)])[shuffled]
            for n, part in enumerate(picked):
                indices[owner == n] = part
        places = torch.full_like(indices, -1)
        for n, (sampling, first) in enumerate(parts):
            if sampling.streamed:
                generator = torch.Generator().manual_seed(derived_seed(self.seed, "stream", epoch, n))
                slots = (owner == n).nonzero().flatten()
                found, read = sampling.stream(slots.numpy(), generator)
                indices[slots], places[slots] = torch.from_numpy(found) + first, torch.from_numpy(read)
        return indices, places

    def steps(self, epoch: int, position: int = 0) -> Iterator[StepPlan]:
        """Plans of the optimizer steps of an epoch that come after `position` consumed samples."""
        order, places = (drawn[position : self.samples_per_epoch].tolist() for drawn in self.drawn(epoch))
        for start in range(0, len(order), self.group_size):
            end = start + self.group_size
            yield self._plan(order[start:end], places[start:end])

    def _plan(self, group: list[int], places: list[int]) -> StepPlan:
        batches, counts, read = [], [], []
        width = self.batch_size * self.world_size
        for start in range(0, len(group), width):
            micro = group[start : start + width]
            mine = micro[self.rank :: self.world_size]
            counts.append(len(mine))
            batches.append(tuple(mine or micro[:1]))
            there = places[start : start + width]
            read.append(tuple(there[self.rank :: self.world_size] or there[:1]))
        return StepPlan(tuple(batches), tuple(counts), len(group), tuple(read))


def eval_batches(length: int, batch_size: int) -> list[tuple[int, ...]]:
    """Consecutive indices, cut into batches; the last one may be smaller.

    Evaluation hands out whole batches to ranks, so what a sample is batched with, and with it every bit of the
    prediction, depends neither on the number of ranks nor on where an earlier attempt was killed.
    """
    return [tuple(range(i, min(i + batch_size, length))) for i in range(0, length, batch_size)]


def eval_units(groups: Sequence[Sequence[int]], batch_size: int) -> list[tuple[int, ...]]:
    """Whole groups, as many as fit into a batch, in their order; a group that fits into none stays whole, too.

    Questions about one video make a group: what is loaded together is decoded once, by one process.
    """
    units: list[tuple[int, ...]] = []
    current: list[int] = []
    for group in groups:
        if current and len(current) + len(group) > batch_size:
            units.append(tuple(current))
            current = []
        current += group
    return units + [tuple(current)] * bool(current)


class SeededDataset(Dataset):
    """Gives each sample its own seed, made of (seed, epoch, index).

    Augmentation that draws from a global generator (LAVIS's random crops do) then depends neither on the number of
    workers or ranks nor on where the run was resumed. Indexed with (epoch, index), which is also how the epoch
    reaches persistent workers.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        (sample,) = self.__getitems__([key])
        if isinstance(sample, LstpError):
            raise sample
        return sample

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Any]:
        """A batch, as torch's loader asks for it; the generators are put back once, not after each sample.

        An error of the user's is returned: raised in a worker process, it would arrive wrapped in a traceback's text.
        """
        samples = []
        with host_generators_kept():
            for epoch, index in keys:
                seed_host(derived_seed(self.seed, "sample", epoch, index))
                try:
                    samples.append(self.dataset[index])
                except LstpError as error:
                    return [error]
        return samples


def collated(collater: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    """A batch, or the error that came instead of its samples or of it."""
    if isinstance(samples[0], LstpError):
        return samples[0]
    try:
        return collater(samples)
    except LstpError as error:
        return error


class BatchKeys:
    """A batch sampler whose batches are set before each pass; works with persistent workers."""

    def __init__(self):
        self.epoch = 0
        self.batches: Sequence[tuple[int, ...]] = ()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([(self.epoch, index) for index in batch] for batch in self.batches)


class Batches:
    """Loads the batches it is told to, in order.

    The base seed of worker processes comes from a generator of its own: starting an iterator does not move torch's
    global one, which would make a resumed epoch differ from an unbroken one.
    """

    def __init__(self, dataset: Dataset, *, seed: int, num_workers: int = 0, pin_memory: bool = False):
        self.keys = BatchKeys()
        self.loader = DataLoader(
            SeededDataset(dataset, seed),
            batch_sampler=self.keys,
            collate_fn=functools.partial(collated, getattr(dataset, "collater", None) or default_collate),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(seed),
        )

    def of_plans(self, plans: Sequence[StepPlan], epoch: int) -> Iterator[Any]:
        """The batches of optimizer steps."""
        return self([batch for plan in plans for batch in plan.batches], epoch)

    def __call__(self, batches: Sequence[tuple[int, ...]], epoch: int = 0) -> Iterator[Any]:
        self.keys.epoch, self.keys.batches = epoch, batches
        for batch in self.loader:
            if isinstance(batch, LstpError):
                try:
                    raise batch
                finally:  # a cycle of error and frame would have torch wait 5 s for each worker when it is collected
                    del batch
            yield batch
