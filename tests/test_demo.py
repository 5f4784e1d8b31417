"""The demo's steps and verdict; the whole of it, tiny, is slow and belongs to `make test-slow`."""

from __future__ import annotations

import json

import pytest

from lavis_lstp import demo
from lavis_lstp.errors import ConfigError, LstpError
from lavis_lstp.metrics.qa import accuracy_interval


def row(name: str, right: int, questions: int = 600) -> dict:
    return {
        "name": name,
        "title": name,
        "questions": questions,
        "accuracy": right / questions,
        "interval": list(accuracy_interval(right, questions)),
        "span_iou": 0.5,
        "milliseconds": dict.fromkeys(demo.STAGES, 1.0),
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
        assert "1.0 + 1.0 + 1.0 + 1.0 + 1.0 = 5.0" in text


def test_a_finished_step_is_not_run_again_and_a_failed_one_is(tmp_path):
    runs = tmp_path / "runs"
    work = demo.Demo(tmp_path)
    command = ["-c", f"open({str(runs)!r}, 'a').write('x')"]
    work.step("one", command)
    work.step("one", command)
    assert runs.read_text() == "x"
    failing = ["-c", "import sys; print('what went wrong'); sys.exit(3)"]
    for _ in range(2):
        with pytest.raises(LstpError, match="step two ended with status 3: what went wrong") as error:
            work.step("two", failing)
        assert "\n" not in str(error.value)


def test_results_of_other_options_do_not_pass_for_these(tmp_path):
    demo.Demo(tmp_path).step("one", ["-c", "pass"])
    with pytest.raises(ConfigError, match="other options"):
        demo.Demo(tmp_path).step("one", ["-c", "0"])


@pytest.mark.slow
def test_the_whole_demo_tiny(tmp_path, capsys):
    sizes = {"train_videos": 4, "val_videos": 2, "test_videos": 3, "train_images": 16}
    options = [f"datasets.lstp_shapes.generate.{key}={value}" for key, value in sizes.items()]
    code = demo.main(["--out", str(tmp_path / "demo"), "--options", *options, "run.max_epoch=1"])
    out = capsys.readouterr().out
    assert code == 1 and "NOT met" in out  # nothing can be learnt from so little
    for name in ("table.md", "table.json", "explanation.png"):
        assert (tmp_path / "demo" / name).stat().st_size > 0
    table = json.loads((tmp_path / "demo" / "table.json").read_text())
    assert [r["questions"] for r in table["rows"]] == [18] * 5
    assert next(r for r in table["rows"] if r["name"] == "oracle")["span_iou"] == 1.0
