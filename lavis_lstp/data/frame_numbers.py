"""Which frames of a video: evenly spaced numbers, as published and as a rule of everything that chooses frames.

Numbers are as good as times where frames come at a constant rate. Of a screen recording, which has a picture only when
something changes, frames are taken by time: those on screen at evenly spaced moments.
"""

from __future__ import annotations

import math

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


def frames_at_rate(length: int, rate: float, fps: float) -> list[int]:
    """About `fps` frames a second of `length` frames that come at `rate`, counted as the published code counts them.

    A second is taken for int(rate) frames, so fps=1 gives every int(rate)-th one; below one frame a second, for `rate`.

    >>> frames_at_rate(70, 23.976, 1)
    [0, 23, 46, 69]
    """
    second = int(rate + 1e-6) or rate
    found = (int(k * second / fps + 1e-9) for k in range(math.ceil(length * fps / second)))
    return sorted({i for i in found if i < length})


VARIES = 0.05
"""Share of a video's duration by which a frame is off the place that its number has at a constant rate."""


def rate_varies(times_s: np.ndarray, end_s: float) -> bool:
    """Return True where numbers say too little of times: a frame is off by VARIES of the duration and 1.5 short steps.

    A clock that rounds, one dropped frame, or a few of a longer video, are less than that.

    Args:
        times_s: float64 [N], ascending. end_s: when the last frame ends.
    """
    edges = np.append(times_s, end_s)
    off_s = np.abs(edges - np.linspace(edges[0], end_s, len(edges))).max()
    return bool(off_s > max(VARIES * (end_s - edges[0]), 1.5 * np.percentile(np.diff(edges), 25)))


def on_screen(times_s: np.ndarray, end_s: float, first_s: float, step_s: float) -> list[int]:
    """Return the frames that are on screen at first_s, first_s + step_s, ... before `end_s`, each once.

    >>> on_screen(np.array([0.0, 0.1, 0.2, 5.0]), 8.0, first_s=0, step_s=2)
    [0, 2, 3]
    """
    edges = np.append(times_s, end_s)
    edges[0] = min(edges[0], first_s)  # before the first one begins it is shown, too
    moments = np.ceil((edges - first_s) / step_s - 1e-6).clip(0)
    return np.flatnonzero(np.diff(moments)).tolist()
