"""Metrics: the published token recall, known values, and no score for half a test set."""

import json
import math

import pytest
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from lavis_lstp.errors import CoverageError
from lavis_lstp.metrics.grounding import entropy_bits, evaluate_spans
from lavis_lstp.metrics.qa import (
    _longest_common_subsequence,
    accuracy_interval,
    evaluate_answers,
    exact_match,
    normalise,
    rouge,
    token_f1,
    token_recall,
)
from lavis_lstp.schema import Span

PAIRS = json.loads((GOLDEN / "rouge_n.json").read_text())["pairs"]
TEXT = st.lists(st.sampled_from(["a", "the", "red", "Red", "box", ",", ".", "box.", "1.5"]), max_size=8).map(" ".join)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p['gold']}|{p['pred']}")
def test_token_recall_equals_published(pair):
    score = token_recall(pair["gold"], pair["pred"])
    assert isinstance(score, float)
    assert abs(score - pair["string"]) <= 1e-12


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The  Red\tbox.", "red box"),
        ("1.5 m", "1.5 m"),
        ("It's 15.", "its 15"),
        ("A", "a"),
        ("a the", "a the"),
        ("?!", ""),
        ("Ärger, Öl", "ärger öl"),
    ],
)
def test_normalise(answer, expected):
    assert normalise(answer) == expected


def test_exact_match_and_f1():
    assert exact_match("a red box", "Red box.") == 1
    assert exact_match("1.5", "15") == 0
    assert exact_match("A", "the") == 0
    assert token_f1("red box", "red ball") == pytest.approx(0.5)
    assert token_f1("red red box", "red") == pytest.approx(0.5)  # precision 1, recall 1/3
    assert token_f1("", "!") == 1 and token_f1("x", "") == token_f1("", "x") == 0


@pytest.mark.parametrize(
    ("gold", "prediction", "rouge_1", "rouge_l"),
    [  # numbers of rouge-score 0.1.2 without stemming
        ("the cat sat on the mat", "the cat on the mat sat", 1.0, 0.8333333333333334),
        ("police killed the gunman", "police kill the gunman", 0.75, 0.75),
        ("police killed the gunman", "the gunman kill police", 0.75, 0.5),
        ("a b c d", "a b", 0.6666666666666666, 0.6666666666666666),
        ("Turn-left, then right!", "turn left", 0.6666666666666666, 0.6666666666666666),
        ("snake_case x", "snake case", 0.8, 0.8),
        ("yes", "no", 0.0, 0.0),
        ("", "", 0.0, 0.0),
    ],
)
def test_rouge(gold, prediction, rouge_1, rouge_l):
    assert rouge(gold, prediction) == pytest.approx({"rouge_1": rouge_1, "rouge_l": rouge_l})


@given(TEXT, TEXT)
def test_scores_lie_in_order(gold, prediction):
    for score in (token_recall, exact_match, token_f1):
        assert 0 <= score(gold, prediction) <= 1
        assert score(gold, gold) == 1 or not gold.replace(",", "").replace(".", "").split()
    scores = rouge(gold, prediction)
    assert 0 <= scores["rouge_l"] <= scores["rouge_1"] <= 1
    assert scores == pytest.approx(rouge(prediction, gold))
    assert exact_match(gold, prediction) <= token_f1(gold, prediction)


def test_wilson_interval():
    # Newcombe 1998, table I, method 3
    assert accuracy_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert accuracy_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert accuracy_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert accuracy_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert accuracy_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 500), st.data())
def test_interval_holds_the_share(n, data):
    k = data.draw(st.integers(0, n))
    low, high = accuracy_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert accuracy_interval(n - k, n) == pytest.approx((1 - high, 1 - low))
    assert high - low > accuracy_interval(4 * k, 4 * n)[1] - accuracy_interval(4 * k, 4 * n)[0]


# ---- by id, and all of them -----------------------------------------------------------------------------------

ANSWERS = {"q1": "red", "q2": "blue", "q3": "left", "q4": "two boxes"}


