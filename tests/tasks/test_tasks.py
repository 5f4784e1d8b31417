"""Tasks: what they record, what they write, and what they refuse."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy import ToyData, ToyModel, make_runner
from video_files import numbered_video

from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.data.spans import read_spans
from lavis_lstp.errors import ConfigError, CoverageError
from lavis_lstp.models.where.pseudo_span import pseudo_span
from lavis_lstp.runners import RunnerLSTP
from lavis_lstp.runners.engine import weights_digest
from lavis_lstp.schema import Span
from lavis_lstp.tasks import PseudoSpanTask, TemporalGroundingTask, VideoInstructTask, VideoQATask


def evaluator(folder, task="video_qa", **options) -> RunnerLSTP:
    return make_runner(folder, task=task, evaluate=True, **{"test_splits": ["test"], **options})


def result(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "result" / name).read_text().splitlines()]


# ---- video_qa -----------------------------------------------------------------------------------------------------


def test_answers_are_keyed_by_question_and_scored(tmp_path):
    runner = evaluator(tmp_path)
    metrics = runner.evaluate()["test"]
    records = result(tmp_path, "test_video_qa.jsonl")
    assert [record["question_id"] for record in records] == ["q0", "q1", "q2"]
    assert set(records[0]) == {"question_id", "video_id", "question", "answer", "prediction", "prompt"}
    hits = [record["answer"] == record["prediction"] for record in records]
    assert metrics["exact_match"] == metrics["agg_metrics"] == pytest.approx(sum(hits) / 3)
    assert metrics["coverage"] == 1.0 and {"token_f1", "rouge_l"} <= set(metrics)
    assert json.loads((tmp_path / "result" / "test_video_qa_metrics.json").read_text())["num_scored"] == 3


def test_a_score_without_unanswerable_or_hidden_questions_is_partial(tmp_path):
    data = ToyData(4)
    data.unanswerable = ["gone"]
    records = [{"question_id": f"q{i}", "answer": "a", "prediction": "a"} for i in range(4)]
    for scored, hidden in ((4, 0), (3, 1)):
        records[0]["answer"] = None if hidden else "a"
        found = VideoQATask({}).after_evaluation(records, "test", "given", dataset=data, result_dir=tmp_path)
        assert (found["exact_match"], found["num_scored"], found["num_questions"]) == (1.0, scored, 5)
        assert found["partial"] and found["coverage"] == scored / 5 and found["num_missing"] == 5 - scored
        assert json.loads((tmp_path / "test_video_qa_missing.jsonl").read_text())["question_id"] == "gone"


def test_answers_with_spans_and_gold_moments_have_the_scores_of_nextgqa():
    """Those of its authors' script on recorded predictions, from seconds in the records."""
    case = json.loads((Path(__file__).parents[1] / "golden" / "grounding.json").read_text())["nextgqa"]
    records = [
        {
            "question_id": key,
            "answer": "yes",
            "prediction": "yes" if case["correct"][key] else "no",
            "span": [0, 1],
            "span_s": span,
            "moments_s": case["golds"][key],
        }
        for key, span in case["predictions"].items()
    ]
    found = VideoQATask({}).metrics([*records, {"question_id": "whole", "answer": "yes", "prediction": "yes"}])
    said = found["grounded"]
    assert {name: said[name] for name in case["result"]} == pytest.approx(case["result"], abs=1e-6)
    assert said["num_questions"] == len(records) == found["num_questions"] - 1
    del records[0]["span_s"]
    assert VideoQATask({}).metrics(records)["grounded"]["num_questions"] == len(records), "no moment is a miss"
    assert "grounded" not in VideoQATask({}).metrics([{**r, "span_s": None} for r in records])


class Richer(ToyModel):
    """Answers as LSTP does: with the span, the frames and the seconds they took."""

    given: dict = {}

    def answer(self, samples, **generation):
        type(self).given = generation
        found = self.locate(samples)
        frame_index = found["frame_index"].clone()
        frame_index[:, 1] = -1
        seconds = {"vision": torch.rand(()).item()}
        return {
            **found,
            "frame_index": frame_index,
            "prediction": self.predict_answers(samples),
            "prompt": [f"Q: {q}" for q in samples["text_input"]],
            "seconds": seconds,
        }


