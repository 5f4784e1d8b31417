"""Verdicts to numbers: accuracy and score with intervals, the published way of counting beside ours, and who judged.

In: rows and their verdicts by question_id. Out: one dict that is the result file, and the table that is printed.

Ours: right answers among all questions, and the mean score with 0 where a judge gave no verdict. Published style:
yes / (yes + no), and the mean of int(score) over what was judged, which is kinder the more a judge refuses. In a record
of the published form (`judge --form published`) every item counts in that mean, as published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from lavis_lstp.errors import CoverageError
from lavis_lstp.judging.rows import case_of
from lavis_lstp.judging.rules import UNDECIDED
from lavis_lstp.judging.verdict import JUDGED, OPEN, UNJUDGED, Verdict
from lavis_lstp.metrics.qa import accuracy_interval
from lavis_lstp.metrics.resampling import group_rows, percentile_interval, resampled_sums
from lavis_lstp.schema import Prediction


def score_verdicts(
    rows: Mapping[str, Prediction],
    verdicts: Mapping[str, Verdict],
    coverage: Mapping[str, Any],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The result.

    Args:
        rows, verdicts: by question_id, the same ids; verdicts that are open are left out and lower the coverage.
        coverage: as `join_by_id` gives it.

    Raises:
        CoverageError: nothing was judged.
    """
    ids = [key for key in rows if verdicts[key].status not in OPEN]
    if not ids:
        raise CoverageError(f"nothing to score: none of {len(rows)} questions has a verdict")
    said = [verdicts[key] for key in ids]
    table = np.array([_counts(verdict) for verdict in said], dtype=float)
    n, right, score, judged, published_score, published_n = table.sum(axis=0)
    groups = group_rows([rows[key].get("video_id") for key in ids])
    sums = resampled_sums(table, groups, resamples=resamples, seed=seed)
    with np.errstate(invalid="ignore"):
        published = np.stack([sums[:, 1] / sums[:, 3], sums[:, 4] / sums[:, 5]], axis=1)
    by_rules = Counter(v.rule for v in said if v.rule)
    return {
        "accuracy": right / n,
        "accuracy_interval": _share_interval(right, n, sums[:, 1] / sums[:, 0]),
        "score": score / n,
        "score_interval": percentile_interval(sums[:, 2] / sums[:, 0]),
        "published_style": {
            "accuracy": right / judged if judged else None,
            "accuracy_interval": _share_interval(right, judged, published[:, 0]) if judged else None,
            "score": published_score / published_n if published_n else None,
            "score_interval": percentile_interval(published[:, 1]) if published_n else None,
        },
        "bootstrap": {"of": "questions" if groups is None else "videos", "resamples": resamples, "seed": seed},
        "judges": dict(Counter(v.judge for v in said).most_common()),
        "rules": {
            "share": sum(count for rule, count in by_rules.items() if rule != UNDECIDED) / n,
            "decided": dict(sorted(by_rules.items())),
        },
        "unjudged": {status: [key for key in ids if verdicts[key].status == status] for status in UNJUDGED},
        **_served(rows, verdicts, ids),
        **coverage,
        "num_scored": len(ids),
        "coverage": len(ids) / coverage["num_questions"],
        "partial": bool(coverage["partial"] or len(ids) < len(rows)),
    }


def _counts(verdict: Verdict) -> list[float]:
    """One question; right; score on our side; judged; score in the published style, and whether it counts there."""
    judged, points = verdict.status == JUDGED, verdict.score or 0
    return [1, verdict.correct is True, points * judged, judged, points, verdict.score is not None]


def _share_interval(successes: float, n: float, resampled: np.ndarray) -> tuple[float, float]:
    """The bootstrap's interval; Wilson's for all or none, where resampling equal values gives no width."""
    return percentile_interval(resampled) if 0 < successes < n else accuracy_interval(successes, int(n))


def _served(rows: Mapping[str, Prediction], verdicts: Mapping[str, Verdict], ids: list[str]) -> dict[str, Any]:
    """What the judges said of themselves, counted once per case: the model that served, tokens."""
    asked = {case_of(rows[key]): verdicts[key].note for key in ids}.values()
    models = Counter(f"{note['model']} {note.get('fingerprint', '')}".strip() for note in asked if "model" in note)
    tokens = [note["tokens"] for note in asked if "tokens" in note]
    found: dict[str, Any] = {"served_by": dict(models.most_common())} if models else {}
    if tokens:
        found["tokens"] = {"in": sum(t[0] for t in tokens), "out": sum(t[1] for t in tokens)}
    return found


def format_result(result: Mapping[str, Any]) -> str:
    """The table."""
    published, unjudged = result["published_style"], result["unjudged"]
    lines = [f"{'':<10}{'ours':<26}published style"]
    lines.append(
        f"{'accuracy':<10}{_percent(result['accuracy'], result['accuracy_interval']):<26}"
        f"{_percent(published['accuracy'], published['accuracy_interval'])}"
    )
    lines.append(
        f"{'score':<10}{_plain(result['score'], result['score_interval']):<26}"
        f"{_plain(published['score'], published['score_interval'])}"
    )
    lines.append(f"questions {result['num_scored']} of {result['num_questions']} ({100 * result['coverage']:.4g} %)")
    if result["partial"]:
        lines[-1] += "; PARTIAL: not the score of the data set"
    for judge, count in result["judges"].items():
        lines.append(f"judged by {judge}: {count} ({100 * count / result['num_scored']:.3g} %)")
    for name, count in result.get("served_by", {}).items():
        lines.append(f"served by {name}: {count}")
    decided = {**result["rules"]["decided"]}
    undecided = decided.pop(UNDECIDED, 0)
    names = f": {', '.join(f'{name} {count}' for name, count in decided.items())}" if decided else ""
    rest = f"; {undecided} they could not decide, counted as wrong" if undecided else ""
    lines.append(f"rules     {100 * result['rules']['share']:.3g} % of the verdicts{names}{rest}")
    lines.append(
        f"unjudged  {sum(map(len, unjudged.values()))}, counted as wrong on our side"
        + "".join(
            f"; {status}: {', '.join(ids[:10])}{', ...' * (len(ids) > 10)}" for status, ids in unjudged.items() if ids
        )
    )
    return "\n".join(lines)


def _percent(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None or interval is None:
        return "none"
    return f"{100 * value:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _plain(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None or interval is None:
        return "none"
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
