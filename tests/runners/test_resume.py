"""A run that was stopped and resumed ends with the bits of one that was not."""

from __future__ import annotations

import json
import logging
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import make_runner

from lavis_lstp.data.shapes import shapes_qa
from lavis_lstp.errors import ConfigError, WeightsError
from lavis_lstp.runners import RunnerLSTP, checkpoint

HERE = Path(__file__).resolve().parents[1]
OPTIONS = {"batch_size_train": 2, "accum_grad_iters": 2, "save_every_steps": 2, "length": 18, "dropout": 0.3}
STEPS = 10  # 2 epochs of 4 full groups and a tail of 2


class Killed(Exception):
    pass


class Dying(RunnerLSTP):
    """Raises before optimizer step `at`; only what is on disk survives, as with SIGKILL."""

    at = 0

    def _train_step(self, *args):
        if self.position.step == self.at:
            raise Killed
        return super()._train_step(*args)


def final_state(folder: Path) -> dict:
    last = checkpoint.find(folder)
    state = load_file(str(last / "model.safetensors"))
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    trainer = torch.load(last / "trainer.pt", weights_only=True)
    state.update({f"{index}.{key}": value for index, slots in optimizer.items() for key, value in slots.items()})
    state["rng"] = trainer["generators"][0]["torch"]
    return {"position": trainer["position"], **state}


def assert_equal_runs(left: Path, right: Path) -> None:
    a, b = final_state(left), final_state(right)
    assert a.keys() == b.keys() and a["position"] == b["position"]
    for name, value in a.items():
        assert name == "position" or torch.equal(value, b[name]), name


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    make_runner(folder, valid_splits=["val"], **OPTIONS).train()
    assert len(losses(folder)) == STEPS
    return folder


@pytest.mark.parametrize("at", range(STEPS))
def test_stopped_before_any_step(unbroken, tmp_path, at):
    runner = make_runner(tmp_path, valid_splits=["val"], resume_ckpt_path="auto", cls=Dying, **OPTIONS)
    runner.at = at
    with pytest.raises(Killed):
        runner.train()
    torch.manual_seed(12345)  # the process that resumes has other generators
    resumed = make_runner(tmp_path, valid_splits=["val"], resume_ckpt_path="auto", **OPTIONS)
    resumed.train()
    assert_equal_runs(unbroken, tmp_path)
    assert losses(tmp_path) == losses(unbroken), "log.jsonl holds each step once"
    assert resumed.store.best() == json.loads((unbroken / "checkpoints" / "best.json").read_text())


def run_toy(ranks, folder: Path, **options) -> int:
    """The exit status of one process of its own."""
    options = {**OPTIONS, "output_dir": str(folder), "resume_ckpt_path": "auto", "valid_splits": ["val"], **options}
    (status,) = ranks.run(1, "toy", options)
    return status


@pytest.mark.parametrize("workers", [0, 2])
def test_sigkill_at_a_random_step(ranks, unbroken, tmp_path, workers):
    at = random.SystemRandom().randrange(1, STEPS)
    assert run_toy(ranks, tmp_path, kill_at=at, num_workers=workers) == -signal.SIGKILL
    make_runner(tmp_path, valid_splits=["val"], resume_ckpt_path="auto", num_workers=workers, **OPTIONS).train()
    assert_equal_runs(unbroken, tmp_path)


def test_sigterm_saves_and_exits_143(ranks, unbroken, tmp_path):
    assert run_toy(ranks, tmp_path, term_at=4) == 143
    assert checkpoint.find(tmp_path).name == "step_00000005"  # the step during which it came is finished
    assert json.loads((tmp_path / "run_manifest.json").read_text())["status"] == "terminated"
    make_runner(tmp_path, valid_splits=["val"], resume_ckpt_path="auto", **OPTIONS).train()
    assert_equal_runs(unbroken, tmp_path)


def test_a_torn_checkpoint_falls_back_to_the_one_before(unbroken, tmp_path):
    runner = make_runner(tmp_path, resume_ckpt_path="auto", cls=Dying, **OPTIONS)
    runner.at = 7
    with pytest.raises(Killed):
        runner.train()
    (tmp_path / "checkpoints" / "step_00000006" / "manifest.json").unlink()
    make_runner(tmp_path, resume_ckpt_path="auto", **OPTIONS).train()
    assert_equal_runs(unbroken, tmp_path)


def test_a_finished_run_trains_no_further(unbroken, tmp_path):
    make_runner(tmp_path, resume_ckpt_path="auto", **OPTIONS).train()
    before = (tmp_path / "log.jsonl").read_text()
    runner = make_runner(tmp_path, resume_ckpt_path="auto", cls=Dying, test_splits=["test"], **OPTIONS)
    runner.at = STEPS  # would raise if a step were begun
    assert "test" in runner.train()
    assert (tmp_path / "log.jsonl").read_text().startswith(before)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"seed": 8}, r"run.seed: 7 -> 8"),
        ({"batch_size_train": 4}, r"samples per optimizer step .*: 4 -> 8"),
        ({"length": 17}, r"the training data"),
        ({"task": "video_qa"}, r"run.task: 'video_instruct' -> 'video_qa'"),
    ],
)
def test_a_meaningless_continuation_is_refused(tmp_path, changes, message):
    make_runner(tmp_path, max_steps=1, **OPTIONS).train()
    with pytest.raises(ConfigError, match=f"cannot continue from .*{message}"):
        make_runner(tmp_path, resume_ckpt_path="auto", **{**OPTIONS, **changes}).train()


