"""`run.profile`: every second of a run is some stretch's, and a profiled run ends with the weights of any other."""

from __future__ import annotations

import json
import logging
import time

import pytest
import torch
from toy import make_runner

from lavis_lstp.runners import profile
from lavis_lstp.runners.profile import REST, profiled, span, waiting


class Inside(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.part = torch.nn.Sequential(torch.nn.Linear(2, 2))
        self.fails = False

    def forward(self, value):
        if self.fails:
            raise ValueError("as asked")
        return self.part(value)


def read(folder) -> dict:
    return json.loads((folder / "seconds.json").read_text())


def test_stretches_add_up_and_inner_ones_do_not_count_twice(tmp_path):
    model, begin = Inside(), time.perf_counter()
    with profiled(tmp_path, torch.nn.ModuleDict({"one": model})):
        with span("outer"):
            time.sleep(0.02)
            for _ in range(3):
                with span("inner"):
                    time.sleep(0.02)
        model(torch.zeros(2))
    whole = time.perf_counter() - begin
    found = read(tmp_path)
    assert {name: row["calls"] for name, row in found.items()} == {
        "outer": 1,
        "inner": 3,
        "model: one": 1,
        "model: one.part": 1,
        REST: 1,
    }
    assert 0.06 <= found["inner"]["seconds"] and 0.02 <= found["outer"]["seconds"] < found["inner"]["seconds"]
    assert sum(row["seconds"] for row in found.values()) <= whole
    assert not model._forward_hooks and not model._forward_pre_hooks and not profile._active


def test_what_is_waited_for_is_given_whole(tmp_path):
    with profiled(tmp_path, torch.nn.Identity()):
        assert list(waiting((n for n in range(3)), "items")) == [0, 1, 2]
    assert read(tmp_path)["items"]["calls"] == 4  # the last one finds the end
    assert list(waiting([1], "nothing is profiled")) == [1]


def test_an_error_leaves_a_table(tmp_path, caplog):
    model = Inside()
    model.fails = True
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="as asked"):
        with profiled(tmp_path, torch.nn.ModuleDict({"one": model})), span("step"):
            model(torch.zeros(2))
    assert read(tmp_path)["model: one"]["calls"] == 1 and "100.0 %" not in caplog.text.splitlines()[-1]
    assert "s in all" in caplog.text and not profile._active


def test_a_run_that_is_profiled_is_the_same_run(tmp_path, caplog):
    runs = {}
    for name in ("plain", "profiled"):
        runner = make_runner(tmp_path / name, max_epoch=2, valid_splits=["val"], profile=name == "profiled")
        with caplog.at_level(logging.INFO):
            metrics = runner.train()
        runs[name] = metrics, {key: value.clone() for key, value in runner.bare_model.state_dict().items()}
    assert runs["plain"][0] == runs["profiled"][0]
    assert all(torch.equal(value, runs["profiled"][1][key]) for key, value in runs["plain"][1].items())
    assert not (tmp_path / "plain/profile").exists()
    folder = tmp_path / "profiled/profile"
    steps = runner.position.step
    found = read(folder)
    assert found["optimizer"]["calls"] == found["forward and backward"]["calls"] == steps
    assert found["checkpoint"]["calls"] == 2 and found["answering"]["calls"] >= 2
    trace = json.loads((folder / "trace_rank0.json").read_text())
    named = {event["name"] for event in trace["traceEvents"]}
    assert {"optimizer", "waiting for data", "aten::linear"} <= named
    assert "where the time went" in caplog.text and "forward and backward" in caplog.text


def test_evaluation_is_profiled(tmp_path):
    make_runner(tmp_path, test_splits=["test"], evaluate=True, profile=True).evaluate()
    assert {"answering", "waiting for data", "copying to the device", REST} <= read(tmp_path / "profile").keys()
