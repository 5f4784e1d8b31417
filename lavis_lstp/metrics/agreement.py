"""Two judgements of the same questions: do they differ (McNemar), do they agree (kappa, rank correlation)?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p: are questions that only one of two models got right split evenly? 1.0 where there are none."""
    n, smaller = only_first + only_second, min(only_first, only_second)
    term = total = 1  # n over 0; whole numbers, as floats overflow from n = 1030 on
    for k in range(1, smaller + 1):
        term = term * (n - k + 1) // k
        total += term
    return min(1.0, 2 * total / (1 << n)) if n else 1.0


def cohen_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Agreement beyond chance of two yes/no judges, -1..1; None where chance alone would agree on all."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    assert len(a) == len(b) and len(a)
    observed = float(np.mean(a == b))
    expected = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    return None if expected == 1 else (observed - expected) / (1 - expected)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation, equal values sharing their mean rank, -1..1; None where one side is constant."""
    a, b = _ranks(first), _ranks(second)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else None


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, place, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[place]
