"""Pseudo spans: the published table, and the largest rectangle found by brute force."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from lavis_lstp.models.where.pseudo_span import pseudo_span
from lavis_lstp.schema import Span

CASES = json.loads((GOLDEN / "pseudo_span.json").read_text())["cases"]
TOKENS = st.integers(1, 12)
SCORES = st.builds(lambda n, parts: [min(p, n) / n for p in parts], TOKENS, st.lists(st.integers(0, 12), max_size=40))


@pytest.mark.parametrize(("key", "subtract_min"), [("span", False), ("span_minsub", True)])
def test_equals_published(key, subtract_min):
    crashed = 0
    for case in CASES:
        span = pseudo_span(case["scores"], subtract_min)
        if isinstance(case[key], str):  # negative scores
            crashed += 1
            assert 0 <= span.start < span.end <= len(case["scores"])
        else:
            assert span.to_inclusive() == tuple(case[key]), case["scores"]
    assert crashed == (3 if key == "span" else 0)


def test_defined_where_published_crashed():
    assert pseudo_span([-0.1, 0.2, -0.3], False) == Span(1, 2)
    assert pseudo_span([-1.0, -1.0], False) == Span(0, 2)


def test_subtracting_the_minimum_finds_a_peak_on_a_plateau():
    scores = [0.1, 0.1, 0.2, 0.1, 0.1]
    assert pseudo_span(scores, False) == Span(0, 5)
    assert pseudo_span(scores, True) == Span(2, 3)
    assert pseudo_span(scores) == Span(2, 3)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor, tuple])
def test_takes_any_sequence(make):
    assert pseudo_span(make([0.0, 1.0, 1.0, 0.0]), False) == Span(1, 3)
    assert pseudo_span(make([]), True) == Span(0, 0)


def test_smoothing_joins_what_a_gap_parts():
    scores = [0, 0, 1, 1, 0, 1, 1, 0, 0, 0]
    assert pseudo_span(scores) == Span(2, 4)
    assert pseudo_span(scores, smooth=3) == Span(2, 7)
    assert pseudo_span([], smooth=3) == Span(0, 0)
    assert pseudo_span([1.0, 1.0], False, smooth=9) == Span(0, 2)


@given(SCORES, st.booleans())
def test_is_the_largest_rectangle(scores, subtract_min):
    span = pseudo_span(scores, subtract_min)
    if not scores:
        assert span == Span(0, 0)
        return
    assert 0 <= span.start < span.end <= len(scores)
    heights = np.array(scores, dtype=np.float32).astype(np.float64)
    heights -= heights.min() if subtract_min else 0
    area = {(i, j): (j - i) * heights[i:j].min() for i in range(len(heights)) for j in range(i + 1, len(heights) + 1)}
    best = max(area.values())
    assert area[tuple(span)] == best
    if best == 0:
        assert span == Span(0, len(scores))
    else:  # of equal areas, the one that closes first
        assert span.end == min(j for (_, j), value in area.items() if value == best)
