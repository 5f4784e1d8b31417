"""`lavis-lstp demo`: from nothing to a trained and measured LSTP, in the order of the paper.

In: a folder to work in. Out, in it: Shapes-QA, one run per step, `table.md`, `table.json` and `explanation.png`. Each
step is the command a user would type, `python -m lavis.train --cfg-path projects/lstp/tiny_*.yaml`; a step that is
complete is not run again, an interrupted one goes on from its last checkpoint.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_lstp.data.qa_dataset import read_annotation
from lavis_lstp.data.shapes_scene import FPS, NUM_FRAMES
from lavis_lstp.data.video import uniform_centres
from lavis_lstp.errors import ConfigError, LstpError
from lavis_lstp.files import atomic_writer, read_jsonl, write_json
from lavis_lstp.metrics.grounding import evaluate_spans
from lavis_lstp.metrics.qa import accuracy_interval, exact_match
from lavis_lstp.schema import Span

logger = logging.getLogger(__name__)

MIN_GAIN = 0.20
MIN_SHARE_OF_ORACLE = 0.90
"""What LSTP must reach: points above uniform, with intervals apart, and share of the oracle's accuracy."""
FLOW = ("--flow", "dis", "--num-frames", "64", "--size", "64", "--flow-size", "32")
"""How the model config `lstp_tiny` computes flow itself."""
STAGES = ("flow", "sampler", "selection", "vision", "language")


@dataclass(frozen=True)
class Row:
    """One line of the table: who trained on what, and who chooses the frames."""

    name: str
    title: str
    options: tuple[str, ...]
    answerer: str = "lstp"


NO_FLOW = ("model.flow.name=none", "datasets.lstp_shapes.flow=none")
ROWS = (
    Row("uniform", "evenly spaced", ("model.selector.name=uniform", *NO_FLOW)),
    Row("uniform_trained", "evenly spaced, trained on such", ("model.selector.name=uniform", *NO_FLOW), "uniform"),
    Row("random", "random", ("model.selector.name=random", *NO_FLOW)),
    # flow is computed here, not read, so that the table shows what it costs
    Row("lstp", "LSTP (predicted span)", ("model.selector.name=lstp", "model.flow.name=dis", NO_FLOW[1])),
    Row("oracle", "oracle (gold span)", ("model.selector.name=given", "model.selector.span_key=gold_span", *NO_FLOW)),
)


