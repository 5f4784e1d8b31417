"""`run.track`: the numbers of log.jsonl as curves, continued by a resumed run."""

from __future__ import annotations

import json
import struct

import pytest
from toy import make_runner

from lavis_lstp.errors import ConfigError
from lavis_lstp.runners import trackers


def events(folder) -> list[tuple[str, int, float]]:
    """(tag, step, value) of TensorBoard's event files, in the order they were written, without purged ones."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for path in sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            (length,) = struct.unpack("<Q", raw[at : at + 8])
            event = Event.FromString(raw[at + 12 : at + 12 + length])
            at += 16 + length
            if event.session_log.status == SessionLog.START:
                found = [row for row in found if row[1] < event.step]
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


def lines(runner) -> list[dict]:
    return [json.loads(line) for line in (runner.output_dir / "log.jsonl").read_text().splitlines()]


def test_curves_hold_what_the_log_holds_and_a_resumed_run_continues_them(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed (pip install '.[test]')")
    how = {"track": ["tensorboard"], "valid_splits": ["val"], "save_every_steps": 3, "log_freq": 1}
    first = make_runner(tmp_path, max_epoch=1, **how)
    first.train()
    resumed = make_runner(tmp_path, max_epoch=2, resume_ckpt_path="auto", **how)
    resumed.train()
    logged = [(row["step"], row["loss"]) for row in lines(resumed) if row["kind"] == "train"]
    curve = [(step, value) for tag, step, value in events(tmp_path / "tracking") if tag == "train/loss"]
    assert [step for step, _ in curve] == [step for step, _ in logged] == list(range(1, len(logged) + 1))
    assert [value for _, value in curve] == pytest.approx([loss for _, loss in logged], rel=1e-5)
    tags = {tag for tag, _, _ in events(tmp_path / "tracking")}
    assert {"train/lr", "train/grad_norm"} <= tags and any(tag.startswith("eval/val/") for tag in tags)


class Recorder:
    """Stands for a tracker of a service that tests cannot reach."""

    made: list = []

    def __init__(self, *place, **settings):
        self.place, self.settings, self.rows, self.ended = place, settings, [], False
        self.made.append(self)

    def start(self):
        pass

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.ended = True


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_services_find_the_run_again_and_get_finite_numbers_alone(tmp_path, monkeypatch, name):
    from accelerate import tracking

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Recorder)
    monkeypatch.setattr(trackers, "check_trackers", lambda names: None)
    Recorder.made = []
    for step in (0, 5):
        one = trackers.Trackers([name], tmp_path / "run", step)
        one.write("train", {"step": 6, "epoch": 1, "loss": 0.5, "lr": float("nan"), "split": None})
        one.write("eval", {"step": 6, "split": "val", "accuracy": 0.25, "note": "x"})
        one.close()
    first, second = Recorder.made
    assert first.settings == second.settings and first.place == second.place == ("lavis_lstp",)
    assert first.rows == [(6, {"train/loss": 0.5}), (6, {"eval/val/accuracy": 0.25})] and second.ended


def test_a_tracker_that_is_not_there_is_said_before_the_run(tmp_path, monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ConfigError, match="run.track: 'tensorboard' is not installed; pip install tensorboardX"):
        make_runner(tmp_path, track=["tensorboard"])
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        make_runner(tmp_path, track=["tensorbord"])
