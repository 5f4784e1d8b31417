"""`lavis-lstp report`: numbers as computed here by hand, the frames of the videos, text as text, a page that works."""

from __future__ import annotations

import base64
import contextlib
import csv
import html.parser
import io
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import chromium
from PIL import Image
from video_files import numbered_video, read_number

from lavis_lstp.commands import cli
from lavis_lstp.commands.report import report
from lavis_lstp.errors import AnnotationError
from lavis_lstp.files import read_jsonl, write_json, write_jsonl
from lavis_lstp.judging.calibrate import calibrate
from lavis_lstp.judging.compare import compare, read_judged
from lavis_lstp.metrics.calibration import reliability

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
KINDS = ("colour", "motion")
T = 16


# ---- predictions as an evaluation writes them ---------------------------------------------------------------------


def prediction(i: int, right: bool, **more) -> dict:
    """A row of a predictions file; `more` replaces or, where None, removes keys."""
    start, seed = i % 10, random.Random(i)
    log_prob = -seed.random() * (1 if right else 3)
    row = {
        "question_id": f"q{i:03d}",
        "video_id": f"v{i // 3:03d}",
        "category": KINDS[i % 2],
        "question": f"what is number {i}?",
        "answer": "red",
        "prediction": "red" if right else f"blue {i}",
        "prompt": "USER",
        "log_prob": {"sum": round(log_prob, 5), "mean": round(log_prob / 2, 5), "tokens": 2},
        "span": [start, start + 4],
        "num_frames": T,
        "span_s": [start * 0.5, (start + 4) * 0.5],
        "entropy": {"start": round(seed.random() * 4, 4), "end": round(seed.random() * 4, 4)},
        "frame_index": [start, start + 1, start + 2, start + 3],
        "frame_times": [round((start + k) * 0.5, 3) for k in range(4)],
        "gold_span": [start + 1, start + 5],
    }
    row.update(more)
    return {key: value for key, value in row.items() if value is not None or key == "answer"}


def write_run(folder: Path, rows: list[dict], **metrics) -> Path:
    """`result/` of a run; returns the predictions file."""
    file = folder / "result" / "test_video_qa.jsonl"
    write_jsonl(file, rows)
    write_json(file.with_name("test_video_qa_metrics.json"), {"num_questions": len(rows), "coverage": 1.0, **metrics})
    seconds = [{"question_id": r["question_id"], "vision": 0.002, "language": 0.001 * i} for i, r in enumerate(rows)]
    write_jsonl(file.with_name("test_video_qa_timings.jsonl"), seconds)
    return file


def pattern(i: int) -> bool:
    return i % 3 != 0


def judge(*arguments: object, cache: Path) -> None:
    assert cli.main(["judge", *map(str, arguments), "--cache", str(cache)]) == 0


# ---- the page as data ---------------------------------------------------------------------------------------------


def rows_of(columns: dict, count: int) -> list[dict]:
    """A dict for each row of the page's columns, without what is null."""
    rows: list[dict] = [{} for _ in range(count)]
    for name, column in columns.items():
        values = column
        if isinstance(column, dict):
            values = [None if place < 0 else column["of"][place] for place in column["at"]]
        for row, value in zip(rows, values, strict=True):
            if value is not None:
                row[name] = value
    return rows