def test_a_changed_setting_is_named_and_another_model_refused(tmp_path, caplog):
    make_runner(tmp_path, max_steps=1, **OPTIONS).train()
    with caplog.at_level(logging.WARNING):
        make_runner(tmp_path, resume_ckpt_path="auto", max_steps=2, weight_decay=0.1, **OPTIONS).train()
    assert "run.max_steps: 1 -> 2" in caplog.text and "run.weight_decay: None -> 0.1" in caplog.text
    other = make_runner(tmp_path, resume_ckpt_path="auto", max_steps=3, **OPTIONS)
    other.bare_model.frozen.requires_grad_(True)
    with pytest.raises(WeightsError, match="2 missing: frozen.bias, frozen.weight"):
        other.train()


def test_a_path_resumes_into_another_folder(unbroken, tmp_path):
    source = unbroken / "checkpoints" / "best"
    runner = make_runner(tmp_path / "new", resume_ckpt_path=str(source), **OPTIONS)
    runner.train()
    assert runner.position.step == STEPS
    assert json.loads((tmp_path / "new" / "run_manifest.json").read_text())["resumed_from"] == [str(source.resolve())]
    with pytest.raises(ConfigError, match="/new already holds a run .*resume_ckpt_path is .*step_00000008"):
        make_runner(
            tmp_path / "new", resume_ckpt_path=str(unbroken / "checkpoints" / "step_00000008"), **OPTIONS
        ).train()


# ---- LSTP itself, from the command line


LSTP_STEPS, NUM_FRAMES = 12, 4


@pytest.fixture(scope="module")
def lstp_command(tmp_path_factory) -> list[str]:
    """Trains the sampler on two videos' questions for 12 steps of two epochs, but for run.output_dir."""
    root = tmp_path_factory.mktemp("lstp")
    sizes = {"seed": 0, "train_videos": 2, "val_videos": 1, "test_videos": 0, "train_images": 0, "size": 32}
    shapes_qa.generate(root / "data", workers=1, **sizes)
    for split in ("train", "val"):
        questions = json.loads((root / "data" / f"{split}.json").read_text())
        spans = {row["question_id"]: {"span": [i % 3, i % 3 + 2]} for i, row in enumerate(questions)}
        header = {"format": "lavis_lstp.spans", "version": 1, "unit": "frames", "num_frames": NUM_FRAMES}
        (root / f"{split}.json").write_text(json.dumps({**header, "spans": spans}))
    assert len(json.loads((root / "data" / "train.json").read_text())) == LSTP_STEPS
    data = {"root": root / "data", "num_frames": NUM_FRAMES, "image_size": 32}
    data.update({f"generate.{name}": value for name, value in sizes.items()})
    data.update({f"spans.{split}": root / f"{split}.json" for split in ("train", "val")})
    run = {"max_epoch": 2, "batch_size_train": 2, "save_every_steps": 1, "log_freq": 1, "resume_ckpt_path": "auto"}
    return [
        *("--cfg-path", str(HERE.parent / "projects" / "lstp" / "tiny_sampler.yaml"), "--options"),
        "model.sampler.dropout=0.3",
        *(f"datasets.lstp_shapes.{name}={value}" for name, value in data.items()),
        *(f"run.{name}={value}" for name, value in run.items()),
    ]


def test_lstp_killed_at_a_random_moment_ends_with_the_weights_of_an_unbroken_run(ranks, lstp_command, tmp_path):
    """The kill comes from outside, so it may also hit a checkpoint that is being written."""

    def start(name: str, **options) -> list[int]:
        given = [[{}, [*lstp_command, f"run.output_dir={tmp_path / name}"]]]
        return ranks.run(1, "launched", {"folder": str(tmp_path), "given": given, **options})

    assert start("unbroken") == [0]
    at, seconds = random.SystemRandom().randrange(2, LSTP_STEPS - 4), random.SystemRandom().uniform(0, 0.05)
    killed = [str(tmp_path / "killed" / "log.jsonl"), at, seconds]
    assert start("killed", killed=killed) == [-signal.SIGKILL]
    done = len(losses(tmp_path / "killed"))
    assert at <= done < LSTP_STEPS

    assert start("killed") == [0]
    manifest = json.loads((tmp_path / "killed" / "run_manifest.json").read_text())
    assert "step_" in manifest["resumed_from"][0]
    assert_equal_runs(tmp_path / "unbroken", tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
    name = "checkpoints/last/model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
