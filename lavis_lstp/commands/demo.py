"""`lavis-lstp demo`: from nothing to a trained and measured LSTP, in the order of the paper.

In: a folder to work in. Out, in it: Shapes-QA, one run per step, and `FILES`. The steps are those of
projects/lstp/chains/tiny.yaml, then LSTP again on evenly spaced frames, and the evaluations; `chain` runs them, so an
interrupted demo goes on where it was.

With `--film FILE` the same on needles in that film (projects/lstp/chains/needles.yaml): what is learned from windows of
a minute is measured on haystacks of ten, each way of choosing frames at 2, 4, 8 and 16 of 600, by `ablate`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lavis_lstp.commands.ablate import ablate, cells_of, ways_of
from lavis_lstp.commands.chain import Chain, Step, check_options, find_chain, read_chain
from lavis_lstp.commands.report import PICTURES, report
from lavis_lstp.files import atomic_writer, owned, write_json
from lavis_lstp.redaction import printable
from lavis_lstp.report.table import judge_line, measure, paired_p, table_lines
from lavis_lstp.untrusted import guard_log

logger = logging.getLogger(__name__)

MIN_GAIN = 0.20
MIN_SHARE_OF_ORACLE = 0.90
"""What LSTP must reach: points above uniform, with intervals apart, and share of the oracle's accuracy."""
CHAIN = "projects/lstp/chains/tiny.yaml"
"""The steps up to a trained LSTP."""
ABOUT_S = {"base": 270, "flow": 30, "spans": 70, "sampler": 180, "lstp": 75, "uniform": 50}
EVALUATION_S = 20
"""Seconds of the steps and of each evaluation, on two quiet cores."""
FILM_CHAIN = "projects/lstp/chains/needles.yaml"
FILM_WAYS = ("uniform", "topk", "bitcost", "lstp", "oracle")
FILM_COUNTS = (2, 4, 8, 16)
FILM_OPTIONS = (
    "datasets.lstp_shapes.num_frames=600",  # one a second, in windows of as many as the sampler was trained on
    "model.sampler.window=64",
    "model.flow.name=precomputed",
    "datasets.lstp_shapes.flow=precomputed",
    "datasets.lstp_shapes.flow_root={out}/flow",
    "datasets.lstp_shapes.flow_pairs=local",
    "datasets.lstp_shapes.bit_cost=true",
    "run.test_splits=[test]",
    "run.batch_size_eval=48",  # the questions about four haystacks
)
FILES = ("table.md", "table.json", "explanation.png", "report.html")


@dataclass(frozen=True)
class Row:
    """One line of the table: who trained on what, and who chooses the frames."""

    name: str
    title: str
    options: tuple[str, ...]
    answerer: str = "lstp"


WAYS = ways_of()
ROWS = (
    Row("uniform", WAYS["uniform"].title, WAYS["uniform"].options),
    Row("uniform_trained", "evenly spaced, trained on such", WAYS["uniform"].options, "uniform"),
    Row("random", WAYS["random"].title, WAYS["random"].options),
    # flow is computed here, not read, so that the table shows what it costs
    Row("lstp", WAYS["lstp"].title, (*WAYS["lstp"].options, "model.flow.name=dis", "datasets.lstp_shapes.flow=none")),
    Row("oracle", WAYS["oracle"].title, WAYS["oracle"].options),
)