class Demo:
    """The steps, each in a folder of its own below `out`.

    Args:
        out: working folder.
        options: further `--options` for every step, for tests and for trying things.
    """

    def __init__(self, out: Path, options: Sequence[str] = ()):
        self.out = out
        self.options = [f"datasets.lstp_shapes.root={out / 'shapes_qa'}", *options]
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """All steps; returns what `table.json` holds."""
        out = self.out
        flow = "model.flow.name=precomputed", "datasets.lstp_shapes.flow=precomputed"
        flow = *flow, f"datasets.lstp_shapes.flow_root={out / 'flow'}"
        spans = [f"datasets.lstp_shapes.spans.{split}={out / f'spans_{split}.json'}" for split in ("train", "val")]
        start = f"model.checkpoint=[{out / 'base'},{out / 'sampler'}]", "run.test_splits=[]"  # tested below
        self.recipe("base", "lavis.train", "tiny_base")
        self.step("flow", ["-m", "lavis_lstp", "flow", str(out / "shapes_qa" / "videos"), str(out / "flow"), *FLOW])
        labels = f"run.spans_out={out / 'spans_{split}.json'}"
        self.recipe("spans", "lavis.evaluate", "tiny_spans", f"model.checkpoint={out / 'base'}", labels)
        self.recipe("sampler", "lavis.train", "tiny_sampler", *spans, *flow)
        self.recipe("lstp", "lavis.train", "tiny_ft", *start, *flow)
        self.recipe("uniform", "lavis.train", "tiny_ft", *start, "model.selector.name=uniform", *NO_FLOW)
        for row in ROWS:
            parts = ",".join(str(out / name) for name in ("base", "sampler", row.answerer))
            options = f"model.checkpoint=[{parts}]", *flow, *row.options
            self.recipe(f"eval_{row.name}", "lavis.evaluate", "tiny_eval", *options)
        return self.report()

    def recipe(self, name: str, module: str, recipe: str, *options: str) -> None:
        """A step that is `python -m lavis.train` or `lavis.evaluate` with a recipe, in the folder `out/name`."""
        command = ["-m", module, "--cfg-path", f"projects/lstp/{recipe}.yaml", "--options", *self.options, *options]
        command.append(f"run.output_dir={self.out / name}")
        if module == "lavis.train":
            command.append("run.resume_ckpt_path=auto")
        self.step(name, command)

    def step(self, name: str, command: list[str]) -> None:
        """Runs a command, unless `done.json` in the step's folder says that it has been run to the end.

        Raises:
            ConfigError: the folder holds the same step with other options, whose results must not pass for these.
            LstpError: the command failed.
        """
        folder = self.out / name
        started, done, output = folder / "command.json", folder / "done.json", folder / "output.txt"
        if started.is_file() and json.loads(started.read_text(encoding="utf-8")) != command:
            raise ConfigError(
                f"{folder} holds this step with other options; choose another --out, or remove {self.out}"
            )
        if done.is_file():
            self.seconds[name] = json.loads(done.read_text(encoding="utf-8"))["seconds"]
            logger.info("%s: done before, in %.0f s", name, self.seconds[name])
            return
        logger.info("%s: python %s", name, " ".join(command))
        write_json(started, command)
        begin = time.perf_counter()
        with open(output, "w", encoding="utf-8") as log:
            run = subprocess.run([sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, check=False)
        if run.returncode:
            last = output.read_text(encoding="utf-8", errors="replace").splitlines()[-1:] or ["no output"]
            raise LstpError(f"step {name} ended with status {run.returncode}: {last[0]} (see {output})")
        self.seconds[name] = time.perf_counter() - begin
        write_json(done, {"seconds": self.seconds[name]})
        logger.info("%s: %.0f s", name, self.seconds[name])

    # ---- results ------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        rows = [self._measure(row) for row in ROWS]
        manifest = json.loads((self.out / "shapes_qa" / "manifest.json").read_text(encoding="utf-8"))
        result = {
            "chance": manifest["chance"]["overall"],
            "rows": rows,
            "verdict": verdict({row["name"]: row for row in rows}),
            "spans": self._label_quality(),
            "seconds_by_step": {name: round(value, 1) for name, value in self.seconds.items()},
            # of the largest process, and only of those that this call started; Linux counts KiB
            "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        }
        write_json(self.out / "table.json", result)
        with atomic_writer(self.out / "table.md") as file:
            file.write(table(result) + "\n")
        return result

    def _measure(self, row: Row) -> dict[str, Any]:
        folder = self.out / f"eval_{row.name}" / "result"
        records = list(read_jsonl(folder / "test_video_qa.jsonl"))
        right = sum(exact_match(r["answer"], r["prediction"]) for r in records)
        low, high = accuracy_interval(right, len(records))
        spans = evaluate_spans(
            {r["question_id"]: r["span"] for r in records}, {r["question_id"]: r["gold_span"] for r in records}
        )
        timings = list(read_jsonl(folder / "test_video_qa_timings.jsonl"))
        stages = {s: 1000 * sum(t.get(s, 0.0) for t in timings) / len(timings) for s in STAGES}
        return {
            "name": row.name,
            "title": row.title,
            "questions": len(records),
            "accuracy": right / len(records),
            "interval": [low, high],
            "span_iou": spans["iou"],
            "milliseconds": stages,
        }

    def _label_quality(self) -> dict[str, float]:
        """IoU of the training split's pseudo spans with the gold spans, which no training step has read."""
        content = json.loads((self.out / "spans_train.json").read_text(encoding="utf-8"))
        times = [i / FPS for i in uniform_centres(content["num_frames"], NUM_FRAMES)]
        gold = {
            row["question_id"]: list(Span.from_seconds(*row["span_s"], times))
            for row in read_annotation(self.out / "shapes_qa" / "train.json")
        }
        found = {name: row["span"] for name, row in content["spans"].items()}
        return evaluate_spans(found, gold)


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
    """Markdown: accuracy, interval, IoU and time by stage for each way of choosing frames."""
    lines = [
        f"| frames (4 of 64) | accuracy | 95 % interval | span IoU | ms per question: {', '.join(STAGES)} |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["interval"]
        times = " + ".join(f"{row['milliseconds'][stage]:.1f}" for stage in STAGES)
        lines.append(
            f"| {row['title']} | {row['accuracy']:.1%} | {low:.1%} to {high:.1%} | {row['span_iou']:.2f} "
            f"| {times} = {sum(row['milliseconds'].values()):.1f} |"
        )
    check = result["verdict"]
    lines += [
        "",
        f"Chance from the question alone: {result['chance']:.1%}. {result['rows'][0]['questions']} test questions.",
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
    print(f"(the annotation says: {question['answer']}, {question['span_s'][0]} to {question['span_s'][1]} s)")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """0 when LSTP met what it claims, 1 when not."""
    parser = argparse.ArgumentParser(prog="lavis-lstp demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("output/demo"), help="working folder (default: output/demo)")
    parser.add_argument("--options", nargs="*", default=[], metavar="A.B=C", help="overrides for every step")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    started = time.perf_counter()
    demo = Demo(args.out, args.options)
    result = demo.run()
    print("\n" + table(result))
    code = explain(demo)
    files = ", ".join(str(args.out / name) for name in ("table.md", "table.json", "explanation.png"))
    print(f"\n{time.perf_counter() - started:.0f} s. Written: {files}")
    return code or (0 if result["verdict"]["met"] else 1)