def test_what_a_model_tells_of_an_answer_is_kept_and_times_are_not_among_it(tmp_path):
    for folder in ("one", "two"):
        runner = evaluator(tmp_path / folder, max_len=7, num_beams=2)
        runner.bare_model.__class__ = Richer
        runner.evaluate()
    record = result(tmp_path / "one", "test_video_qa.jsonl")[1]
    assert {"span", "frame_index", "prompt", "gold_span"} <= set(record) and "seconds" not in record
    assert record["frame_index"][1] == -1
    assert Richer.given == {"max_new_tokens": 7, "num_beams": 2}
    timings = result(tmp_path / "one", "test_video_qa_timings.jsonl")
    assert [set(row) for row in timings] == [{"question_id", "vision"}] * 3
    names = ("test_video_qa.jsonl", "test_video_qa_metrics.json")
    assert all((tmp_path / "one/result" / n).read_bytes() == (tmp_path / "two/result" / n).read_bytes() for n in names)


def test_an_adaptive_number_of_frames_is_recorded_without_its_batch_and_measured():
    class Adapts(ToyModel):
        def answer(self, samples, **generation):
            index = torch.tensor([[0, 2, 3], [1, -1, -1]])
            return {"prediction": ["a", "b"], "frame_index": index, "num_shown": torch.tensor([3, 1])}

    samples = {"question_id": ["q0", "q1"], "text_input": ["?", "?"], "text_output": ["a", "a"]}
    records = VideoQATask().valid_step(Adapts(), samples)
    assert [record["frame_index"] for record in records] == [[0, 2, 3], [1]]
    assert [record["num_shown"] for record in records] == [3, 1]
    assert VideoQATask().metrics(records)["frames_per_answer"] == 2.0
    for record in records:
        del record["num_shown"]
    assert "frames_per_answer" not in VideoQATask().metrics(records)


def test_evaluation_is_in_eval_mode_and_repeats_to_the_byte(tmp_path):
    """The toy drops out half of its units in train mode, which changes its answers."""
    files = []
    for folder in ("one", "two"):
        runner = evaluator(tmp_path / folder, dropout=0.5, test_splits=["train"], batch_size_eval=3)
        runner.bare_model.train()
        torch.manual_seed(len(files))
        runner.evaluate()
        files.append((tmp_path / folder / "result" / "train_video_qa.jsonl").read_bytes())
    assert files[0] == files[1]
    runner.bare_model.train()
    batch = ToyData(20).collater([ToyData(20)[i] for i in range(20)])
    assert len({tuple(runner.bare_model.predict_answers(batch)) for _ in range(5)}) > 1, (
        "the toy must be able to differ"
    )


def test_a_task_that_draws_repeats_and_leaves_training_alone(tmp_path):
    """Sampled answers come from the run's seed; the generators of training stand where they stood."""
    drawn, weights = [], []
    for folder, splits in (("one", ["val"]), ("two", ["val"]), ("none", [])):
        runner = make_runner(tmp_path / folder, valid_splits=splits, dropout=0.3)
        runner.task.valid_step = lambda model, samples: [
            {"question_id": name, "loss": drawn.append(torch.rand(()).item()) or 0.0} for name in samples["question_id"]
        ]
        torch.manual_seed(len(weights))
        runner.train()
        weights.append(runner.bare_model.head[0].weight.detach())
    assert drawn[:10] == drawn[10:] and len(set(drawn)) == 5
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_models_that_only_generate_are_asked_one_question_at_a_time():
    class Captioner(torch.nn.Module):
        def generate(self, samples, max_length=30):
            (image,) = samples["image"]  # LAVIS's OPT takes one prompt for all images of a batch
            return [f"{samples['prompt']}/{image}/{max_length}"]

    task = VideoQATask({"max_len": 5, "prompt": "Question: {} Answer:"})
    samples = {"question_id": ["a", "b"], "text_input": ["who?", "what?"], "image": torch.tensor([7, 8]), "epoch": 0}
    predictions = [record["prediction"] for record in task.valid_step(Captioner(), samples)]
    assert predictions == ["Question: who? Answer:/7/5", "Question: what? Answer:/8/5"]
    hotter = VideoQATask({"max_len": 5, "temperature": 0.5})
    with pytest.raises(ConfigError, match="run.temperature is not read by .*Captioner.generate, which answers here"):
        hotter.valid_step(Captioner(), samples)
    with pytest.raises(ConfigError, match="needs a model with predict_answers or generate, got Linear"):
        task.valid_step(torch.nn.Linear(1, 1), samples)


