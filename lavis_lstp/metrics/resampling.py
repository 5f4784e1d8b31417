"""How far a mean could be off: the bootstrap over questions, or over videos where many questions share one.

In: one row of numbers per question. Out: sums over resampled sets, from which any ratio's interval follows. Questions
on one video stand or fall together, so resampling them one by one would claim more certainty than there is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
MIN_GROUPS = 20
"""With fewer videos than this, resampling them says nothing; questions are resampled instead."""


def group_rows(groups: Sequence[object] | None) -> Sequence[str] | None:
    """`groups` as texts if every row has one and there are enough of them, else None: resample rows."""
    if groups is None or any(group is None for group in groups):
        return None
    names = [str(group) for group in groups]
    return names if len(set(names)) >= MIN_GROUPS else None


def resampled_sums(
    values: np.ndarray, groups: Sequence[str] | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Column sums of `resamples` sets drawn with replacement, float64 [resamples, k].

    Args:
        values: [n, k]; a column of ones gives the number of rows drawn, which varies where groups differ in size.
        groups: of each row; whole groups are drawn. None draws rows.
    """
    values = np.asarray(values, dtype=np.float64)
    assert values.ndim == 2 and len(values), values.shape
    if groups is not None:
        _, place = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        values = np.stack([np.bincount(place, weights=column) for column in values.T], axis=1)
    # equal rows are drawn as one: a multinomial over the distinct ones is the same distribution, in far less time
    distinct, counts = np.unique(values, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // len(distinct))
    parts = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        parts.append(generator.multinomial(len(values), counts / len(values), size=size) @ distinct)
    return np.concatenate(parts)


def percentile_interval(samples: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The middle `confidence` of the samples that are numbers."""
    tail = 100 * (1 - confidence) / 2
    low, high = np.nanpercentile(samples, [tail, 100 - tail])
    return float(low), float(high)


def two_sided_p(differences: np.ndarray) -> float:
    """Share of resampled differences on the far side of 0, doubled; never 0, as more resamples could find one."""
    n = len(differences)
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (n + 1))
