"""The runner in one process: steps, accumulation, schedule, checkpoints, settings, errors."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from toy import RUN, ToyConfig, ToyData, ToyModel, make_runner

from lavis_lstp.config.run import RunSettings
from lavis_lstp.errors import ConfigError, WeightsError
from lavis_lstp.models.weights import saved_runs
from lavis_lstp.runners import checkpoint, resume
from lavis_lstp.runners.checkpoint import CheckpointError, CheckpointStore
from lavis_lstp.runners.data_order import Batches, TrainOrder, eval_batches
from lavis_lstp.runners.engine import TorchEngine, parameter_groups
from lavis_lstp.runners.schedule import warmup_cosine
from lavis_lstp.runners.splits import join, training_parts
from lavis_lstp.runners.train_loop import TrainingError, losses_of


def head_of(runner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in runner.bare_model.named_parameters()}


def train_log(runner) -> list[dict]:
    rows = [json.loads(line) for line in (runner.output_dir / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


# ---- data order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length,batch,accumulate,world", [(20, 3, 1, 1), (20, 3, 2, 2), (7, 2, 2, 3), (1, 4, 2, 2)])
def test_each_sample_counts_exactly_once_an_epoch(length, batch, accumulate, world):
    seen = []
    for rank in range(world):
        order = TrainOrder([length], batch_size=batch, accumulate=accumulate, seed=3, rank=rank, world_size=world)
        plans = list(order.steps(epoch=1))
        assert len(plans) == order.steps_per_epoch
        for plan in plans:
            assert all(plan.batches), "every rank runs every micro-batch"
            for indices, count in zip(plan.batches, plan.counts, strict=True):
                assert count in (0, len(indices))
                seen += indices[:count]
    assert sorted(seen) == list(range(length))


def test_order_is_global_and_continues_from_any_position():
    one = TrainOrder([23], batch_size=4, accumulate=1, seed=0)
    two = [TrainOrder([23], batch_size=2, accumulate=1, seed=0, rank=r, world_size=2) for r in range(2)]
    groups_of_one = [sorted(i for b in plan.batches for i in b) for plan in one.steps(2)]
    pairs = zip(two[0].steps(2), two[1].steps(2), strict=True)
    groups_of_two = [
        sorted(i for plan in pair for b, n in zip(plan.batches, plan.counts, strict=True) for i in b[:n])
        for pair in pairs
    ]
    assert groups_of_one == groups_of_two
    assert list(one.steps(2, position=8)) == list(one.steps(2))[2:]
    assert list(one.steps(0)) != list(one.steps(1))


def test_ratios_share_an_epoch_among_data_sets():
    order = TrainOrder([10, 30], batch_size=1, accumulate=1, seed=0, ratios=[3, 1])
    indices = [plan.batches[0][0] for plan in order.steps(0)]
    small = [i for i in indices if i < 10]
    assert (len(small), len(indices)) == (30, 40)
    assert {small.count(i) for i in range(10)} == {3}


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_seed_epoch_and_index_alone(workers):
    data = ToyData(6, noise=1.0)
    whole = {}
    for number, batch in enumerate(Batches(data, seed=5)([(0, 1), (2, 3), (4, 5)], epoch=1)):
        whole[number] = batch["x"]
    before = torch.get_rng_state()
    loader = Batches(data, seed=5, num_workers=workers)
    (again,) = [batch["x"] for batch in loader([(4, 5)], epoch=1)]
    (other_epoch,) = [batch["x"] for batch in loader([(4, 5)], epoch=2)]
    assert torch.equal(again, whole[2])
    assert not torch.equal(other_epoch, whole[2])
    assert torch.equal(torch.get_rng_state(), before), "loading moves no global generator"


def test_several_data_sets_are_one_and_pass_over_what_cannot_be_read():
    data = {name: ToyData(3) for name in ("a", "b")}
    parts = training_parts({name: {"train": part} for name, part in data.items()}, ["train"], {"a": 1, "b": 1})
    joined = join(parts)
    assert len(joined) == 6 and list(parts) == ["a", "b"]
    assert joined.collater([joined[4], None])["question_id"] == ["q1"]
    assert joined.collater([None, None]) is None
    assert join({"a": data["a"]}) is data["a"]
    assert list(training_parts({"a": {"train": 1 * [0], "more": [0]}}, ["train", "more"], None)) == [
        "a.train",
        "a.more",
    ]


def test_eval_batches_cover_without_padding():
    assert eval_batches(5, 2) == [(0, 1), (2, 3), (4,)]
    assert eval_batches(0, 2) == []


# ---- steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [18, 20, 22])
def test_accumulation_equals_a_big_batch_and_keeps_the_tail(tmp_path, length):
    """22 samples in groups of 6 end in micro-batches of 3 and 1: weighted by size, not averaged by batch."""
    options = {"length": length, "dropout": 0.0, "max_grad_norm": 0.5}
    big = make_runner(tmp_path / "big", batch_size_train=6, **options)
    small = make_runner(tmp_path / "small", batch_size_train=3, accum_grad_iters=2, **options)
    big.train(), small.train()
    assert big.position.step == small.position.step == 2 * math.ceil(length / 6)
    for name, value in head_of(big).items():
        torch.testing.assert_close(value, head_of(small)[name], rtol=1e-5, atol=1e-6)
    losses = [[row["loss"] for row in train_log(runner)] for runner in (big, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("optimizer,decayed", [("adamw", 1 - 0.01 * 0.5), ("adam", 1 - 0.01)])
def test_adam_decays_through_the_gradient_and_adamw_beside_it(tmp_path, optimizer, decayed):
    """One step without any gradient of the loss: AdamW takes lr * decay off a weight, Adam's first step is lr long."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    engine = TorchEngine(model, device=torch.device("cpu"), optimizer=optimizer, lr=0.01, weight_decay=0.5)
    engine.accumulate(lambda m: {"loss": 0 * m(torch.ones(1, 1)).sum()}, weight=1.0, last=True)
    engine.step()
    assert float(model.weight.detach()) == pytest.approx(decayed, rel=1e-6)
    runner = make_runner(tmp_path, optimizer=optimizer, max_steps=1)
    runner.train()
    assert type(runner.optimizer) is {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]


