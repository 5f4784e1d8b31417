"""Result files: numbers that `verify-result` finds again in the predictions, and what it says where it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_report import judge, pattern, prediction, write_run

from lavis_lstp.commands import cli
from lavis_lstp.files import sha256_file, write_json, write_jsonl
from lavis_lstp.inference.loading import EXAMPLE

MANIFEST = {
    "config": {
        "run": {"task": "video_qa", "seed": 3},
        "model": {"arch": "lstp_tiny", "selector": {"name": "lstp"}},
        "datasets": {},
    },
    "command": ["evaluate.py", "--options", "x=https://me:word@host/x"],
}


@pytest.fixture
def board(tmp_path) -> Path:
    """A result file with its predictions; the run itself is gone."""
    run = tmp_path / "run"
    file = write_run(run, [prediction(i, pattern(i)) for i in range(30)], num_questions=32)
    write_json(file.with_name(f"{file.stem}_digests.json"), {"weights": "w", "data": "d"})
    write_json(run / "evaluate_manifest.json", MANIFEST)
    assert report(run, tmp_path) == 0
    shutil.rmtree(run)
    return tmp_path / "board" / "x.json"


def report(run: Path, folder: Path) -> int:
    out = ["--out", str(folder / "x.html"), "--result", str(folder / "board" / "x.json")]
    return cli.main(["report", str(run), "--pictures", "0", *out])


def verify(file: Path, capsys, *more: object) -> tuple[int, str]:
    capsys.readouterr()
    status = cli.main(["verify-result", str(file), *map(str, more)])
    out, err = capsys.readouterr()
    assert len((out + err).strip().splitlines()) == 1
    return status, out + err


def change(file: Path, **values) -> None:
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), **values})


def test_the_numbers_are_found_again_without_the_run(board, capsys):
    said = json.loads(board.read_text())
    assert said["numbers"]["accuracy"] == 20 / 30 and said["numbers"]["num_questions"] == 32
    assert said["numbers"]["partial"] is True and said["judges"] == {"nobody: exact match": 30}
    assert said["digests"]["weights"] == "w" and said["digests"]["data"] == "d" and len(said["digests"]["config"]) == 64
    assert said["command"][2] == "x=https://***@host/x" and said["measured"]["ms_a_question"] > 0
    assert verify(board, capsys) == (0, f"{board}: {len(said['numbers'])} numbers recomputed, all as recorded\n")


def test_each_number_that_differs_is_named(board, capsys):
    numbers = json.loads(board.read_text())["numbers"]
    for name, value in numbers.items():
        wrong = 99 if not value else not value if isinstance(value, bool) else value + 1
        if name != "num_questions":  # more questions than there are predictions change what follows from them
            change(board, numbers={**numbers, name: wrong})
            status, line = verify(board, capsys)
            assert status == 1 and f"DIFFERS: {name} is {value}, recorded {wrong}\n" in line
    for changed in ({**numbers, "num_questions": 31}, {**numbers, "extra": 1}, {**numbers, "extra": None}):
        change(board, numbers=changed)
        assert verify(board, capsys)[0] == 1
    change(board, numbers=numbers, judges={"somebody else": 30})
    assert "judges are {'nobody: exact match': 30}, recorded" in verify(board, capsys)[1]


def test_other_predictions_are_told_by_digest_and_numbers(board, capsys, tmp_path):
    other = tmp_path / "other.jsonl"
    write_jsonl(other, [prediction(i, True) for i in range(30)])
    status, line = verify(board, capsys, "--predictions", other)
    assert (
        status == 1 and f"sha256 of predictions is {sha256_file(other)}" in line and "right is 30, recorded 20" in line
    )
    write_jsonl(other, [prediction(i, pattern(i)) for i in range(29)])
    assert "digest of the questions is" in verify(board, capsys, "--predictions", other)[1]
    (board.parent / "x.predictions.jsonl").unlink()
    status, line = verify(board, capsys)
    assert status == 2 and "no x.predictions.jsonl beside it; say where it is (--predictions PATH)" in line


def test_verdicts_of_a_judge_are_part_of_it(tmp_path, capsys):
    file = write_run(tmp_path / "run", [prediction(i, pattern(i)) for i in range(30)])
    judge(file, "--judge", "rules", cache=tmp_path / "c")
    assert report(tmp_path / "run", tmp_path) == 0
    board = tmp_path / "board" / "x.json"
    verdicts = board.with_name("x.verdicts.jsonl")
    original = file.with_name("test_video_qa_judged_rules.jsonl")
    assert verdicts.read_bytes() == original.read_bytes() and verify(board, capsys)[0] == 0
    assert verify(board, capsys, "--predictions", file, "--verdicts", original)[0] == 0
    rows = [json.loads(line) for line in verdicts.read_text().splitlines()]
    write_jsonl(verdicts, [{**row, "pred": "yes"} for row in rows])
    status, line = verify(board, capsys)
    assert status == 1 and "sha256 of verdicts is" in line and "right is 30, recorded 20" in line


def test_one_evaluation_and_a_name_are_expected(tmp_path, capsys):
    for name in ("a", "b"):
        write_run(tmp_path / name, [prediction(i, True) for i in range(3)])
    for paths, result in ((["a", "b"], "x.json"), (["a"], "x.txt")):
        given = [str(tmp_path / path) for path in paths]
        assert cli.main(["report", *given, "--pictures", "0", "--result", str(tmp_path / result)]) == 2
        assert "expected a name that ends with .json, and one evaluation, not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("predictions", {"file": "../secret.jsonl", "sha256": "x"}),
        ("predictions", {"file": "/etc/passwd", "sha256": "x"}),
        ("predictions", "pipe:true"),
        ("verdicts", {"file": "a/b", "sha256": "x"}),
        ("numbers", {"questions": 1, "hidden": 0, "accuracy": 1e308}),
        ("numbers", {"questions": 1, "hidden": 0, "accuracy": "1"}),
        ("numbers", {"questions": 1, "hidden": 0, "num_questions": 2.5}),
        ("bootstrap", {"resamples": 10**9, "seed": 0}),
        ("bootstrap", {}),
        ("format", "other"),
        ("version", 2),
        ("digests", []),
    ],
)
def test_a_file_of_another_form_is_one_line(board, capsys, key, value):
    change(board, **{key: value})
    status, line = verify(board, capsys)
    assert status == 2 and f"'{key}' is not of the form that was written" in line


def test_numbers_that_are_none_and_escapes_are_refused(board, capsys):
    text = board.read_text()
    for wrong in ("NaN", "1e999", "1" + "0" * 400):
        board.write_text(text.replace('"accuracy": 0.6666666666666666', f'"accuracy": {wrong}'))
        assert verify(board, capsys)[0] == 2
    numbers = json.loads(text)["numbers"]
    board.write_text(text)
    change(board, numbers={**numbers, "a\x1b[2J\nb": 1})
    status, line = verify(board, capsys)
    assert status == 1 and "\x1b" not in line


RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_the_results_in_docs_are_found_again(file, capsys):
    assert verify(file, capsys)[0] == 0


def test_the_shipped_example_has_its_result():
    """Of the model and the clip that ship: what the digests were made of has not changed since."""
    said = json.loads((RESULTS / "example.json").read_text(encoding="utf-8"))
    assert said["numbers"]["questions"] == len(json.loads((EXAMPLE / "questions.json").read_text(encoding="utf-8")))
    assert said["digests"].keys() == {"config", "weights", "data", "questions"} and all(said["digests"].values())
    assert "projects/lstp/tiny_example.yaml" in said["command"]