class Reader(html.parser.HTMLParser):
    """Tables by id, as lists of rows of texts; scripts by type; images' alternative texts; texts outside of scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: list[tuple[str, str]] = []
        self.alts: list[str] = []
        self.texts: list[str] = []
        self._rows: list[list[str]] | None = None
        self._cell = self._script = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "table":
            self._rows = self.tables.setdefault(attrs.get("id") or attrs.get("class") or "", [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell = True
            self._rows[-1].append("")
        elif tag == "script":
            self._script = True
            self.scripts.append((attrs.get("type", "javascript"), ""))
        elif tag == "img":
            self.alts.append(attrs["alt"])

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = False
        elif tag == "script":
            self._script = False

    def handle_data(self, data):
        if self._script:
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        else:
            self.texts.append(data)
        if self._cell:
            self._rows[-1][-1] += data

    def row(self, table: str, label: str) -> list[str]:
        return next([" ".join(cell.split()) for cell in row[1:]] for row in self.tables[table] if row[0] == label)

    @property
    def data(self) -> dict:
        """What the script shows, with an object for each question in place of columns."""
        found = json.loads(next(text for kind, text in self.scripts if kind == "application/json"))
        questions = rows_of(found["columns"], found["count"])
        for i, question in enumerate(questions):
            said = [rows_of(run["columns"], found["count"])[i] for run in found["runs"]] if found["count"] < 100 else []
            question["runs"] = [one if "status" in one else None for one in said]
        return {**found, "questions": questions}

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page(*paths: object, **how) -> Reader:
    out, _ = report([str(path) for path in paths], **{"pictures": 0, **how})
    return Reader(out.read_text(encoding="utf-8"))


# ---- numbers ------------------------------------------------------------------------------------------------------


def test_reliability_of_known_answers():
    found = reliability([0.95, 0.85, 1.0, 0.05], [True, False, True, False])
    assert [(row["low"], row["count"], row["accuracy"]) for row in found["bins"]] == [
        (0.0, 1, 0),
        (0.8, 1, 0),
        (0.9, 2, 1),
    ]
    assert found["ece"] == pytest.approx((0.05 + 0.85 + 2 * 0.025) / 4)
    assert reliability([1.0] * 4, [True] * 4)["ece"] == 0 and reliability([1.0] * 4, [False] * 4)["ece"] == 1


def test_the_numbers_of_the_page_are_those_computed_by_hand(tmp_path):
    rows = [prediction(i, pattern(i)) for i in range(90)]
    rows[5]["span"], rows[6]["span"] = [0, T], [0, T]
    write_run(tmp_path, rows)
    seen = page(tmp_path)
    right = [pattern(i) for i in range(90)]
    assert seen.row("results", "accuracy")[0].startswith(f"{100 * sum(right) / 90:.1f} % [")
    assert seen.row("results", "right, wrong, unjudged") == ["60, 30, 0"]
    assert seen.row("results", "coverage") == ["90 of 90 (100.0 %)"]
    assert seen.row("results", "ms a question") == [f"{2 + 44.5:.1f}"]
    assert seen.row("stages", "language") == ["44.50 44.50, 85.00"]
    for kind, index in zip(KINDS, (0, 1), strict=True):
        own = right[index::2]
        assert seen.row("by-category", kind)[0].startswith(f"{100 * sum(own) / 45:.1f} % [")
        assert seen.row("by-category", kind)[0].endswith("of 45")
    spans = [(set(range(*r["span"])), set(range(*r["gold_span"]))) for r in rows]
    ious = [len(a & b) / len(a | b) for a, b in spans]
    assert seen.row("evidence", "IoU with the gold span") == [f"{np.mean(ious):.3f}"]
    covered = np.mean([len(a & b) / len(b) for a, b in spans])
    assert seen.row("evidence", "coverage: share of the gold span inside the span") == [f"{100 * covered:.1f} %"]
    inside = np.mean([len(set(r["frame_index"]) & b) / 4 for r, (_, b) in zip(rows, spans, strict=True)])
    assert seen.row("evidence", "chosen frames inside the gold span") == [f"{100 * inside:.1f} %"]
    assert seen.row("evidence", "accuracy where it is less") == ["50.0 % of 2"], "q005 right, q006 wrong"
    entropy = [np.mean([r["entropy"][edge] for r in rows]) for edge in ("start", "end")]
    expected = f"{entropy[0]:.2f}, {entropy[1]:.2f} (4.00)"
    assert seen.row("evidence", "entropy of start, of end, bits (the most possible)") == [expected]
    assert seen.row("evidence", "fallbacks: the span is the whole video") == ["2 (2.2 %)"]
    confidence = [math.exp(r["log_prob"]["sum"]) for r in rows]
    bins = [[i for i in range(90) if int(10 * confidence[i]) == b] for b in range(10)]
    gaps = [abs(sum(right[i] for i in b) - sum(confidence[i] for i in b)) / 90 for b in bins if b]
    assert seen.row("results", "ECE") == [f"{sum(gaps):.3f}"]
    assert len(seen.alts) == 6 and all(len(alt) > 20 for alt in seen.alts)
    by_video = {row[0]: row[1].split(" (")[0] for row in seen.tables["by-video"][1:]}
    assert by_video["v000"] == "2 of 3" and len(by_video) == 30


def test_a_judged_evaluation_shows_what_the_judge_said(tmp_path):
    file = write_run(tmp_path, [prediction(i, pattern(i)) for i in range(60)])
    judge(file, "--judge", "rules", cache=tmp_path / "c")
    result = json.loads((tmp_path / "result" / "test_video_qa_judged_rules.json").read_text())
    seen = page(tmp_path)
    low, high = (100 * edge for edge in result["accuracy_interval"])
    assert seen.row("results", "accuracy") == [f"{100 * result['accuracy']:.1f} % [{low:.1f}, {high:.1f}]"]
    low, high = result["score_interval"]
    assert seen.row("results", "score, 0 to 5") == [f"{result['score']:.2f} [{low:.2f}, {high:.2f}]"]
    (identity,) = result["judges"]
    assert seen.row("results", "judged by") == [f"{identity} (60)"] and "no judge has seen" not in seen.text


def test_what_no_judge_could_say_is_unjudged_and_counts_as_wrong(tmp_path):
    rows = [prediction(i, True) for i in range(8)]
    file = write_run(tmp_path, rows, num_questions=10)
    verdicts = [
        {"question_id": row["question_id"], "answer": "red", "prediction": "red", "judge": "J 1", **said}
        for row, said in zip(
            rows, [{"status": "refused"}, *[{"pred": "yes", "score": 5}] * 5, {"status": "failed"}], strict=False
        )
    ]  # one refused, five right, one failed, one that the file does not have
    write_jsonl(file.with_name("test_video_qa_judged_x.jsonl"), verdicts)
    write_jsonl(file.with_name("test_video_qa_missing.jsonl"), [{"question_id": "x"}, {"question_id": "y"}])
    seen = page(tmp_path)
    assert seen.row("results", "right, wrong, unjudged") == ["5, 0, 3"]
    assert seen.row("results", "coverage") == ["6 of 10 (60.0 %), PARTIAL"]
    assert seen.row("results", "accuracy")[0].startswith("83.3 %")
    assert seen.row("results", "accuracy, published style")[0].startswith("100.0 %")
    assert "PARTIAL, over 6 of 10 questions" in seen.text and "no prediction for 2 ('x', 'y')" in seen.text
    assert [q["runs"][0]["status"] for q in seen.data["questions"]] == ["unjudged"] * 3 + ["right"] * 5


def test_answers_that_only_the_judge_was_given(tmp_path):
    rows = [prediction(i, pattern(i)) for i in range(6)]
    write_jsonl(tmp_path / "answers.jsonl", [{key: row[key] for key in ("question_id", "answer")} for row in rows])
    file = write_run(tmp_path, [{**row, "answer": None} for row in rows])
    assert (
        page(tmp_path).row("results", "questions") == ["6"]
        and "answers of 6 questions are hidden" in page(tmp_path).text
    )
    judge(file, "--answers", tmp_path / "answers.jsonl", "--judge", "rules", cache=tmp_path / "c")
    assert page(tmp_path).row("results", "right, wrong, unjudged") == ["4, 2, 0"]


def test_several_evaluations_are_compared_in_pairs(tmp_path):
    first = write_run(tmp_path / "a", [prediction(i, pattern(i)) for i in range(60)])
    second = write_run(tmp_path / "b", [prediction(i, i % 5 != 0) for i in range(60)])
    for file in (first, second):
        judge(file, "--judge", "rules", cache=tmp_path / "c")
    write_json(tmp_path / "table.json", {"rows": [{"name": "b", "title": "second first"}, {"name": "a", "title": "A"}]})
    seen = page(tmp_path)
    assert seen.tables["results"][0] == ["", "A: second first", "B: A"], "order and titles of ablate's table"
    judged = [read_judged(file.with_name("test_video_qa_judged_rules.jsonl")) for file in (second, first)]
    expected = compare(*judged)
    low, high = (100 * edge for edge in expected["accuracy"]["interval"])
    difference = f"{100 * expected['accuracy']['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
    assert seen.row("results", "difference to A, points") == ["-", difference]
    assert seen.row("results", "p, McNemar") == ["-", f"{expected['mcnemar']['p']:.2g}"]
    assert "different judges" not in seen.text
    assert page(tmp_path / "a", tmp_path / "b").tables["results"][0] == ["", "A: a", "B: b"], "as they were named"


def test_rows_of_different_judges_and_other_questions_are_warned_of(tmp_path):
    first = write_run(tmp_path / "a", [prediction(i, pattern(i)) for i in range(30)])
    write_run(tmp_path / "b", [prediction(i, True) for i in range(10, 40)])
    judge(first, "--judge", "rules", cache=tmp_path / "c")
    _, said = report([tmp_path / "a", tmp_path / "b"], tmp_path / "x.html", pictures=0)
    assert "judged by different judges" in said and "different questions: only the first file has 10" in said


def test_two_judges_of_the_same_answers_are_calibrated(tmp_path):
    file = write_run(tmp_path, [prediction(i, pattern(i)) for i in range(60)])
    judge(file, "--judge", "rules", cache=tmp_path / "c")
    other = [
        {
            "question_id": r["question_id"],
            "judge": "J 1",
            "pred": ("no", "yes")[i % 4 > 0],
            "score": i % 6,
            **{k: r[k] for k in ("question", "answer", "prediction", "video_id")},
        }
        for i, r in enumerate(read_jsonl(file))
    ]
    write_jsonl(file.with_name("test_video_qa_judged_other.jsonl"), other)
    seen = page(tmp_path)
    a, b = (file.with_name(f"test_video_qa_judged_{name}.jsonl") for name in ("other", "rules"))
    expected = calibrate(read_judged(a), read_judged(b))
    assert seen.row("agreement", "kappa")[0] == f"{expected['all']['kappa']:.3f}"
    assert seen.row("agreement", "same verdict")[0] == f"{100 * expected['all']['agreement']:.1f} %"
    assert seen.row("agreement", "accuracy, B - A")[0].startswith(
        f"{100 * expected['all']['accuracy_offset']:+.1f} points"
    )


def test_choices_hidden_answers_and_confidence_among_options(tmp_path):
    scores = [{"mean": -0.1, "sum": -0.3, "tokens": 3}, {"mean": -2.1, "sum": -2.1, "tokens": 1}]
    options = {"options": ["red", "blue"], "option_log_prob": scores, "log_prob": scores[0], "choice": "A"}
    rows = [prediction(i, True, **options, correct=i < 3) for i in range(4)]
    rows.append(prediction(4, True, options=["red", "blue"], choice=None, correct=False, log_prob=None))
    rows.append(prediction(5, True, options=["red", "blue"], choice="A", correct=None, answer=None))
    write_run(tmp_path, rows)
    seen = page(tmp_path)
    assert seen.row("results", "right, wrong, unjudged") == ["3, 2, 0"]
    assert seen.row("results", "unparsable choices") == ["1"]
    assert seen.row("results", "judged by") == ["the right option was chosen (5)"]
    assert "the answers of 1 questions are hidden" in seen.text and "no judge has seen" not in seen.text
    confidence = 1 / (1 + math.exp(-2.0))
    (line,) = [row for row in seen.tables["reliability"][1:] if row[1].startswith("the option")]
    assert line[3:5] == ["4", f"{confidence:.3f}"]
    hidden = next(q for q in seen.data["questions"] if q["id"] == "q005")
    assert "answer" not in hidden and hidden["runs"][0]["status"] == "unjudged"


def test_old_predictions_without_evidence_make_a_page(tmp_path):
    bare = ("video_id", "category", "log_prob", "span", "num_frames", "span_s", "entropy", "frame_index", "gold_span")
    rows = [prediction(i, i > 1, **dict.fromkeys((*bare, "frame_times"))) for i in range(4)]
    write_jsonl(tmp_path / "p.jsonl", rows)
    seen = page(tmp_path / "p.jsonl")
    assert seen.row("results", "accuracy")[0].startswith("50.0 %") and set(seen.tables) == {"results", ""}


# ---- several evaluations: frames, oracle, seeds, exports ----------------------------------------------------------


def ways(folder: Path, **names: dict) -> list[Path]:
    """Runs with a manifest; each is told by selector, frames, seed, checkpoint and which answers are right."""
    for name, told in names.items():
        selector = {"name": told["by"], "num_selected": told["k"], "span_key": "gold_span"}
        frames = {"frame_index": list(range(told["k"])), "frame_times": None}
        write_run(folder / name, [prediction(i, i % told["wrong"] != 0, **frames) for i in range(60)])
        model = {"arch": "lstp_tiny", "checkpoint": told.get("checkpoint", "c"), "selector": selector}
        run = {"task": "video_qa", "seed": told.get("seed", 1), "output_dir": name}
        write_json(folder / name / "evaluate_manifest.json", {"config": {"run": run, "model": model, "datasets": {}}})
    return [folder / name for name in names]


WAYS = {
    "even_2": {"by": "uniform", "k": 2, "wrong": 2},
    "even_4": {"by": "uniform", "k": 4, "wrong": 3},
    "ours_4": {"by": "lstp", "k": 4, "wrong": 5},
    "gold_4": {"by": "given", "k": 4, "wrong": 10},
    "gold_4_other": {"by": "given", "k": 4, "wrong": 60, "checkpoint": "another"},
}


def test_frames_oracle_gap_and_curves_are_those_computed_by_hand(tmp_path):
    seen = page(*ways(tmp_path, **WAYS))
    assert seen.row("results", "frames an answer") == ["2", "4", "4", "4", "4"]
    assert seen.row("results", "frames scored for an answer") == ["0", "0", str(T), "0", "0"]
    gaps = seen.row("results", "gap to the oracle, points")
    right = [[i % WAYS[name]["wrong"] != 0 for i in range(60)] for name in ("even_4", "ours_4", "gold_4")]
    by_hand = [100 * (sum(right[2]) - sum(one)) / 60 for one in right[:2]]
    assert [float(gap.split()[0]) for gap in gaps[1:3]] == pytest.approx(by_hand, abs=0.05)
    assert gaps[0] == gaps[3] == gaps[4] == "-", "no oracle of 2 frames; the oracles themselves"
    assert "uniform (A, B): 50.0 % at 2, 66.7 % at 4" in next(a for a in seen.alts if a.startswith("Accuracy against"))
    curve = next(alt for alt in seen.alts if alt.startswith("R@1 against the threshold of IoU."))
    assert "A: 1.000 at 0.3, 1.000 at 0.5, 0.000 at 0.7;" in curve, "IoU is 3 of 5 frames"


def test_subtitles_are_named_beside_the_runs_that_had_none(tmp_path):
    for name, window in (("near", 2.0), ("whole", None), ("none", ...)):
        shown = {} if window is ... else {"subtitles": {"window_s": window, "lines": 3, "left_out": 0}}
        write_run(tmp_path / name, [prediction(i, True, **shown) for i in range(4)])
    runs = [tmp_path / name for name in ("near", "whole", "none")]
    assert page(*runs).row("results", "subtitles") == ["within 2 s of the frames", "whole", "-"]
    assert not any(row[0] == "subtitles" for row in page(runs[2]).tables["results"])
    write_run(tmp_path / "odd", [prediction(i, True, subtitles={"window_s": "<b>"}) for i in range(4)])
    with pytest.raises(AnnotationError, match="subtitles is not of the form"):
        report([tmp_path / "odd"], pictures=0)


def test_seconds_are_scored_where_there_are_moments_and_no_span_is_a_miss(tmp_path):
    rows = [prediction(i, True, span=[0, 4], span_s=[0.0, 2.0], moments_s=[[9, 10], [0, 2.5]]) for i in range(4)]
    rows.append(prediction(4, True, span=None, span_s=None, moments_s=[[0, 1]]))
    write_run(tmp_path, rows)
    seen = page(tmp_path)
    assert seen.row("evidence", "moments in seconds, questions that have one") == ["5"]
    assert seen.row("evidence", "mean IoU with the moment, in seconds") == [f"{4 * 0.8 / 5:.3f}"]
    for wrong in ([[0, 1e308]], [], [1, 2], "x"):
        write_run(tmp_path, [{**row, "moments_s": wrong} for row in rows])
        with pytest.raises(AnnotationError, match="question_id 'q000': moments_s is not of the form"):
            report([tmp_path], pictures=0)


def test_located_moments_without_answers_make_a_page(tmp_path):
    keys = ("question_id", "video_id", "span", "span_s", "gold_span")
    rows = [{key: row[key] for key in keys} for row in (prediction(i, True) for i in range(10))]
    write_jsonl(tmp_path / "result" / "test_temporal_grounding.jsonl", rows)
    seen = page(tmp_path, exports=[tmp_path / "x.csv"])
    assert seen.row("evidence", "IoU with the gold span") == ["0.600"] and "questions are hidden" not in seen.text
    (row,) = csv.DictReader((tmp_path / "x.csv").open())
    assert float(row["mean IoU"]) == 0.6 and float(row["R@1 at 0.5"]) == 1 and "accuracy, %" not in row
    rows[3]["answer"] = "red"
    write_jsonl(tmp_path / "result" / "test_temporal_grounding.jsonl", [{**rows[0], "prediction": "a"}, *rows[1:]])
    with pytest.raises(AnnotationError, match="question_id 'q001': prediction is not of the form"):
        report([tmp_path], pictures=0)


def test_runs_that_differ_in_their_seed_have_a_mean_and_a_spread(tmp_path):
    told = {"by": "lstp", "k": 4}
    seeds = {f"s{seed}": {**told, "wrong": seed + 1, "seed": seed, "checkpoint": f"c{seed}"} for seed in (1, 2, 3)}
    folders = ways(tmp_path, **seeds, even={"by": "uniform", "k": 4, "wrong": 2})
    out, _ = report(folders, tmp_path / "x.html", pictures=0, exports=[tmp_path / "x.csv"])
    (row,) = Reader(out.read_text(encoding="utf-8")).tables["by-seed"][1:]
    shares = [sum(i % (seed + 1) != 0 for i in range(60)) / 60 for seed in (1, 2, 3)]
    assert row[:2] == ["A, B, C", "1, 2, 3"]
    assert row[2] == f"{100 * np.mean(shares):.1f} \u00b1 {100 * np.std(shares, ddof=1):.1f} [50.0, 75.0]"
    last = list(csv.DictReader((tmp_path / "x.csv").open()))[-1]
    assert last["evaluation"] == "seeds 1, 2, 3: mean of s1, s2, s3"
    assert float(last["standard deviation of accuracy over seeds"]) == round(100 * np.std(shares, ddof=1), 2)
    same = ways(tmp_path / "same", a={**told, "wrong": 2}, b={**told, "wrong": 3})
    assert "not averaged over seeds, because two of them have the same seed" in report(same, pictures=0)[1]
    write_run(folders[1], [prediction(i, True) for i in range(50)])
    assert "because they do not answer the same questions" in report(folders, pictures=0)[1]


def test_exported_tables_are_text_whatever_they_contain(tmp_path):
    evil = r"=1+1|\\input{x} $x$ [a](http://e.x) <b> & 100% _#^~`"
    folders = ways(tmp_path, **dict.fromkeys("ab", WAYS["ours_4"]))
    write_json(
        tmp_path / "table.json", {"rows": [{"name": "a", "title": evil}, {"name": "b", "title": "[2cm]\n\x1b[2Jx"}]}
    )
    files = [tmp_path / f"table{ending}" for ending in (".csv", ".md", ".tex")]
    report([tmp_path], pictures=0, exports=files)
    rows = list(csv.reader(files[0].open(newline="")))
    assert rows[1][0] == f"'{evil}" and float(rows[1][6]) == 80.0 and len({len(row) for row in rows}) == 1
    lines = files[1].read_text().splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(rows[0]) + 1}
    assert not re.search(r"(?<!\\)[\[\]<>`$#_{}]", lines[2]) and r"http\://" in lines[2]
    tex = files[2].read_text()
    body = tex.split("\\hline")[2]
    assert r"=1+1\textbar{}\textbackslash{}\textbackslash{}input\{x\} \$x\$ {[}a]" in body
    assert r"{[}2cm] \textbackslash{}x1b{[}2Jx & lstp" in body and body.count("\\\\\n") == 2
    assert all("\x1b" not in file.read_text() for file in files)
    assert folders[0].is_dir()


# ---- bad input ----------------------------------------------------------------------------------------------------


def refused(capsys, *arguments: object) -> str:
    assert cli.main(["report", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_bad_input_is_one_line(tmp_path, capsys):
    assert "no such file or folder" in refused(capsys, tmp_path / "nothing")
    write_jsonl(tmp_path / "log.jsonl", [{"kind": "train"}])
    assert "no predictions; expected result/" in refused(capsys, tmp_path)
    file = write_run(tmp_path / "a", [prediction(i, True) for i in range(3)])
    whole = file.read_text()
    file.write_text(whole[:-40])
    line = refused(capsys, tmp_path / "a")
    assert "line 3: no complete JSON" in line and "was its writer stopped?" in line
    file.write_text(whole)
    assert "ends with .html" in refused(capsys, tmp_path / "a", "--out", tmp_path / "x.txt")
    assert "at least 0" in refused(capsys, tmp_path / "a", "--pictures", "-1")
    deep = tmp_path / "a" / "evaluate_manifest.json"
    deep.write_text('{"config": {"model": {"x": ' + "[" * 900 + "]" * 900 + "}}}")
    assert "nested deeper than 50 levels" in refused(capsys, tmp_path / "a")
    deep.unlink()
    assert "ends with .csv, .md, .tex" in refused(capsys, tmp_path / "a", "--export", tmp_path / "x.txt")
    assert "no such folder" in refused(capsys, tmp_path / "a", "--videos", tmp_path / "gone")
    assert not (tmp_path / "a" / "report.html").exists()
    for key, value in (("span", [1]), ("log_prob", {"sum": "x"}), ("prediction", 3), ("frame_times", "now")):
        write_jsonl(file, [prediction(0, True, **{key: value})])
        assert f"question_id 'q000': {key} is not of the form" in refused(capsys, tmp_path / "a")
    likely = {"sum": -1.0, "mean": -1.0, "tokens": 1}
    for choice, count in (("C", 2), ("A", 3)):
        chosen = {"options": ["a", "b"], "choice": choice, "option_log_prob": [likely] * count}
        write_jsonl(file, [prediction(0, True, **chosen)])
        assert "choice or option_log_prob are not about its 2 options" in refused(capsys, tmp_path / "a")
    file.write_text(whole)
    stale = [
        {**json.loads(row), "prediction": "other", "judge": "J", "pred": "yes", "score": 5}
        for row in whole.splitlines()
    ]
    write_jsonl(file.with_name("test_video_qa_judged_x.jsonl"), stale)
    line = refused(capsys, tmp_path / "a")
    assert "its verdicts are not about" in line and "judge these predictions again" in line


# ---- pictures -----------------------------------------------------------------------------------------------------


def pictures_of(seen: Reader, key: str, run: int = 0) -> list[np.ndarray]:
    """uint8 [3,H,W] of each chosen frame."""
    places = next(q for q in seen.data["questions"] if q["id"] == key)["runs"][run]["pictures"]
    raw = [base64.b64decode(seen.data["pictures"][place].split(",")[1]) for place in places]
    return [np.asarray(Image.open(io.BytesIO(one))).transpose(2, 0, 1) for one in raw]


@pytest.fixture(scope="module")
def own_videos(tmp_path_factory) -> Path:
    """A run on two numbered videos of 30 frames a second, whose times are rounded, and its manifest."""
    root = tmp_path_factory.mktemp("own")
    (root / "videos").mkdir()
    for name in ("v000", "v001"):
        numbered_video(root / "videos" / f"{name}.mp4", 36, fps=30)
    rows = [prediction(i, i > 0, frame_times=[0.0, 0.033, 0.567, 1.167], frame_index=[0, 1, 2, 3]) for i in range(4)]
    keys = ("question_id", "video_id", "question", "answer")
    annotation = [{**{key: row[key] for key in keys}, "video": f"{row['video_id']}.mp4"} for row in rows]
    (root / "test.json").write_text(json.dumps(annotation))
    write_run(root / "out", rows)
    write_manifest(root, "out", {"test": {"storage": "test.json"}})
    return root


def write_manifest(root: Path, run: str, annotations: dict) -> None:
    info = {"annotations": annotations, "videos": {"storage": "videos"}}
    section = {"build_info": info, "num_frames": 4, "flow": "precomputed", "flow_root": "gone", "image_size": 64}
    defaults = {"spans_form": "lavis_lstp", "spans": None, "fps": None, "short_videos": "keep", "data_type": "videos"}
    config = {"run": {"task": "video_qa"}, "datasets": {"lstp_video_qa": {**defaults, **section}}}
    write_json(root / run / "evaluate_manifest.json", {"config": config, "cwd": str(root)})


def test_pictures_are_the_frames_that_were_chosen(own_videos):
    seen = page(own_videos / "out", pictures=3)
    for key in ("q000", "q001"):
        assert [read_number(frame) for frame in pictures_of(seen, key)] == [0, 1, 17, 35]
    assert {frame.shape for frame in pictures_of(seen, "q000")} == {(3, 96, 160)}, "the video's own proportions"
    shown = [q["id"] for q in seen.data["questions"] if "pictures" in q["runs"][0]]
    assert shown == ["q000", "q001", "q002"] and "shown for 3 of 4 questions" in seen.text
    assert len(seen.data["pictures"]) == 4, "each frame of equal videos is held once"


def test_pictures_come_out_of_shards_and_from_another_folder(own_videos, tmp_path):
    from webdataset_tools.__main__ import main as tools

    command = ["pack", str(own_videos / "shards" / "test"), str(own_videos / "test.json")]
    assert tools([*command, "--root", str(own_videos / "videos")]) == 0
    (shard,) = (own_videos / "shards").glob("*.tar")
    write_run(own_videos / "tars", list(read_jsonl(own_videos / "out" / "result" / "test_video_qa.jsonl")))
    write_manifest(own_videos, "tars", {"test": {"storage": [f"shards/{shard.name}"]}})
    alone = tmp_path / "alone" / "p.jsonl"
    write_jsonl(alone, read_jsonl(own_videos / "out" / "result" / "test_video_qa.jsonl"))
    for seen in (
        page(own_videos / "tars", pictures=2),
        page(alone, pictures=2, videos=str(own_videos / "videos")),
        page(alone, pictures=2, videos=str(shard)),
    ):
        assert [read_number(frame) for frame in pictures_of(seen, "q000")] == [0, 1, 17, 35]
    assert "2 without pictures: no manifest in" in page(alone, pictures=2).text


def test_two_splits_of_a_run_have_their_own_videos(own_videos):
    rows = list(read_jsonl(own_videos / "out" / "result" / "test_video_qa.jsonl"))
    write_run(own_videos / "two", rows)
    write_jsonl(
        own_videos / "two" / "result" / "val_video_qa.jsonl",
        [{**row, "question_id": f"x{row['question_id']}"} for row in rows],
    )
    annotation = json.loads((own_videos / "test.json").read_text())
    (own_videos / "val.json").write_text(
        json.dumps([{**row, "question_id": f"x{row['question_id']}"} for row in annotation])
    )
    write_manifest(own_videos, "two", {split: {"storage": f"{split}.json"} for split in ("test", "val")})
    seen = page(own_videos / "two", pictures=9)
    assert "shown for 8 of 8 questions" in seen.text
    assert "A and B: nothing to compare: no question has a verdict in both files" in seen.text


def test_a_video_that_is_gone_or_damaged_is_said(own_videos, tmp_path):
    write_run(tmp_path / "out", list(read_jsonl(own_videos / "out" / "result" / "test_video_qa.jsonl")))
    (tmp_path / "test.json").write_bytes((own_videos / "test.json").read_bytes())
    write_manifest(tmp_path, "out", {"test": {"storage": "test.json"}})
    before = os.getcwd()
    assert "no such folder: videos" in page(tmp_path / "out", pictures=9).text and os.getcwd() == before
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "v000.mp4").write_bytes(b"no video")
    seen = page(tmp_path / "out", pictures=9)
    assert "3 without pictures: videos/v000.mp4" in seen.text and "1 without pictures: videos/v001.mp4" in seen.text
    assert not any("pictures" in q["runs"][0] for q in seen.data["questions"]) and len(seen.data["questions"]) == 4


# ---- text and bytes -----------------------------------------------------------------------------------------------


def evil_run(folder: Path) -> Path:
    rows = [prediction(i, pattern(i)) for i in range(6)]
    evil = {"question": EVIL, "video_id": EVIL, "category": EVIL, "prediction": f"$x_{{ {EVIL}\u2028"}
    write_run(folder / EVIL.replace("/", "|"), [*rows, prediction(6, False, **evil)])
    return folder / EVIL.replace("/", "|")


def test_text_stays_text(tmp_path):
    out, _ = report([evil_run(tmp_path)], tmp_path / "x.html", pictures=0)
    seen = Reader(out.read_text(encoding="utf-8"))
    assert [kind for kind, _ in seen.scripts] == ["application/json", "javascript"]
    assert "owned" not in dict(seen.scripts)["javascript"]
    assert not any("onerror" in alt for alt in seen.alts) and EVIL in "".join(seen.texts)
    assert next(q for q in seen.data["questions"] if q["id"] == "q006")["question"] == EVIL


@pytest.mark.parametrize("value", ["NaN", "1" + "0" * 400])
@pytest.mark.parametrize("name", ["span", "gold_span", "num_frames", "frame_index"])
def test_numbers_that_scores_are_made_of_must_be_numbers(tmp_path, name, value):
    rows = [prediction(i, True) for i in range(3)]
    rows[1][name] = "?" if name == "num_frames" else [0, "?"]
    file = write_run(tmp_path, rows)
    file.write_text(file.read_text().replace('"?"', value))
    with pytest.raises(AnnotationError, match=f"question_id 'q001': {name} is not of the form"):
        report([tmp_path], pictures=0)


@pytest.mark.parametrize("value", ["-Infinity", "1e308"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("span_s", [0, "?"]),
        ("frame_times", ["?", 0.5, 1.0, 1.5]),
        ("entropy", {"start": "?", "end": 1}),
        ("log_prob", {"sum": -1, "mean": "?", "tokens": 2}),
        ("log_prob", {"sum": -1, "mean": -1, "tokens": "?"}),
        ("option_log_prob", [{"sum": "?", "mean": -1, "tokens": 2}] * 2),
    ],
)
def test_numbers_that_are_shown_alone_are_left_out_and_said(tmp_path, name, content, value, caplog):
    rows = [prediction(i, True) for i in range(3)]
    rows[1][name] = content
    if name == "option_log_prob":
        rows[1] |= {"options": ["a", "b"], "choice": "A"}
    file = write_run(tmp_path, rows)
    file.write_text(file.read_text().replace('"?"', value))
    seen = page(tmp_path)
    assert len(seen.data["questions"]) == 3 and "1" + "0" * 308 not in json.dumps(seen.data)
    (line,) = [record.getMessage() for record in caplog.records if "left out of the page" in record.getMessage()]
    assert line.startswith(f"{file}: 1 numbers are NaN, infinite or beyond") and f"'q001': {name} " in line


@pytest.mark.parametrize("name", ["span_s", "log_prob", "frame_times", "entropy"])
def test_what_is_shown_alone_and_of_another_form_is_named(tmp_path, name):
    rows = [prediction(i, True) for i in range(3)]
    rows[1][name] = "a text"
    write_run(tmp_path, rows)
    with pytest.raises(AnnotationError, match=f"question_id 'q001': {name} is not of the form"):
        report([tmp_path], pictures=0)


def test_log_probs_that_are_infinite_are_written_as_null_and_read(tmp_path):
    rows = [prediction(i, True) for i in range(3)]
    rows[1]["log_prob"] = {"sum": float("-inf"), "mean": float("nan"), "tokens": 2}
    file = write_run(tmp_path, rows)
    assert '"log_prob": {"sum": null, "mean": null, "tokens": 2}' in file.read_text()
    assert "confidence" not in page(tmp_path).data["questions"][1]["runs"][0]["facts"]


def test_two_calls_give_equal_bytes(own_videos, tmp_path):
    pages = []
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "lavis_lstp", "report", str(own_videos / "out"), "--videos", "videos"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command += ["--out", str(tmp_path / f"{seed}.html")]
        done = subprocess.run(command, env=environment, cwd=own_videos, capture_output=True, text=True, check=True)
        assert "4 with pictures" in done.stdout
        pages.append((tmp_path / f"{seed}.html").read_bytes())
    assert pages[0] == pages[1]


# ---- a real evaluation --------------------------------------------------------------------------------------------


def test_the_report_of_an_evaluation(tmp_path, monkeypatch):
    """LAVIS's evaluation of an untrained model on Shapes-QA, and the page about it."""
    from lavis_lstp.host import evaluate

    monkeypatch.chdir(tmp_path)
    sizes = {"train_videos": 1, "val_videos": 1, "test_videos": 2, "train_images": 1, "size": 64}
    options = [f"datasets.lstp_shapes.generate.{name}={value}" for name, value in sizes.items()]
    options += [
        "datasets.lstp_shapes.num_frames=8",
        "model.checkpoint=null",
        "run.output_dir=out",
        "run.test_splits=[test]",
    ]
    with contextlib.redirect_stderr(io.StringIO()):
        recipe = "projects/lstp/eval/shapes_qa_lstp_tiny.yaml"
        assert evaluate.main(["--cfg-path", recipe, "--options", *options, "model.selector.name=lstp"]) in (0, None)
    rows = list(read_jsonl("out/result/test_video_qa.jsonl"))
    assert all(row["num_frames"] == 8 and 0 <= row["entropy"]["start"] <= 3 for row in rows)
    monkeypatch.chdir("/")
    board = tmp_path / "out" / "result" / "board.json"
    seen = page(tmp_path / "out", pictures=100, result=board)
    digests = json.loads(board.read_text())["digests"]
    assert all(len(digests[name]) == 64 for name in ("config", "weights", "data", "questions"))
    assert cli.main(["verify-result", str(board)]) == 0
    assert seen.row("evidence", "answers that asked the sampler") == ["12"]
    assert "shown for 12 of 12 questions" in seen.text
    assert set(seen.row("stages", "flow")[0]) <= set("0123456789., ") and len(seen.tables["by-category"]) > 2
    for row in rows:
        times = dict(zip(row["frame_index"], row["frame_times"], strict=True))
        assert times.get(row["span"][0], row["span_s"][0]) == row["span_s"][0], "span_s is the time of its first frame"


