"""The memory estimate against what a run allocates on the CPU, and on its own."""

from __future__ import annotations

import sys

import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_lstp.commands import cli, estimate
from lavis_lstp.config import complete_model
from lavis_lstp.config.run import RunSettings
from lavis_lstp.runners.deepspeed import config as deepspeed_config

SIZES = {  # activations outweigh the rest, or are outweighed
    "large": {"batch": 6, "frames": 8, "prompt_tokens": 60, "answer_tokens": 10},
    "small": {"batch": 1, "frames": 1, "prompt_tokens": 5, "answer_tokens": 2},
}
# name: (precision, batches a step, DeepSpeed's configuration)
KINDS = {
    "plain": ("fp32", 1, None),
    "plain accumulated": ("fp32", 2, None),
    **{f"zero{stage}": ("fp32", 1, {"zero_optimization": {"stage": stage}}) for stage in range(4)},
    "zero2 bf16": ("bf16", 2, {"zero_optimization": {"stage": 2}}),
    "zero3 bf16": ("bf16", 1, {"zero_optimization": {"stage": 3}}),
}


def prepared(device: str, kind: str, size: str, world_size: int) -> tuple:
    """Model, complete DeepSpeed configuration or None, and a batch."""
    model_cfg = complete_model(OmegaConf.create({"model": {"arch": "lstp_tiny"}})).model
    model_cfg.selector.name = "uniform"
    if device == "meta":
        model = estimate.build_without_memory(model_cfg)
    else:
        model = registry.get_model_class("lstp_tiny").from_config(model_cfg)
    samples = estimate.example(model, **SIZES[size], device=device)
    precision, accumulate, given = KINDS[kind]
    if given is None:
        return model, None, samples
    run = {"output_dir": "x", "init_lr": 1e-3, "precision": precision, "accum_grad_iters": accumulate}
    settings = RunSettings.from_config({**run, "batch_size_train": SIZES[size]["batch"], "max_grad_norm": 1.0})
    return model, deepspeed_config.complete(given, settings, world_size), samples


QUICK = {("plain", "large", 1), ("zero1", "small", 2), ("zero2", "large", 1), ("zero3", "small", 2)}
ALL = [(kind, size, world_size) for kind in KINDS for size in SIZES for world_size in (1, 2)]


@pytest.mark.parametrize(
    ("kind", "size", "world_size"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in ALL],
)
def test_within_15_percent_of_what_a_run_allocates(ranks, tmp_path, kind, size, world_size):
    pytest.importorskip("deepspeed")
    options = {"kind": kind, "size": size, "world_size": world_size, "output": str(tmp_path / "peak")}
    assert ranks.run(world_size, "memory", options) == [0] * world_size
    measured = max(int((tmp_path / f"peak.{rank}").read_text()) for rank in range(world_size))
    model, deepspeed, samples = prepared("meta", kind, size, world_size)
    precision, accumulate, _ = KINDS[kind]
    options = {"precision": precision, "accumulate": accumulate, "deepspeed": deepspeed}
    found = estimate.divide(model, samples, processes=world_size, **options)
    assert found.total == pytest.approx(measured, rel=0.15), found


def test_the_command_says_whether_it_fits(capsys):
    """The full size is estimated in seconds, from no weights; what a stage divides shrinks with the processes."""
    recipe = ["estimate", "--cfg-path", "projects/lstp/vicuna_ft.yaml", "--gpus", "8", "--prompt-tokens", "64"]
    zero3 = ["--options", "run.runner=runner_deepspeed", "run.deepspeed=projects/lstp/deepspeed/zero3.json"]
    assert cli.main([*recipe, "--memory", "80"]) == 0
    whole = capsys.readouterr().out
    assert "runner_lstp, 8 processes, bf16" in whole and "165,570,304 of 7,6" in whole and "fits: " in whole
    assert cli.main([*recipe, "--memory", "10", *zero3]) == 0, "divided by 8 it fits where it did not"
    assert "ZeRO stage 3, 8 processes" in capsys.readouterr().out
    assert cli.main([*recipe, "--memory", "10"]) == 1
    assert "does not fit: " in capsys.readouterr().out
    refining = ["estimate", "--cfg-path", "projects/lstp/sf_flant5xl.yaml", "--prompt-tokens", "16"]
    assert cli.main([*refining, "--memory", "80"]) == 0, "generates nothing, although the recipe does in each step"


def test_what_cannot_be_estimated_is_said(capsys, monkeypatch):
    recipe = ["estimate", "--cfg-path", "projects/lstp/vicuna_ft.yaml"]
    assert cli.main([*recipe, "--options", "model.backbone.weights=some/model"]) == 2
    assert "the sizes of some/model are not known; known: " in capsys.readouterr().err
    assert cli.main([*recipe, "--gpus", "0"]) == 2
    assert "--gpus must be at least 1, got 0" in capsys.readouterr().err
    for name in {"deepspeed", *(name for name in sys.modules if name.startswith("deepspeed."))}:
        monkeypatch.setitem(sys.modules, name, None)
    zero3 = ["run.runner=runner_deepspeed", "run.deepspeed=projects/lstp/deepspeed/zero3.json"]
    assert cli.main([*recipe, "--options", *zero3]) == 2
    assert "pip install 'lavis-lstp[deepspeed]'" in capsys.readouterr().err
