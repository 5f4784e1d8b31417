"""runner_deepspeed on the toy: equal to plain PyTorch at every stage, resumed to the bit, and clear about mistakes."""

from __future__ import annotations

import json
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from ranks import HUNG
from safetensors.torch import load_file
from toy import RUN, make_runner

from lavis_lstp.errors import ConfigError, WeightsError
from lavis_lstp.models.weights import saved_runs
from lavis_lstp.runners import checkpoint
from lavis_lstp.runners.deepspeed import config as deepspeed_config

pytest.importorskip("deepspeed")

ROOT = Path(__file__).resolve().parents[2]
READY = sorted((ROOT / deepspeed_config.FOLDER).glob("*.json"))
# 17 samples in groups of 8: the last group of an epoch holds one, so that one of two ranks is idle.
PLAIN = {"length": 17, "dropout": 0.0, "max_grad_norm": 1.0, "accum_grad_iters": 2, "max_epoch": 7, "max_steps": 20}
DROPOUT = {**PLAIN, "dropout": 0.3, "save_every_steps": 2, "keep_last": 99, "resume_ckpt_path": "auto"}


def zero(stage: int, **more) -> dict:
    """A configuration of a stage; the toy's weights are small, and stage 3 keeps small ones whole if not told."""
    section = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}), **more}
    return {"runner": "runner_deepspeed", "deepspeed": {"zero_optimization": section}}


def offload(stage: int) -> dict:
    device = {"device": "cpu"}
    return zero(stage, offload_optimizer=device, **({"offload_param": device} if stage == 3 else {}))