# ---- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as window:
        yield window


def pick(browser, control: str, value: str, event: str = "change") -> None:
    change = (
        "((e) => { e.value = arguments[1]; e.dispatchEvent(new Event(arguments[2])); })"
        "(document.getElementById(arguments[0]))"
    )
    browser.script(change, control, value, event)


def test_the_page_in_a_browser(browser, own_videos, tmp_path):
    report([own_videos / "out"], tmp_path / "p.html")
    browser.look(1280)
    browser.open(tmp_path / "p.html")
    assert browser.texts(".question h3")[0] == "what is number 0?", "the wrong one first"
    assert browser.texts(".badge") == ["wrong", "right", "right", "right"]
    loaded = "[...document.querySelectorAll('.frames img')].map(i => [i.naturalWidth, i.alt])"
    assert browser.script(loaded)[:2] == [[160, "frame at 0 s"], [160, "frame at 0.033 s"]]
    assert len(browser.script(loaded)) == 16
    assert "span 0 to 4 (0 to 2 s); gold 1 to 5" in browser.script("document.querySelector('.track').ariaLabel")
    place = (
        "(e => [e.offsetLeft, e.offsetWidth].map(x => x / e.parentElement.clientWidth))"
        "(document.querySelectorAll('.track .gold')[1])"
    )
    assert browser.script(place) == pytest.approx([2 / T, 4 / T], abs=0.01)
    pictures = [browser.screenshot(tmp_path / "wide.png")]
    for width, dark in ((400, False), (400, True)):
        browser.look(width, dark=dark)
        browser.open(tmp_path / "p.html")
        assert browser.overflow() == 0, "nothing sticks out of a narrow screen"
        pictures.append(browser.screenshot(tmp_path / f"{width}{dark}.png"))
    assert browser.complaints() == []
    wide, narrow, dark = (Image.open(path).convert("L") for path in pictures)
    assert wide.width > 1200 and narrow.width <= 400 and len(wide.getcolors()) > 100
    assert narrow.getpixel((2, 2)) > 240 and dark.getpixel((2, 2)) < 40


