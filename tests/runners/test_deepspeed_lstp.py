"""LSTP itself under DeepSpeed: the tiny recipe at every stage, mixed batches, adapters, generation on uneven shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_deepspeed import assert_close, assert_equal_runs, curve, zero
from test_lstp import model_config

from lavis_lstp.data.shapes import shapes_qa
from lavis_lstp.models.lstp import LSTP
from lavis_lstp.runners import checkpoint
from lavis_lstp.runners.deepspeed.engine import set_aside

pytest.importorskip("deepspeed")

RECIPE = "projects/lstp/tiny_ft.yaml"
STEPS = 20
SIZES = {"train_videos": 4, "val_videos": 1, "test_videos": 1, "train_images": 4, "size": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    shapes_qa.generate(folder, seed=0, workers=1, **SIZES)
    for split in ("val", "test"):  # three questions: two ranks get two and one
        path = folder / f"{split}.json"
        path.write_text(json.dumps(json.loads(path.read_text())[:3]))
    return folder


def words(data: Path, output: Path, world_size: int, *more: str, **run) -> list[str]:
    """--options of a run; `run` as `zero` gives it."""
    settings = {"batch_size_train": 4 // world_size, "batch_size_eval": 1, "max_steps": STEPS, "max_epoch": 9, **run}
    return [
        f"datasets.lstp_shapes.root={data}",
        "datasets.lstp_shapes.num_frames=4",
        *(f"datasets.lstp_shapes.generate.{key}={value}" for key, value in SIZES.items()),
        f"run.output_dir={output}",
        "run.test_splits=[]",
        "run.log_freq=1",
        *(f"run.{key}={json.dumps(value)}" for key, value in settings.items()),
        *more,
    ]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_tiny_recipe_has_one_loss_curve(ranks, data, tmp_path, world_size):
    """Stages 0 to 3 and plain PyTorch (DDP on two processes), fp32, 20 steps."""
    kinds = {"plain": {}, **{f"zero{stage}": zero(stage) for stage in range(4)}}
    runs = [words(data, tmp_path / name, world_size, **kind) for name, kind in kinds.items()]
    assert ranks.run(world_size, "lavis_run", {"cfg": RECIPE, "runs": runs}) == [0] * world_size
    expected = curve(tmp_path / "plain")
    assert len(expected) == STEPS
    for name in kinds:
        assert_close(curve(tmp_path / name), expected, 1e-5)


@pytest.mark.parametrize(
    ("family", "language", "in_loop"),
    [
        pytest.param("instructblip", "llama", False, marks=pytest.mark.slow),  # all of it happens where in_loop is true
        ("blip2", "t5", False),
        ("instructblip", "llama", True),
    ],
)
def test_ranks_that_draw_other_kinds_of_samples_do_not_wait_for_ever(ranks, tmp_path, family, language, in_loop):
    """One rank all text, the other all video, and what else can meet: training, answers of other lengths, and more
    options on one rank; with `in_loop` each frame of each video is answered in the step as well."""
    found = {}
    config = {"refinement": {"in_loop": in_loop, "max_new_tokens": 2}}
    for stage in (0, 3):
        options = {"family": family, "language": language, "stage": stage, "config": config}
        options["output"] = str(tmp_path / f"zero{stage}")
        assert ranks.run(2, "draws", options) == [0, 0], "no rank hangs, none fails"
        found[stage] = [json.loads((tmp_path / f"zero{stage}.{rank}").read_text()) for rank in range(2)]
    for whole, divided in zip(found[0], found[3], strict=True):
        for left, right in zip(whole[:6], divided[:6], strict=True):
            assert left == pytest.approx(right, rel=1e-5, abs=1e-6)
        assert whole[6:12] == divided[6:12]
        assert len(whole) == 18
        for left, right in zip(whole[12:], divided[12:], strict=True):
            assert left == pytest.approx(right, rel=1e-5, abs=2e-5)


def test_adapters_are_all_that_a_checkpoint_holds_and_resume_to_the_bit(ranks, data, tmp_path):
    """Stage 3, dropout in LoRA, checkpointed activations, frozen weights in bf16; one rank dies in an epoch."""
    settings = [
        "model.lora={r: 4, alpha: 8, dropout: 0.2}",
        "model.train=[lora]",
        "model.backbone.gradient_checkpointing=true",
        "model.backbone.dtype=bfloat16",
    ]
    run = {**zero(3), "max_steps": 8, "save_every_steps": 2, "keep_last": 9, "resume_ckpt_path": "auto"}
    jobs = {name: {"cfg": RECIPE, "runs": [words(data, tmp_path / name, 2, *settings, **run)]} for name in ("a", "b")}
    assert ranks.run(2, "lavis_run", jobs["a"]) == [0, 0]
    assert ranks.run(2, "lavis_run", {**jobs["b"], "kill_at": 5}) != [0, 0]
    assert ranks.run(2, "lavis_run", jobs["b"]) == [0, 0]
    assert_equal_runs(tmp_path / "a", tmp_path / "b")
    last = checkpoint.find(tmp_path / "a")
    entries = []
    for path in last.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            entries += file.keys()
    assert len(entries) == 3 * len(checkpoint.load_weights(last)) == 3 * 8, (
        "q and v of two layers, A and B, two moments"
    )
    assert all(".lora_" in entry for entry in entries)


def test_three_questions_on_two_ranks_are_answered_as_by_one_process(ranks, data, tmp_path):
    """Trained and evaluated at stage 3, and evaluated alone; one process without DeepSpeed writes the same bytes."""
    evaluation = {"test_splits": ["test"], "max_steps": 1}
    run = {**evaluation, **zero(3)}
    job = {"cfg": RECIPE, "runs": [words(data, tmp_path / "trained", 2, **run)]}
    assert ranks.run(2, "lavis_run", job) == [0, 0]
    alone = {**evaluation, "evaluate": True, "resume_ckpt_path": str(tmp_path / "trained")}
    for name, world_size, kind in (("divided", 2, zero(3)), ("one", 1, {})):
        job = {"cfg": RECIPE, "runs": [words(data, tmp_path / name, world_size, **{**alone, **kind})]}
        assert ranks.run(world_size, "lavis_run", job) == [0] * world_size
    answers = [
        (tmp_path / name / "result/test_video_instruct.jsonl").read_bytes() for name in ("trained", "divided", "one")
    ]
    assert len(answers[0].splitlines()) == 3 and len(set(answers)) == 1


def test_ranks_label_pseudo_spans_in_any_number_of_batches(ranks, data, tmp_path):
    """Three questions, one a batch: with whole weights no rank waits for another, with divided ones each answers as
    often as the others; the labels are those of one process."""
    kinds = {"one": (1, {}), "whole": (2, {}), "divided": (2, zero(3))}
    for name, (world_size, kind) in kinds.items():
        options = words(data, tmp_path / name, world_size, "model.checkpoint=null", test_splits=["test"], **kind)
        job = {"cfg": "projects/lstp/tiny_spans.yaml", "runs": [[*options, "run.spans_out=null"]]}
        assert ranks.run(world_size, "lavis_run", job) == [0] * world_size, name
    files = [(tmp_path / name / "spans_test.json").read_bytes() for name in kinds]
    assert len(json.loads(files[0])["spans"]) == 3 and len(set(files)) == 1


def test_raft_is_neither_cast_nor_divided():
    """DeepSpeed's bf16 would make it fail, and stage 3 would ask each rank for pieces of a frozen, small network."""
    model = LSTP.from_config(model_config(flow={"name": "raft_small", "weights": "checkpoint"})).eval()
    set_aside(model)
    assert not [key for key in model.state_dict() if key.startswith("flow.")]
    model.bfloat16()
    assert {p.dtype for p in model.flow.model.parameters()} == {torch.float32}
    frames = torch.zeros(1, 2, 3, 64, 64, dtype=torch.uint8)
    assert model.flow(frames, torch.ones(1, 2)).dtype == torch.float32
    set_aside(model)  # nothing is left to do
