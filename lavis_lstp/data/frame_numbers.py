"""Which frames of a video: evenly spaced numbers, as published and as a rule of everything that chooses frames."""

from __future__ import annotations

import numpy as np


def uniform_centres(num: int, length: int) -> list[int]:
    """Centres of `num` equal intervals of `length` frames; all of them where there are no more (SPEC 4).

    >>> uniform_centres(4, 16)
    [1, 5, 9, 13]
    """
    if num < 1 or length < 0:
        raise ValueError(f"expected num >= 1 and length >= 0, got num={num}, length={length}")
    if length <= num:
        return list(range(length))
    edges = np.linspace(0, length, num + 1).astype(int)
    return [int(a + b - 1) // 2 for a, b in zip(edges[:-1], edges[1:], strict=True)]


def sample_indices(num: int, length: int) -> list[int]:
    """`num` frames of a video of any length, as in published training (SPEC 5); `uniform_centres` where it is long.

    In a shorter video every frame is doubled until there are at least `num`, and the centres of those are taken,
    so frames repeat in order: 3 frames to 4 gives the centres of 0 0 1 1 2 2, [0, 0, 1, 2].
    """
    if length < 1:
        raise ValueError(f"expected a video of at least one frame, got length={length}")
    indices = list(range(length))
    while len(indices) < num:
        indices = [i for i in indices for _ in range(2)]
    return [indices[i] for i in uniform_centres(num, len(indices))]