def test_clipping_bounds_the_gradient(tmp_path):
    model = ToyModel(0.0)
    engine = TorchEngine(model, device=torch.device("cpu"), lr=1e-3, max_grad_norm=0.1)
    batch = ToyData(8).collater([ToyData(8)[i] for i in range(8)])
    engine.accumulate(lambda m: m(batch), weight=1.0, last=True)
    before = float(engine.clip())
    after = math.sqrt(sum(float(p.grad.square().sum()) for p in engine.parameters))
    assert before > 0.1 and after == pytest.approx(0.1, rel=1e-4)


def test_an_unused_trained_weight_under_ddp_is_explained(tmp_path, monkeypatch):
    """One gloo process stands for several: DDP wraps the same way."""
    from lavis_lstp import distributed

    class Unused(ToyModel):
        def __init__(self):
            super().__init__(0.0)
            self.spare = torch.nn.Linear(1, 1)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        batch = ToyData(2).collater([ToyData(2)[i] for i in range(2)])
        options = {"device": torch.device("cpu"), "lr": 1e-3}
        engine = TorchEngine(Unused(), **options)
        engine.accumulate(lambda m: m(batch), weight=1.0, last=True)
        with pytest.raises(ConfigError, match="set run.find_unused_parameters=true"):
            engine.accumulate(lambda m: m(batch), weight=1.0, last=True)
        engine = TorchEngine(Unused(), find_unused_parameters=True, **options)
        for _ in range(2):
            engine.accumulate(lambda m: m(batch), weight=1.0, last=True)
    finally:
        torch.distributed.destroy_process_group()


def test_learning_rate_by_optimizer_step(tmp_path):
    runner = make_runner(tmp_path, warmup_steps=4, accum_grad_iters=2, min_lr=1e-4)
    runner.train()
    rates = [row["lr"] for row in train_log(runner)]
    total = runner.total_steps
    expected = [
        warmup_cosine(s, total_steps=total, warmup_steps=4, init_lr=1e-2, min_lr=1e-4, warmup_lr=0.0)
        for s in range(total)
    ]
    assert rates == pytest.approx(expected)
    assert rates[:4] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2]) and rates[-1] < rates[4] == pytest.approx(1e-2)


