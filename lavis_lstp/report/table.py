"""Evaluations as rows of one Markdown table: accuracy with its interval, a paired test, spans, the time of each stage.

In: the `result` folders of runs. Out: rows, and the lines of a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_lstp.errors import CoverageError
from lavis_lstp.files import read_jsonl, read_record
from lavis_lstp.metrics.agreement import mcnemar_exact
from lavis_lstp.metrics.grounding import evaluate_spans
from lavis_lstp.metrics.qa import accuracy_interval

MOST_CATEGORIES = 4
"""Kinds of questions that have columns of their own."""
STAGES = ("flow", "sampler", "selection", "vision", "language")


def measure(folder: Path, stem: str) -> tuple[dict[str, Any], dict[str, bool]]:
    """A row of the table, and which questions were answered right.

    Args:
        folder: `result` of a run; stem: <split>_<task> of its files.

    Raises:
        CoverageError: nothing was scored.
    """
    from lavis_lstp.tasks.video_qa import is_right

    records = [r for r in read_jsonl(folder / f"{stem}.jsonl") if r.get("answer") is not None]
    if not records:
        raise CoverageError(f"{folder / stem}.jsonl: no question has an answer to compare with")
    metrics = read_record(folder / f"{stem}_metrics.json", error=CoverageError)
    right = {record["question_id"]: is_right(record) for record in records}
    gold = {r["question_id"]: r["gold_span"] for r in records if "gold_span" in r and "span" in r}
    spans = {r["question_id"]: r["span"] for r in records if r["question_id"] in gold}
    timings_file = folder / f"{stem}_timings.jsonl"
    timings = list(read_jsonl(timings_file)) if timings_file.is_file() else []
    return {
        "questions": len(records),
        "accuracy": sum(right.values()) / len(right),
        "interval": list(accuracy_interval(sum(right.values()), len(right))),
        "coverage": metrics["coverage"],
        "unparsable": metrics.get("num_unparsable"),
        "by_category": metrics.get("by_category"),
        "frames_scored": sum(r["num_frames"] for r in records if "entropy" in r) / len(records),
        "span_iou": evaluate_spans(spans, gold)["iou"] if gold else None,
        "milliseconds": {s: 1000 * sum(t.get(s, 0.0) for t in timings) / len(timings) for s in STAGES}
        if timings
        else None,
    }, right


def paired_p(first: Mapping[str, bool], second: Mapping[str, bool]) -> float:
    """Exact two-sided McNemar: could chance have made the difference, on the questions that both answered?"""
    both = [key for key in first if key in second]
    return mcnemar_exact(
        sum(first[key] and not second[key] for key in both), sum(second[key] and not first[key] for key in both)
    )


def table_lines(rows: Sequence[Mapping[str, Any]], first: str) -> list[str]:
    """Markdown, a line for each row; columns that no row has anything for are left out.

    Args:
        first: what the first column, `title` of each row, is called.
    """
    kinds = dict.fromkeys(kind for row in rows for kind in row.get("by_category") or ())
    kinds = sorted(kinds, key=lambda kind: (len(kind), kind)) if 1 < len(kinds) <= MOST_CATEGORIES else []
    columns = [
        (first, lambda row: row["title"]),
        ("accuracy", lambda row: f"{row['accuracy']:.1%}"),
        ("95 % interval", lambda row: "{:.1%} to {:.1%}".format(*row["interval"])),
        ("p, paired", lambda row: None if row.get("p_value") is None else f"{row['p_value']:.2g}"),
        ("unparsable", lambda row: None if row.get("unparsable") is None else str(row["unparsable"])),
        ("coverage", lambda row: f"{row['coverage']:.1%}" if row.get("coverage", 1.0) < 1 else None),
        *((kind, lambda row, kind=kind: _share(row, kind)) for kind in kinds),
        ("frames scored", lambda row: f"{row['frames_scored']:.0f}" if row.get("frames_scored") else None),
        ("span IoU", lambda row: None if row.get("span_iou") is None else f"{row['span_iou']:.2f}"),
        (f"ms per question: {', '.join(STAGES)}", lambda row: _times(row["milliseconds"])),
    ]
    cells = [(name, [value(row) for row in rows]) for name, value in columns]
    kept = [(name, values) for name, values in cells if any(value is not None for value in values)]
    lines = ["| " + " | ".join(name for name, _ in kept) + " |", "|" + "---|" * len(kept)]
    for i in range(len(rows)):
        lines.append("| " + " | ".join("-" if values[i] is None else values[i] for _, values in kept) + " |")
    return lines


def judge_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """By whose word an answer is right in these rows."""
    chosen = {row.get("unparsable") is not None for row in rows}
    words = {True: "the right option was chosen", False: "exact match after normalising, no judge was asked"}
    return f"Judged by: {'; '.join(words[kind] for kind in sorted(chosen))}."


def _share(row: Mapping[str, Any], kind: str) -> str | None:
    found = (row.get("by_category") or {}).get(kind)
    return None if found is None else f"{found['accuracy']:.1%}"


def _times(milliseconds: Mapping[str, float] | None) -> str | None:
    if milliseconds is None:
        return None
    return " + ".join(f"{milliseconds[stage]:.1f}" for stage in STAGES) + f" = {sum(milliseconds.values()):.1f}"
