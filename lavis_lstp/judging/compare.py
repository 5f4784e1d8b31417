"""`lavis-lstp compare a.jsonl b.jsonl`: is b better than a, or could chance have made the difference?

In: two verdict files of `lavis-lstp judge`, or predictions whose rows say `correct` themselves (multiple choice). Out:
a table and, with --out, JSON: both accuracies over the questions they share, the difference with its interval from a
paired bootstrap, and McNemar's exact test. What makes such a comparison doubtful is printed as a warning: other
judges, other questions, verdicts that are missing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lavis_lstp.errors import ConfigError, CoverageError
from lavis_lstp.files import write_json
from lavis_lstp.judging.replay import is_rules, read_verdict
from lavis_lstp.judging.rows import by_question_id, named, writing
from lavis_lstp.judging.verdict import JUDGED, OPEN, Verdict
from lavis_lstp.metrics.agreement import mcnemar_exact
from lavis_lstp.metrics.resampling import RESAMPLES, group_rows, percentile_interval, resampled_sums, two_sided_p
from lavis_lstp.redaction import printable, without_secrets_in
from lavis_lstp.schema import Prediction

ITSELF = "the file itself (correct)"
"""Judge of rows that bring their own `correct`."""


Result = dict[str, Any]


class Judged(NamedTuple):
    row: Prediction
    verdict: Verdict


def read_judged(path: str | os.PathLike) -> dict[str, Judged]:
    """Rows and their verdicts by question_id.

    Raises:
        AnnotationError: a row without a verdict of the documented form.
        CoverageError: a question_id occurs twice.
    """
    found = {}
    for key, row in by_question_id(path).items():
        if "judge" not in row and isinstance(row.get("correct"), bool):
            found[key] = Judged(row, Verdict(ITSELF, correct=row["correct"]))
        else:
            found[key] = Judged(row, read_verdict(f"{path}: question_id '{key}'", row))
    return found


def shared_ids(a: Mapping[str, Judged], b: Mapping[str, Judged]) -> tuple[list[str], list[str]]:
    """Questions that both files have a verdict on, and warnings about the others.

    Raises:
        CoverageError: there are none.
    """
    ids = [key for key in a if key in b and not {a[key].verdict.status, b[key].verdict.status} & set(OPEN)]
    if not ids:
        raise CoverageError(f"nothing to compare: no question has a verdict in both files ({len(a)} and {len(b)} rows)")
    warnings = []
    for what, keys in (
        ("only the first file has", a.keys() - b.keys()),
        ("only the second file has", b.keys() - a.keys()),
        ("one of the files has no verdict yet on", (a.keys() & b.keys()) - set(ids)),
    ):
        if keys:
            warnings.append(f"different questions: {what} {named(sorted(keys))}; left out")
    return ids, warnings


def judges_of(a: Mapping[str, Judged], b: Mapping[str, Judged], ids: Sequence[str]) -> dict[str, list[str]]:
    """Who judged, on either side."""
    return {name: sorted({side[key].verdict.judge for key in ids}) for name, side in (("a", a), ("b", b))}


def judge_lines(result: Mapping[str, Any]) -> list[str]:
    """Warnings and judges, as every table begins."""
    judges = [f"{side} judged by {judge}" for side in "ab" for judge in result["judges"][side]]
    return [f"warning: {text}" for text in result["warnings"]] + judges


def judge_warnings(a: Mapping[str, Judged], b: Mapping[str, Judged], ids: Sequence[str]) -> list[str]:
    """Where the two files' judges differ, which makes their numbers different quantities."""
    first, second = ({side[key].verdict.judge for key in ids} for side in (a, b))
    warnings = []
    # rules decide what they can under any judge; of other versions they are another judge
    for kind, mine, theirs in (
        ("judges", {j for j in first if not is_rules(j)}, {j for j in second if not is_rules(j)}),
        ("rules", {j for j in first if is_rules(j)}, {j for j in second if is_rules(j)}),
    ):
        if mine != theirs and (kind == "judges" or (mine and theirs)):
            sides = (" and ".join(sorted(side)) or "rules alone" for side in (mine, theirs))
            warnings.append(f"judged by different {kind}: {' against '.join(sides)}")
    return warnings


