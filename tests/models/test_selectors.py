"""Rules from scores to frames: the recorded ones exactly, and what every rule promises."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from lavis_lstp import select_from_scores
from lavis_lstp.errors import ConfigError
from lavis_lstp.models.where.selectors import SELECTORS, LazyScores, Row, Selector, best_span, choose, question_kind

CASES = json.loads((GOLDEN / "frame_selectors.json").read_text())["cases"]
PUBLISHED = {
    "aks": ("aks", {}),
    "inverse_transform": ("inverse_transform", {}),
    "inverse_transform_power2": ("inverse_transform", {"power": 2}),
}


def row_of(length: int, k: int, seed: int = 0) -> Row:
    rng = np.random.default_rng(seed)
    times_s = np.arange(length, dtype=float)
    return Row(rng.random(length), k, times_s, "Who waves?", rng.standard_normal((length, 4)), (0, length), rng)


@pytest.mark.parametrize("key", PUBLISHED)
def test_published_rules_give_the_recorded_frames(key):
    method, settings = PUBLISHED[key]
    for case in CASES:
        k, recorded = case["k"], case[key]
        assert sorted(SELECTORS[method].rule(Row(np.asarray(case["scores"]), k), **settings)) == recorded
        chosen = choose(method, Row(case["scores"], k), **settings)
        assert set(recorded) <= set(chosen.frames)
        assert len(set(chosen.frames)) == len(chosen.frames) == min(k, len(case["scores"]))
        short = len(case["scores"]) <= k  # all frames are shown, and no rule is asked
        assert chosen.num_filled == (0 if short else k - len(set(recorded)))


@pytest.mark.parametrize("method", SELECTORS)
@given(length=st.integers(1, 60), k=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_rule_gives_k_sorted_frames_once(method, length, k, seed):
    frames = choose(method, row_of(length, k, seed)).frames
    assert frames == sorted(set(frames)) and len(frames) == min(k, length)
    assert 0 <= frames[0] and frames[-1] < length
    assert frames == choose(method, row_of(length, k, seed)).frames


@pytest.mark.parametrize("method", [m for m in SELECTORS if m != "random"])
def test_equal_scores_and_equal_frames_have_a_defined_result(method):
    row = Row(np.ones(20), 4, np.arange(20.0), "Who?", np.ones((20, 3)), (3, 5), np.random.default_rng(0))
    assert len(set(choose(method, row).frames)) == 4


def test_repeats_are_kept_only_where_asked():
    scores = np.eye(1, 9, 4)[0]
    assert select_from_scores(scores, 3, "inverse_transform", repeats=True) == [4, 4, 4]
    assert len(set(select_from_scores(scores, 3, "inverse_transform"))) == 3


@pytest.mark.parametrize(
    "frames, words", [([0, 3], r"\[3\], those of the video are 0 to 2"), ([-1], r"\[-1\]"), ([0, 1, 2], "3 frames, 2")]
)
def test_a_rule_that_gives_frames_that_are_not_there_is_named(frames, words, monkeypatch):
    """As with a forgotten offset: -1 would be read as the last frame."""
    monkeypatch.setitem(SELECTORS, "mine", Selector(lambda row: frames, needs=("scores",)))
    with pytest.raises(AssertionError, match=f"rule mine gave .*{words}"):
        select_from_scores([1, 2, 3], 2, "mine")


def test_focus_scores_few_frames_of_a_long_video_and_finds_the_moment():
    truth = np.random.default_rng(1).normal(0, 0.05, 3200)
    truth[1600:1632] += 1
    scores = LazyScores(len(truth), lambda numbers: truth[numbers])
    frames = choose("focus", Row(scores, 8, np.arange(3200.0), rng=np.random.default_rng(0))).frames
    assert np.isfinite(scores.known).sum() < 1600
    assert sum(1600 <= i < 1632 for i in frames) >= 2


def test_mmr_and_dpp_avoid_equal_frames():
    features = np.repeat(np.eye(3), 5, axis=0)
    scores = np.linspace(1, 0.5, 15)
    for method in ("mmr", "dpp"):
        assert {i // 5 for i in select_from_scores(scores, 3, method, features=features)} == {0, 1, 2}


def test_a_question_about_the_whole_video_gets_evenly_spaced_frames():
    scores = np.arange(40.0)
    whole, moment = "What is the main topic of this video?", "What does the man hold when he opens the door?"
    assert question_kind(whole) == "global" and question_kind(moment) == "local"
    assert select_from_scores(scores, 4, "global_local", question=whole) == select_from_scores(scores, 4, "uniform")
    found = select_from_scores(scores, 4, "global_local", question=moment, local="topk")
    assert found == [36, 37, 38, 39]


def test_best_span_agrees_with_the_one_of_logits():
    import torch

    from lavis_lstp.models.where.frame_selector import best_spans

    start, end = torch.randn(50, 12), torch.randn(50, 12)
    expected = best_spans(start, end, torch.ones(50, 12)).tolist()
    assert [list(best_span(*pair)) for pair in zip(start.numpy(), end.numpy(), strict=True)] == expected


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: select_from_scores([1, 2], 1, "topp"), "did you mean 'topk'"),
        (lambda: select_from_scores([1, 2], 1, "topk", power=2), "no setting 'power'"),
        (lambda: select_from_scores([1, 2], 1, "aks", depth=2.5), "depth .* must be int"),
        (lambda: select_from_scores([1, 2], 1, "inverse_transform", power=0), "greater than 0"),
        (lambda: select_from_scores([1, float("nan")], 1), "frame 1"),
        (lambda: select_from_scores([[1, 2]], 1), "1 axis"),
        (lambda: select_from_scores([], 1), "no candidate"),
        (lambda: select_from_scores([1, 2], 0), "at least 1"),
        (lambda: select_from_scores([1, 2], 1, "mmr"), "needs features"),
        (lambda: select_from_scores([1, 2], 1, "mmr", features=[[1.0]]), "2 scores, .*1 features"),
        (lambda: select_from_scores([1, 2], 1, "uniform_in_span", span=(1, 3)), "half-open"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_scores_need_no_torch():
    code = (
        "import sys, lavis_lstp; lavis_lstp.select_from_scores([1, 2], 1); print({'torch', 'lavis'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