class Demo:
    """The steps, each in a folder of its own below `out`.

    Args:
        out: working folder.
        options: further `--options` for every step, for tests and for trying things.
    """

    def __init__(self, out: Path, options: Sequence[str] = ()):
        self.out = out
        self.steps = read_chain(find_chain(CHAIN))
        check_options(options, self.steps)
        self.chain = Chain(out, options)
        self.chain.about_s.update(ABOUT_S, **{f"eval_{row.name}": EVALUATION_S for row in ROWS})

    def run(self) -> dict[str, Any]:
        """All steps; returns what `table.json` holds."""
        lstp = self.steps[-1]
        steps = [*self.steps, replace(lstp, name="uniform", options=(*lstp.options, *WAYS["uniform"].options))]
        for row in ROWS:
            parts = ",".join(f"{{out}}/{name}" for name in ("base", "sampler", row.answerer))
            options = *lstp.options, f"model.checkpoint=[{parts}]", "run.test_splits=[test]", *row.options
            steps.append(Step(f"eval_{row.name}", "evaluate", "projects/lstp/tiny_eval.yaml", options=options))
        todo = [self.chain.about_s.get(step.name, 0) for step in steps if not self.chain.is_done(step.name)]
        logger.info(
            "%d of %d steps to do, about %.0f minutes on two quiet cores", len(todo), len(steps), sum(todo) / 60
        )
        self.chain.run(steps)
        return self.report()

    # ---- results ------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        measured = {row.name: measure(self.out / f"eval_{row.name}" / "result", "test_video_qa") for row in ROWS}
        first = measured[ROWS[0].name][1]
        rows = [
            {"name": row.name, "title": row.title, "p_value": paired_p(first, right) if i else None, **found}
            for i, (row, (found, right)) in enumerate(zip(ROWS, measured.values(), strict=True))
        ]
        manifest = json.loads((self.out / "shapes_qa" / "manifest.json").read_text(encoding="utf-8"))
        labels = self.out / "spans" / "result" / "train_pseudo_span_metrics.json"  # against gold, which no step learns
        result = {
            "chance": manifest["chance"]["overall"],
            "rows": rows,
            "verdict": verdict({row["name"]: row for row in rows}),
            "spans": json.loads(labels.read_text(encoding="utf-8")),
            "seconds_by_step": {name: round(value, 1) for name, value in self.chain.seconds.items()},
            # of the largest process, and only of those that this call started; Linux counts KiB
            "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        }
        write_json(self.out / "table.json", result)
        with atomic_writer(self.out / "table.md") as file:
            file.write(table(result) + "\n")
        return result


def with_film(film: Path, out: Path, options: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The steps on needles in a film; returns the rows of the table.

    Args:
        film, out: file and working folder.
        options: further `--options` for every step, or as STEP:A.B=C for one.
    """
    own = [f"datasets.lstp_shapes.generate.film={film}", *options]
    steps = read_chain(find_chain(FILM_CHAIN))
    check_options(own, steps)
    Chain(out, own).run(steps)
    parts = ",".join(f"{{out}}/{name}" for name in ("base", "sampler_long", "lstp"))
    common = (*steps[0].options, *FILM_OPTIONS, f"model.checkpoint=[{parts}]")
    common = [option.replace("{out}", str(out)) for option in common]
    common += [option for option in own if ":" not in option.partition("=")[0]]
    cells = cells_of(["projects/lstp/tiny_eval.yaml"], {name: WAYS[name] for name in FILM_WAYS}, FILM_COUNTS, common)
    return ablate(cells, out, common)


def verdict(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Whether LSTP does what it claims, against both uniform baselines, the better of the two counting."""
    lstp, oracle = rows["lstp"], rows["oracle"]
    uniform = max(rows["uniform"], rows["uniform_trained"], key=lambda row: row["accuracy"])
    gain = lstp["accuracy"] - uniform["accuracy"]
    share = lstp["accuracy"] / oracle["accuracy"] if oracle["accuracy"] else 0.0
    apart = lstp["interval"][0] > uniform["interval"][1]
    return {
        "gain_over_uniform": gain,
        "share_of_oracle": share,
        "intervals_apart": apart,
        "met": gain >= MIN_GAIN and share >= MIN_SHARE_OF_ORACLE and apart,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: the table of `ablate` for each row, and what it says of LSTP."""
    lines = table_lines(result["rows"], "frames (4 of 64)")
    check = result["verdict"]
    lines += [
        "",
        f"Chance from the question alone: {result['chance']:.1%}. {result['rows'][0]['questions']} test questions. "
        f"p: exact McNemar test against {result['rows'][0]['title']}. {judge_line(result['rows'])}",
        f"LSTP is {100 * check['gain_over_uniform']:.1f} points above evenly spaced frames "
        f"(wanted: {100 * MIN_GAIN:.0f}) and reaches {check['share_of_oracle']:.1%} of the oracle "
        f"(wanted: {MIN_SHARE_OF_ORACLE:.0%}): {'met' if check['met'] else 'NOT met'}.",
        f"Pseudo spans of the training questions: IoU {result['spans']['iou']:.2f} with the gold spans. "
        f"Largest process: {result['peak_memory_mib']} MiB.",
    ]
    return "\n".join(lines)


def explain(demo: Demo) -> int:
    """Asks the first test question through the command line and leaves the picture."""
    question = json.loads((demo.out / "shapes_qa" / "test.json").read_text(encoding="utf-8"))[0]
    command = ["-m", "lavis_lstp", "ask", str(demo.out / "shapes_qa" / question["video"]), question["question"]]
    command += ["--checkpoint", str(demo.out / "lstp"), "--picture", str(demo.out / "explanation.png")]
    print(f"\n$ lavis-lstp {' '.join(repr(part) if ' ' in part else part for part in command[2:])}", flush=True)
    code = subprocess.run([sys.executable, *command], check=False).returncode
    print(
        printable(f"(the annotation says: {question['answer']}, {question['span_s'][0]} to {question['span_s'][1]} s)")
    )
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """0 when LSTP met what it claims, 1 when not."""
    parser = argparse.ArgumentParser(prog="lavis-lstp demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="working folder (default: output/demo)")
    parser.add_argument("--film", type=Path, help="needles in this film instead (default of --out: output/demo_real)")
    parser.add_argument("--options", nargs="*", default=[], metavar="A.B=C", help="overrides for every step")
    args = parser.parse_args(argv)
    args.out = args.out or Path("output/demo_real" if args.film else "output/demo")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    guard_log()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    started = time.perf_counter()
    if args.film:
        with owned(args.out):
            rows = with_film(args.film, args.out, args.options)
        print(printable("\n" + "\n".join(table_lines(rows, "frames (of 600)"))))
        print(f"\n{time.perf_counter() - started:.0f} s. Written: {args.out / 'table.md'}, {args.out / 'accuracy.png'}")
        return 0
    demo = Demo(args.out, args.options)
    with owned(args.out):
        result = demo.run()
        print(printable("\n" + table(result)))
        code = explain(demo)
        logger.info("the page: reads the frames of %d answers again", PICTURES)
        report([args.out], title="Shapes-QA")
    files = ", ".join(str(args.out / name) for name in FILES)
    print(f"\n{time.perf_counter() - started:.0f} s. Written: {files}")
    return code or (0 if result["verdict"]["met"] else 1)
