"""Scores of single frames -> the span to learn from (paper: temporal refinement).

In: how well each frame alone answers the question, 0..1. Out: the span under the largest rectangle of that
histogram, width times lowest score: long and good is better than short and perfect. Equal to the published
code, also in its rounding (scores are float32, areas float64) and its choice among ties, and defined where that
code crashed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lavis_lstp.schema import Span


def pseudo_span(scores: Sequence[float], subtract_min: bool = True, *, smooth: int = 1) -> Span:
    """Largest rectangle under `scores`, in O(N).

    A strictly larger area replaces the best so far; the rectangle whose right edge closes first wins ties.

    Args:
        scores: of the N frames (a list, array or tensor). Negative ones count as 0 (the published code crashed).
        subtract_min: first subtract the smallest score, so that a peak on a plateau is found; the better default.
        smooth: window in frames of a moving average applied first; 1 = none. The authors suggest it for scores
            that are often 0. At the borders the window shrinks.

    Returns:
        Half-open span; all N frames where every score is 0; Span(0, 0) where there is none.
    """
    heights = np.asarray(scores, dtype=np.float32).reshape(-1)
    if smooth > 1 and len(heights):
        heights = _moving_average(heights, smooth)
    heights = heights.astype(np.float64)
    if subtract_min and len(heights):
        heights -= heights.min()
    heights = np.maximum(heights, 0.0).tolist()
    best_area, best = 0.0, (0, len(heights) - 1)
    open_bars: list[tuple[int, float]] = []  # (left edge, height), heights never falling
    for right, height in enumerate([*heights, 0.0]):
        left = right
        while open_bars and open_bars[-1][1] > height:
            left, low = open_bars.pop()
            area = (right - left) * low
            if area > best_area:
                best_area, best = area, (left, right - 1)
        open_bars.append((left, height))
    return Span.from_inclusive(*best)


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    centred = slice((window - 1) // 2, (window - 1) // 2 + len(values))
    total = np.convolve(values, np.ones(window))[centred]
    count = np.convolve(np.ones(len(values)), np.ones(window))[centred]
    return (total / count).astype(np.float32)