def test_filters_and_pages_with_ten_thousand_questions(browser, tmp_path):
    rows = [prediction(i, pattern(i), gold_span=None, entropy=None) for i in range(10_000)]
    write_run(tmp_path / "a", rows)
    more = [prediction(i, True) for i in range(9_000)]
    write_run(tmp_path / "b", more)
    out, _ = report([tmp_path / "a", tmp_path / "b"], tmp_path / "x.html", pictures=0)
    assert out.stat().st_size < 10e6
    browser.look(1280)
    browser.open(out)
    assert browser.texts("#count") == ["10000 of 10000 questions"] and browser.texts("#place") == ["1 to 20 of 10000"]
    assert len(browser.texts("article")) == 20 and set(browser.texts("article > .run .badge")) == {"wrong"}
    pick(browser, "status", "right")
    assert browser.texts("#count") == ["6666 of 10000 questions"]
    pick(browser, "category", "motion")
    assert browser.texts("#count") == [f"{sum(pattern(i) and i % 2 for i in range(10_000))} of 10000 questions"]
    pick(browser, "search", "NUMBER 77", "input")
    found = [i for i in range(10_000) if str(i).startswith("77") and pattern(i) and i % 2]
    assert browser.texts("#count") == [f"{len(found)} of 10000 questions"]
    assert browser.texts("article h3") == [f"what is number {i}?" for i in found][:20]
    browser.script("document.getElementById('next').click()")
    assert browser.texts("#place") == [f"21 to {len(found)} of {len(found)}"]
    pick(browser, "search", "nowhere to be found", "input")
    assert browser.texts("#place") == ["none"] and browser.texts("article") == []
    pick(browser, "search", "", "input")
    pick(browser, "status", "wrong")
    pick(browser, "of", "1")
    assert browser.texts("#count") == ["0 of 10000 questions"], "of b none is wrong"
    pick(browser, "status", "unjudged")
    assert browser.texts("#count") == ["0 of 10000 questions"]
    typed = (
        "(() => { const s = document.getElementById('search'), t = performance.now();"
        "for (const w of ['b', 'bl', 'blu', 'blue', '']) { s.value = w; s.dispatchEvent(new Event('input')); }"
        "return (performance.now() - t) / 5; })()"
    )
    pick(browser, "status", "")
    assert browser.script(typed) < 300, "ms a key stroke"
    assert browser.complaints() == []