def test_lavis_own_schedule_is_accepted(tmp_path):
    runner = make_runner(tmp_path, lr_sched="linear_warmup_step_lr", lr_decay_rate=0.5)
    runner.train()
    assert {row["lr"] for row in train_log(runner)} == {1e-2, 5e-3}


def test_weight_decay_spares_vectors():
    names, groups = parameter_groups(ToyModel(), 0.05)
    decays = {p.ndim: group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {2: 0.05, 1: 0.0}
    assert names == ["head.0.weight", "head.2.weight", "head.0.bias", "head.2.bias"]
    with pytest.raises(ConfigError, match="no weight of the model is trained"):
        parameter_groups(ToyModel().requires_grad_(False), 0.05)


def test_losses_of_each_kind_of_task():
    loss = torch.tensor(1.0)
    assert losses_of(loss) == {"loss": loss}
    assert losses_of((loss, {"part": loss})) == {"loss": loss, "part": loss}
    assert losses_of({"loss": loss, "lm_loss": loss}) == {"loss": loss, "lm_loss": loss}


def test_bf16_is_autocast_with_fp32_weights(tmp_path):
    seen = []

    class Spy(ToyModel):
        def forward(self, samples):
            seen.append(self.frozen(samples["x"]).dtype)
            return super().forward(samples)

    runner = make_runner(tmp_path, amp=True, max_steps=1)
    runner.bare_model.__class__ = Spy
    runner.train()
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in runner.bare_model.parameters()} == {torch.float32}


def unreadable(runner, lost: set[int]) -> None:
    """Let samples fail as a data set with `max_bad_fraction` does: the collater drops them, and gives None for none."""
    data = runner.datasets["toy"]["train"]
    plain = data.collater
    data.collater = lambda items: plain(kept) if (kept := [i for i in items if i["index"] not in lost]) else None


def test_a_batch_without_readable_samples_is_passed_over(tmp_path):
    order = TrainOrder([20], batch_size=2, accumulate=2, seed=RUN["seed"])
    runner = make_runner(tmp_path / "one", batch_size_train=2, accum_grad_iters=2, max_epoch=1)
    unreadable(runner, set(list(order.steps(0))[1].batches[0]))
    runner.train()
    assert runner.position.step == order.steps_per_epoch
    runner = make_runner(tmp_path / "all", batch_size_train=2, accum_grad_iters=2, max_epoch=1)
    unreadable(runner, {i for batch in list(order.steps(0))[1].batches for i in batch})
    with pytest.raises(TrainingError, match="no sample of optimizer step 2 could be read"):
        runner.train()


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    runner = make_runner(tmp_path, nan_at=4, noise=0.0)
    with pytest.raises(TrainingError, match=r"loss = nan on this rank at optimizer step \d+; .*\bq4\b"):
        runner.train()
    assert all(torch.isfinite(value).all() for value in head_of(runner).values())
    manifest = json.loads((tmp_path / "run_manifest.json").read_text())
    assert manifest["status"] == "failed" and "TrainingError" in manifest["error"]


# ---- checkpoints ------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_trained_weights_only(tmp_path):
    runner = make_runner(tmp_path)
    runner.train()
    folder = checkpoint.find(tmp_path)
    weights = load_file(str(folder / "model.safetensors"))
    assert sorted(weights) == ["head.0.bias", "head.0.weight", "head.2.bias", "head.2.weight"]
    manifest = checkpoint.read_manifest(folder)
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.pt", "trainer.pt"}
    assert manifest["config"]["run"]["seed"] == RUN["seed"] and manifest["step"] == 14
    assert (tmp_path / "checkpoints" / "last" / "model.safetensors").is_file()


def test_loading_is_strict():
    model, state = ToyModel(), dict(checkpoint.trained_state(ToyModel()))
    state["stranger"] = state.pop("head.0.bias")
    state["head.2.bias"] = torch.zeros(5)
    with pytest.raises(
        WeightsError, match=r"1 missing: head.0.bias; 1 unexpected: stranger; 1 wrong shape: head.2.bias"
    ):
        checkpoint.load_trained_state(model, state, "there")


def test_buffers_of_trained_modules_are_kept():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3).requires_grad_(False))
    assert sorted(checkpoint.trained_state(model)) == [
        "0.bias",
        "0.num_batches_tracked",
        "0.running_mean",
        "0.running_var",
        "0.weight",
    ]


