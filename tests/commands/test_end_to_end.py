"""The recipes of projects/lstp, from pictures to answers, and LAVIS's own BLIP-2 on the same data; all in this process.

Two optimizer steps a recipe: what is tested is that each step's files are what the next one reads, not what is learnt.
"""

from __future__ import annotations

import json
from pathlib import Path

import lavis_tiny
import pytest
import yaml

from lavis_lstp.data.spans import read_spans
from lavis_lstp.files import read_jsonl
from lavis_lstp.host import evaluate, train
from lavis_lstp.models.weights.reading import load_state_dict_file

NUM_FRAMES = 8
SIZES = {"seed": 0, "train_videos": 1, "val_videos": 1, "test_videos": 1, "train_images": 4, "size": 64}


def options(root: Path) -> list[str]:
    """Of every run: only how large and where."""
    sizes = [f"datasets.lstp_shapes.generate.{name}={value}" for name, value in SIZES.items()]
    return [*sizes, f"datasets.lstp_shapes.root={root / 'data'}", f"datasets.lstp_shapes.num_frames={NUM_FRAMES}"]


def answers(folder: Path) -> list[dict]:
    return list(read_jsonl(folder / "result" / "test_video_qa.jsonl"))


def steps(folder: Path) -> int:
    return max(row["step"] for row in read_jsonl(folder / "log.jsonl") if row["kind"] == "train")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A folder in which all five recipes ran, one after the other."""
    root = tmp_path_factory.mktemp("pipeline")
    spans = {split: root / f"spans_{split}.json" for split in ("train", "val")}
    two_steps = ["run.max_steps=2", "run.max_epoch=1", "run.batch_size_train=2"]
    base, sampler, ft = (root / name for name in ("base", "sampler", "ft"))
    runs = [
        (train, "base", [*two_steps]),
        (evaluate, "spans", [f"model.checkpoint={base}", f"run.spans_out={root}/spans_{{split}}.json"]),
        (train, "sampler", [*two_steps, *(f"datasets.lstp_shapes.spans.{s}={path}" for s, path in spans.items())]),
        (train, "ft", [*two_steps, f"model.checkpoint=[{base},{sampler}]"]),
        (evaluate, "eval", [f"model.checkpoint=[{base},{sampler},{ft}]"]),
    ]
    for module, name, more in runs:
        command = ["--cfg-path", f"projects/lstp/tiny_{name}.yaml", "--options", *options(root), *more]
        assert module.main([*command, f"run.output_dir={root / name}"]) == 0, name
    return root


def test_each_step_leaves_what_the_next_one_reads(done):
    for name in ("base", "sampler", "ft"):
        folder = done / name
        assert (folder / "checkpoints" / "last" / "manifest.json").is_file()
        assert json.loads((folder / "run_manifest.json").read_text())["kind"] == "train"
        assert steps(folder) == 2
    assert (done / "sampler" / "checkpoints" / "best" / "model.safetensors").is_file()
    assert {path.name for path in (done / "data").iterdir()} >= {"train.json", "test.json", "manifest.json", "videos"}


def test_checkpoints_hold_what_the_recipe_trains(done):
    def parts(name: str) -> set[str]:
        state = load_state_dict_file(done / name / "checkpoints" / "last" / "model.safetensors")
        return {key.removeprefix("backbone.model.").split(".")[0] for key in state}

    answerer = {"qformer", "query_tokens", "language_projection", "language_model"}
    assert parts("base") == {"vision_model", *answerer}
    assert parts("sampler") == {"sampler"}
    assert parts("ft") == answerer


def test_pseudo_spans_label_every_question(done):
    for split in ("train", "val"):
        questions = json.loads((done / "data" / f"{split}.json").read_text())
        spans = read_spans(done / f"spans_{split}.json", NUM_FRAMES)
        assert list(spans) == [row["question_id"] for row in questions]
        content = json.loads((done / f"spans_{split}.json").read_text())
        assert content["unit"] == "frames" and content["made_by"]["checkpoint"] == str(done / "base")
        assert all(len(row["scores"]) == NUM_FRAMES for row in content["spans"].values())
    grounding = json.loads((done / "sampler" / "result" / "val_temporal_grounding_metrics.json").read_text())
    assert 0 <= grounding["pseudo_iou"] <= 1 and grounding["coverage"] == 1.0


def test_every_test_question_is_answered_from_its_frames(done):
    questions = json.loads((done / "data" / "test.json").read_text())
    records = answers(done / "eval")
    assert [r["question_id"] for r in records] == [q["question_id"] for q in questions]
    for record in records:
        assert isinstance(record["prediction"], str)
        chosen, (start, end) = record["frame_index"], record["span"]
        assert len(chosen) == 4 and chosen == sorted(chosen) and 0 <= start < end <= NUM_FRAMES
        assert set(chosen) <= set(range(-1, NUM_FRAMES))
    metrics = json.loads((done / "eval" / "result" / "test_video_qa_metrics.json").read_text())
    assert metrics["coverage"] == 1.0 and metrics["num_scored"] == len(questions) == 6 and not metrics["partial"]
    assert 0 <= metrics["exact_match"] <= 1


def test_a_second_evaluation_gives_equal_files(done):
    again = done / "eval_again"
    checkpoints = ",".join(str(done / name) for name in ("base", "sampler", "ft"))
    command = ["--cfg-path", "projects/lstp/tiny_eval.yaml", "--options", *options(done)]
    assert evaluate.main([*command, f"model.checkpoint=[{checkpoints}]", f"run.output_dir={again}"]) == 0
    for name in ("test_video_qa.jsonl", "test_video_qa_metrics.json"):
        assert (again / "result" / name).read_bytes() == (done / "eval" / "result" / name).read_bytes(), name


# ---- LAVIS's own models


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Tiny weights under the names LAVIS has in its code, in the current folder."""
    with lavis_tiny.hub(tmp_path_factory.mktemp("hub")) as root:
        yield root