def test_evil_text_runs_nothing(browser, tmp_path):
    out, _ = report([evil_run(tmp_path)], tmp_path / "x.html", pictures=0)
    browser.look(1280)
    browser.open(out)
    pick(browser, "search", "onerror", "input")
    assert browser.texts("article h3") == [EVIL]
    assert "owned" not in browser.script("document.title.slice(0, 5)") and browser.complaints() == []
    refused = "fetch('https://example.invalid/').then(() => 'sent', e => String(e))"
    assert "TypeError" in browser.script(refused), "the page's own policy lets nothing out"
    assert any("Content Security Policy" in line for line in browser.complaints())


def test_tables_need_no_script(browser, own_videos, tmp_path):
    out, _ = report([own_videos / "out"], tmp_path / "x.html")
    browser.look(1280, javascript=False)
    try:
        browser.open(out)
        assert "75.0 %" in browser.script("document.querySelector('#results').innerText")
        assert "needs JavaScript" in browser.script("document.querySelector('noscript').innerText")
        assert browser.script("document.querySelector('#browser').hidden")
    finally:
        browser.look(1280)


def test_pages_of_the_shard_tools_in_a_browser(browser, own_videos, tmp_path):
    from webdataset_tools.__main__ import main as tools

    rows = json.loads((own_videos / "test.json").read_text())
    rows[0]["question"] = EVIL
    (tmp_path / "t.json").write_text(json.dumps(rows))
    command = ["pack", str(tmp_path / "s" / "x"), str(tmp_path / "t.json"), "--root", str(own_videos / "videos")]
    assert tools(command) == 0
    (shard,) = map(str, (tmp_path / "s").glob("*.tar"))
    assert tools(["stats", shard, "--workers", "1", "--html", str(tmp_path / "stats.html")]) == 0
    assert tools(["preview", shard, "--out", str(tmp_path / "preview.html"), "--size", "48"]) == 0
    for name, headings in (("stats", 3), ("preview", 4)):
        for width in (1280, 400):
            browser.look(width)
            browser.open(tmp_path / f"{name}.html")
            assert browser.overflow() == 0 and browser.complaints() == []
        assert len(browser.texts("h2")) >= headings and browser.script("document.images.length") >= 3
        assert browser.script("[...document.images].every(i => i.naturalWidth > 0 && i.alt)")
        browser.screenshot(tmp_path / f"{name}.png")
    assert any(EVIL in text for text in browser.texts("p")) and "owned" not in browser.script("document.title")
