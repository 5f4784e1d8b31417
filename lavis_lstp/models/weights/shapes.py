"""Sizes of a model read off the shapes of its weights, one damaged weight or strange key notwithstanding.

A size is what most of the weights that have it say, and a layer counts where it has more than half of the fullest one's
keys.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Shapes = Mapping[str, torch.Size]


def below(prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Shapes of what begins with `prefix`, without it."""
    return {key.removeprefix(prefix): value.shape for key, value in state_dict.items() if key.startswith(prefix)}


def most(shapes: Shapes, *where: tuple[str, int]) -> int | None:
    """What most weights say of a size: (regular expression for their names, the axis that has it)."""
    found = Counter(
        shape[axis]
        for pattern, axis in where
        for name, shape in shapes.items()
        if len(shape) > axis and shape[axis] > 0 and re.search(pattern, name)
    )
    return found.most_common(1)[0][0] if found else None


def layers_of(names: Iterable[str], pattern: str) -> list[int]:
    """Numbers (group 1 of `pattern`) of the layers that have more than half of the fullest one's keys."""
    counts = Counter(int(match[1]) for name in names if (match := re.match(pattern, name)))
    return sorted(number for number, count in counts.items() if 2 * count > max(counts.values()))


def count(layers: list[int]) -> int:
    return max(layers, default=-1) + 1
