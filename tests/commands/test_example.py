"""`lavis-lstp ask --example`: the shipped checkpoint answers the shipped clip's questions rightly."""

from __future__ import annotations

import json

import pytest

import lavis_lstp
from lavis_lstp.commands import cli
from lavis_lstp.inference.loading import EXAMPLE

ROWS = json.loads((EXAMPLE / "questions.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def predictor():
    loaded = lavis_lstp.load("example")
    assert loaded.notes == ()
    return loaded


@pytest.mark.parametrize("row", ROWS, ids=[row["question"] for row in ROWS])
def test_each_question_is_answered_and_its_moment_found(predictor, row):
    found = predictor.answer(EXAMPLE / "clip.mp4", row["question"])
    assert found.prediction == row["answer"]
    assert found.span_s == pytest.approx(row["span_s"], abs=0.3)


def test_the_command_answers(tmp_path, capsys):
    assert cli.main(["ask", "--example", "--json", "--picture", str(tmp_path / "why.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = [row for row in ROWS if row["question"] == found["question"]]
    assert found["prediction"] == row["answer"] and (tmp_path / "why.png").is_file()


def test_the_users_own_question_is_asked(tmp_path, capsys):
    words = ["ask", ROWS[2]["question"], "--example", "--json", "--picture", str(tmp_path / "why.png")]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["question"], found["prediction"]) == (ROWS[2]["question"], ROWS[2]["answer"])


def test_example_beside_a_checkpoint_is_refused(capsys):
    assert cli.main(["ask", "--example", "--checkpoint", "x"]) == 2
    assert "--example brings its own" in capsys.readouterr().err


def test_it_is_small():
    assert sum(file.stat().st_size for file in EXAMPLE.iterdir()) < 4_000_000
