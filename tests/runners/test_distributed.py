"""Two gloo ranks on the CPU do what one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import make_runner

from lavis_lstp.data.shapes import shapes_qa
from lavis_lstp.runners import checkpoint

HERE = Path(__file__).resolve().parents[1]

# 17 samples in groups of 8: the last group holds one, so that one rank is idle.
PLAIN = {"length": 17, "dropout": 0.0, "accum_grad_iters": 2, "max_grad_norm": 1.0, "batch_size_eval": 1}
SPLITS = {"valid_splits": ["val"], "test_splits": ["test"], "valid_on": "answers"}
DROPOUT = {**PLAIN, "dropout": 0.3, "save_every_steps": 2, "resume_ckpt_path": "auto"}
TWO_RANKS = {"batch_size_train": 2}
ONE_RANK = {"batch_size_train": 4}


def rows(folder: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory) -> Path:
    """Runs of the same two processes: plain; with dropout; that stopped in an epoch, and resumed; two that fail."""
    folder = tmp_path_factory.mktemp("two_ranks")
    groups = [
        {**PLAIN, **TWO_RANKS, **SPLITS, "output_dir": str(folder / "plain")},
        {**DROPOUT, **TWO_RANKS, "output_dir": str(folder / "unbroken")},
        {**DROPOUT, **TWO_RANKS, "output_dir": str(folder / "resumed"), "raise_at": 5},
        {**DROPOUT, **TWO_RANKS, "output_dir": str(folder / "resumed")},
        {
            **PLAIN,
            "task": "video_qa",
            "evaluate": True,
            "test_splits": ["test"],
            "lose": "q1",
            "output_dir": str(folder / "lost"),
        },
        {**PLAIN, **TWO_RANKS, "output_dir": str(folder / "nan"), "nan_at": 4},
    ]
    assert ranks.run(2, "toy", groups) == [0, 0]
    return folder


def test_two_ranks_equal_one_process_with_twice_the_batch(runs, tmp_path):
    one = make_runner(tmp_path, **PLAIN, **ONE_RANK)
    one.train()
    two = rows(runs / "plain", "train")
    mine = rows(tmp_path, "train")
    assert len(two) == len(mine) == 6
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in mine], rel=1e-5)
    weights = load_file(str(checkpoint.find(runs / "plain") / "model.safetensors"))
    for name, value in checkpoint.trained_state(one.bare_model).items():
        torch.testing.assert_close(weights[name], value.detach(), rtol=1e-5, atol=1e-6)


def test_uneven_evaluation_equals_that_of_one_process_to_the_byte(runs, tmp_path):
    """3 questions on 2 ranks: nothing is padded, nothing waits, and the file is the same."""
    one = make_runner(tmp_path, **PLAIN, **ONE_RANK, **SPLITS)
    best = runs / "plain" / "checkpoints" / "best"
    checkpoint.load_trained_state(one.bare_model, checkpoint.load_weights(best), best)
    metrics = one.evaluate(skip_reload=True)
    for name in ("test_video_instruct.jsonl", "test_video_instruct_metrics.json"):
        assert (runs / "plain" / "result" / name).read_bytes() == (tmp_path / "result" / name).read_bytes()
    assert metrics["test"]["num_scored"] == 3
    assert len((tmp_path / "result" / "test_video_instruct.jsonl").read_text().splitlines()) == 3


CUTS = {
    "lstp": ((1, 1, 0), (1, 5, 2), (1, 7, 0), (1, 40, 0), (2, 7, 0), (3, 5, 1)),
    "gumbel": ((1, 1, 0), (1, 7, 0), (3, 5, 0)),  # draws; for each question by itself
}
"""By selector: ranks, batch size and loader processes of evaluations that must agree; the first is the plainest."""


def test_lstp_answers_alike_in_any_batch_on_any_number_of_ranks(ranks, tmp_path):
    """Predictions, spans and frames are equal for any batch size, number of ranks and of loader processes.

    Log-probabilities are sums of floats that another batch makes in another order: what is left of that after rounding
    is one unit of the last digit, in few rows. With one batch size the files are equal to the byte.
    """
    sizes = {"train_videos": 0, "val_videos": 0, "test_videos": 3, "train_images": 0, "size": 32}
    shapes_qa.generate(tmp_path / "data", workers=1, **sizes)

    def words(selector: str, batch_size: int, workers: int, folder: str) -> list[str]:
        return [
            f"datasets.lstp_shapes.root={tmp_path / 'data'}",
            "datasets.lstp_shapes.num_frames=8",
            *(f"datasets.lstp_shapes.generate.{key}={value}" for key, value in sizes.items()),
            f"model.selector.name={selector}",
            f"run.output_dir={tmp_path / folder}",
            f"run.batch_size_eval={batch_size}",
            f"run.num_workers={workers}",
            "run.evaluate=true",
        ]

    runs: dict[int, list[list[str]]] = {}
    for selector, cuts in CUTS.items():
        for world_size, batch_size, workers in cuts:
            folder = f"{selector}_{world_size}_{batch_size}"
            runs.setdefault(world_size, []).append(words(selector, batch_size, workers, folder))
    for world_size, jobs in runs.items():
        job = {"cfg": "projects/lstp/tiny_ft.yaml", "runs": jobs}
        assert ranks.run(world_size, "lavis_run", job) == [0] * world_size
    files = {path.parent.parent.name: path.read_bytes() for path in tmp_path.glob("*/result/test_video_instruct.jsonl")}
    assert files["lstp_1_5"] == files["lstp_3_5"] and files["lstp_1_7"] == files["lstp_2_7"]
    for selector, cuts in CUTS.items():
        plain = [json.loads(line) for line in files[f"{selector}_1_1"].splitlines()]
        assert len(plain) == 18 and plain[0]["log_prob"]["tokens"] > 1
        likely = [row.pop("log_prob") for row in plain]
        for world_size, batch_size, _ in cuts[1:]:
            other = [json.loads(line) for line in files[f"{selector}_{world_size}_{batch_size}"].splitlines()]
            theirs = [row.pop("log_prob") for row in other]
            assert plain == other
            for left, right in zip(likely, theirs, strict=True):
                assert left == pytest.approx(right, abs=1.5e-4)
            assert sum(left != right for left, right in zip(likely, theirs, strict=True)) <= 3, "of 18"


def test_resumed_on_two_ranks_to_the_bit(runs):
    """Dropout differs between the ranks, so this needs the generators of both."""
    states = [
        (load_file(str(folder / "model.safetensors")), torch.load(folder / "trainer.pt", weights_only=True))
        for folder in (checkpoint.find(runs / "unbroken"), checkpoint.find(runs / "resumed"))
    ]
    for name, value in states[0][0].items():
        assert torch.equal(value, states[1][0][name]), name
    generators = [trainer["generators"] for _, trainer in states]
    assert not torch.equal(generators[0][0]["torch"], generators[0][1]["torch"]), "ranks draw differently"
    for rank in range(2):
        assert torch.equal(generators[0][rank]["torch"], generators[1][rank]["torch"])


def test_an_error_reaches_every_rank(runs):
    """Rank 0 alone joins the records and one rank alone sees the NaN; none may wait for the other."""
    for rank in range(2):
        assert "2 of 3 questions have a prediction" in (runs / "lost" / f"error_rank{rank}.txt").read_text()
    errors = [(runs / "nan" / f"error_rank{rank}.txt").read_text() for rank in range(2)]
    assert all("loss = nan" in error for error in errors)
    assert [("on this rank" in error, "q4" in error) for error in errors].count((True, True)) == 1


def test_a_killed_rank_ends_the_run_and_one_process_can_go_on(tmp_path, caplog):
    """Under torchrun itself; most other tests fork their ranks."""
    options = {**DROPOUT, **TWO_RANKS, "output_dir": str(tmp_path), "kill_at": 5, "on_rank": 1}
    words = [str(HERE / "toy.py"), *(f"{key}={json.dumps(value)}" for key, value in options.items())]
    killed = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words],
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=600,
    )
    assert killed.returncode != 0
    assert checkpoint.find(tmp_path).name == "step_00000004"
    runner = make_runner(tmp_path, **DROPOUT, **ONE_RANK)
    runner.train()
    assert "resuming on 1 processes what 2 saved" in caplog.text
    assert runner.position.step == 6 and [row["step"] for row in rows(tmp_path, "train")] == list(range(1, 7))
