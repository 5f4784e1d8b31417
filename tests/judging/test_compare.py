"""Two models under one judge, and two judges of one model: known values, honest intervals, loud warnings."""

from __future__ import annotations

import json
import math
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavis_lstp.commands.cli import main
from lavis_lstp.errors import AnnotationError, CoverageError
from lavis_lstp.judging.calibrate import calibrate
from lavis_lstp.judging.compare import ITSELF, compare, read_judged
from lavis_lstp.metrics.agreement import cohen_kappa, mcnemar_exact, spearman
from lavis_lstp.metrics.resampling import group_rows, percentile_interval, resampled_sums, two_sided_p

# ---- statistics -----------------------------------------------------------------------------------------------


def test_mcnemar_known_values():
    assert mcnemar_exact(0, 0) == 1
    assert mcnemar_exact(3, 3) == 1
    assert mcnemar_exact(0, 5) == mcnemar_exact(5, 0) == 2 / 32
    assert mcnemar_exact(1, 9) == pytest.approx(0.021484375)  # R: binom.test(1, 10)
    assert mcnemar_exact(10_000, 10_100) == pytest.approx(0.485, abs=1e-3), "no overflow"
    assert mcnemar_exact(0, 2000) < 1e-300


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial(b, c):
    n = b + c
    tail = sum(math.comb(n, k) for k in range(min(b, c) + 1)) / 2**n
    assert mcnemar_exact(b, c) == pytest.approx(min(1, 2 * tail))


def test_kappa_and_rank_correlation():
    first = [True] * 25 + [False] * 25
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)  # the textbook's 20, 5, 10, 15
    assert cohen_kappa(first, first) == 1
    assert cohen_kappa([True, True], [True, True]) is None
    assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(
        0.8207826816681233
    )  # of scipy's documentation, with a tie
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_bootstrap_has_the_spread_of_the_mean():
    values = np.array([[1.0, n % 4 == 0] for n in range(400)])
    sums = resampled_sums(values, resamples=20_000, seed=1)
    assert (sums[:, 0] == 400).all()
    share = sums[:, 1] / 400
    assert share.mean() == pytest.approx(0.25, abs=1e-3)
    assert share.std() == pytest.approx(math.sqrt(0.25 * 0.75 / 400), rel=0.03)
    low, high = percentile_interval(share)
    assert (low, high) == pytest.approx((0.2075, 0.2925), abs=0.003)
    assert (resampled_sums(values, resamples=50, seed=1) == resampled_sums(values, resamples=50, seed=1)).all()
    assert (resampled_sums(values, resamples=50, seed=1) != resampled_sums(values, resamples=50, seed=2)).any()