def test_a_checkpoint_may_be_chosen_by_bleu_1():
    pytest.importorskip("sacrebleu")
    records = [
        {"question_id": "a", "answer": "a red star", "prediction": "the red star"},
        {"question_id": "b", "answer": "two", "prediction": "2"},
        {"question_id": "c", "answer": None, "prediction": "who knows"},
    ]
    assert VideoQATask({"metric": "bleu1"}).metrics(records)["bleu1"] == pytest.approx(0.5)
    assert VideoInstructTask({"metric": "bleu1", "valid_on": "answers"}).metrics(records)["bleu1"] == pytest.approx(0.5)
    assert "bleu1" not in VideoQATask({}).metrics(records)


def test_spans_may_be_measured_as_published():
    records = [{"question_id": "a", "span": [2, 6], "gold_span": [5, 10]}]
    assert TemporalGroundingTask({}).metrics(records)["iou"] == pytest.approx(1 / 8)
    assert TemporalGroundingTask({"iou": "published"}).metrics(records)["iou"] == 0.0
    with pytest.raises(ConfigError, match="unknown run.iou 'publish'"):
        TemporalGroundingTask({"iou": "publish"})


@pytest.mark.parametrize(("said", "count"), [(["red", "redder", "blue", "bluer"], 4), (["red"], 1)])
def test_answers_that_are_not_one_for_each_question_are_refused(said, count):
    """Two beams a question came back as the first question's, given to the first two questions."""

    class Several(torch.nn.Module):
        def answer(self, samples):
            return {"prediction": said}

        def locate(self, samples):
            return {"span": torch.zeros(count, 2, dtype=torch.long)}

        def pseudo_scores(self, samples):
            return torch.zeros(count, 4)

    samples = {"question_id": ["a", "b"], "text_input": ["who?", "what?"], "frame_mask": torch.ones(2, 4)}
    for task, key in ((VideoQATask(), "prediction"), (TemporalGroundingTask(), "span"), (PseudoSpanTask(), "scores")):
        with pytest.raises(ConfigError, match=f"Several gave {count} of '{key}' for 2 questions, the first 'a'"):
            task.valid_step(Several(), samples)


def drop_q1(runner) -> None:
    plain = runner.task.valid_step
    runner.task.valid_step = lambda model, samples: [r for r in plain(model, samples) if r["question_id"] != "q1"]


def test_less_than_full_coverage_is_refused_unless_allowed(tmp_path):
    runner = evaluator(tmp_path)
    drop_q1(runner)
    with pytest.raises(CoverageError, match=r"2 of 3 questions have a prediction; 1 ids \('q1'\) missing"):
        runner.evaluate()
    metrics_file = tmp_path / "result" / "test_video_qa_metrics.json"
    assert not metrics_file.exists()
    runner = evaluator(tmp_path, allow_partial=True)
    drop_q1(runner)
    metrics = runner.evaluate()["test"]
    assert metrics["partial"] is True and metrics["coverage"] == pytest.approx(2 / 3)
    assert metrics_file.exists()
    runner = evaluator(tmp_path)
    drop_q1(runner)
    with pytest.raises(CoverageError):
        runner.evaluate()
    assert not metrics_file.exists(), "metrics of other predictions"


