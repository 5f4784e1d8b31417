"""`lavis-lstp ablate --cfg-path YAML --frames uniform random lstp oracle --num-frames 4 8`: does the sampler help?

In: evaluations, ways to choose frames and numbers of frames. Out, in a folder: one evaluation for each combination,
`table.md` and `table.json`: accuracy with its 95 % interval, an exact paired test against the first way of choosing,
and the time of each stage. LAVIS's own models stand in the same table, on evenly spaced frames. `chain` runs the
evaluations, so that one that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lavis_lstp.errors import ConfigError, CoverageError
from lavis_lstp.files import atomic_writer, owned, read_jsonl, write_json
from lavis_lstp.metrics.agreement import mcnemar_exact
from lavis_lstp.metrics.grounding import evaluate_spans
from lavis_lstp.metrics.qa import accuracy_interval

STAGES = ("flow", "sampler", "selection", "vision", "language")
FRAMES = {
    "uniform": ("evenly spaced", ("model.selector.name=uniform",)),
    "random": ("random", ("model.selector.name=random",)),
    "lstp": ("LSTP (predicted span)", ("model.selector.name=lstp",)),
    "oracle": ("oracle (gold span)", ("model.selector.name=given", "model.selector.span_key=gold_span")),
}
"""Ways to choose frames: what the table calls them, and the options that do it."""
LEARNT = ("lstp", "best_span", "argmax", "gumbel")
"""Selectors that ask the sampler: a recipe that has one of these keeps it for `lstp`."""


@dataclass(frozen=True)
class Cell:
    """One evaluation: its folder's name, its recipe and options, and how the table calls it."""

    name: str
    title: str
    recipe: str
    split: str
    options: tuple[str, ...]
    baseline: str
    """Name of the cell it is compared with."""


