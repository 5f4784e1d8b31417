"""Which data set a run trains on, and which one a split's metrics belong to.

In: LAVIS's {data set name: {split: data set}}. Out: the map-style data sets that are asked for, or an error that lists
those there are.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lavis.datasets.datasets.base_dataset import ConcatDataset
from torch.utils.data import Dataset, IterableDataset

from lavis_lstp.batch import with_equal_keys
from lavis_lstp.config.run import check_splits
from lavis_lstp.errors import ConfigError

log = logging.getLogger(__name__)

Datasets = Mapping[str, Mapping[str, Dataset]]


class JoinedDataset(ConcatDataset):
    """LAVIS's concatenation, for data sets that give None for a sample that cannot be read.

    LAVIS's leaves out of a batch what some of its samples do not have; here that is an error.

    Args:
        parts: data sets by name, in their order.

    Raises:
        ConfigError: samples of two of them cannot share a batch.
    """

    def __init__(self, parts: Mapping[str, Dataset]):
        super().__init__(list(parts.values()))
        self.parts = dict(parts)
        self._check_settings()

    def _check_settings(self) -> None:
        known = [(name, part.batch_settings()) for name, part in self.parts.items() if hasattr(part, "batch_settings")]
        for (one, first), (other, second) in itertools.combinations(known, 2):
            for key in first.keys() & second.keys():
                if first[key] != second[key]:
                    raise ConfigError(
                        f"data sets '{one}' and '{other}' are mixed in one batch, but {key} is {first[key]} in one and "
                        f"{second[key]} in the other; set datasets.{one}.{key} and datasets.{other}.{key} alike"
                    )

    def collater(self, samples: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
        """A batch, None when no sample is left.

        Raises:
            ConfigError: samples have different keys.
        """
        readable = with_equal_keys(sample for sample in samples if sample is not None)
        if any(sample.keys() != readable[0].keys() for sample in readable):
            raise ConfigError(self._different_keys())
        return super().collater(readable) if readable else None

    def _different_keys(self) -> str:
        """Which data sets differ in which key, told by a first sample of each."""
        firsts = {
            name: next(filter(None, map(part.__getitem__, range(len(part)))), {}) for name, part in self.parts.items()
        }
        for (one, first), (other, second) in itertools.combinations(firsts.items(), 2):
            for key in sorted(first.keys() ^ second.keys()):
                has, lacks = (one, other) if key in first else (other, one)
                return f"samples of data set '{has}' have '{key}', those of '{lacks}' do not: they cannot share a batch"
        return f"samples within one of the data sets {', '.join(self.parts)} have different keys; they cannot be mixed"


def join(parts: Mapping[str, Dataset]) -> Dataset:
    """One data set of all parts, in their order."""
    return next(iter(parts.values())) if len(parts) == 1 else JoinedDataset(parts)


def training_parts(datasets: Datasets, wanted: Sequence[str], ratios: Mapping[str, float] | None) -> dict[str, Dataset]:
    """Training data by name, one entry per data set, or per data set and split where several splits are wanted.

    Raises:
        ConfigError: there is none, one cannot be indexed, or `ratios` names others.
    """
    check_splits(datasets, {"train_splits": wanted})
    for split in wanted:
        without = [name for name, splits in datasets.items() if split not in splits]
        if without:
            log.warning("run.train_splits: data set %s has no split '%s'", " and ".join(without), split)
    found = {
        name if len(wanted) == 1 else f"{name}.{split}": splits[split]
        for name, splits in datasets.items()
        for split in wanted
        if split in splits
    }
    if not found:
        raise ConfigError("run.train_splits names no split; for instance [train]")
    for name, dataset in found.items():
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ConfigError(
                f"runner_lstp needs data that have a length and an order, datasets.{name} is a {type(dataset).__name__}"
            )
    if ratios is not None and set(ratios) != set(found):
        raise ConfigError(
            f"run.train_dataset_ratios names {sorted(ratios)}, the data sets are {sorted(found)}; give each a share"
        )
    return found


def evaluation_dataset(datasets: Datasets, split: str, key: str = "test_splits") -> Dataset:
    """The one data set that has a split.

    Raises:
        ConfigError: none has it, or several do: their metrics must not be mixed.
    """
    check_splits(datasets, {key: [split]})
    found = {name: splits[split] for name, splits in datasets.items() if split in splits}
    if len(found) != 1:
        what = f"{len(found)} data sets have it: {', '.join(found)}"
        raise ConfigError(f"run.{key}: '{split}' must be of one data set, {what}; leave one of them in 'datasets'")
    return next(iter(found.values()))
