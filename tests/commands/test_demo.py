"""The demo's steps and verdict; the whole of it, tiny, is slow and belongs to `make test-slow`."""

from __future__ import annotations

import json

import pytest
from video_files import numbered_video

from lavis_lstp.commands import chain, demo
from lavis_lstp.metrics.qa import accuracy_interval
from lavis_lstp.report.table import STAGES


def row(name: str, right: int, questions: int = 600) -> dict:
    return {
        "name": name,
        "title": name,
        "questions": questions,
        "accuracy": right / questions,
        "interval": list(accuracy_interval(right, questions)),
        "span_iou": 0.5,
        "milliseconds": dict.fromkeys(STAGES, 1.0),
    }


def rows(uniform: int, trained: int, lstp: int, oracle: int) -> dict[str, dict]:
    counts = {"uniform": uniform, "uniform_trained": trained, "random": 90, "lstp": lstp, "oracle": oracle}
    return {name: row(name, right) for name, right in counts.items()}


@pytest.mark.parametrize(
    ("counts", "met"),
    [
        ((10, 90, 500, 510), True),
        ((10, 90, 440, 510), False),  # 86 % of the oracle
        ((10, 400, 500, 510), False),  # 17 points above the uniform model that trained on such frames
        ((400, 10, 500, 510), False),  # the better of the two counts
        ((0, 0, 0, 0), False),
    ],
)
def test_verdict_compares_with_the_better_uniform_baseline_and_with_the_oracle(counts, met):
    assert demo.verdict(rows(*counts))["met"] is met


def test_table_says_when_the_claim_is_not_met():
    for counts, said in (((10, 90, 500, 510), ": met."), ((10, 90, 440, 510), "NOT met")):
        found = rows(*counts)
        result = {"chance": 0.146, "rows": list(found.values()), "verdict": demo.verdict(found)}
        text = demo.table({**result, "spans": {"iou": 0.8}, "peak_memory_mib": 1000})
        assert said in text and text.count("\n|") == 6
        assert f"{' + '.join(['1.0'] * len(STAGES))} = {len(STAGES)}.0" in text


def test_each_row_of_the_table_is_evaluated_with_its_own_frames_and_answerer(tmp_path, caplog):
    ran, places = [], []
    work = demo.Demo(tmp_path, ["run.max_epoch=1"])
    work.chain.step = lambda name, command, **how: places.append(how["place"]) or ran.append((name, command))
    work.report = dict
    with caplog.at_level("INFO"):
        work.run()
    assert "11 of 11 steps to do, about 13 minutes on two quiet cores" in caplog.text
    commands = dict(ran)
    evaluations = [f"eval_{row.name}" for row in demo.ROWS]
    assert list(commands) == ["base", "flow", "spans", "sampler", "lstp", "uniform", *evaluations]
    assert (
        places == [f"step {number} of 11, " for number in range(1, 12)] and commands.keys() == work.chain.about_s.keys()
    )

    def last(name: str, key: str) -> str:
        return [word.partition("=")[2] for word in commands[name] if word.startswith(f"{key}=")][-1]

    parts = {name: last(name, "model.checkpoint").strip("[]").split(",") for name in ("lstp", "uniform", *evaluations)}
    for name in evaluations:
        answerer = "uniform" if name == "eval_uniform_trained" else "lstp"
        assert parts[name] == [str(tmp_path / part) for part in ("base", "sampler", answerer)]
        assert last(name, "run.test_splits") == "[test]"
    assert parts["lstp"] == parts["uniform"] == [str(tmp_path / "base"), str(tmp_path / "sampler")]
    flows = {name: last(name, "model.flow.name") for name in evaluations}
    assert flows["eval_lstp"] == "dis"
    chosen = {name: last(name, "model.selector.name") for name in evaluations}
    assert chosen.pop("eval_lstp") == "lstp" and set(chosen.values()) == {"uniform", "random", "given"}, (
        "no flow is used"
    )
    assert last("eval_oracle", "model.selector.span_key") == "gold_span"
    assert last("uniform", "model.selector.name") == last("eval_uniform_trained", "model.selector.name") == "uniform"
    assert all("run.max_epoch=1" in command for name, command in commands.items() if name != "flow")


def test_needles_are_learned_in_windows_and_measured_in_whole_videos(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(chain.Chain, "step", lambda self, name, command, **_: ran.append((name, command)))
    monkeypatch.setattr(demo, "ablate", lambda cells, out, options: [(cell, options) for cell in cells])
    found = demo.with_film(tmp_path / "film.mp4", tmp_path, ["run.max_epoch=1", "base:run.seed=2"])
    names = ["base", "flow_train", "flow_val", "flow_test", "spans", "sampler", "lstp"]
    assert [name for name, _ in ran] == [*names, "long_spans", "flow_long", "sampler_long"]
    film = f"datasets.lstp_shapes.generate.film={tmp_path / 'film.mp4'}"
    assert all(film in command and "run.max_epoch=1" in command for name, command in ran if "flow" not in name)
    assert len(found) == 20 and [cell.frames for cell, _ in found[::5]] == [2, 4, 8, 16]
    _, options = found[0]
    assert film in options and "base:run.seed=2" not in options
    assert f"datasets.lstp_shapes.root={tmp_path}/needles" in options and "model.sampler.window=64" in options


@pytest.mark.slow
def test_the_whole_demo_with_a_film_tiny(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "FILM_COUNTS", (2, 4))
    film = numbered_video(tmp_path / "film.mp4", 75, width=64, height=32)
    sizes = {"train_videos": 2, "val_videos": 1, "test_videos": 1, "train_images": 16, "size": 32, "haystack_s": 151}
    options = [f"datasets.lstp_shapes.generate.{key}={value}" for key, value in sizes.items()]
    command = ["--film", str(film), "--out", str(tmp_path / "demo"), "--options", *options, "run.max_epoch=1"]
    assert demo.main(command) == 0
    said = capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads((tmp_path / "demo" / "table.json").read_text())["rows"]}
    assert len(rows) == 10 and {row["questions"] for row in rows.values()} == {12}
    assert rows["tiny_eval_oracle_2"]["span_iou"] == 1.0 and rows["tiny_eval_lstp_4"]["frames_scored"] == 600
    assert "| 2 s | 10 s | 60 s |" in said and (tmp_path / "demo" / "accuracy.png").stat().st_size > 0
    assert demo.main(command) == 0  # what is done is not done again


@pytest.mark.slow
def test_the_whole_demo_tiny(tmp_path, capsys):
    sizes = {"train_videos": 4, "val_videos": 2, "test_videos": 3, "train_images": 16}
    options = [f"datasets.lstp_shapes.generate.{key}={value}" for key, value in sizes.items()]
    code = demo.main(["--out", str(tmp_path / "demo"), "--options", *options, "run.max_epoch=1"])
    out = capsys.readouterr().out
    assert code == 1 and "NOT met" in out  # nothing can be learnt from so little
    for name in demo.FILES:
        assert (tmp_path / "demo" / name).stat().st_size > 0
    table = json.loads((tmp_path / "demo" / "table.json").read_text())
    assert [r["questions"] for r in table["rows"]] == [18] * 5
    assert next(r for r in table["rows"] if r["name"] == "oracle")["span_iou"] == 1.0