def tear_no_manifest(folder):
    (folder / "manifest.json").unlink()


def tear_short(folder):
    data = (folder / "optimizer.pt").read_bytes()
    (folder / "optimizer.pt").write_bytes(data[:-1])


def tear_flipped(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize("tear", [tear_no_manifest, tear_short, tear_flipped])
def test_a_torn_checkpoint_is_skipped_with_a_line(tmp_path, caplog, tear):
    runner = make_runner(tmp_path)
    runner.train()
    store = CheckpointStore(tmp_path / "checkpoints")
    tear(store.path(14))
    assert store.latest() == store.path(7)
    assert "skipping torn checkpoint" in caplog.text and "step_00000014" in caplog.text


def test_old_checkpoints_go_and_the_best_stays(tmp_path, monkeypatch):
    runner = make_runner(tmp_path, max_epoch=5, keep_last=2, valid_splits=["test"])
    values = iter([-3.0, -1.0, -2.0, float("nan"), -2.5])  # all below LAVIS's starting best of 0
    monkeypatch.setattr(runner.task, "metrics", lambda records: {"agg_metrics": next(values)})
    runner.train()
    folders = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert folders == ["step_00000014", "step_00000028", "step_00000035"]
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step_00000014"
    assert runner.store.best() == {
        "checkpoint": "step_00000014",
        "metric": "agg_metrics",
        "value": -1.0,
        "epoch": 1,
        "worse_steps": [21, 28, 35],
        "validated_step": 35,
    }


def test_the_best_checkpoint_is_the_one_tested(tmp_path, monkeypatch):
    runner = make_runner(tmp_path, valid_splits=["val"], test_splits=["test"])
    values = iter([2.0, 1.0, 0.0])
    monkeypatch.setattr(runner.task, "metrics", lambda records: {"agg_metrics": next(values)})
    runner.train()
    expected = load_file(str(tmp_path / "checkpoints" / "step_00000007" / "model.safetensors"))
    for name, value in expected.items():
        assert torch.equal(head_of(runner)[name], value)


@pytest.mark.parametrize("metric,best", [("loss", 7), ("val_loss", 7), ("loss_free", 14), ("agg_metrics", 14)])
def test_of_losses_the_lowest_is_the_best(tmp_path, monkeypatch, metric, best):
    runner = make_runner(tmp_path, max_epoch=3, valid_splits=["val"], metric=metric)
    values = iter([0.5, 2.0, 1.0])
    monkeypatch.setattr(runner.task, "metrics", lambda records: {metric: next(values)})
    runner.train()
    assert runner.store.best()["checkpoint"] == f"step_{best:08d}"


def test_a_run_that_improves_no_more_stops_early_and_stays_stopped(tmp_path, monkeypatch):
    """Killed before the third validation and resumed, it stops where an unbroken one does; the best is tested."""
    options = {"max_epoch": 9, "early_stop_epochs": 2, "valid_splits": ["val"], "test_splits": ["test"]}
    values = {7: 1.0, 14: 3.0, 21: 2.0, 28: 3.0}

    def resumed(values):
        runner = make_runner(tmp_path, resume_ckpt_path="auto", **options)
        monkeypatch.setattr(runner.task, "metrics", lambda records: {"agg_metrics": values[runner.position.step]})
        return runner

    with pytest.raises(KeyError):
        resumed({7: 1.0, 14: 3.0}).train()
    for _ in range(2):  # the second one finds a run that has stopped
        runner = resumed(values)
        runner.train()
        assert runner.position.step == 28
        assert runner.store.best()["worse_steps"] == [21, 28]
        assert runner.store.best()["checkpoint"] == "step_00000014"
    expected = load_file(str(runner.store.path(14) / "model.safetensors"))
    assert all(torch.equal(head_of(runner)[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "metric,message",
    [
        ("cider", "run.metric 'cider' is not among the metrics of split 'val'"),
        ("note", "run.metric 'note' is a str, no number of split 'val'"),
        ("by_category", "run.metric 'by_category' is a dict, no number of split 'val'"),
        ("partial", "run.metric 'partial' is a bool, no number of split 'val'"),
        ("agg_metrics", "run.metric 'agg_metrics' is a NoneType, no number of split 'val'"),
    ],
)
def test_a_metric_that_is_no_number_is_refused(tmp_path, monkeypatch, metric, message):
    runner = make_runner(tmp_path, valid_splits=["val"], metric=metric)
    found = {"iou": 0.5, "note": "none", "by_category": {"a": 1.0}, "agg_metrics": None}
    monkeypatch.setattr(runner.task, "metrics", lambda records: found)
    with pytest.raises(ConfigError, match=f"{message}; choose one of coverage, iou, num_extra"):
        runner.train()


@pytest.mark.parametrize("max_epoch", [2, 3])
def test_another_metric_chooses_the_best_anew(tmp_path, monkeypatch, caplog, max_epoch):
    """The second run is resumed at the end of the first one's last epoch, to train on or only to be tested."""
    for metric, epochs, source in (("iou", 2, None), ("agg_metrics", max_epoch, "auto")):
        runner = make_runner(tmp_path, valid_splits=["val"], max_epoch=epochs, metric=metric, resume_ckpt_path=source)
        monkeypatch.setattr(runner.task, "metrics", lambda records: {"iou": 100.0, "agg_metrics": 1.0})
        runner.train()
    assert "run.metric is agg_metrics: forgetting the best checkpoint by iou" in caplog.text
    expected = {"checkpoint": "step_00000014", "metric": "agg_metrics", "value": 1.0, "epoch": 1}
    worse = [21] if max_epoch == 3 else []
    assert runner.store.best() == {**expected, "worse_steps": worse, "validated_step": 7 * max_epoch}
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step_00000014"


def test_a_refused_resume_leaves_the_best_alone(tmp_path):
    make_runner(tmp_path, valid_splits=["val"]).train()
    before = (tmp_path / "checkpoints" / "best.json").read_bytes()
    with pytest.raises(ConfigError, match="cannot continue from"):
        make_runner(tmp_path, valid_splits=["val"], metric="loss", seed=8, resume_ckpt_path="auto").train()
    assert (tmp_path / "checkpoints" / "best.json").read_bytes() == before


def test_a_full_disk_leaves_the_old_checkpoint_alone(tmp_path, monkeypatch):
    runner = make_runner(tmp_path)
    real, calls = checkpoint.save_weights, []

    def full(state, path):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(state, path)

    monkeypatch.setattr(checkpoint, "save_weights", full)
    with pytest.raises(
        CheckpointError, match=r"step_00000014: .*No space left on device; earlier checkpoints are intact"
    ):
        runner.train()
    assert [path.name for path in runner.store.folder.iterdir() if path.is_dir() and not path.is_symlink()] == [
        "step_00000007"
    ]
    assert runner.store.latest() == runner.store.path(7)


def test_a_checkpoint_every_so_many_minutes(tmp_path, monkeypatch):
    """Each step takes a minute by the runner's clock; the end of an epoch, which is saved anyway, starts it anew."""
    runner = make_runner(tmp_path, save_every_minutes=3, keep_last=99)
    clock = itertools.count(0, 60)
    now = [0]

    def step(*args, real=runner._train_step):
        now[0] = next(clock)
        return real(*args)

    monkeypatch.setattr(runner, "_train_step", step)
    monkeypatch.setattr("lavis_lstp.runners.runner_lstp.time.monotonic", lambda: now[0])
    runner.train()
    steps = [saved_runs.step_of(path) for path in runner.store.complete()]
    assert steps == [4, 7, 10, 13, 14]


def test_find_names_what_is_wrong(tmp_path):
    with pytest.raises(WeightsError, match="no checkpoint at"):
        checkpoint.find(tmp_path / "nothing")
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    with pytest.raises(WeightsError, match="no complete checkpoint in"):
        checkpoint.find(tmp_path)
    with pytest.raises(WeightsError, match="no manifest.json"):
        checkpoint.find(tmp_path / "checkpoints" / "step_00000001")


# ---- settings and folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"precision": "fp16"}, "run.precision must be fp32 or bf16, got 'fp16'"),
        ({"precision": "fp32", "amp": True}, "run.amp=True contradicts run.precision=fp32"),
        ({"batch_size_train": 0}, "run.batch_size_train must be a whole number of at least 1, got 0"),
        ({"batch_size_train": 1.5}, "run.batch_size_train must be a whole number of at least 1, got 1.5"),
        ({"init_lr": "fast"}, "run.init_lr must be a number of at least 0 and at most 1000000, got 'fast'"),
        ({"init_lr": 0}, "run.init_lr must be above 0 to train"),
        ({"max_grad_norm": -1}, "run.max_grad_norm must be a number above 0 or null, got -1"),
        ({"save_every_minutes": 0}, "run.save_every_minutes must be a number above 0 or null, got 0"),
        (
            {"early_stop_epochs": 0, "valid_splits": ["val"]},
            "run.early_stop_epochs must be a whole number of at least 1 or null, got 0",
        ),
        ({"early_stop_epochs": 1}, "run.early_stop_epochs needs validations: set run.valid_splits"),
        ({"optimizer": "adamm"}, "unknown run.optimizer 'adamm'; did you mean 'adam'"),
        ({"valid_splits": "val"}, "run.valid_splits must be a list, got 'val'"),
        ({"allow_partial": "no"}, "run.allow_partial must be true or false, got 'no'"),
        ({"device": "tpu"}, "run.device must be auto, cpu or cuda, got 'tpu'"),
        ({"output_dir": None}, "run.output_dir is missing"),
    ],
)
def test_settings_name_what_is_wrong(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        RunSettings.from_config({**RUN, "output_dir": str(tmp_path), **changes}).torch_device()


def test_settings_read_yaml_numbers(tmp_path):
    settings = RunSettings.from_config({**RUN, "output_dir": str(tmp_path), "init_lr": "5e-5", "max_epoch": 3.0})
    assert (settings.init_lr, settings.max_epoch) == (5e-5, 3)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"lr_sched": "linear_warmup_cosine"}, "unknown run.lr_sched 'linear_warmup_cosine'; did you mean"),
        ({"train_splits": ["trian"]}, r"unknown split in run.train_splits: 'trian'; did you mean 'train'\?"),
        ({"valid_splits": ["dev"]}, "unknown split in run.valid_splits: 'dev'; known: .*toy has "),
        ({"valid_splits": ["val"], "metric": "cider"}, "run.metric 'cider' is not among the metrics of split 'val'"),
        ({"train_dataset_ratios": {"other": 1}}, r"run.train_dataset_ratios names \['other'\]"),
        ({"length": 0}, "the training data set is empty"),
    ],
)
def test_a_run_names_what_is_wrong(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_runner(tmp_path, **changes).train()


def test_a_folder_with_a_run_in_it_is_not_overwritten(tmp_path):
    make_runner(tmp_path).train()
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="already holds a run .* is not set; set run.resume_ckpt_path=auto"):
        make_runner(tmp_path, seed=8).train()
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("accumulate", "steps", "samples"), [(1, 2, 6), (2, 1, 6), (4, 1, 12)])
def test_limit_batches_ends_epochs_and_evaluations_which_say_so(tmp_path, accumulate, steps, samples):
    limited = {"limit_batches": 2, "accum_grad_iters": accumulate, "valid_splits": ["val"], "test_splits": ["test"]}
    runner = make_runner(tmp_path, **limited)
    found = runner.train()["test"]
    assert runner.position.step == 2 * steps and runner.order.samples_per_epoch == samples
    whole = TrainOrder([20], batch_size=3, accumulate=accumulate, seed=7)
    assert list(runner.order.steps(1)) == list(whole.steps(1))[:steps], "the first batches of the whole epoch"
    assert (found["num_scored"], found["partial"]) == (3, False), "two batches are all of this split"
    part = json.loads((tmp_path / "result" / "val_video_instruct_metrics.json").read_text())
    assert (part["num_scored"], part["num_questions"], part["partial"]) == (4, 5, True)


