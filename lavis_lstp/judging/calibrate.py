"""`lavis-lstp calibrate a.jsonl b.jsonl`: how far two judges of the same predictions agree.

In: two verdict files on the same predictions. Out: a table and, with --out, JSON: Cohen's kappa of their yes and no,
how much more the second one gives (offset of accuracy and score, with intervals), Spearman's rank correlation of the
scores, and the four counts. Answers that rules decided on both sides are the same by construction, so the figures are
given without them, too: those are the judges'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lavis_lstp.errors import CoverageError
from lavis_lstp.judging.compare import Judged, judge_lines, judges_of, pair_command, shared_ids
from lavis_lstp.judging.replay import is_rules
from lavis_lstp.judging.rows import named
from lavis_lstp.judging.rules import UNDECIDED
from lavis_lstp.judging.verdict import JUDGED, Case, Verdict
from lavis_lstp.metrics.agreement import cohen_kappa, spearman
from lavis_lstp.metrics.resampling import RESAMPLES, group_rows, percentile_interval, resampled_sums


def calibrate(
    a: Mapping[str, Judged], b: Mapping[str, Judged], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Agreement of two judges over the answers that both judged.

    Raises:
        CoverageError: the files are about other predictions, or share no judged one.
    """
    ids, warnings = shared_ids(a, b)
    other = [key for key in ids if any(a[key].row.get(name) != b[key].row.get(name) for name in Case._fields)]
    if other:
        raise CoverageError(
            f"two judges can be compared over the same predictions only; questions, answers or predictions differ in "
            f"{named(other)} of {len(ids)} (for two models under one judge: lavis-lstp compare)"
        )
    both = [key for key in ids if a[key].verdict.status == b[key].verdict.status == JUDGED]
    if len(both) < len(ids):
        warnings.append(f"{len(ids) - len(both)} of {len(ids)} answers are unjudged on one side at least; left out")
    if not both:
        raise CoverageError("nothing to compare: no answer was judged on both sides")
    judges = [key for key in both if not (_decided(a[key].verdict) and _decided(b[key].verdict))]
    parts = {"all": both, "without_rules": judges}
    return {
        "judges": judges_of(a, b, both),
        **{name: _agreement(a, b, keys, resamples, seed) if keys else None for name, keys in parts.items()},
        "warnings": warnings,
    }


def _decided(verdict: Verdict) -> bool:
    return is_rules(verdict.judge) and verdict.rule != UNDECIDED


def _agreement(
    a: Mapping[str, Judged], b: Mapping[str, Judged], keys: Sequence[str], resamples: int, seed: int
) -> dict[str, Any]:
    yes = np.array([[bool(side[key].verdict.correct) for side in (a, b)] for key in keys])
    score = np.array([[side[key].verdict.score or 0 for side in (a, b)] for key in keys], dtype=float)
    differences = np.column_stack([np.ones(len(keys)), yes[:, 1] * 1.0 - yes[:, 0], score[:, 1] - score[:, 0]])
    groups = group_rows([a[key].row.get("video_id") for key in keys])
    sums = resampled_sums(differences, groups, resamples=resamples, seed=seed)
    found: dict[str, Any] = {
        "num_answers": len(keys),
        "kappa": cohen_kappa(yes[:, 0], yes[:, 1]),
        "agreement": float((yes[:, 0] == yes[:, 1]).mean()),
        "spearman": spearman(score[:, 0], score[:, 1]),
        "counts": {
            f"a_{'yes' if first else 'no'}_b_{'yes' if second else 'no'}": int(
                ((yes[:, 0] == first) & (yes[:, 1] == second)).sum()
            )
            for first in (True, False)
            for second in (True, False)
        },
    }
    for column, name in ((1, "accuracy_offset"), (2, "score_offset")):
        found[name] = float(differences[:, column].mean())
        found[f"{name}_interval"] = percentile_interval(sums[:, column] / sums[:, 0])
    return found


def format_agreement(result: Mapping[str, Any]) -> str:
    lines = judge_lines(result)
    shown = {"all answers": result["all"], "without rules": result["without_rules"]}
    columns = {name: found for name, found in shown.items() if found}
    lines.append(f"{'':<18}" + "".join(f"{name:<26}" for name in columns).rstrip())
    for label, text in (
        ("answers", lambda f: str(f["num_answers"])),
        ("kappa", lambda f: _number(f["kappa"])),
        ("same verdict", lambda f: f"{100 * f['agreement']:.1f} %"),
        ("rank correlation", lambda f: _number(f["spearman"])),
        ("accuracy, b - a", lambda f: _offset(f, "accuracy_offset", 100, 1)),
        ("score, b - a", lambda f: _offset(f, "score_offset", 1, 2)),
        ("yes/yes, yes/no", lambda f: f"{f['counts']['a_yes_b_yes']}, {f['counts']['a_yes_b_no']}"),
        ("no/yes, no/no", lambda f: f"{f['counts']['a_no_b_yes']}, {f['counts']['a_no_b_no']}"),
    ):
        lines.append(f"{label:<18}" + "".join(f"{text(found):<26}" for found in columns.values()).rstrip())
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "none (no variation)" if value is None else f"{value:.3f}"


def _offset(found: Mapping[str, Any], name: str, scale: int, digits: int) -> str:
    low, high = (f"{scale * edge:+.{digits}f}" for edge in found[f"{name}_interval"])
    return f"{scale * found[name]:+.{digits}f} [{low}, {high}]"


def main(argv: Sequence[str] | None = None) -> int:
    description = "Say how far two judges of the same answers agree."
    return pair_command("calibrate", description, argv, calibrate, format_agreement)
