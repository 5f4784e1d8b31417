"""Scores of spans: predicted and gold `Span` in, numbers out; and how sure a sampler was of their edges."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lavis_lstp.metrics.coverage import Items, join_by_id
from lavis_lstp.metrics.qa import accuracy_interval
from lavis_lstp.schema import Span

IOU_THRESHOLDS = (0.3, 0.5)


IOUS = ("frames", "published")


def published_iou(prediction: Span, gold: Span) -> float:
    """Intersection over union as the published evaluation counts it, 0..1.

    It counts frames as `Span.iou` does, but spans that meet in one frame alone, and a span of one frame that is at an
    edge of the other, have 0; equal spans have 1.
    """
    (start, end), (gold_start, gold_end) = prediction.to_inclusive(), gold.to_inclusive()
    if prediction == gold:
        return 1.0
    return 0.0 if start >= gold_end or end <= gold_start else prediction.iou(gold)


def evaluate_spans(
    predictions: Items[Span], golds: Items[Span], *, allow_partial: bool = False, iou: str = "frames"
) -> dict:
    """Mean intersection over union, and the share of spans that reach 0.3 and 0.5 (R@0.3, R@0.5).

    Args:
        predictions, golds: question id -> half-open span in frames, or pairs of them.
        allow_partial: see `join_by_id`; means are then over the questions that have a prediction.
        iou: one of IOUS: frames in common, or the published count.

    Returns:
        iou, recall_0.3, recall_0.5 (0..1), recall_*_interval (95 %), and the coverage as in `evaluate_answers`.

    Raises:
        CoverageError: predictions and golds are not one to one.
    """
    ids, predicted, gold, coverage = join_by_id(predictions, golds, allow_partial=allow_partial)
    measure = published_iou if iou == "published" else Span.iou
    ious = [measure(Span(*predicted[key]), Span(*gold[key])) for key in ids]
    result: dict = {"iou": math.fsum(ious) / len(ious)}
    for threshold in IOU_THRESHOLDS:
        hits = sum(iou >= threshold for iou in ious)
        result[f"recall_{threshold}"] = hits / len(ious)
        result[f"recall_{threshold}_interval"] = accuracy_interval(hits, len(ious))
    return {**result, **coverage}


def entropy_bits(logits: Sequence[float]) -> float:
    """Of softmax(logits): 0 = one frame alone is meant, log2(number of frames) = any of them as well as another."""
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    total = math.fsum(weights)
    return -math.fsum(w / total * math.log2(w / total) for w in weights if w) + 0.0
