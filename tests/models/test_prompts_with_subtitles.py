"""Subtitles in the prompt: near the frames that are shown, as many as fit, and nothing but text."""

from __future__ import annotations

import math

import pytest
import torch
from test_lstp import QUESTIONS, batch, model_config, row

from lavis_lstp.errors import ConfigError
from lavis_lstp.models.lstp import LSTP
from lavis_lstp.models.subtitles import shown_in
from lavis_lstp.tasks import VideoQATask
from lavis_lstp.tasks.video_qa import with_options

LINES = [(float(t), t + 0.5, f"word {t}") for t in range(8)]


def model(**settings) -> LSTP:
    return LSTP.from_config(model_config(selector={"name": "uniform", "num_selected": 2}, **settings)).eval()


@pytest.fixture(scope="module")
def tiny() -> LSTP:
    return model()


def spoken(window_s: float = 0.0, lengths=(8, 5, 3)) -> dict:
    """A frame a second, and a line beginning with each."""
    samples = batch(lengths)
    samples["frame_times"] = torch.arange(8.0).expand(3, -1)
    return {**samples, "subtitles": [list(LINES)] * 3, "subtitles_window_s": [window_s] * 3}


def test_lines_within_the_window_of_the_frames_stand_before_the_question(tiny):
    samples = spoken()
    found = tiny.answer(samples)
    for i, index in enumerate(found["frame_index"].tolist()):
        said = "".join(f"word {t}\n" for t in index)
        assert found["prompt"][i] == tiny.prompt.replace("{question}", f"Subtitles:\n{said}{QUESTIONS[i]}")
    assert found["subtitles"] == [{"window_s": 0.0, "lines": 2, "left_out": 0}] * 3
    near = tiny.answer(spoken(1.0))
    for index, facts in zip(near["frame_index"].tolist(), near["subtitles"], strict=True):
        close = {t for t in range(8) for i in index if t - 1 <= i <= t + 1.5}
        assert facts["lines"] == len(close) > 2
    whole = tiny.answer(spoken(math.inf))
    assert whole["subtitles"][0] == {"window_s": None, "lines": 8, "left_out": 0}
    assert "subtitles" not in tiny.answer(batch())


def test_answers_with_subtitles_do_not_depend_on_the_batch(tiny):
    samples = spoken(1.0)
    together = tiny.answer(samples)
    for i in range(3):
        own = row({**samples, "frame_times": samples["frame_times"][:, :8]}, i)
        alone = tiny.answer(own)
        assert (alone["prompt"], alone["prediction"]) == (
            together["prompt"][i : i + 1],
            together["prediction"][i : i + 1],
        )


def test_a_prompt_without_room_keeps_the_nearest_lines_and_the_question_whole():
    narrow = model(backbone={"max_text_tokens": 40})
    found = narrow.answer(spoken(math.inf))
    for prompt, facts in zip(found["prompt"], found["subtitles"], strict=True):
        assert 0 < facts["lines"] < 8 and facts["lines"] + facts["left_out"] == 8
        assert len(narrow.backbone.tokenizer(prompt)["input_ids"]) <= 40
    first = found["frame_index"][0].tolist()[0]
    assert f"word {first}\n" in found["prompt"][0] and QUESTIONS[0] in found["prompt"][0]


def test_marks_of_the_tokenizer_are_no_marks_in_a_line(tiny):
    mark = max(tiny.backbone.tokenizer.all_special_tokens, key=len)
    prompt, _ = shown_in("see: what?", "what?", [(0.0, 1.0, f"before {mark} behind")], tiny.backbone)
    assert prompt == "see: Subtitles:\nbefore behind\nwhat?"
    with pytest.raises(ConfigError, match="does not contain it"):
        shown_in("see: what?", "where?", [(0.0, 1.0, "x")], tiny.backbone)


def test_options_stand_behind_the_question_and_the_table_says_what_was_shown(tiny):
    samples = spoken()
    options = [["red", "blue"]] * 3
    asked = with_options(tiny, samples, options)
    found = tiny.score_options({**asked, "options": options})
    before, _, behind = found["prompt"][0].partition(QUESTIONS[0])
    assert before.endswith("\n") and "Subtitles:" in before and "(A) red" in behind
    records = VideoQATask().valid_step(tiny, samples)
    metrics = VideoQATask().metrics(records)
    assert metrics["subtitles"] == "within 0 s of the frames" and metrics["subtitle_lines"] == 2
    assert metrics["subtitle_lines_left_out"] == 0
    plain = VideoQATask().metrics(VideoQATask().valid_step(tiny, batch()))
    assert not {"subtitles", "subtitle_lines"} & plain.keys()


def test_training_reads_them_too(tiny):
    learning = model(train=["projection"]).train()
    seen = []
    learning.backbone.look = lambda frames, which, prompts, times_s=None, look=learning.backbone.look: (
        seen.extend(prompts) or look(frames, which, prompts, times_s)
    )
    learning(spoken())["loss"].backward()
    assert all("Subtitles:\nword" in prompt for prompt in seen) and len(seen) == 3