# ---- resuming an evaluation -----------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupt_after(runner, batches: int) -> list:
    """Let `batches` batches through, then die; gives the list of batches that were computed."""
    plain, seen = runner.task.valid_step, []

    def step(model, samples):
        if len(seen) == batches:
            raise Interrupted
        seen.append(samples["question_id"])
        return plain(model, samples)

    runner.task.valid_step = step
    return seen


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path):
    evaluator(tmp_path / "whole", test_splits=["train"]).evaluate()
    runner = evaluator(tmp_path / "parts", test_splits=["train"])
    interrupt_after(runner, 4)
    with pytest.raises(Interrupted):
        runner.evaluate()
    (part,) = (tmp_path / "parts/result/.parts/train_video_qa").glob("rank*.jsonl")
    part.write_text(part.read_text() + '{"batch": 4, "rec')  # a line that was being written
    runner = evaluator(tmp_path / "parts", test_splits=["train"])
    seen = interrupt_after(runner, 99)
    runner.evaluate()
    assert len(seen) == 10 - 4
    name = "result/train_video_qa.jsonl"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "parts/result/.parts/train_video_qa").exists()


def killed(options: dict) -> None:
    """Evaluate in a process of its own, which dies before a batch."""
    folder, batches = Path(options["folder"]), []
    runner = evaluator(folder / "run", test_splits=["train"])
    plain = runner.task.valid_step

    def step(model, samples):
        batches.append(samples["question_id"])
        if len(batches) > options["batches"]:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(folder / "asked.txt", "a", encoding="utf-8") as file:
            file.writelines(f"{key}\n" for key in samples["question_id"])
        return plain(model, samples)

    runner.task.valid_step = step
    runner.evaluate()


def test_a_killed_evaluation_asks_nothing_twice(ranks, tmp_path):
    for batches, status in ((3, -signal.SIGKILL), (2, -signal.SIGKILL), (99, 0)):
        assert ranks.run(1, "test_tasks:killed", {"folder": str(tmp_path), "batches": batches}) == [status]
    evaluator(tmp_path / "whole", test_splits=["train"]).evaluate()
    name = "result/train_video_qa.jsonl"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    ids = [record["question_id"] for record in result(tmp_path / "run", "train_video_qa.jsonl")]
    assert sorted((tmp_path / "asked.txt").read_text().split()) == sorted(ids)


def test_records_of_other_weights_or_settings_are_never_taken_over(tmp_path):
    for change in ("weights", "settings"):
        runner = evaluator(tmp_path / change, test_splits=["train"])
        interrupt_after(runner, 4)
        with pytest.raises(Interrupted):
            runner.evaluate()
        runner = evaluator(tmp_path / change, test_splits=["train"], **({"max_len": 3} if change == "settings" else {}))
        if change == "weights":
            runner.bare_model.frozen.weight.data[0, 0] += 1.0
        seen = interrupt_after(runner, 99)
        runner.evaluate()
        assert len(seen) == 10


class Describer(torch.nn.Module):
    """Answers with the number of frames it was shown."""

    def predict_answers(self, samples, **unused):
        return [str(int(frames)) for frames in samples["frame_mask"].sum(1)]


def test_a_video_that_was_repaired_is_asked_about_again(tmp_path):
    """One of a batch's two samples cannot be read, and none of another batch: neither batch is done."""
    for i in range(6):
        numbered_video(tmp_path / f"{i}.mp4", 4, width=64, height=48)
    whole = {i: (tmp_path / f"{i}.mp4").read_bytes() for i in (1, 4, 5)}
    rows = [{"question_id": f"q{i}", "video_id": f"{i}", "video": f"{i}.mp4"} for i in range(6)]
    rows = [{**row, "question": "how many?", "answer": "3"} for row in rows]

    def evaluate(**options) -> tuple[dict, list]:
        runner = evaluator(tmp_path / "run", **options)
        runner.datasets = {"videos": {"test": VideoQADataset(rows, tmp_path, num_frames=3, max_bad_fraction=0.9)}}
        runner.bare_model = Describer()
        seen = interrupt_after(runner, 99)
        try:
            return runner.evaluate()["test"], seen
        except CoverageError as error:
            assert "3 of 6 questions have a prediction; 3 ids ('q1', 'q4', 'q5') missing" in str(error)
            return {}, seen

    for i in whole:
        (tmp_path / f"{i}.mp4").write_bytes(b"not a video")
    assert evaluate() == ({}, [["q0"], ["q2", "q3"]])
    assert evaluate() == ({}, [["q0"]])
    for i, content in whole.items():
        (tmp_path / f"{i}.mp4").write_bytes(content)
    metrics, seen = evaluate()
    assert seen == [["q0", "q1"], ["q4", "q5"]]
    assert metrics["coverage"] == metrics["exact_match"] == 1.0 and not metrics["partial"]
    assert [r["question_id"] for r in result(tmp_path / "run", "test_video_qa.jsonl")] == [f"q{i}" for i in range(6)]