# ---- what one evaluation says, for the demo's table too -------------------------------------------------------------


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
    metrics = json.loads((folder / f"{stem}_metrics.json").read_text(encoding="utf-8"))
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
    columns = [
        (first, lambda row: row["title"]),
        ("accuracy", lambda row: f"{row['accuracy']:.1%}"),
        ("95 % interval", lambda row: "{:.1%} to {:.1%}".format(*row["interval"])),
        ("p, paired", lambda row: None if row.get("p_value") is None else f"{row['p_value']:.2g}"),
        ("unparsable", lambda row: None if row.get("unparsable") is None else str(row["unparsable"])),
        ("coverage", lambda row: f"{row['coverage']:.1%}" if row.get("coverage", 1.0) < 1 else None),
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


def _times(milliseconds: Mapping[str, float] | None) -> str | None:
    if milliseconds is None:
        return None
    return " + ".join(f"{milliseconds[stage]:.1f}" for stage in STAGES) + f" = {sum(milliseconds.values()):.1f}"


# ---- the combinations -----------------------------------------------------------------------------------------------


def no_flow(datasets: Sequence[str]) -> tuple[str, ...]:
    """Options under which no flow is computed or read."""
    return "model.flow.name=none", *(f"datasets.{name}.flow=none" for name in datasets)


def cells_of(
    recipes: Sequence[str], frames: Sequence[str], counts: Sequence[int], options: Sequence[str]
) -> list[Cell]:
    """Every combination, those of one recipe and number together; LAVIS's models on evenly spaced frames alone.

    Raises:
        ConfigError: a recipe is not complete, evaluates not exactly one split, or is of a task without answers.
    """
    from lavis_lstp import register

    register()
    from lavis.common.registry import registry

    from lavis_lstp.config import Config
    from lavis_lstp.models.lstp import LSTP

    cells = []
    for recipe in recipes:
        whole = Config(SimpleNamespace(cfg_path=recipe, options=list(options))).config
        splits = list(whole.run.get("test_splits") or [])
        if len(splits) != 1 or whole.run.task != "video_qa":
            raise ConfigError(
                f"{recipe}: ablate wants run.task video_qa and one split in run.test_splits, got {whole.run.task} and "
                f"{splits}"
            )
        label = f"{Path(recipe).stem}: " if len(recipes) > 1 else ""
        if not issubclass(registry.get_model_class(whole.model.arch), LSTP):
            for count in counts:
                own = tuple(f"datasets.{name}.image_frames={count}" for name in whole.datasets)
                cells.append(_cell(recipe, "uniform", count, label, splits[0], own, "uniform"))
            continue
        for count in counts:
            for way in frames:
                own = (*FRAMES[way][1], f"model.selector.num_selected={count}")
                if way == "lstp" and whole.model.selector.name in LEARNT:
                    own = own[1:]
                elif way != "lstp":
                    own = (*own, *no_flow(list(whole.datasets)))
                cells.append(_cell(recipe, way, count, label, splits[0], own, frames[0]))
    return cells


def _cell(recipe: str, way: str, count: int, label: str, split: str, own: Sequence[str], baseline: str) -> Cell:
    name = f"{Path(recipe).stem}_{{}}_{count}"
    title = f"{label}{FRAMES[way][0]}, {count} frames"
    return Cell(name.format(way), title, recipe, split, tuple(own), name.format(baseline))


def ablate(
    cells: Sequence[Cell], out: Path, options: Sequence[str] = (), launcher: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Evaluates every cell that is not done yet; returns the rows of the table."""
    from lavis_lstp.commands.chain import Chain, Step

    chain = Chain(out, options, launcher)
    rows, rights = [], {}
    for cell in cells:
        chain.run([Step(cell.name, "evaluate", cell.recipe, options=cell.options)])
        row, rights[cell.name] = measure(out / cell.name / "result", f"{cell.split}_video_qa")
        compared = cell.baseline if cell.baseline != cell.name and cell.baseline in rights else None
        p_value = None if compared is None else paired_p(rights[compared], rights[cell.name])
        facts = {"name": cell.name, "title": cell.title, "compared_with": compared, "p_value": p_value}
        rows.append({**facts, **row})
        write_json(out / "table.json", {"rows": rows, "options": list(options)})
        with atomic_writer(out / "table.md") as file:
            file.write("\n".join([*table_lines(rows, "frames"), "", judge_line(rows)]) + "\n")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lavis-lstp ablate", description=__doc__.splitlines()[0])
    parser.add_argument("--cfg-path", required=True, nargs="+", help="evaluations, projects/lstp/eval/... or your own")
    parser.add_argument("--frames", nargs="+", choices=list(FRAMES), default=["uniform", "random", "lstp"])
    parser.add_argument("--num-frames", nargs="+", type=int, default=[4], help="frames shown to the language model")
    parser.add_argument("--out", type=Path, help="working folder (default: output/ablate/NAME)")
    parser.add_argument("--nproc", type=int, default=1, help="processes, one a GPU, on this machine")
    parser.add_argument("--options", nargs="+", action="extend", default=[], metavar="A.B=C", help="overrides")
    args = parser.parse_args(argv)
    if min(args.num_frames) < 1:
        raise ConfigError(f"--num-frames must be at least 1, got {min(args.num_frames)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    unique = [list(dict.fromkeys(given)) for given in (args.cfg_path, args.frames, args.num_frames)]
    cells = cells_of(*unique, args.options)
    launcher = ["torchrun", "--standalone", f"--nproc-per-node={args.nproc}"] if args.nproc > 1 else []
    out = args.out or Path("output/ablate", Path(args.cfg_path[0]).stem)
    with owned(out):
        rows = ablate(cells, out, args.options, launcher)
    print("\n" + "\n".join([*table_lines(rows, "frames"), "", judge_line(rows)]))
    first = ", ".join(dict.fromkeys(row["compared_with"] for row in rows if row["compared_with"]))
    print(f"\n{rows[0]['questions']} questions." + (f" p: exact McNemar test against {first}." if first else ""))
    print(f"Written: {out / 'table.md'}, {out / 'table.json'}")
    return 0