def compare(
    a: Mapping[str, Judged], b: Mapping[str, Judged], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Accuracy and score of two files over the questions they share, and whether they differ.

    Raises:
        CoverageError: they share none.
    """
    ids, warnings = shared_ids(a, b)
    warnings += judge_warnings(a, b, ids)
    for name in ("question", "answer"):
        other = [key for key in ids if a[key].row.get(name) != b[key].row.get(name)]
        if other:
            warnings.append(f"different questions: another {name} under the same question_id in {named(other)}")
    right = np.array([[side[key].verdict.correct is True for side in (a, b)] for key in ids], dtype=float)
    scored = all(v.score is not None or v.status != JUDGED for key in ids for v in (a[key].verdict, b[key].verdict))
    score = np.array([[side[key].verdict.score or 0 for side in (a, b)] for key in ids], dtype=float)
    groups = group_rows([a[key].row.get("video_id") for key in ids])
    table = np.column_stack([np.ones(len(ids)), right, score])
    sums = resampled_sums(table, groups, resamples=resamples, seed=seed)
    only_a, only_b = int((right[:, 0] > right[:, 1]).sum()), int((right[:, 0] < right[:, 1]).sum())
    result: dict[str, Any] = {
        "num_questions": len(ids),
        "judges": judges_of(a, b, ids),
        "accuracy": _difference(right, sums[:, 1:3] / sums[:, :1]),
        "mcnemar": {"only_a_right": only_a, "only_b_right": only_b, "p": mcnemar_exact(only_a, only_b)},
    }
    if scored:
        result["score"] = _difference(score, sums[:, 3:5] / sums[:, :1])
    how = {"of": "questions" if groups is None else "videos", "resamples": resamples, "seed": seed}
    return {**result, "bootstrap": how, "warnings": warnings}


def _difference(values: np.ndarray, resampled: np.ndarray) -> dict[str, Any]:
    a, b = values.mean(axis=0)
    differences = resampled[:, 1] - resampled[:, 0]
    return {
        "a": float(a),
        "b": float(b),
        "difference": float(b - a),
        "interval": percentile_interval(differences),
        "p": two_sided_p(differences),
    }


def format_comparison(result: Mapping[str, Any]) -> str:
    lines = judge_lines(result)
    lines.append(f"{'':<10}{'a':>8}{'b':>8}  {'b - a':<26}p (paired bootstrap)")
    for name, scale, digits, unit in (("accuracy", 100, 1, " %"), ("score", 1, 2, "")):
        if name in result:
            found = result[name]
            a, b = (f"{scale * found[side]:.{digits}f}{unit}" for side in "ab")
            low, high = (f"{scale * edge:+.{digits}f}" for edge in found["interval"])
            difference = f"{scale * found['difference']:+.{digits}f} [{low}, {high}]"
            lines.append(f"{name:<10}{a:>8}{b:>8}  {difference:<26}{found['p']:.2g}")
    test = result["mcnemar"]
    lines.append(
        f"McNemar   only a right {test['only_a_right']}, only b right {test['only_b_right']}, exact p {test['p']:.2g}"
    )
    how = result["bootstrap"]
    lines.append(
        f"{result['num_questions']} questions; {how['resamples']} resamples of {how['of']}, seed {how['seed']}"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    return pair_command(
        "compare", "Test whether one model answers better than another.", argv, compare, format_comparison
    )


def at_least(lowest: int) -> Callable[[str], int]:
    """The type of a command line's whole number."""

    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"expected at least {lowest}")
        return value

    return number


def pair_command(
    name: str,
    description: str,
    argv: Sequence[str] | None,
    compute: Callable[..., Result],
    show: Callable[[Result], str],
) -> int:
    """A command over two verdict files.

    Args:
        compute: (a, b, resamples=, seed=) -> the result, of rows by question_id.
    """
    parser = argparse.ArgumentParser(prog=f"lavis-lstp {name}", description=description)
    parser.add_argument("a", help="verdict file of `lavis-lstp judge`")
    parser.add_argument("b", help="another")
    parser.add_argument("--out", help="write the result as JSON, too")
    parser.add_argument(
        "--resamples", type=at_least(1), default=RESAMPLES, help="of the bootstrap (default: %(default)s)"
    )
    parser.add_argument("--bootstrap-seed", type=at_least(0), default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.out and Path(args.out).resolve() in {Path(args.a).resolve(), Path(args.b).resolve()}:
        raise ConfigError(f"--out {args.out} would replace the verdicts that it is about; name another file")
    result = compute(read_judged(args.a), read_judged(args.b), resamples=args.resamples, seed=args.bootstrap_seed)
    if args.out:
        with writing(args.out):
            write_json(args.out, without_secrets_in({"a": str(args.a), "b": str(args.b), **result}))
    print(printable(show(result)))
    return 0