def test_weights_digest_sees_frozen_trained_and_half_precision():
    model = ToyModel()
    digests = {weights_digest(model)}
    for change in (model.frozen.bias, model.head[0].weight):
        change.data.view(-1)[0] += 1e-3
        digests.add(weights_digest(model))
    digests.add(weights_digest(model.bfloat16()))
    assert len(digests) == 4


# ---- pseudo_span and temporal_grounding -----------------------------------------------------------------------


def test_pseudo_spans_are_written_in_the_documented_form(tmp_path):
    metrics = evaluator(tmp_path, task="pseudo_span", test_splits=["train"], subtract_min=False).evaluate()["train"]
    written = json.loads((tmp_path / "spans_train.json").read_text())
    assert metrics["spans_file"] == str(tmp_path / "spans_train.json")
    assert (written["format"], written["version"], written["unit"], written["num_frames"]) == (
        "lavis_lstp.spans",
        1,
        "frames",
        6,
    )
    assert len(written["spans"]) == 20
    frames = {len(entry["scores"]) for entry in written["spans"].values()}
    assert frames == {5, 6}, "padded frames have no score"
    for entry in written["spans"].values():
        assert entry["span"] == list(pseudo_span(entry["scores"], False))


def test_spans_of_a_part_never_replace_those_of_the_whole(tmp_path):
    asked = {"task": "pseudo_span", "test_splits": ["train"], "spans_out": str(tmp_path / "spans.json")}
    evaluator(tmp_path / "whole", **asked).evaluate()
    before = (tmp_path / "spans.json").read_bytes()
    found = evaluator(tmp_path / "part", **asked, limit_batches=2).evaluate()["train"]
    assert found["spans_file"] == str(tmp_path / "part" / "partial_spans.json") and found["partial"]
    assert len(json.loads(Path(found["spans_file"]).read_text(encoding="utf-8"))["spans"]) == 4
    assert (tmp_path / "spans.json").read_bytes() == before


class FrameScorer(torch.nn.Module):
    def pseudo_scores(self, samples):
        mask = samples["frame_mask"]
        return mask * (torch.arange(mask.shape[1]) > 1)


def test_spans_of_short_videos_are_read_by_the_data_set_they_label(tmp_path):
    """Of 8 frames that are asked for, no video has more than 5."""
    for i, frames in enumerate((5, 3, 4)):
        numbered_video(tmp_path / f"{i}.mp4", frames, width=64, height=48)
    rows = [{"question_id": f"q{i}", "video_id": f"{i}", "video": f"{i}.mp4"} for i in range(3)]
    rows = [{**row, "question": "when?", "answer": "now"} for row in rows]
    runner = evaluator(tmp_path, task="pseudo_span")
    runner.datasets = {"videos": {"test": VideoQADataset(rows, tmp_path, num_frames=8)}}
    runner.bare_model = FrameScorer()
    runner.evaluate()
    spans = read_spans(tmp_path / "spans_test.json", 8)
    assert spans == {"q0": Span(2, 5), "q1": Span(2, 3), "q2": Span(2, 4)}
    labelled = VideoQADataset(rows, tmp_path, num_frames=8, spans=spans)
    assert [labelled[i]["span"].tolist() for i in range(3)] == [[2, 5], [2, 3], [2, 4]]