def test_videos_are_drawn_whole():
    """40 videos of 10 questions, each all right or all wrong: as sure as 40 questions, not as 400."""
    values = np.array([[1.0, (n // 10) % 2] for n in range(400)])
    groups = group_rows([f"v{n // 10}" for n in range(400)])
    by_video = (resampled_sums(values, groups, resamples=20_000)[:, 1] / 400).std()
    by_question = (resampled_sums(values, resamples=20_000)[:, 1] / 400).std()
    assert by_video == pytest.approx(math.sqrt(0.25 / 40), rel=0.03)
    assert by_question == pytest.approx(math.sqrt(0.25 / 400), rel=0.03)
    assert group_rows(["a", None] * 40) is None and group_rows(["a", "b"] * 40) is None


def test_p_is_never_zero():
    assert two_sided_p(np.array([1.0] * 999)) == pytest.approx(2 / 1000)
    assert two_sided_p(np.array([-1.0, 1.0])) == 1.0


# ---- compare --------------------------------------------------------------------------------------------------

RULES, MODEL = "rules version=1 simplemma=2.0.0", "openai model=m"


def rows(words, judge=MODEL, first=0):
    """Verdict rows of "y" (right), "n" (wrong), "u" (unparsable), "m" (missing)."""
    found = []
    for n, word in enumerate(words, first):
        row = {"question_id": f"q{n}", "question": f"q {n}", "answer": "a", "prediction": "p", "judge": judge}
        if word in "yn":
            row |= {"status": "judged", "pred": {"y": "yes", "n": "no"}[word], "score": 5 if word == "y" else 1}
        else:
            row["status"] = {"u": "unparsable", "m": "missing"}[word]
        found.append(row)
    return found


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def judged(tmp_path):
    def judged(lines):
        return read_judged(write(tmp_path / "x.jsonl", lines))

    return judged


def test_compare_counts_pairs(judged):
    result = compare(judged(rows("yyyynnnnuu")), judged(rows("yynnyyyynn")[::-1]))
    assert result["num_questions"] == 10 and result["warnings"] == []
    accuracy = result["accuracy"]
    assert (accuracy["a"], accuracy["b"]) == (0.4, 0.6) and accuracy["difference"] == pytest.approx(0.2)
    assert accuracy["interval"][0] < 0.2 < accuracy["interval"][1]
    assert result["mcnemar"] == {"only_a_right": 2, "only_b_right": 4, "p": 0.6875}
    assert (result["score"]["a"], result["score"]["b"]) == (2.4, 3.4), "an unparsable verdict counts 0"
    assert result["accuracy"]["p"] > 0.3
    assert compare(judged(rows("y" * 30)), judged(rows("n" * 30)))["accuracy"]["p"] < 0.001


def test_equal_files_do_not_differ(judged):
    a = judged(rows("yn" * 30))
    result = compare(a, a)
    assert result["accuracy"] == {"a": 0.5, "b": 0.5, "difference": 0, "interval": (0, 0), "p": 1.0}
    assert result["mcnemar"]["p"] == 1


def test_pairs_make_it_sharper_than_two_intervals(judged):
    """b is a with 12 of 200 wrong answers put right: certain in pairs, lost in two intervals of 7 points each way."""
    chance = random.Random(0)
    words = "".join(chance.choice("yn") for _ in range(200))
    better = words.replace("n", "y", 12)
    result = compare(judged(rows(words)), judged(rows(better)))
    assert result["accuracy"]["interval"][0] > 0.02
    assert result["accuracy"]["p"] < 0.001 and result["mcnemar"]["p"] == 2 / 2**12


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (rows("yn", "openai model=m2"), "judged by different judges: openai model=m against openai model=m2"),
        (rows("yn", RULES), "judged by different judges: openai model=m against rules alone"),
        (rows("yny"), r"different questions: only the second file has 1 \('q2'\); left out"),
        (rows("y"), r"different questions: only the first file has 1 \('q1'\); left out"),
        (rows("ym"), r"no verdict yet on 1 \('q1'\); left out"),
        ([{**rows("y")[0], "question": "x"}, *rows("n", first=1)], r"another question under the same question_id in 1"),
        ([{**rows("y")[0], "answer": "x"}, *rows("n", first=1)], r"another answer under the same question_id in 1"),
    ],
)
def test_what_makes_it_doubtful_is_said(judged, tmp_path, capsys, other, expected):
    assert [] == compare(judged(rows("yn")), judged(rows("yn")))["warnings"]
    a, b = write(tmp_path / "a.jsonl", rows("yn")), write(tmp_path / "b.jsonl", other)
    assert main(["compare", str(a), str(b), "--out", str(tmp_path / "c.json")]) == 0
    out = capsys.readouterr().out
    (warning,) = (line for line in out.splitlines() if line.startswith("warning: "))
    assert re.search(expected, warning), warning
    assert "a judged by openai model=m\n" in out
    assert len(json.loads((tmp_path / "c.json").read_text())["warnings"]) == 1


def test_rules_beside_a_judge_are_no_other_judge(judged):
    mixed = rows("y", RULES) + rows("n", first=1)
    assert compare(judged(mixed), judged(rows("yn")))["warnings"] == []
    later = rows("y", "rules version=2 simplemma=2.0.0") + rows("n", first=1)
    assert "different rules" in compare(judged(mixed), judged(later))["warnings"][0]


def test_predictions_that_say_correct_themselves(judged):
    a = judged([{"question_id": n, "correct": n < 2} for n in range(4)])
    result = compare(a, judged([{"question_id": n, "correct": True} for n in range(4)]))
    assert result["accuracy"]["difference"] == 0.5 and "score" not in result and result["warnings"] == []
    mixed = compare(a, judged([{**row, "question_id": n} for n, row in enumerate(rows("ynyn"))]))
    assert ITSELF in mixed["warnings"][0]


def test_compare_refuses(judged, tmp_path, capsys):
    with pytest.raises(CoverageError, match="no question has a verdict in both files"):
        compare(judged(rows("yn")), judged(rows("yn", first=2)))
    with pytest.raises(AnnotationError, match="question_id 'q0': no verdict: expected judge"):
        judged([{"question_id": "q0", "question": "q", "answer": "a", "prediction": "p"}])
    with pytest.raises(CoverageError, match="more than one row"):
        judged(rows("y") * 2)
    assert main(["compare", str(tmp_path / "none"), str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err


# ---- calibrate ------------------------------------------------------------------------------------------------


def test_videos_may_be_called_anything(judged):
    files = [
        judged([{**row, "video_id": [n % 25]} for n, row in enumerate(rows(words * 25))]) for words in ("yn", "ny")
    ]
    assert compare(*files, resamples=10)["bootstrap"]["of"] == "videos"


@pytest.mark.parametrize("command", ["compare", "calibrate"])
def test_a_comparison_replaces_none_of_its_files(tmp_path, capsys, command):
    path = str(write(tmp_path / "a.jsonl", rows("yn")))
    before = open(path, encoding="utf-8").read()
    for name, said in ((path, "would replace the verdicts"), (f"{path}/c.json", "c.json: cannot be written")):
        assert main([command, path, path, "--out", name]) == 2
        assert said in capsys.readouterr().err
    assert open(path, encoding="utf-8").read() == before
    for words in (["--resamples", "0"], ["--bootstrap-seed", "-1"]):
        with pytest.raises(SystemExit):
            main([command, path, path, *words])
        assert "expected at least" in capsys.readouterr().err


def test_two_judges(judged, tmp_path, capsys):
    a = rows("y" * 25 + "n" * 25 + "yu")
    b = rows("y" * 20 + "n" * 5 + "y" * 10 + "n" * 15 + "uy", "local model=l")
    result = calibrate(judged(a), judged(b))
    both = result["all"]
    assert both == result["without_rules"]
    assert both["num_answers"] == 50 and both["kappa"] == pytest.approx(0.4) and both["agreement"] == 0.7
    assert both["counts"] == {"a_yes_b_yes": 20, "a_yes_b_no": 5, "a_no_b_yes": 10, "a_no_b_no": 15}
    assert both["accuracy_offset"] == pytest.approx(0.1) and both["score_offset"] == pytest.approx(0.4)
    assert both["accuracy_offset_interval"][0] < 0.1 < both["accuracy_offset_interval"][1]
    assert both["spearman"] == pytest.approx(0.40824829)
    assert result["warnings"] == ["2 of 52 answers are unjudged on one side at least; left out"]
    paths = [str(write(tmp_path / name, lines)) for name, lines in (("a.jsonl", a), ("b.jsonl", b))]
    assert main(["calibrate", *paths, "--out", str(tmp_path / "c.json")]) == 0
    out = capsys.readouterr().out
    assert "kappa             0.400" in out and "a judged by openai model=m\nb judged by local model=l\n" in out
    assert json.loads((tmp_path / "c.json").read_text())["all"]["kappa"] == pytest.approx(0.4)


def test_what_rules_decided_is_no_agreement_of_judges(judged):
    decided = [{**row, "rule": "exact"} for row in rows("y" * 40, RULES)]
    result = calibrate(judged(decided + rows("yyynnn", first=40)), judged(decided + rows("yynnny", "l", first=40)))
    assert result["all"]["num_answers"] == 46 and result["without_rules"]["num_answers"] == 6
    assert result["all"]["agreement"] > 0.9 and result["without_rules"]["kappa"] == pytest.approx(1 / 3)
    only = calibrate(judged(decided), judged(decided))
    assert only["without_rules"] is None and only["all"]["kappa"] is None


def test_calibrate_refuses_other_predictions(judged):
    other = [{**rows("y")[0], "prediction": "x"}, *rows("n", first=1)]
    with pytest.raises(CoverageError, match=r"the same predictions only.*differ in 1 \('q0'\) of 2"):
        calibrate(judged(rows("yn")), judged(other))
    with pytest.raises(CoverageError, match="no answer was judged on both sides"):
        calibrate(judged(rows("uy")), judged(rows("yu")))