def test_answers_are_joined_by_id():
    shuffled = {"q4": "two balls", "q2": "green", "q1": "Red.", "q3": "left"}
    result = evaluate_answers(shuffled, ANSWERS)
    assert result["exact_match"] == 0.5
    assert result["token_f1"] == pytest.approx(0.625)
    assert result["rouge_1"] == result["rouge_l"] == pytest.approx(0.625)
    assert result["exact_match_interval"] == accuracy_interval(2, 4)
    assert (result["coverage"], result["partial"], result["num_questions"]) == (1.0, False, 4)
    assert evaluate_answers(list(shuffled.items()), ANSWERS) == result
    json.dumps(result)


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({"q1": "red", "q2": "blue"}, r"2 of 4 questions have a prediction; 2 ids \('q3', 'q4'\) missing, 0 ids"),
        ({**ANSWERS, "q9": "x"}, r"0 ids missing, 1 ids \('q9'\) unknown"),
        ([("q1", "a"), ("q1", "b"), *ANSWERS.items()], r"1 ids \('q1'\) with more than one prediction"),
    ],
)
def test_incomplete_coverage_is_refused(predictions, message):
    with pytest.raises(CoverageError, match=message):
        evaluate_answers(predictions, ANSWERS)


def test_duplicates_are_refused_even_where_partial_is_allowed():
    with pytest.raises(CoverageError, match=r"1 ids \('q1'\) with more than one prediction"):
        evaluate_answers([("q1", "a"), ("q1", "a")], ANSWERS, allow_partial=True)
    with pytest.raises(CoverageError, match="more than one question"):
        evaluate_answers(ANSWERS, [("q1", "a"), ("q1", "a")])


def test_partial_says_so():
    result = evaluate_answers({"q1": "red", "q9": "x"}, ANSWERS, allow_partial=True)
    assert result["exact_match"] == 1
    assert result["partial"] is True
    assert (result["num_scored"], result["num_missing"], result["num_extra"]) == (1, 3, 1)
    assert result["coverage"] == 0.25
    assert evaluate_answers(ANSWERS, ANSWERS, allow_partial=True)["partial"] is False


def test_nothing_to_score():
    for predictions, answers in (({}, {}), ({"a": "x"}, {"b": "x"})):
        with pytest.raises(CoverageError, match="nothing to score"):
            evaluate_answers(predictions, answers, allow_partial=True)


def test_spans():
    golds = {"a": Span(0, 10), "b": Span(10, 20), "c": Span(0, 10), "d": Span(5, 6)}
    found = {"a": Span(0, 10), "b": (15, 25), "c": Span(0, 3), "d": Span(7, 9)}
    result = evaluate_spans(found, golds)
    assert result["iou"] == pytest.approx((1 + 1 / 3 + 0.3 + 0) / 4)
    assert result["recall_0.3"] == 0.75, "0.3 itself counts"
    assert result["recall_0.5"] == 0.25
    assert result["recall_0.5_interval"] == accuracy_interval(1, 4)
    json.dumps(result)
    with pytest.raises(CoverageError, match=r"1 ids \('d'\) missing"):
        evaluate_spans({k: v for k, v in found.items() if k != "d"}, golds)


@given(st.lists(st.tuples(*[st.integers(0, 30)] * 4), min_size=1, max_size=10))
def test_iou_is_that_of_sets(rows):
    spans = [(Span(min(a, b), max(a, b)), Span(min(c, d), max(c, d))) for a, b, c, d in rows]
    result = evaluate_spans(
        {str(i): p for i, (p, _) in enumerate(spans)}, {str(i): g for i, (_, g) in enumerate(spans)}
    )
    expected = []
    for p, g in spans:
        p, g = set(range(*p)), set(range(*g))
        expected.append(len(p & g) / len(p | g) if p | g else 0.0)
    assert result["iou"] == pytest.approx(math.fsum(expected) / len(expected))
    assert result["recall_0.5"] <= result["recall_0.3"]


def test_entropy_of_known_distributions():
    assert entropy_bits([5.0] * 8) == pytest.approx(3)
    assert entropy_bits([0.0, math.log(3)]) == pytest.approx(-0.25 * math.log2(0.25) - 0.75 * math.log2(0.75))
    assert entropy_bits([0.0, 1000.0, 0.0]) == 0, "no overflow, no log of 0"


@given(*[st.lists(st.sampled_from("abc"), max_size=12)] * 2)
def test_the_longest_common_subsequence_is_that_of_the_definition(a, b):
    def longest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        if (i, j) not in known:
            same = 1 + longest(i + 1, j + 1) if a[i] == b[j] else 0
            known[i, j] = max(same, longest(i + 1, j), longest(i, j + 1))
        return known[i, j]

    known: dict = {}
    assert _longest_common_subsequence(a, b) == longest(0, 0)
