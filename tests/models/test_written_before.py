"""What was written before the model became two halves is read, and answers as it did.

tests/written_before holds a checkpoint of two steps of tiny_ft (sampler and all, losses lm and span), shards with their
flow, and what the code of then (git 30042cf) made of them: `expected.json`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

import lavis_lstp
from lavis_lstp.data.frame_numbers import uniform_centres
from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.data.shards.questions import ShardQuestions
from lavis_lstp.inference.loading import EXAMPLE

BEFORE = Path(__file__).resolve().parents[1] / "written_before"
EVEN = uniform_centres(4, 8)
EXPECTED = json.loads((BEFORE / "expected.json").read_text(encoding="utf-8"))


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def test_a_checkpoint_answers_as_it_did():
    with lavis_lstp.load(BEFORE / "checkpoint") as predictor:
        for row in EXPECTED["answers"]:
            found = predictor.answer(EXAMPLE / "clip.mp4", row["question"])
            assert found.prediction == row["prediction"]
            assert list(found.frame_times_s) == row["frame_times_s"] and list(found.span_s) == row["span_s"]
            for name in ("start_logits", "end_logits"):
                assert getattr(found, name) == pytest.approx(row[name], abs=1e-5)


def test_evenly_spaced_frames_leave_its_sampler_out(caplog):
    with caplog.at_level("INFO"):
        predictor = lavis_lstp.load(BEFORE / "checkpoint", options=["model.selector.name=uniform"])
    assert predictor.model.sampler is None and "weights of the temporal sampler" in caplog.text
    assert predictor.answer(EXAMPLE / "clip.mp4", "what moves?").frame_index == EVEN


def test_shards_give_the_frames_and_the_flow_that_they_gave():
    questions = ShardQuestions([str(BEFORE / "shards/test-000000.tar")], flow=[str(BEFORE / "shards/flow-000000.tar")])
    data = VideoQADataset(questions, num_frames=8, image_size=64, flow="precomputed", flow_size=64)
    item, wanted = data[0], EXPECTED["shards"]
    assert len(data) == wanted["questions"]
    assert {key: item[key] for key in wanted["first"]} == wanted["first"]
    assert item["frame_times"].tolist() == pytest.approx(wanted["frame_times"], abs=1e-4)
    # a JPEG's pixels may differ by a level between versions of its library, the flow is ours
    assert digest(item["flow"]) == wanted["flow"] and item["flow"].abs().float().mean() == pytest.approx(
        wanted["flow_mean"]
    )
    assert item["frames"].shape == (8, 3, 64, 64)