def batch(world_size: int) -> dict:
    return {"batch_size_train": 4 // world_size}


def train_rows(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def curve(folder: Path) -> dict[int, list[float]]:
    return {row["step"]: [row["loss"], row["grad_norm"]] for row in train_rows(folder)}


def assert_close(left: dict, right: dict, rel: float) -> None:
    assert left.keys() == right.keys()
    for step, values in left.items():
        assert values == pytest.approx(right[step], rel=rel), step


@pytest.fixture(scope="module")
def plain(ranks, tmp_path_factory) -> dict[int, Path]:
    """Runs of runner_lstp, by number of processes."""
    folder = tmp_path_factory.mktemp("plain")
    for world_size in (1, 2):
        options = {**PLAIN, **batch(world_size), "output_dir": str(folder / str(world_size))}
        assert ranks.run(world_size, "toy", options) == [0] * world_size
    return {world_size: folder / str(world_size) for world_size in (1, 2)}


def test_stage_3_changes_pytorch_for_its_own_model_only(tmp_path):
    linear = torch.nn.functional.linear
    seen = []

    def look(*_):
        seen.append(torch.nn.functional.linear)

    runner = make_runner(tmp_path, **{**PLAIN, "max_steps": 1}, **zero(3))
    runner.bare_model.head.register_forward_hook(look)
    runner.bare_model.head.register_full_backward_hook(look)
    runner.train()
    forward, backward = seen[:2]
    assert forward is backward is not linear  # DeepSpeed's, which keeps no whole weight
    assert torch.nn.functional.linear is linear


# ---- equality -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_stage_gives_the_losses_of_plain_pytorch(ranks, plain, tmp_path, world_size):
    """With accumulation, clipping, a tail of an epoch in which a rank is idle, and Adam's other way to decay."""
    kinds = {**{f"zero{stage}": zero(stage) for stage in range(4)}, "offload2": offload(2), "offload3": offload(3)}
    kinds.update({path.stem: {"runner": "runner_deepspeed", "deepspeed": str(path)} for path in READY})
    runs = [{**PLAIN, **batch(world_size), **kind, "output_dir": str(tmp_path / n)} for n, kind in kinds.items()]
    assert ranks.run(world_size, "toy", runs) == [0] * world_size
    expected = curve(plain[world_size])
    assert len(expected) == 20
    for name in kinds:
        assert_close(curve(tmp_path / name), expected, 1e-5)
    weights = checkpoint.load_weights(checkpoint.find(plain[world_size]))
    for name in kinds:
        for key, value in checkpoint.load_weights(checkpoint.find(tmp_path / name)).items():
            torch.testing.assert_close(value, weights[key], rtol=1e-4, atol=1e-5)


def test_adam_and_bf16_at_every_stage(ranks, tmp_path):
    """Stages agree with each other; in bf16 they follow plain autocast, and the checkpoint is half as large."""
    for setting, rel in (({"optimizer": "adam", "weight_decay": 0.5}, 1e-5), ({"precision": "bf16"}, 0.1)):
        kinds = {"plain": {}, **{f"zero{stage}": zero(stage) for stage in range(4)}}
        key = next(iter(setting))
        runs = [{**PLAIN, **setting, **kind, "output_dir": str(tmp_path / key / name)} for name, kind in kinds.items()]
        assert ranks.run(1, "toy", runs) == [0]
        for name in kinds:
            assert_close(curve(tmp_path / key / name), curve(tmp_path / key / "plain"), rel)
    dtypes = {value.dtype for value in checkpoint.load_weights(checkpoint.find(tmp_path / "precision/zero3")).values()}
    assert dtypes == {torch.bfloat16}


# ---- checkpoints --------------------------------------------------------------------------------------------------


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """Everything a last checkpoint holds in tensors."""
    last = checkpoint.find(folder)
    state = {name: value for path in last.glob("*.safetensors") for name, value in load_file(str(path)).items()}
    trainer = torch.load(last / "trainer.pt", weights_only=True)
    generators = {f"rng{i}": generator["torch"] for i, generator in enumerate(trainer["generators"])}
    return {**state, **generators, "position": torch.tensor(list(trainer["position"].values()))}


def assert_equal_runs(left: Path, right: Path) -> None:
    a, b = saved(left), saved(right)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
    assert curve(left) == curve(right)


def test_a_checkpoint_holds_what_was_trained_and_nothing_frozen(ranks, tmp_path):
    """Its weights are read without DeepSpeed; what is larger is one file of the optimizer per process."""
    kinds = {"fp32": ["exp_avg", "exp_avg_sq"], "bf16": ["exp_avg", "exp_avg_sq", "master"]}
    common = {**PLAIN, **batch(2), "max_steps": 2}
    runs = [
        {**common, **zero(stage), "precision": precision, "output_dir": str(tmp_path / f"{precision}{stage}")}
        for precision in kinds
        for stage in range(4)
    ]
    assert ranks.run(2, "toy", runs) == [0, 0]
    for precision, keys in kinds.items():
        for stage in range(4):
            last = checkpoint.find(tmp_path / f"{precision}{stage}")
            names = ["head.0.bias", "head.0.weight", "head.2.bias", "head.2.weight"]
            assert sorted(checkpoint.load_weights(last)) == names
            files = sorted(path.name for path in last.glob("optimizer*"))
            assert files == [f"optimizer_0000{rank}_of_00002.safetensors" for rank in range(2)]
            shards = [load_file(str(last / name)) for name in files]
            assert all(shards), "each process writes its share"
            assert sorted(key for shard in shards for key in shard) == [f"{key}/{n}" for key in keys for n in names]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_killed_at_a_random_step_and_resumed_to_the_bit(ranks, tmp_path, stage):
    """One rank of two dies of SIGKILL in the middle of an epoch; dropout needs the generators of both."""
    options = {**DROPOUT, **batch(2), **zero(stage)}
    assert ranks.run(2, "toy", {**options, "output_dir": str(tmp_path / "unbroken")}) == [0, 0]
    at, victim = random.SystemRandom().randrange(3, 19), random.SystemRandom().randrange(2)
    killed = {**options, "output_dir": str(tmp_path / "killed"), "kill_at": at, "on_rank": victim}
    statuses = ranks.run(2, "toy", killed)
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] not in (0, HUNG), (at, statuses)
    assert max(curve(tmp_path / "killed")) <= at
    assert ranks.run(2, "toy", {**options, "output_dir": str(tmp_path / "killed")}) == [0, 0]
    manifest = json.loads((tmp_path / "killed" / "run_manifest.json").read_text())
    last = max(at // 2 * 2, at // 3 * 3)  # every second step, and the third of each epoch, was saved
    assert manifest["resumed_from"][0].endswith(f"step_{last:08d}"), at
    assert_equal_runs(tmp_path / "unbroken", tmp_path / "killed")


@pytest.mark.parametrize("kind", [zero(0), offload(2), offload(3), {**zero(1), "precision": "bf16"}])
def test_resumed_to_the_bit_with_offload_bf16_and_without_zero(ranks, tmp_path, kind):
    options = {**DROPOUT, **kind, "max_steps": 9}
    whole = {**options, "output_dir": str(tmp_path / "unbroken")}
    parts = {**options, "output_dir": str(tmp_path / "resumed")}
    assert ranks.run(1, "toy", [whole, {**parts, "raise_at": 5}]) == [0]
    assert ranks.run(1, "toy", parts) == [0]
    assert_equal_runs(tmp_path / "unbroken", tmp_path / "resumed")


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_resumed_on_another_number_of_processes(ranks, tmp_path, sizes):
    """Any checkpoint is a universal one: the curve goes on as if nothing had changed, also at another stage."""
    common = {**PLAIN, "max_epoch": 8, "max_steps": 24, "resume_ckpt_path": "auto"}
    stages = [(1, 1), (2, 2), (3, 3), (1, 3), (3, 0)]
    for turn, size in enumerate(sizes):
        part = {**common, **batch(size), **({} if turn else {"save_every_steps": 1, "raise_at": 4})}
        runs = [{**part, **zero(pair[turn]), "output_dir": str(tmp_path / f"{pair}")} for pair in stages]
        assert ranks.run(size, "toy", runs) == [0] * size
    assert ranks.run(1, "toy", {**common, **batch(1), "output_dir": str(tmp_path / "whole")}) == [0]
    expected = curve(tmp_path / "whole")
    assert len(expected) == 24
    for pair in stages:
        assert_close(curve(tmp_path / f"{pair}"), expected, 1e-4)


def test_a_disk_that_fills_on_one_rank_stops_both_and_spares_the_old_checkpoint(ranks, tmp_path):
    options = {**DROPOUT, **batch(2), **zero(2), "output_dir": str(tmp_path), "full_disk": 4, "on_rank": 1}
    assert ranks.run(2, "toy", options) == [0, 0]
    for rank in range(2):
        said = (tmp_path / f"error_rank{rank}.txt").read_text()
        assert "CheckpointError: cannot write checkpoint" in said and "\n" not in said
        assert "step_00000004: [Errno 28] No space left on device" in said and "earlier checkpoints are intact" in said
    store = checkpoint.CheckpointStore(tmp_path / "checkpoints")
    assert [saved_runs.step_of(path) for path in store.complete()] == [2, 3]
    assert not list(store.folder.glob(".step*")), "nothing half-written is left"


def test_a_changed_configuration_is_named_and_other_weights_are_refused(ranks, tmp_path, caplog):
    first = make_runner(tmp_path, **{**PLAIN, "max_steps": 2}, **zero(2))
    first.train()
    other = make_runner(tmp_path, **{**PLAIN, "max_steps": 3}, **zero(1), resume_ckpt_path="auto")
    with caplog.at_level("WARNING"):
        other.train()
    assert "run.deepspeed.zero_optimization.stage: 2 -> 1" in caplog.text
    with pytest.raises(ConfigError, match=r"cannot continue from .*run.seed: 7 -> 8"):
        make_runner(tmp_path, **PLAIN, **zero(2), resume_ckpt_path="auto", seed=8).train()
    with pytest.raises(WeightsError, match="no optimizer.pt in .*: another runner saved it"):
        make_runner(tmp_path, **PLAIN, resume_ckpt_path="auto").train()
    with pytest.raises(WeightsError, match="another run.precision .for instance head.0.bias, .*resume with the conf"):
        make_runner(tmp_path, **PLAIN, **zero(1), resume_ckpt_path="auto", precision="bf16").train()
    unfrozen = make_runner(tmp_path, **PLAIN, **zero(3), resume_ckpt_path="auto")
    unfrozen.bare_model.frozen.requires_grad_(True)
    with pytest.raises(WeightsError, match="2 missing: frozen.bias, frozen.weight"):
        unfrozen.train()


def test_a_missing_file_of_a_checkpoint_is_named(ranks, tmp_path, caplog):
    options = {**PLAIN, **batch(2), **zero(2), "max_steps": 2, "output_dir": str(tmp_path)}
    assert ranks.run(2, "toy", options) == [0, 0]
    last = checkpoint.find(tmp_path)
    (last / "optimizer_00001_of_00002.safetensors").unlink()
    assert checkpoint.CheckpointStore(tmp_path / "checkpoints").latest() is None
    assert "optimizer_00001_of_00002.safetensors is missing" in caplog.text
    torch_run = tmp_path / "torch"
    make_runner(torch_run, **{**PLAIN, "max_steps": 2}).train()
    with pytest.raises(WeightsError, match=r"no optimizer_\*.safetensors in .*: another runner saved it"):
        make_runner(torch_run, **PLAIN, **zero(2), resume_ckpt_path="auto").train()


# ---- evaluation ---------------------------------------------------------------------------------------------------


def test_uneven_evaluation_at_stage_3_equals_that_of_one_process(ranks, tmp_path):
    """3 questions on 2 ranks, batch 1: the rank that is done makes one more step, which does not count."""
    options = {**PLAIN, "max_steps": 4, "batch_size_eval": 1, "test_splits": ["test"], "valid_splits": ["val"]}
    options["valid_on"] = "answers"
    two = {**options, **batch(2), **zero(3), "output_dir": str(tmp_path / "two")}
    assert ranks.run(2, "toy", two) == [0, 0]
    one = make_runner(tmp_path / "one", **options, **batch(1))
    best = tmp_path / "two" / "checkpoints" / "best"
    checkpoint.load_trained_state(one.bare_model, checkpoint.load_weights(best), best)
    assert one.evaluate(skip_reload=True)["test"]["num_scored"] == 3
    for name in ("test_video_instruct.jsonl", "test_video_instruct_metrics.json"):
        assert (tmp_path / "two/result" / name).read_bytes() == (tmp_path / "one/result" / name).read_bytes()
    digests = [
        json.loads((tmp_path / run / "result/test_video_instruct_digests.json").read_text(encoding="utf-8"))
        for run in ("two", "one")
    ]
    assert digests[0]["weights"] == digests[1]["weights"]


def test_evaluation_reads_a_checkpoint_without_deepspeed(ranks, tmp_path, monkeypatch):
    assert ranks.run(2, "toy", {**PLAIN, **batch(2), **zero(3), "max_steps": 2, "output_dir": str(tmp_path)}) == [0, 0]
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    options = {"evaluate": True, "test_splits": ["test"], "resume_ckpt_path": str(tmp_path)}
    for kind in ({}, zero(3)):
        runner = make_runner(tmp_path / f"answers{len(kind)}", **options, **kind)
        assert runner.train()["test"]["num_scored"] == 3
        expected = checkpoint.load_weights(checkpoint.find(tmp_path))["head.0.weight"]
        assert torch.equal(runner.bare_model.head[0].weight, expected)


# ---- configuration ------------------------------------------------------------------------------------------------


def complete(given: dict, world_size: int = 1, **run) -> tuple:
    run = {**{key: RUN[key] for key in ("init_lr", "batch_size_train")}, "output_dir": "somewhere", **run}
    settings = deepspeed_config.settings_with(run, deepspeed_config.load(given))
    return settings, deepspeed_config.complete(deepspeed_config.load(given), settings, world_size)


def test_each_side_fills_in_what_the_other_leaves_out():
    settings, whole = complete({}, 2, accum_grad_iters=4, max_grad_norm=0.5, amp=True)
    wanted = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 4}
    assert wanted.items() <= whole.items() and whole["gradient_clipping"] == 0.5 and whole["bf16"]["enabled"]
    given = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "betas": [0.9, 0.98], "adam_w_mode": False}},
    }
    settings, whole = complete(given)
    assert (settings.accum_grad_iters, settings.max_grad_norm, settings.precision) == (2, 1.0, "bf16")
    assert (settings.optimizer, settings.beta2, settings.batch_size_train) == ("adam", 0.98, 3)
    assert "optimizer" not in whole and whole["train_batch_size"] == 6


