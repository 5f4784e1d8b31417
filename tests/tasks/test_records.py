"""One definition of a sample and of a prediction: what data sets and tasks give has these keys and no others."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_lstp import model_config
from video_files import numbered_video

from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.data.subtitles import Subtitles
from lavis_lstp.inference.prediction import Prediction as Answer
from lavis_lstp.judging.verdict import Case
from lavis_lstp.models.lstp import LSTP
from lavis_lstp.report.evaluations import FORMS, SHOWN_ONLY
from lavis_lstp.schema import Prediction, Sample, Span
from lavis_lstp.tasks import PseudoSpanTask, TemporalGroundingTask, VideoInstructTask, VideoQATask

DOCS = Path(__file__).resolve().parents[2] / "docs"
READ = {"num_frames": 4, "image_size": 64}
RICH = {
    "category": "when",
    "categories": {"length": "short"},
    "span_s": [0.1, 0.2],
    "options": ["red", "green"],
    "prompt": "",
}


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("media")
    numbered_video(root / "a.mp4", 6, width=64, height=64)
    (root / "a.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nred\n")
    np.save(root / "a_raft.npy", np.zeros((3, 2, 16, 16), np.float32))
    Image.new("RGB", (64, 64)).save(root / "a.png")
    return root


def data_set(media: Path, kind: str = "video", more: dict | None = None, **settings) -> VideoQADataset:
    row = {"question_id": "q0", "video_id": "a", "question": "what?", "answer": "red", **(more or {})}
    row |= {"video": {"video": "a.mp4"}, "image": {"image": "a.png"}, "text": {}}[kind]
    return VideoQADataset([row], media, **READ | settings)


PUBLISHED = {"flow": "precomputed", "flow_size": 16}
SUBTITLED = {"subtitles": "whole"}


@pytest.mark.parametrize(
    ("kind", "settings", "more"),
    [
        ("video", {}, set()),
        ("image", {}, set()),
        ("text", {}, set()),
        ("video", {"flow": "motion_vectors"}, {"flow"}),
        ("image", {"flow": "motion_vectors"}, {"flow"}),
        ("text", {"flow": "motion_vectors"}, {"flow"}),
        ("video", PUBLISHED, {"flow", "flow_mask"}),
        ("video", {"spans": {"q0": Span(1, 3)}}, set()),
        ("video", {"spans": {"q0": None}}, {"no_moment"}),
        ("video", SUBTITLED, {"subtitles", "subtitles_window_s"}),
        ("video", {"vis_processor": lambda picture: torch.zeros(3, 8, 8)}, {"image"}),
    ],
)
@pytest.mark.parametrize("row", [{}, RICH], ids=["poor", "rich"])
def test_every_item_is_a_sample_and_its_batch_has_the_same_keys(media, kind, settings, more, row):
    if settings is PUBLISHED:
        settings = {**settings, "flow_root": media}
    if settings is SUBTITLED:
        settings = {"subtitles": Subtitles([{"question_id": "q0", "video": "a.mp4"}], media, "whole", 0)}
    row = row if kind == "video" else {name: value for name, value in row.items() if name != "span_s"}
    data = data_set(media, kind, row, **settings)
    assert data[0].keys() == set(Sample.__required_keys__) | more and more <= Sample.__optional_keys__
    assert data.collater([data[0]]).keys() == data[0].keys() | {"frame_mask"}


ALWAYS = {"question_id", "video_id"}
ASKED = ALWAYS | {"question", "answer", "prediction", "prompt", "log_prob", "seconds", "num_frames"}
LOOKED = {"span", "span_s", "frame_index", "frame_times", "entropy", "num_filled", "num_scored"}
CHOSEN = {"options", "choice", "correct", "category", "categories", "moments_s", "gold_span"}


@pytest.fixture(scope="module")
def model() -> LSTP:
    return LSTP.from_config(model_config(selector={"name": "topk", "num_selected": 2})).eval()


@pytest.mark.parametrize(
    ("task", "run", "row", "keys"),
    [
        (VideoQATask, {}, {}, ASKED | LOOKED),
        (VideoQATask, {}, RICH, ASKED | LOOKED | CHOSEN),
        (VideoQATask, {"choose": "likelihood"}, RICH, ASKED | LOOKED | CHOSEN | {"option_log_prob"}),
        (VideoInstructTask, {"valid_on": "answers"}, {}, ASKED | LOOKED),
        (VideoInstructTask, {"valid_on": "loss"}, {}, {"question_id", "loss"}),
        (TemporalGroundingTask, {}, {}, ALWAYS | {"span", "span_s", "pseudo_span"}),
        (TemporalGroundingTask, {}, RICH, ALWAYS | {"span", "span_s", "pseudo_span", "gold_span", "moments_s"}),
        (PseudoSpanTask, {}, {}, {"question_id", "span", "scores"}),
    ],
)
def test_every_task_gives_predictions(media, model, task, run, row, keys):
    data = data_set(media, "video", row, spans={"q0": Span(1, 3)})
    (record,) = task(run).valid_step(model, data.collater([data[0]]))
    assert record.keys() == keys and keys <= Prediction.__annotations__.keys()


def test_who_reads_predictions_knows_no_other_keys():
    known = Prediction.__annotations__.keys()
    assert Prediction.__required_keys__ == {"question_id"}
    assert {*FORMS, *SHOWN_ONLY, *Case._fields} <= known
    table = (DOCS / "benchmarks.md").read_text(encoding="utf-8").split("## Predictions\n")[1].split("\n\n")[1]
    told = set(re.findall(r"\w+", " ".join(line.split("|")[1] for line in table.splitlines()[2:])))
    assert told == known - {"loss", "scores", "pseudo_span", "seconds"}, "those are of other tasks and of another file"


def test_an_answer_has_the_words_of_a_prediction():
    shared = {field.name for field in dataclasses.fields(Answer)} & Prediction.__annotations__.keys()
    assert shared == {
        "question", "prediction", "prompt", "log_prob", "span", "span_s", "spans_s", "frame_index", "scores", "seconds",
        "subtitles"
    }  # fmt: skip