def test_a_fast_dev_run_can_be_repeated_and_leaves_the_real_run_alone(tmp_path, caplog):
    def files():
        found = (path for path in tmp_path.rglob("*") if path.is_file() and "fast_dev_run" not in path.parts)
        return {path: path.read_bytes() for path in found}

    real = {"valid_splits": ["val"], "test_splits": ["test"], "max_epoch": 3, "resume_ckpt_path": "auto"}
    make_runner(tmp_path, **real).train()
    before = files()
    for _ in range(2):
        trial = make_runner(tmp_path, **real, fast_dev_run=True, track=["tensorboard"])
        caplog.set_level("INFO")
        trial.train()
        assert trial.output_dir == tmp_path / "fast_dev_run" and trial.position.step == 2
        assert "val: PARTIAL, not the score of the split: " in caplog.text
    evaluated = make_runner(tmp_path, evaluate=True, test_splits=["val"], resume_ckpt_path="auto", fast_dev_run=True)
    assert evaluated.evaluate()["val"]["partial"]
    assert files() == before and not (tmp_path / "fast_dev_run" / "tracking").exists()


def test_a_task_that_cannot_say_partial_is_not_limited(tmp_path):
    from lavis.tasks.captioning import CaptionTask

    runner = make_runner(tmp_path, evaluate=True, test_splits=["test"], limit_batches=1)
    runner.task = CaptionTask(num_beams=1, max_len=1, min_len=1, evaluate=True)
    with pytest.raises(ConfigError, match="run.limit_batches and run.fast_dev_run: CaptionTask cannot say"):
        runner.evaluate()


