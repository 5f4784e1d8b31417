"""Moments in seconds: the same numbers as the benchmarks' authors' own scripts give for recorded predictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lavis_lstp.errors import CoverageError
from lavis_lstp.metrics.grounding import evaluate_grounded_qa, evaluate_moments, hit_at_one

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "grounding.json").read_text())
CLIPS = 75


def test_qvhighlights_scores_are_its_authors():
    case = GOLDEN["qvhighlights"]
    found, said = evaluate_moments(case["predictions"], case["golds"]), case["result"]
    assert [found["map_0.5"], found["map_0.75"], found["map"]] == pytest.approx(
        [said["map_05"], said["map_075"], said["map"]], abs=1e-6
    )
    assert {name: found[f"r1_{name}"] for name in said["r1"]} == pytest.approx(said["r1"], abs=1e-6)
    marks = {key: [row.get(str(clip), [0, 0, 0]) for clip in range(CLIPS)] for key, row in case["marks"].items()}
    hits = {least: hit_at_one(case["scores"], marks, int(least)) for least in said["hit1"]}
    assert hits == pytest.approx(said["hit1"], abs=1e-6) and len(set(hits.values())) > 1


def test_nextgqa_scores_are_its_authors():
    case = GOLDEN["nextgqa"]
    found = evaluate_grounded_qa(case["predictions"], case["golds"], case["correct"])
    assert {name: found[name] for name in case["result"]} == pytest.approx(case["result"], abs=1e-6)
    assert found["acc_gqa"] < found["acc_qa"] and found["coverage"] == 1


def test_scores_of_one_moment_are_those_of_timelens():
    case = GOLDEN["single"]
    moments = [{key: [value] for key, value in case[name].items()} for name in ("predictions", "golds")]
    found = evaluate_moments(*moments)
    assert {name: found[name] for name in case["result"]} == pytest.approx(case["result"], abs=1e-6)


def test_no_moment_is_a_miss_and_a_gap_is_refused():
    golds = {"a": [[0, 2]], "b": [[4, 6]]}
    found = evaluate_moments({"a": [[0, 2]], "b": []}, golds)
    assert found["r1_0.5"] == found["miou"] == found["map"] == 0.5
    with pytest.raises(CoverageError, match="1 of 2 questions have a prediction"):
        evaluate_moments({"a": [[0, 2]]}, golds)
