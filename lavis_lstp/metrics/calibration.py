"""Does a model know when it is right? Confidences and whether the answers were right in, a reliability table out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lavis_lstp.metrics.qa import accuracy_interval

BINS = 10


def reliability(confidence: Sequence[float], right: Sequence[bool], *, bins: int = BINS) -> dict[str, Any]:
    """Accuracy beside mean confidence in bins of equal width, and how far they lie apart.

    Args:
        confidence: 0..1; 1 falls into the last bin.
        right: of the same answers.

    Returns:
        ece: the expected calibration error, the mean over answers of |accuracy - confidence| of their bin (0 = a model
            that knows); bins: low, high, count, confidence, accuracy, interval (95 %) of those that are not empty.
    """
    assert len(confidence) == len(right) and len(right)
    groups: dict[int, list[int]] = {}
    for i, value in enumerate(confidence):
        groups.setdefault(min(int(value * bins), bins - 1), []).append(i)
    table = []
    for number, members in sorted(groups.items()):
        hits = sum(bool(right[i]) for i in members)
        table.append(
            {
                "low": number / bins,
                "high": (number + 1) / bins,
                "count": len(members),
                "confidence": math.fsum(confidence[i] for i in members) / len(members),
                "accuracy": hits / len(members),
                "interval": accuracy_interval(hits, len(members)),
            }
        )
    gaps = (row["count"] * abs(row["accuracy"] - row["confidence"]) for row in table)
    return {"ece": math.fsum(gaps) / len(right), "bins": table}