def test_labels_are_measured_against_gold_spans_beside_labelling_everything():
    samples = {
        "question_id": ["a", "b", "c"],
        "frame_mask": torch.ones(3, 8).long(),
        "frame_times": torch.arange(8.0).repeat(3, 1),
        "end_s": [7.25] * 3,
        "gold_span": torch.tensor([[2, 8], [0, 2], [-1, -1]]),
        "moments_s": [[[2.0, 7.25]], [[0.0, 2.0]], []],
        "answer": ["red", "green", "blue"],
    }
    task = PseudoSpanTask()
    records = task.valid_step(FrameScorer(), samples)  # labels [2, 8) everywhere
    assert [record.get("span_s") for record in records] == [[2.0, 7.25], [2.0, 7.25], None]
    found = task.metrics(records)
    assert (found["iou"], found["recall_0.5"], found["num_gold_spans"]) == (0.5, 0.5, 2)
    assert found["iou_of_whole_video"] == pytest.approx((6 / 8 + 2 / 8) / 2)
    assert (found["moments"]["r1_0.5"], found["moments"]["miou"], found["labelled"]) == (0.5, 0.5, 3)
    assert not {"iou", "moments", "iou_of_whole_video"} & task.metrics(records[2:]).keys()
    samples["answer"][1] = None
    with pytest.raises(ConfigError, match="question 'b' has no answer.*run.label=scores"):
        task.valid_step(FrameScorer(), samples)


def test_pseudo_spans_of_several_splits_need_several_files(tmp_path):
    options = {"task": "pseudo_span", "test_splits": ["train", "test"]}
    with pytest.raises(ConfigError, match=r"run.spans_out must contain \{split\} to label 2 splits"):
        evaluator(tmp_path, spans_out=str(tmp_path / "spans.json"), **options)
    evaluator(tmp_path, spans_out=str(tmp_path / "spans_{split}.json"), **options).evaluate()
    assert {path.name for path in tmp_path.glob("spans*")} == {"spans_train.json", "spans_test.json"}


def test_labelling_goes_on_where_it_was_killed(tmp_path):
    evaluator(tmp_path / "whole", task="pseudo_span").evaluate()
    runner = evaluator(tmp_path / "parts", task="pseudo_span")
    interrupt_after(runner, 1)
    with pytest.raises(Interrupted):
        runner.evaluate()
    assert not (tmp_path / "parts/spans_test.json").exists()
    runner = evaluator(tmp_path / "parts", task="pseudo_span")
    seen = interrupt_after(runner, 99)
    runner.evaluate()
    assert len(seen) == 1
    assert (tmp_path / "parts/spans_test.json").read_bytes() == (tmp_path / "whole/spans_test.json").read_bytes()


def test_grounding_is_measured_where_there_is_a_gold_span(tmp_path):
    metrics = evaluator(tmp_path, task="temporal_grounding", test_splits=["train"]).evaluate()["train"]
    records = result(tmp_path, "train_temporal_grounding.jsonl")
    assert [("gold_span" in r) for r in records[:4]] == [False, True, True, False]
    ious = []
    for record in (r for r in records if "gold_span" in r):
        (a, b), (c, d) = record["span"], record["gold_span"]
        inter = max(0, min(b, d) - max(a, c))
        ious.append(inter / ((b - a) + (d - c) - inter))
    assert metrics["iou"] == metrics["agg_metrics"] == pytest.approx(sum(ious) / len(ious))
    assert metrics["recall_0.5"] == pytest.approx(sum(i >= 0.5 for i in ious) / len(ious))
    assert metrics["num_questions"] == 20 and metrics["num_gold_spans"] == len(ious) < 20
    assert "pseudo_iou" not in metrics


def test_a_checkpoint_can_be_chosen_without_looking_at_gold_spans():
    task = TemporalGroundingTask()
    records = [{"question_id": "a", "span": [0, 4], "gold_span": [4, 8], "pseudo_span": [0, 4]}]
    metrics = task.metrics(records)
    assert (metrics["iou"], metrics["pseudo_iou"], metrics["agg_metrics"]) == (0.0, 1.0, 0.0)
    with pytest.raises(ConfigError, match="nothing to measure"):
        task.metrics([{"question_id": "a", "span": [0, 4]}])


def test_several_spans_are_recorded_and_count_for_average_precision():
    class Finds(torch.nn.Module):
        def locate(self, samples):
            return {"span": torch.tensor([[6, 9]]), "spans": [[(6, 9), (1, 3)]]}

    samples = {
        "question_id": ["a"],
        "frame_mask": torch.ones(1, 10).long(),
        "frame_times": torch.arange(10.0)[None],
        "gold_span": torch.tensor([[6, 9]]),
        "moments_s": [[[1.0, 3.0], [6.0, 9.0]]],
    }
    task = TemporalGroundingTask()
    (record,) = task.valid_step(Finds(), samples)
    assert record["spans"] == [[6, 9], [1, 3]] and record["spans_s"] == [[6.0, 9.0], [1.0, 3.0]]
    both, one = (task.metrics([{**record, "spans_s": record["spans_s"][:n]}])["moments"]["map"] for n in (2, 1))
    assert both == pytest.approx(1) and one < 0.6


