"""Scores of spans: predicted and gold `Span` in, numbers out; and how sure a sampler was of their edges.

Moments in seconds are scored as the authors of NExT-GQA, Charades-STA, ActivityNet-Captions, TimeLens-Bench and
QVHighlights do; tests/golden/grounding.json has numbers of their own scripts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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


# ---- moments in seconds, as the benchmarks' authors count them ----------------------------------------------------

Moment = Sequence[float]
"""[start, end] in seconds; a predicted one of several may have its score as a third number."""
RECALL_AT = (0.3, 0.5, 0.7)
MAP_AT = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
MOST_MOMENTS = 10
"""QVHighlights' average precision reads so many predicted moments of a question."""


def moment_iou(one: Moment, other: Moment) -> float:
    """Intersection over the hull of two moments, 0..1: what Charades-STA, ActivityNet-Captions and TimeLens report.

    It is intersection over union where they meet, and 0 where they do not.
    """
    hull = max(one[1], other[1]) - min(one[0], other[0])
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0])) / hull if hull > 0 else 0.0


def evaluate_moments(
    predictions: Items[Sequence[Moment]], golds: Items[Sequence[Moment]], *, allow_partial: bool = False
) -> dict:
    """R@1 at IoU 0.3, 0.5 and 0.7, mean IoU, and mean average precision (QVHighlights).

    The first predicted moment counts for R@1 and mean IoU, against the gold moment that it meets best.

    Args:
        predictions: question id -> moments, best first; a third number of each is its score, which orders average
            precision. No moment counts as a miss.
        golds: question id -> moments.

    Returns:
        r1_0.3, r1_0.5, r1_0.7, miou, map_0.5, map_0.75, map (mean over 0.5, 0.55, ..., 0.95), all 0..1, intervals of
        the recalls (95 %), and the coverage.

    Raises:
        CoverageError: predictions and golds are not one to one.
    """
    ids, predicted, gold, coverage = join_by_id(predictions, golds, allow_partial=allow_partial)
    best = [
        max((moment_iou(predicted[key][0], one) for one in gold[key]), default=0.0) if predicted[key] else 0.0
        for key in ids
    ]
    result: dict = {"miou": math.fsum(best) / len(best)}
    for threshold in RECALL_AT:
        hits = sum(iou >= threshold for iou in best)
        result[f"r1_{threshold}"] = hits / len(best)
        result[f"r1_{threshold}_interval"] = accuracy_interval(hits, len(best))
    precisions = [[average_precision(predicted[key], gold[key], at) for key in ids] for at in MAP_AT]
    means = [math.fsum(row) / len(row) for row in precisions]
    result |= {"map_0.5": means[0], "map_0.75": means[MAP_AT.index(0.75)], "map": math.fsum(means) / len(means)}
    return {**result, **coverage}


def average_precision(predicted: Sequence[Moment], gold: Sequence[Moment], threshold: float) -> float:
    """Interpolated average precision of a question's moments at one IoU threshold, each gold moment found once."""
    if not predicted or not gold:
        return 0.0
    ranked = sorted(predicted[:MOST_MOMENTS], key=lambda one: -(one[2] if len(one) > 2 else 0.0))
    found: set[int] = set()
    right = []
    for one in ranked:
        ious = [_union_iou(one, other) for other in gold]
        open_golds = [i for i in range(len(gold)) if ious[i] >= threshold and i not in found]
        if open_golds:
            found.add(max(open_golds, key=lambda i: (ious[i], i)))
        right.append(bool(open_golds))
    hits = [sum(right[: place + 1]) for place in range(len(right))]
    precision = [hit / (place + 1) for place, hit in enumerate(hits)]
    steps = [max(precision[place:]) for place in range(len(right)) if right[place]]
    return math.fsum(steps) / len(gold)


def _union_iou(one: Moment, other: Moment) -> float:
    shared = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    union = one[1] - one[0] + other[1] - other[0] - shared
    return shared / union if union else 0.0


def hit_at_one(scores: Items[Sequence[float]], saliency: Items[Sequence[Sequence[int]]], least: int = 4) -> float:
    """Share of questions whose best-scored clip is a highlight for any annotator (QVHighlights' HIT@1), 0..1.

    Args:
        scores: question id -> a score for each clip of the video.
        saliency: question id -> for each clip the annotators' marks 0..4, all 0 where the clip is not marked.
        least: mark that makes a clip a highlight: 4 is Very Good, 3 Good, 2 Fair.
    """
    ids, given, marks, _ = join_by_id(scores, saliency)
    hits = 0
    for key in ids:
        best = max(range(len(given[key])), key=lambda i, row=given[key]: (row[i], -i))
        hits += best < len(marks[key]) and max(marks[key][best]) >= least
    return hits / len(ids)


def evaluate_grounded_qa(
    predictions: Items[Moment | None], golds: Items[Sequence[Moment]], correct: Mapping[str, bool] | None = None
) -> dict:
    """NExT-GQA's scores, 0..1: an answer counts for Acc@GQA if it is right and its moment has an IoP of 0.5 or more.

    Intersection over prediction (IoP) and IoU are each the best over the gold moments. A prediction of no length has an
    IoP of 1 inside a gold moment and 0 elsewhere, and an IoU of 0, as the authors count it.

    Args:
        predictions: question id -> [start, end] in seconds; None is a miss.
        golds: question id -> moments.
        correct: question id -> whether the answer is right; None = grounding alone.

    Returns:
        acc_qa and acc_gqa (with `correct`), miop, iop_0.3, iop_0.5, miou, iou_0.3, iou_0.5, and the coverage.
    """
    ids, predicted, gold, coverage = join_by_id(predictions, golds)
    pairs = {key: [_iou_iop(one, predicted[key]) for one in gold[key]] for key in ids}
    ious = {key: max([0.0, *(iou for iou, _ in pairs[key])]) for key in ids}
    iops = {key: max([0.0, *(iop for _, iop in pairs[key])]) for key in ids}
    result: dict = {}
    if correct is not None:
        _, right, _, _ = join_by_id(correct, golds)
        result["acc_qa"] = sum(right.values()) / len(ids)
        result["acc_gqa"] = sum(right[key] and iops[key] >= 0.5 for key in ids) / len(ids)
    for name, values in (("iop", iops), ("iou", ious)):
        result[f"m{name}"] = math.fsum(values.values()) / len(ids)
        for threshold in IOU_THRESHOLDS:
            result[f"{name}_{threshold}"] = sum(value >= threshold for value in values.values()) / len(ids)
    return {**result, **coverage}


def _iou_iop(gold: Moment, predicted: Moment | None) -> tuple[float, float]:
    if predicted is None:
        return 0.0, 0.0
    if predicted[0] == predicted[1]:
        return 0.0, float(gold[0] <= predicted[0] <= gold[1])
    shared = min(gold[1], predicted[1]) - max(gold[0], predicted[0])
    hull = max(gold[1], predicted[1]) - min(gold[0], predicted[0])
    length = predicted[1] - predicted[0]
    return shared / hull if hull > 0 else 0.0, shared / length if length > 0 else 0.0
