"""Evaluations as rows of a table: accuracy with its interval, a paired test, spans, the time of each stage.

In: the `result` folders of runs, or the numbers of a report. Out: rows, and the text of a table as Markdown, LaTeX or
CSV, in which a cell is text whatever it contains: no markup, no command, no formula.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_lstp.errors import CoverageError
from lavis_lstp.files import read_jsonl, read_record
from lavis_lstp.metrics.agreement import mcnemar_exact
from lavis_lstp.metrics.grounding import RECALL_AT, evaluate_spans
from lavis_lstp.metrics.qa import accuracy_interval, is_right
from lavis_lstp.redaction import printable
from lavis_lstp.schema import Prediction

MOST_CATEGORIES = 4
"""Kinds of questions that have columns of their own."""
STAGES = ("flow", "sampler", "scores", "selection", "vision", "language")


def measure(folder: Path, stem: str) -> tuple[dict[str, Any], dict[str, bool]]:
    """A row of the table, and which questions were answered right.

    Args:
        folder: `result` of a run; stem: <split>_<task> of its files.

    Raises:
        CoverageError: nothing was scored.
    """
    records: list[Prediction] = [r for r in read_jsonl(folder / f"{stem}.jsonl") if r.get("answer") is not None]
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
        "frames_per_answer": metrics.get("frames_per_answer"),
        "subtitles": metrics.get("subtitles"),
        "subtitle_lines_left_out": metrics.get("subtitle_lines_left_out"),
        "by_category": metrics.get("by_category"),
        "frames_scored": sum(r.get("num_scored", 0) for r in records) / len(records),
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
    measured = [row["milliseconds"] for row in rows if row["milliseconds"]]
    stages = [stage for stage in STAGES if stage != "scores" or any(one.get(stage) for one in measured)]
    columns = [
        (first, lambda row: row["title"]),
        ("accuracy", lambda row: f"{row['accuracy']:.1%}"),
        ("95 % interval", lambda row: "{:.1%} to {:.1%}".format(*row["interval"])),
        ("p, paired", lambda row: None if row.get("p_value") is None else f"{row['p_value']:.2g}"),
        ("unparsable", lambda row: None if row.get("unparsable") is None else str(row["unparsable"])),
        ("frames per answer", lambda row: row.get("frames_per_answer") and f"{row['frames_per_answer']:.1f}"),
        ("subtitles", _subtitles),
        ("coverage", lambda row: f"{row['coverage']:.1%}" if row.get("coverage", 1.0) < 1 else None),
        *((kind, lambda row, kind=kind: _share(row, kind)) for kind in kinds),
        ("frames scored", lambda row: f"{row['frames_scored']:.0f}" if row.get("frames_scored") else None),
        ("span IoU", lambda row: None if row.get("span_iou") is None else f"{row['span_iou']:.2f}"),
        (f"ms per question: {', '.join(stages)}", lambda row: _times(row["milliseconds"], stages)),
    ]
    return markdown(_cells(columns, rows)).splitlines()


Cells = list[list[Any]]
"""Rows of texts and numbers, the names of the columns first; None is an empty cell."""


def _cells(columns: Sequence[tuple[str, Callable[[Any], Any]]], rows: Sequence[Any]) -> Cells:
    """The table without columns that no row has anything for."""
    values = [[value(row) for value in (use for _, use in columns)] for row in rows]
    kept = [i for i in range(len(columns)) if any(row[i] is not None for row in values)]
    return [[columns[i][0] for i in kept], *([row[i] for i in kept] for row in values)]


def report_cells(runs: Sequence[Mapping[str, Any]], seeds: Sequence[Mapping[str, Any]]) -> Cells:
    """One row for each evaluation of a report, then one for each group that differs in its seed alone.

    Args:
        runs, seeds: of `report.numbers`.
    """

    def scored(get: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda run: run["scored"] and get(run["scored"])

    def gap(get: Callable[[Any], float]) -> Callable[[Any], Any]:
        return lambda run: run["gap"] and round(100 * get(run["gap"]), 2)

    def moment(get: Callable[[Any], float]) -> Callable[[Any], Any]:
        return lambda run: run["grounding"] and round(get(run["grounding"]), 4)

    columns: list[tuple[str, Callable[[Any], Any]]] = [
        ("evaluation", lambda run: run["name"]),
        ("frames chosen by", lambda run: run["choosing"]["by"]),
        ("frames", lambda run: run["choosing"]["frames"] and round(run["choosing"]["frames"], 2)),
        ("frames scored", lambda run: run["choosing"]["scored"] and round(run["choosing"]["scored"], 2)),
        ("subtitles", lambda run: run["choosing"]["subtitles"]),
        ("questions", scored(lambda s: s["num_questions"])),
        ("scored", scored(lambda s: s["num_scored"])),
        ("accuracy, %", scored(lambda s: round(100 * s["accuracy"], 2))),
        ("low", scored(lambda s: s["accuracy_interval"] and round(100 * s["accuracy_interval"][0], 2))),
        ("high", scored(lambda s: s["accuracy_interval"] and round(100 * s["accuracy_interval"][1], 2))),
        ("gap to the oracle, points", gap(lambda g: g["difference"])),
        ("gap, low", gap(lambda g: g["interval"][0])),
        ("gap, high", gap(lambda g: g["interval"][1])),
        ("mean IoU", moment(lambda g: g["miou"])),
        *((f"R@1 at {at}", moment(lambda g, at=at: g["r1"][str(at)])) for at in RECALL_AT),
        ("ms a question", lambda run: run["latency"] and round(run["latency"]["all"]["mean"], 2)),
        ("judged by", scored(lambda s: "; ".join(s["judges"]))),
        ("standard deviation of accuracy over seeds", lambda run: run.get("deviation")),
    ]
    means = [
        {
            **row["runs"][0],
            "name": f"seeds {', '.join(map(str, row['seeds']))}: mean of " + ", ".join(r["name"] for r in row["runs"]),
            "scored": {**row["runs"][0]["scored"], "accuracy": row["accuracy"]["mean"], "accuracy_interval": None},
            "gap": None,
            "grounding": None,
            "latency": None,
            "deviation": round(100 * row["accuracy"]["sd"], 2),
        }
        for row in seeds
    ]
    return _cells(columns, [*runs, *means])


# ---- forms of a table -----------------------------------------------------------------------------------------------


def markdown(cells: Cells) -> str:
    return _lines(cells, _markdown_text, "| ", " | ", " |", ["|" + "---|" * len(cells[0])])


def latex(cells: Cells) -> str:
    """A tabular that needs no package."""
    columns = "".join(
        "l" if any(isinstance(one, str) for one in column) else "r" for column in zip(*cells[1:], strict=True)
    )
    body = _lines(cells, _latex_text, "", " & ", r" \\", [r"\hline"])
    return f"\\begin{{tabular}}{{{columns}}}\n\\hline\n{body}\\hline\n\\end{{tabular}}\n"


def comma_separated(cells: Cells) -> str:
    text = io.StringIO()
    rows = [["" if one is None else _csv_text(one) if isinstance(one, str) else one for one in row] for row in cells]
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


FORMS: dict[str, Callable[[Cells], str]] = {".csv": comma_separated, ".md": markdown, ".tex": latex}
"""Ending of a file -> the table as its text."""


def _lines(
    cells: Cells, escaped: Callable[[str], str], before: str, between: str, after: str, rule: Sequence[str]
) -> str:
    def shown(one: Any) -> str:
        return "-" if one is None else escaped(one) if isinstance(one, str) else f"{one:.6g}"

    lines = [before + between.join(map(shown, row)) + after for row in cells]
    return "\n".join([lines[0], *rule, *lines[1:]]) + "\n"


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>#|~!$&@]|(?<=\w):(?=//)|(?<=\bwww)\.", re.IGNORECASE)
"""What begins markup, and what makes an address a link."""


def _markdown_text(text: str) -> str:
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", _one_line(text))


_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
_LATEX |= {"[": "{[}", "*": "{*}"}  # behind a line's end they would be its arguments
_LATEX |= {"^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in _one_line(text))


def _csv_text(text: str) -> str:
    """Not a formula for a spreadsheet: one that begins like it gets an apostrophe."""
    text = _one_line(text)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def judge_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """By whose word an answer is right in these rows."""
    chosen = {row.get("unparsable") is not None for row in rows}
    words = {True: "the right option was chosen", False: "exact match after normalising, no judge was asked"}
    return f"Judged by: {'; '.join(words[kind] for kind in sorted(chosen))}."


def _subtitles(row: Mapping[str, Any]) -> str | None:
    left_out = row.get("subtitle_lines_left_out")
    return row.get("subtitles") and row["subtitles"] + (f", {left_out} lines left out" if left_out else "")


def _share(row: Mapping[str, Any], kind: str) -> str | None:
    found = (row.get("by_category") or {}).get(kind)
    return None if found is None else f"{found['accuracy']:.1%}"


def _times(milliseconds: Mapping[str, float] | None, stages: Sequence[str]) -> str | None:
    if milliseconds is None:
        return None
    return " + ".join(f"{milliseconds[stage]:.1f}" for stage in stages) + f" = {sum(milliseconds.values()):.1f}"