def test_spans_found_are_written_for_training_to_read(tmp_path):
    runner = evaluator(tmp_path, task="temporal_grounding", spans_out=str(tmp_path / "found_{split}.json"))
    data = runner.datasets["toy"]["test"]
    data.num_frames = 6
    metrics = runner.evaluate()["test"]
    assert metrics["spans_file"] == str(tmp_path / "found_test.json")
    spans = read_spans(tmp_path / "found_test.json", 6)
    records = result(tmp_path, "test_temporal_grounding.jsonl")
    assert {name: list(span) for name, span in spans.items()} == {r["question_id"]: r["span"] for r in records}
    written = json.loads((tmp_path / "found_test.json").read_text())
    assert written["made_by"]["task"] == "temporal_grounding" and len(spans) == len(records) > 0


def test_locating_needs_no_spans_to_compare_with_and_leaves_out_what_has_no_frames(tmp_path):
    task = TemporalGroundingTask({"spans_out": str(tmp_path / "found.json")})
    records = [{"question_id": "a", "span": [1, 4]}, {"question_id": "text", "span": [-1, -1]}]
    assert task.metrics(records)["located"] == 2
    data = [{"question_id": name} for name in ("a", "text")]
    dataset = SimpleNamespace(question_ids=["a", "text"], num_frames=8, annotation=data)
    task.after_evaluation(records, "test", 0, dataset=dataset, result_dir=tmp_path)
    assert read_spans(tmp_path / "found.json", 8) == {"a": Span(1, 4), "text": None}
    with pytest.raises(ConfigError, match=r"must contain \{split\}"):
        TemporalGroundingTask({"spans_out": "found.json", "test_splits": ["train", "val"]})


# ---- video_instruct -----------------------------------------------------------------------------------------------


def test_validation_by_loss_is_the_mean_over_samples(tmp_path):
    """5 samples in batches of 2, 2 and 1: the mean over samples is not the mean over batches."""
    runner = make_runner(tmp_path, evaluate=True, valid_splits=["val"], batch_size_eval=2)
    metrics = runner.train()["val"]
    data = ToyData(5)
    with torch.no_grad():
        expected = float(runner.bare_model(data.collater([data[i] for i in range(5)]))["loss"])
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5) and metrics["agg_metrics"] == -metrics["loss"]


def test_validation_by_answers(tmp_path):
    metrics = make_runner(tmp_path, evaluate=True, valid_splits=["val"], valid_on="answers").train()["val"]
    assert metrics["agg_metrics"] == metrics["exact_match"]
    with pytest.raises(ConfigError, match="unknown run.valid_on 'answer'; did you mean 'answers'"):
        VideoInstructTask({"valid_on": "answer"})


def test_all_losses_of_the_model_are_logged(tmp_path):
    make_runner(tmp_path, max_steps=1).train()
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert row["half_loss"] == pytest.approx(row["loss"] / 2)


def test_tasks_are_registered_under_their_names():
    from lavis.common.registry import registry

    for name in ("video_qa", "video_instruct", "temporal_grounding", "pseudo_span"):
        assert registry.get_task_class(name).name == name
    assert registry.get_runner_class("runner_lstp") is RunnerLSTP


def test_lavis_own_tasks_run_too(tmp_path):
    """A task of LAVIS gives a bare loss in training and makes its metrics itself."""
    from lavis.tasks.base_task import BaseTask

    class Plain(BaseTask):
        def valid_step(self, model, samples):
            return [{"question_id": name} for name in samples["question_id"]]

        def after_evaluation(self, val_result, split_name, epoch, **kwargs):
            return {"agg_metrics": float(len(val_result))}

    runner = make_runner(tmp_path, valid_splits=["val"])
    runner.task = Plain()
    runner.train()
    assert runner.store.best()["value"] == 5.0 and runner.position.step == 14
