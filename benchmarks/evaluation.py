"""Questions a second, against asking them one at a time: taskset -c 0,1 python benchmarks/evaluation.py [--out FILE]

Shapes-QA with ten questions a video, LSTP at tiny size with random weights, both through this package. `alone` is what
the published code does: for each question the video is decoded anew, its flow computed anew, and a batch of one goes
through vision and language model. `together` is the evaluation as `lavis.evaluate` runs it. Both keep keys and values
while they generate: transformers does so for any decoder-only model that is given embeddings, in the release of the
published code, too. Both must give the same predictions, spans and frames. They run in turn, and the fastest of each
counts. What each stage takes is measured in one process; in `together` a worker decodes meanwhile.

With `--clips FOLDER` the videos are the folder's clips of at most a minute, two copies of each, with ten questions
each. `--model-ms 100` runs `together` once more with a language model that takes so long for each question, asleep, as
the processor is while a GPU works; what is left of the time, evaluation outside of that model, is wanted below 20 %.

The judge's share are the rules, which see each prediction first (more: benchmarks/judge.py). Prints a table, then one
line of JSON; exits 1 below the target of five times, of ten with clips.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lavis_lstp.host import plugin

TARGET, TARGET_CLIPS = 5.0, 10.0
MOST_OUTSIDE = 0.2
STAGES = ("decode", "flow", "sampler", "selection", "vision", "language", "judge")
SIZES = {"train_videos": 0, "val_videos": 0, "train_images": 0, "size": 96}
QUESTIONS = 10
THINGS = ("person", "animal", "car", "tree", "colour", "door", "hand", "light", "word", "sound")
COPIES = 2
Records = list[dict[str, Any]]


def ten_questions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The six of each video, and of its four moving shapes also what was not asked; those answers are not known."""
    more = []
    for row in rows:
        motion, sort = row["category"].split("-")
        if motion not in ("first", "last"):
            colour = "what colour is the shape that"
            swap = ("which shape", colour) if sort == "kind" else (colour, "which shape")
            more.append({**row, "question": row["question"].replace(*swap), "answer": None})
            more[-1]["question_id"] += "/other"
    assert len(rows) + len(more) == QUESTIONS * len({row["video"] for row in rows})
    assert len({(row["video"], row["question"]) for row in rows + more}) == len(rows + more)
    return [*rows, *more]


def about_clips(clips: Path, folder: Path) -> list[dict[str, Any]]:
    """Ten questions about each clip, under several names in `folder`, so that nothing is known of a copy."""
    from lavis_lstp.data.video import probe
    from lavis_lstp.data.video.reading import VIDEO_ENDINGS

    rows = []
    found = [path for path in sorted(clips.iterdir()) if path.suffix in VIDEO_ENDINGS]
    for clip in [path for path in found if probe(path).duration_s <= 60] * COPIES:
        name = f"{len(rows)}_{clip.name}"
        shutil.copyfile(clip, folder / name)
        about = {"video": name, "video_id": Path(name).stem, "answer": None}
        rows += [{**about, "question_id": f"{name}/{x}", "question": f"what does the {x} do?"} for x in THINGS]
    return rows


class Sides:
    """The two ways over one model and one data set.

    Args:
        clips: folder of real clips; None = Shapes-QA.
    """

    def __init__(self, folder: Path, videos: int, batch_size: int, clips: Path | None):
        from lavis_lstp.data.annotation import read_annotation
        from lavis_lstp.data.qa_dataset import VideoQADataset
        from lavis_lstp.data.shapes import shapes_qa
        from lavis_lstp.models.lstp import LSTP
        from lavis_lstp.models.variants import MODEL_TYPES, load_variant
        from lavis_lstp.tasks import VideoQATask

        if clips:
            (folder / "data").mkdir()
            rows = about_clips(clips, folder / "data")
        else:
            shapes_qa.generate(folder / "data", test_videos=videos, workers=2, **SIZES)
            rows = ten_questions(read_annotation(folder / "data/test.json"))
        self.data = VideoQADataset(rows, folder / "data", num_frames=64, image_size=64)
        self.model = LSTP.from_config(load_variant(MODEL_TYPES["lstp_tiny"]["default"]).model).eval()
        self.task, self.folder, self.batch_size = VideoQATask(), folder, batch_size

    @torch.no_grad()
    def alone(self) -> Records:
        """Each question by itself."""
        found = []
        for index in range(len(self.data)):
            self.data.__dict__.update(self.data.__getstate__())  # forgets the last video's frames
            self.model._last_video = None  # and its flow
            samples = self.data.collater([self.data[index]])
            found += self.task.valid_step(self.model, samples)
        return found

    def together(self, workers: int, model_s: float = 0.0) -> Records:
        """Answers as `runners.evaluation.evaluate_split` does, and sleeps so many seconds more for each question."""
        from lavis_lstp.runners.evaluation import PartFiles, run_evaluation

        self.data.__dict__.update(self.data.__getstate__())
        parts = PartFiles(self.folder / "parts", "benchmark")

        def answer(samples: dict[str, Any]) -> Records:
            records = self.task.valid_step(self.model, samples)
            time.sleep(model_s * len(records))
            return records

        found = run_evaluation(
            answer,
            self.data,
            parts=parts,
            batch_size=self.batch_size,
            num_workers=workers,
            seed=0,
        )
        parts.remove()
        return found