def write_config(root: Path, name: str, **model) -> list[str]:
    """The command line for LAVIS's model `name` on Shapes-QA."""
    size = lavis_tiny.IMAGE_SIZE
    content = {
        "model": {**lavis_tiny.config(name, root, **model), "model_type": None},
        "datasets": {
            "lstp_shapes": {
                "root": str(root / "data"),
                "generate": SIZES,
                "num_frames": 3,
                "flow": "none",
                "vis_processor": {
                    "train": {"name": "blip2_image_train", "image_size": size},
                    "eval": {"name": "blip_image_eval", "image_size": size},
                },
            }
        },
        "run": {
            "task": "video_instruct",
            "runner": "runner_lstp",
            "device": "cpu",
            "output_dir": str(root / name),
            "train_splits": ["train"],
            "max_steps": 3,
            "max_epoch": 1,
            "batch_size_train": 2,
            "batch_size_eval": 4,
            "init_lr": 1e-3,
            "log_freq": 1,
        },
    }
    (root / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return ["--cfg-path", str(root / f"{name}.yaml"), "--options"]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(folder / "log.jsonl") if row["kind"] == "train"]


@pytest.mark.parametrize("name", ["blip2_t5", "blip2_opt"])
def test_blip2_trains_and_answers_on_our_data(hub, name):
    half = {"vit_precision": "fp16"} if name == "blip2_t5" else {}
    command = write_config(hub, name, **half)
    assert train.main([*command, "run.max_steps=3"]) == 0
    assert len(losses(hub / name)) == 3 and all(0 < loss < 20 for loss in losses(hub / name))
    before = load_state_dict_file(hub / name / "checkpoints" / "last" / "model.safetensors")
    assert before and not any(key.startswith(("t5_model", "opt_model", "visual_encoder")) for key in before)

    asked = ["run.task=video_qa", "run.test_splits=[test]", "run.max_len=3", f"run.resume_ckpt_path={hub / name}"]
    records = []
    for out in ("one", "two"):
        folder = hub / f"{name}_{out}"
        assert evaluate.main([*command, *asked, f"run.output_dir={folder}"]) == 0
        records.append((folder / "result" / "test_video_qa.jsonl").read_bytes())
    assert records[0] == records[1]
    rows = answers(hub / f"{name}_one")
    assert len(rows) == 6 and all(isinstance(row["prediction"], str) for row in rows)
    metrics = json.loads((hub / f"{name}_one" / "result" / "test_video_qa_metrics.json").read_text())
    assert metrics["coverage"] == 1.0


def test_the_qformer_trains_on_our_data(hub):
    """Its contrastive loss asks torch.distributed for the rank, in one process too."""
    command = write_config(hub, "blip2")
    assert train.main([*command, "run.max_steps=2"]) == 0
    assert len(losses(hub / "blip2")) == 2
