"""Metrics: the published token recall, known values, and no score for half a test set."""

import importlib.util
import json
import math

import pytest
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from lavis_lstp.errors import ConfigError, CoverageError
from lavis_lstp.metrics.choice import parse_choice
from lavis_lstp.metrics.grounding import entropy_bits, evaluate_spans, published_iou
from lavis_lstp.metrics.qa import (
    _longest_common_subsequence,
    accuracy_interval,
    bleu_1,
    evaluate_answers,
    exact_match,
    normalise,
    rouge,
    token_f1,
    token_recall,
    yes_or_no,
)
from lavis_lstp.schema import Span
from lavis_lstp.tasks import VideoQATask

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
        ("-1", "-1"),
        ("\u22121.", "-1"),
        ("- one", "one"),
        ("1/2 of 2-3, at 10:30!", "1/2 of 2-3 at 10:30"),
        ("1,000", "1000"),
        ("C#, not C++", "c# not c++"),
        ("5 %", "5%"),
        ("T-shirt", "tshirt"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u201cred\u201d \u2026", "red"),
        ("\uff21\uff22\u3002", "ab"),
    ],
)
def test_normalise(answer, expected):
    assert normalise(answer) == expected


def test_exact_match_and_f1():
    assert exact_match("a red box", "Red box.") == 1
    assert exact_match("1.5", "15") == 0
    assert exact_match("A", "the") == 0
    for gold, said in (("-1", "1"), ("1/2", "12"), ("2-3", "23"), ("5%", "5"), ("C#", "C++"), ("10:30", "1030")):
        assert exact_match(gold, said) == exact_match(said, gold) == 0 and exact_match(gold, f" {gold}.") == 1
    for gold, said in (
        ("caf\u00e9", "cafe\u0301"),
        ("red", "\u201cred\u201d"),
        ("it's", "it\u2019s"),
        ("-1", "\u22121"),
    ):
        assert exact_match(gold, said) == token_f1(gold, said) == rouge(gold, said)["rouge_l"] == 1
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("yes", True),
        ("Yep.", True),
        ("**Yes**", True),
        ("<answer>no</answer>", False),
        ("Answer: No", False),
        ("No, he isn\u2019t", False),
        ("No it is not", False),
        ("no doubt", None),
        ("yes or no", None),
        ("Yes, it isn't", None),
        ("Yes, because there is no other person.", True),
        ("The answer is yes, since he didn't drop it.", True),
        ("Yes, but not because he fell", None),
        ("nobody", None),
        ("yesterday", None),
        ("I see no dog", None),
        ("", None),
    ],
)
def test_a_plain_yes_or_no(text, said):
    assert yes_or_no(text) is said


@given(TEXT, TEXT)
def test_scores_lie_in_order(gold, prediction):
    for score in (token_recall, exact_match, token_f1):
        assert 0 <= score(gold, prediction) <= 1
        assert score(gold, gold) == 1 or not gold.replace(",", "").replace(".", "").split()
    scores = rouge(gold, prediction)
    assert 0 <= scores["rouge_l"] <= scores["rouge_1"] <= 1
    assert scores == pytest.approx(rouge(prediction, gold))
    assert exact_match(gold, prediction) <= token_f1(gold, prediction)


def test_bleu_1_counts_words_and_punishes_short_answers():
    """By hand: matches over words said, times exp(1 - words asked / words said) where too few are said."""
    pytest.importorskip("sacrebleu")
    assert bleu_1(["a red star", "two"], ["the red star", "2"]) == pytest.approx(2 / 4)
    assert bleu_1(["a red star"], ["red"]) == pytest.approx(math.exp(1 - 3))
    assert bleu_1(["red"], ["red red"]) == pytest.approx(1 / 2)
    assert bleu_1(["Red."], ["red"]) == 0.0


def test_without_sacrebleu_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install sacrebleu"):
        VideoQATask({"metric": "bleu1"})


@pytest.mark.parametrize(
    "end",
    ["<|im_end|>", "<|im_end|>\n<|endoftext|>", "</s>", "<end_of_turn>", "<\uff5cend\u2581of\u2581sentence\uff5c>"],
)
def test_control_tokens_count_in_no_score(end):
    assert exact_match("dog", f"dog{end}") == exact_match("dog", f"<think>A cat?</think>dog{end}") == 1.0
    assert exact_match("3", "<|begin_of_box|>3<|end_of_box|>") == bleu_1(["3"], [f"3{end}"]) == 1.0
    assert exact_match("dog", "dog <b>") == 0.0
    assert parse_choice(f"B{end}", ["a red car", "a blue car"]) == 1 and yes_or_no(f"Yes{end}") is True


@pytest.mark.parametrize(
    ("gold", "prediction", "same"),
    [
        ("3,5,7", "(3, 5, 7)", True),
        ("3,5,7", "357", False),
        ("3,5,7", "3,5", False),
        ("100,200,300", "100200300", True),  # marks of thousands
        ("red,blue", "Red, blue", True),
        ("a dog; a cat", "dog;cat", True),
        ("red,blue", "redblue", False),
    ],
)
def test_lists_are_the_same_with_and_without_blanks(gold, prediction, same):
    assert exact_match(gold, prediction) == float(same)


def test_thoughts_count_in_no_score():
    thought = "<think>It barks, so no cat.</think>\n\ndog"
    assert exact_match("dog", thought) == bleu_1(["dog"], [thought]) == 1.0
    found = evaluate_answers({"a": thought, "b": "<think>a dog"}, {"a": "dog", "b": "dog"})
    assert found["exact_match"] == found["token_f1"] == found["rouge_1"] == found["rouge_l"] == 0.5


@pytest.mark.parametrize(
    ("prediction", "gold", "iou"),
    [  # half-open here, inclusive there: a frame more than the end says
        ((2, 6), (5, 10), 0.0),  # both have frame 5, and nothing else in common
        ((2, 7), (5, 10), 2 / 8),
        ((3, 4), (3, 7), 0.0),
        ((4, 5), (3, 7), 1 / 4),
        ((3, 4), (3, 4), 1.0),
        ((0, 2), (5, 6), 0.0),
    ],
)
def test_published_iou(prediction, gold, iou):
    assert published_iou(Span(*prediction), Span(*gold)) == pytest.approx(iou)
    found = evaluate_spans({"a": prediction}, {"a": gold}, iou="published")
    assert found["iou"] == pytest.approx(iou) and found["recall_0.3"] == (iou >= 0.3)
    assert evaluate_spans({"a": prediction}, {"a": gold})["iou"] == Span(*prediction).iou(Span(*gold))


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