def test_evaluation_alone_writes_results_and_no_checkpoint(tmp_path):
    runner = make_runner(tmp_path, evaluate=True, valid_splits=["val"], test_splits=["test"], init_lr=0)
    assert sorted(runner.train()) == ["test", "val"]
    assert not (tmp_path / "checkpoints").exists()
    assert json.loads((tmp_path / "evaluate_manifest.json").read_text())["status"] == "finished"


def test_evaluation_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="nothing to evaluate: name splits in run.test_splits"):
        make_runner(tmp_path, evaluate=True).evaluate()


def test_output_dir_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = make_runner("here/run")
    assert runner.output_dir == tmp_path / "here" / "run"


def test_config_stub_has_what_lavis_config_has():
    """The other tests are worth as much as this stand-in: it must not offer more than LAVIS's class."""
    from lavis.common.config import Config

    for name in ("run_cfg", "model_cfg", "datasets_cfg"):
        assert isinstance(getattr(Config, name), property)
        assert getattr(ToyConfig({}), name) is not None


def test_evaluation_of_a_checkpoint(tmp_path):
    """`run.resume_ckpt_path` in an evaluation: the weights of that run, for models that have no checkpoint setting."""
    trained = make_runner(tmp_path / "trained")
    trained.train()
    asked = {"evaluate": True, "test_splits": ["test"], "task": "video_qa"}
    evaluated = make_runner(tmp_path / "answers", resume_ckpt_path=str(tmp_path / "trained"), **asked)
    wanted = trained.bare_model.head[0].weight
    assert not torch.equal(evaluated.bare_model.head[0].weight, wanted)
    evaluated.evaluate()
    assert torch.equal(evaluated.bare_model.head[0].weight, wanted)
    again = make_runner(tmp_path / "trained", resume_ckpt_path="auto", **asked)
    again.train()  # with run.evaluate it only evaluates
    assert torch.equal(again.bare_model.head[0].weight, wanted)
    with pytest.raises(WeightsError, match="no complete checkpoint in"):
        make_runner(tmp_path / "empty", resume_ckpt_path="auto", **asked).evaluate()


def test_evaluation_of_a_run_takes_its_best_checkpoint_and_training_its_last(tmp_path, monkeypatch):
    trained = make_runner(tmp_path / "run", valid_splits=["val"], metric="loss")
    values = iter([1.0, 2.0])
    monkeypatch.setattr(trained.task, "metrics", lambda records: {"loss": next(values)})
    trained.train()
    store = trained.store
    for wanted in ("auto", str(tmp_path / "run"), str(store.folder / "best")):
        assert resume.to_evaluate(store, wanted).name == "step_00000007", wanted
    assert resume.to_evaluate(store, str(store.path(14))).name == "step_00000014"
    for wanted in ("auto", str(tmp_path / "run")):
        assert resume.choose_source(store, wanted).name == "step_00000014"
    asked = {"evaluate": True, "test_splits": ["test"], "task": "video_qa", "resume_ckpt_path": str(tmp_path / "run")}
    evaluated = make_runner(tmp_path / "answers", **asked)
    evaluated.evaluate()
    for name, value in load_file(str(store.path(7) / "model.safetensors")).items():
        assert torch.equal(head_of(evaluated)[name], value)