@pytest.mark.parametrize(
    "given,run,message",
    [
        (
            {"gradient_clipping": 1},
            {"max_grad_norm": 2},
            r"gradient_clipping \(1\) contradicts run.max_grad_norm \(2\)",
        ),
        ({"train_micro_batch_size_per_gpu": 4}, {}, r"train_micro_batch_size_per_gpu \(4\) contradicts run.batch_size"),
        ({"gradient_accumulation_steps": 4}, {"accum_grad_iters": 2}, "contradicts run.accum_grad_iters"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, {}, r"params.lr \(1\) contradicts run.init_lr"),
        ({"optimizer": {"type": "AdamW"}}, {"optimizer": "adam"}, "optimizer.type .adamw. contradicts run.optimizer"),
        ({"bf16": {"enabled": True}}, {"precision": "fp32"}, "bf16.enabled .bf16. contradicts run.precision .fp32."),
        ({"bf16": {"enabled": False}}, {"amp": True}, "bf16.enabled .fp32. contradicts run.amp .bf16."),
        ({"train_batch_size": 7}, {}, r"train_batch_size \(7\) contradicts run.batch_size_train \(3\) x .* = 3"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "remove 'scheduler'; run.lr_sched"),
        ({"fp16": {"enabled": True}}, {}, "remove 'fp16'; .*run.precision=bf16"),
        ({"zero_optimisation": {}}, {}, "unknown key in run.deepspeed: 'zero_optimisation'; did you mean 'zero_optim"),
        ({"zero_optimization": {"overlap_com": 1}}, {}, "run.deepspeed.zero_optimization: 'overlap_com'; did you mean"),
        ({"bf16": {"enabld": True}}, {}, "unknown key in run.deepspeed.bf16: 'enabld'; did you mean 'enabled'"),
        (
            {"data_types": {"grad_dtype": 1}},
            {},
            "run.deepspeed.data_types: 'grad_dtype'; did you mean 'grad_accum_dtype'",
        ),
        (
            {"zero_optimization": {"overlap_comm": "perhaps"}},
            {},
            "overlap_comm: Input should be a valid boolean.*perhaps",
        ),
        ({"zero_optimization": {"stage": 4}}, {}, "zero_optimization.stage must be 0, 1, 2 or 3, got 4"),
        (
            {"optimizer": {"type": "OneBitAdam"}, "zero_optimization": {"stage": 2}},
            {},
            "'OneBitAdam' does not go with Ze",
        ),
        ({"optimizer": {"type": "Adam", "params": {"bias": 1}}}, {}, "unknown key in run.deepspeed optimizer.params"),
        (offload(0)["deepspeed"], {}, "offload_optimizer does not go with ZeRO stage 0; it needs stage 1 or 2 or 3"),
        (zero(2, offload_param={"device": "cpu"})["deepspeed"], {}, "offload_param does not go with ZeRO stage 2"),
        (zero(3, offload_param={"device": "nvme"})["deepspeed"], {}, "offload_param.device must be cpu or none"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(given, run, message):
    with pytest.raises(ConfigError, match=message) as caught:
        complete(given, **run)
    assert "\n" not in str(caught.value)


def test_the_file_is_found_as_recipes_are(tmp_path, monkeypatch):
    assert {path.stem for path in READY} == {"zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"}
    monkeypatch.chdir(tmp_path)
    assert deepspeed_config.load("projects/lstp/deepspeed/zero3.json")["zero_optimization"]["stage"] == 3
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert deepspeed_config.load("mine.json")["zero_optimization"]["stage"] == 1
    for content, message in (("{", "mine.json is not JSON"), ("[]", "expected a JSON object in .* got a list")):
        (tmp_path / "mine.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            deepspeed_config.load("mine.json")
    with pytest.raises(
        ConfigError, match="unknown file run.deepspeed 'projects/lstp/deepspeed/zero4.json'; did you mean"
    ):
        deepspeed_config.load("projects/lstp/deepspeed/zero4.json")


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="needs run.deepspeed, for instance projects/lstp/deepspeed/zero2.json"):
        make_runner(tmp_path, runner="runner_deepspeed")
    import deepspeed

    monkeypatch.setattr(deepspeed, "__version__", "0.18.3+cu13")
    with pytest.raises(ConfigError, match=r"DeepSpeed 0.18.3\+cu13 is too old, .* needs 0.19 or newer: pip install"):
        make_runner(tmp_path, **zero(2))
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"needs DeepSpeed \(.*\); pip install 'lavis-lstp\[deepspeed\]'"):
        make_runner(tmp_path, **zero(2))
