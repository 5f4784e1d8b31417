"""Answers and verdicts of the published evaluation: converted, replayed, counted as they were."""

from __future__ import annotations

import json

import pytest

from lavis_lstp.commands import cli
from lavis_lstp.errors import AnnotationError
from lavis_lstp.files import read_jsonl
from lavis_lstp.judging.published import RECORDED, published_verdict, read_record
from lavis_lstp.judging.verdict import JUDGED, UNPARSABLE

SAID = {
    "a": {"pred": "yes", "score": 5},
    "b": {"pred": "Yes.", "score": 4.8},
    "c": {"pred": "no", "score": "2"},
    "d": {"pred": "unknown", "score": 1},
    "7": {"pred": "maybe", "score": 3},  # counts in the score alone
    "e": {"pred": "yes", "score": "4.8"},  # no whole number: neither yes nor no, and 0 of 5 points
    "f": {"score": 2},
}
YES, NO, POINTS = 2, 2, 5 + 4 + 2 + 1 + 3 + 0 + 2


@pytest.fixture
def published(tmp_path):
    """merge.jsonl and gpt3.5/<id>.json, one of its ids a number."""
    folder = tmp_path / "gpt3.5"
    folder.mkdir()
    lines = []
    for key, said in SAID.items():
        row = {
            "id": int(key) if key.isdigit() else key,
            "question": f"what is {key}?",
            "answer": "red",
            "pred": f"{key} red",
        }
        lines.append(json.dumps({**row, "pred": row["pred"] + "</s> USER: and then?"}))
        asked = {"q": row["question"], "a": "red", "pred": row["pred"]}
        (folder / f"{key}.json").write_text(json.dumps([said, asked]))
    (tmp_path / "merge.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def test_results_of_the_published_evaluation_give_its_numbers(published, capsys):
    out = published / "p.jsonl"
    assert run("import-answers", published / "merge.jsonl", "--verdicts", published / "gpt3.5", "--out", out) == 0
    rows = list(read_jsonl(out))
    assert rows[1] == {"question_id": "b", "question": "what is b?", "answer": "red", "prediction": "b red"}
    assert [row["question_id"] for row in rows] == list(SAID)
    command = capsys.readouterr().out.splitlines()[-1].split("lavis-lstp ")[1].split()
    assert run(*command) == 0
    result = json.loads((published / "p_judged_replay.json").read_text())
    style = result["published_style"]
    assert style["accuracy"] == YES / (YES + NO) and style["score"] == pytest.approx(POINTS / len(SAID))
    assert result["accuracy"] == pytest.approx(YES / len(SAID)) and result["score"] == pytest.approx(12 / len(SAID))
    assert result["judges"] == {RECORDED: len(SAID)} and result["unjudged"]["unparsable"] == ["7", "e", "f"]
    # what was written is a record of the documented form, with the same numbers
    judged = published / "p_judged_replay.jsonl"
    assert run("judge", out, "--judge", "replay", "--verdicts", judged, "--out", published / "again.jsonl") == 0
    again = json.loads((published / "again.json").read_text())
    assert again["published_style"] == style and again["score"] == result["score"]


def test_the_combined_file_is_the_folder(published):
    folder = published / "gpt3.5"
    combined = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    (published / "all.json").write_text(json.dumps(combined))
    assert read_record(published / "all.json") == read_record(folder)


def test_what_has_no_partner_is_said(published, capsys):
    (published / "gpt3.5" / "a.json").rename(published / "gpt3.5" / "z.json")
    words = (
        "import-answers",
        published / "merge.jsonl",
        "--verdicts",
        published / "gpt3.5",
        "--out",
        published / "p.jsonl",
    )
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert "answers without a verdict: 1 ('a')" in said and "verdicts on no answer: 1 ('z')" in said


@pytest.mark.parametrize(
    ("pred", "score", "status", "correct", "points"),
    [
        ("YES", 3, JUDGED, True, 3),
        ("Not correct", 0, JUDGED, False, 0),
        ("no, not yes", 2, JUDGED, True, 2),  # as published
        ("unknown", 4.8, JUDGED, False, 4),
        (None, 4, UNPARSABLE, None, 4),
        (True, 4, UNPARSABLE, None, 4),
        ("yes", None, UNPARSABLE, None, 0),
        ("yes", "five", UNPARSABLE, None, 0),
        ("yes", float("nan"), UNPARSABLE, None, 0),
        ("yes", float("inf"), UNPARSABLE, None, 0),
    ],
)
def test_a_verdict_counts_as_published(pred, score, status, correct, points):
    verdict = published_verdict("here", {"pred": pred, "score": score})
    assert (verdict.status, verdict.correct, verdict.score, verdict.judge) == (status, correct, points, RECORDED)


def test_a_score_outside_the_scale_is_an_error():
    with pytest.raises(AnnotationError, match="here: expected a score of 0 to 5, got 45"):
        published_verdict("here", {"pred": "yes", "score": 45})


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        (
            "merge.jsonl",
            "{'id': 1, 'pred': __import__('os')}",
            "no complete JSON",
        ),  # the published code evaluates lines
        ("merge.jsonl", '{"id": 1, "question": "q", "answer": "a"}', "expected pred as a text, got None"),
        ("merge.jsonl", '{"id": true, "question": "q", "answer": "a", "pred": ""}', "expected an id"),
        ("merge.jsonl", '{"id": 1, "question": "q", "answer": "a", "pred": ""}\n' * 2, "more than one row"),
        ("gpt3.5/a.json", "{", "a.json: cannot be read as JSON"),
        ("gpt3.5/a.json", '[{"pred": "yes"}]', "expected [{pred, score}, {q, a, pred}]"),
        ("gpt3.5/a.json", '[{"pred": "yes"}, {"q": "q", "a": 3, "pred": ""}]', "expected a as a text, got 3"),
    ],
)
def test_damaged_files_give_one_line(published, capsys, file, content, line):
    (published / file).write_text(content)
    words = (
        "import-answers",
        published / "merge.jsonl",
        "--verdicts",
        published / "gpt3.5",
        "--out",
        published / "p.jsonl",
    )
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1 and not (published / "p.jsonl").exists()


def test_nothing_that_is_read_is_replaced(published, capsys):
    before = (published / "merge.jsonl").read_bytes()
    assert run("import-answers", published / "merge.jsonl", "--out", published / "merge.jsonl") == 2
    assert "would replace what is read" in capsys.readouterr().err
    assert (published / "merge.jsonl").read_bytes() == before