def timed(way: Callable[[], Records]) -> tuple[float, Records]:
    started = time.perf_counter()
    records = way()
    return time.perf_counter() - started, records


def stages(seconds: float, records: Records, judge_s: float) -> dict[str, float]:
    """ms a question; what no stage of the model takes is reading: decoding, and making batches."""
    total = Counter()
    for record in records:
        total.update(record["seconds"])
    total["decode"] = seconds - sum(total.values())
    total["judge"] = judge_s
    return {stage: 1000 * total[stage] / len(records) for stage in STAGES}


def judged(records: Records) -> float:
    """Seconds that the rules take over all predictions."""
    from lavis_lstp.judging.rules import decide
    from lavis_lstp.judging.verdict import Case

    decide(Case("what?", "a", "b"))  # loads the dictionary
    started = time.perf_counter()
    for record in records:
        decide(Case(record["question"], record["answer"] or "unknown", record["prediction"]))
    return time.perf_counter() - started


def check_equal(alone: Records, together: Records) -> float:
    """The same answers from the same frames; the largest difference of two log-probabilities, a token's mean."""
    by_id = {record["question_id"]: record for record in together}
    assert len(by_id) == len(alone) == len(together)
    differences = []
    for record in alone:
        other = by_id[record["question_id"]]
        for key in ("prediction", "prompt", "span", "frame_index", "frame_times"):
            assert record[key] == other[key], (key, record, other)
        differences.append(abs(record["log_prob"]["mean"] - other["log_prob"]["mean"]))
    assert max(differences) < 1e-3
    return max(differences)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=30, help="default: 30, so 300 questions")
    parser.add_argument("--clips", type=Path, help="a folder of real clips in place of Shapes-QA")
    parser.add_argument("--model-ms", type=float, help="also with a language model that takes so long for a question")
    parser.add_argument("--batch-size", type=int, default=64, help="of `together`; default: 64, as the tiny recipes")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode for `together`; default: 1")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch, on each side; default: 1, the best for `alone`"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    plugin.before_lavis()
    torch.set_num_threads(args.threads)
    best: dict[str, tuple[float, Records]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(Path(folder), args.videos, args.batch_size, args.clips)
        ways = {
            "alone": sides.alone,
            "together": lambda: sides.together(args.workers),
            "together, one process": lambda: sides.together(0),
        }
        for way in ways.values():
            way()  # warm
        for _ in range(args.repeats):
            for name, way in ways.items():
                best[name] = min(best.get(name, (float("inf"), [])), timed(way), key=lambda run: run[0])
        outside = None
        if args.model_ms:
            slow_s = min(
                timed(lambda: sides.together(args.workers, args.model_ms / 1000))[0] for _ in range(args.repeats)
            )
            outside = 1 - len(sides.data) * args.model_ms / 1000 / slow_s
    difference = check_equal(best["alone"][1], best["together"][1])
    check_equal(best["together"][1], best["together, one process"][1])
    count = len(best["alone"][1])
    rate = {name: count / seconds for name, (seconds, _) in best.items()}
    ratio = rate["together"] / rate["alone"]
    judge_s = judged(best["together"][1])
    split = {name: stages(*best[name], judge_s) for name in ("alone", "together, one process")}
    print(f"| ms a question | {' | '.join(STAGES)} | questions/s |\n|---|{'---|' * (len(STAGES) + 1)}")
    for name in best:
        cells = [f"{split[name][stage]:.2f}" if name in split else "" for stage in STAGES]
        print(f"| {name} | {' | '.join(cells)} | {rate[name]:.1f} |")
    target = TARGET_CLIPS if args.clips else TARGET
    if outside is not None:
        print(f"outside of a language model of {args.model_ms:g} ms: {outside:.1%}, target {MOST_OUTSIDE:.0%}")
    print(f"{ratio:.1f} times as fast, target {target:.0f}; mean log-probabilities differ by at most {difference:.0e}")
    figures = {
        "questions_per_s": rate,
        "ratio": ratio,
        "outside": outside,
        "ms": split,
        "questions": count,
        "batch_size": args.batch_size,
    }
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "threads": args.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    line = json.dumps({**figures, "log_prob_difference": difference, **machine})
    print(line)
    if args.out:
        args.out.write_text(line + "\n")
    return 0 if ratio >= target and (outside or 0.0) <= MOST_OUTSIDE else 1


if __name__ == "__main__":
    sys.exit(main())
