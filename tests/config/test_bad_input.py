"""Whatever is wrong with the input: one line that begins `error: `, names the file or key, and exit status 2.

Through `lavis.train` and `lavis.evaluate`, in this process. What is wrong with a configuration alone is in test_config.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lavis_lstp.data.shapes import shapes_qa
from lavis_lstp.host import evaluate, train

SIZES = {"seed": 0, "train_videos": 2, "val_videos": 1, "test_videos": 1, "train_images": 4, "size": 64}
SHAPES = """
model: {arch: lstp_tiny, flow: {name: none}, selector: {name: uniform, num_selected: 1}}
datasets:
  lstp_shapes: {root: data, generate: SIZES, num_frames: 8, flow: none}
run: {task: video_instruct, runner: runner_lstp, device: cpu, output_dir: out, train_splits: [train], max_steps: 1,
  batch_size_train: 2, batch_size_eval: 2, init_lr: 1.0e-3}
""".replace("SIZES", json.dumps(SIZES))
OWN = """
model: {arch: lstp_tiny, flow: {name: none}, selector: {name: uniform, num_selected: 1}}
datasets:
  lstp_video_qa:
    num_frames: 8
    image_size: 64
    build_info: {annotations: {train: {storage: questions.json}}, videos: {storage: data}}
run: {task: video_instruct, runner: runner_lstp, device: cpu, output_dir: out, train_splits: [train], max_steps: 1,
  batch_size_train: 2, batch_size_eval: 2, init_lr: 1.0e-3}
"""


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    shapes_qa.generate(root, workers=1, **SIZES)
    return root


@pytest.fixture
def here(tmp_path, monkeypatch, shapes) -> Path:
    """The current folder: shapes.yaml, own.yaml, Shapes-QA in data/, its training questions in questions.json."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shapes, tmp_path / "data")
    shutil.copy(shapes / "train.json", tmp_path / "questions.json")
    (tmp_path / "shapes.yaml").write_text(SHAPES)
    (tmp_path / "own.yaml").write_text(OWN)
    return tmp_path


@pytest.fixture
def error(here, capfd):
    """Runs a configuration that cannot work and gives the one line it ends with."""

    def run(config: str, *options: str, main=train.main) -> str:
        status = main(["--cfg-path", config, *(["--options", *options] if options else [])])
        captured = capfd.readouterr()
        assert status == 2
        assert "Traceback" not in captured.err + captured.out
        (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert captured.err.rstrip().endswith(line.rstrip()), "nothing follows the error"
        return line

    return run


def questions(change=None) -> list[dict]:
    """Rewrites questions.json."""
    path = Path("questions.json")
    rows = json.loads(path.read_text(encoding="utf-8"))
    if change is not None:
        change(rows)
        path.write_text(json.dumps(rows), encoding="utf-8")
    return rows


# ---- it would work otherwise


def test_both_configurations_work_as_they_stand(here):
    assert train.main(["--cfg-path", "shapes.yaml"]) == 0
    assert train.main(["--cfg-path", "own.yaml", "--options", "run.output_dir=own"]) == 0


# ---- names


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("model.flow.name=raftt_large", "unknown flow 'raftt_large'; did you mean 'raft_large'?"),
        ("model.selector.name=lstpp", "'lstpp'; did you mean 'lstp'?"),
        ("model.backbone.family=instruct_blip", "'instruct_blip'; did you mean 'instructblip'?"),
        ("model.train=[qfromer]", "unknown part (model.train) 'qfromer'; did you mean 'qformer'?"),
        ("model.losses=[ml]", "unknown loss (model.losses) 'ml'"),
        ("model.fusion=concatenate", "'concatenate'"),
        ("datasets.lstp_shapes.flow=motion_vector", "unknown datasets.lstp_shapes.flow 'motion_vector'; did you mean"),
        ("datasets.lstp_shapes.backend=pyaw", "'pyaw'"),
        (
            "datasets.lstp_shapes.generate.seed=1",
            "data holds Shapes-QA with other parameters (seed: there 0, wanted 1)",
        ),
        ("datasets.lstp_shapes.num_frames=0", "datasets.lstp_shapes.num_frames must be a whole number of at least 1"),
        ("run.train_splits=[trian]", "'trian'"),
        ("run.valid_splits=[vall]", "'vall'"),
        ("run.valid_on=loss_es", "unknown run.valid_on 'loss_es'"),
    ],
)
def test_names_that_only_a_part_knows(error, option, said):
    assert said in error("shapes.yaml", option)


def test_evaluate_ends_in_the_same_way(error):
    options = ("run.task=video_qa", "run.test_splits=[tset]")
    assert "'tset'" in error("shapes.yaml", *options, main=evaluate.main)
    assert "run.test_splits" in error("shapes.yaml", "run.task=video_qa", main=evaluate.main)


def test_parts_that_do_not_fit_together(error):
    assert "set datasets.<name>.flow: motion_vectors" in error(
        "shapes.yaml", "model.flow.name=motion_vectors", "model.selector.name=lstp"
    )
    assert "datasets.<name>.spans" in error("shapes.yaml", "model.losses=[span]", "model.train=[sampler]")
    assert "image_size: 64" in error("shapes.yaml", "datasets.lstp_shapes.image_size=32")


def test_an_output_folder_that_cannot_be_one(error, here):
    (here / "taken").write_text("a file")
    assert f"run.output_dir: cannot write to {here / 'taken'}" in error("shapes.yaml", "run.output_dir=taken")


# ---- weights


def test_a_checkpoint_that_is_nowhere(error, here):
    line = error("shapes.yaml", "model.checkpoint=output/tiny_base")
    assert "no weights at 'output/tiny_base'" in line and "expected a run's folder" in line
    (here / "empty").mkdir()
    line = error("shapes.yaml", "model.checkpoint=empty")
    assert "no weights in folder 'empty'" in line and "model.safetensors" in line


def test_backbone_weights_that_are_missing(error):
    line = error("shapes.yaml", "model.backbone.weights=models/instructblip-vicuna-7b")
    for part in ("models/instructblip-vicuna-7b", "model.backbone.weights", "config.json", "hub id", "huggingface.co"):
        assert part in line
    line = error("shapes.yaml", "model.sampler.tokenizer=data", "model.selector.name=lstp")
    assert "no tokenizer at 'data' (model.sampler.tokenizer)" in line and "such as bert-base-uncased" in line


def test_backbone_weights_that_are_not_whole(error, here):
    from lavis.models import load_model

    folder = here / "weights"
    option = "model.backbone.weights=weights"
    backbone = load_model("lstp_tiny").backbone
    backbone.model.save_pretrained(folder)
    assert "no instructblip weights at 'weights'" in error("shapes.yaml", option)  # nor tokenizers
    backbone.tokenizer.save_pretrained(folder)
    backbone.qformer_tokenizer.save_pretrained(folder / "qformer_tokenizer")
    assert train.main(["--cfg-path", "shapes.yaml", "--options", option]) == 0
    file = folder / "model.safetensors"
    state, name = load_file(file), "language_projection.weight"
    rest = {key: value for key, value in state.items() if key != name}
    save_file(rest, file, metadata={"format": "pt"})
    assert f"lacks 1 weights of instructblip, first {name}" in error("shapes.yaml", option)
    save_file({**rest, name: state[name][:, :3].contiguous()}, file, metadata={"format": "pt"})
    assert "no instructblip weights at 'weights'" in error("shapes.yaml", option)
    file.write_bytes(file.read_bytes()[:1000])
    assert "no instructblip weights at 'weights'" in error("shapes.yaml", option)


def test_raft_weights_that_are_missing(error, here, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(here / "cache"))
    line = error("shapes.yaml", "model.flow.name=raft_large", "model.selector.name=lstp")
    for part in ("https://download.pytorch.org/models/raft_large", "model.flow.weights", str(here / "cache")):
        assert part in line


def test_a_checkpoint_of_another_shape_or_none_at_all(error, here):
    from lavis.models import load_model

    state = load_model("lstp_tiny").state_dict()
    part = {key: value for key, value in state.items() if key.startswith("backbone.model.language_projection.")}
    short = {key: value[..., :3].contiguous() for key, value in part.items()}
    first = min(part)
    files = {
        "shape.safetensors": (short, "language_projection.bias' is [3] in the file, [64] in the model"),
        "torn.safetensors": ({first: part[first]}, "keys missing: 'backbone.model.language_projection.weight'"),
        "other.safetensors": ({"encoder.weight": torch.zeros(1)}, "encoder.weight"),
    }
    for name, (content, said) in files.items():
        save_file(content, here / name)
        assert said in error("shapes.yaml", f"model.checkpoint={name}"), name
    (here / "text.safetensors").write_text("no weights")
    assert "text.safetensors" in error("shapes.yaml", "model.checkpoint=text.safetensors")
    torch.save(torch.nn.Linear(1, 1), here / "code.pth")
    assert "code.pth" in error("shapes.yaml", "model.checkpoint=code.pth")
    assert "no checkpoint at nowhere" in error("shapes.yaml", "run.resume_ckpt_path=nowhere")
    line = error("shapes.yaml", "run.resume_ckpt_path=None")
    assert "run.resume_ckpt_path: no checkpoint at None" in line and "no value is null there" in line


# ---- data


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[3].pop("answer"), ["entry 3", "train-00000-q3", "'answer' is missing"]),
        (lambda rows: rows[3].update(question=7), ["entry 3", "'question' must be a string, got int 7"]),
        (lambda rows: rows[3].update(span_s=[4, 2]), ["'span_s'", "[4, 2]"]),
        (lambda rows: rows[3].update(question_id=rows[0]["question_id"]), ["entry 3", "occurs twice"]),
        (lambda rows: rows.insert(2, "text"), ["entry 2", "expected an object, got str"]),
        (lambda rows: rows.clear(), ["holds no question"]),
    ],
)
def test_annotations(error, change, said):
    questions(change)
    line = error("own.yaml")
    for part in ["questions.json", *said]:
        assert part in line


def test_annotation_files(error, here):
    lines = [json.dumps(row) for row in questions()]
    (here / "questions.json").write_text("\n".join([*lines[:2], lines[2][:20], *lines[3:]]))
    assert "questions.json, line 3: not JSON" in error("own.yaml")
    (here / "questions.json").unlink()
    line = error("own.yaml")
    assert "questions.json: no such annotation file (datasets.lstp_video_qa.build_info.annotations)" in line
    line = error("own.yaml", "datasets.lstp_video_qa.build_info.videos.storage=nowhere")
    assert "datasets.lstp_video_qa.build_info.videos.storage: no such folder: nowhere" in line


def test_span_files(error):
    options = ("run.task=temporal_grounding", "model.losses=[span]", "model.train=[sampler]")
    line = error("shapes.yaml", *options, "datasets.lstp_shapes.spans=spans.json")
    assert "spans.json: no such span file (datasets.lstp_shapes.spans); write it with run.task=pseudo_span" in line


def test_a_video_that_is_gone(error, here):
    video = questions()[0]["video"]
    (here / "data" / video).unlink()
    line = error("own.yaml")
    assert f"{video}: no such file, needed by question 'train-00000-q0'" in line
    assert error("shapes.yaml").startswith("error: ") and video in line


@pytest.mark.parametrize("workers", [0, 2])
def test_a_video_that_cannot_be_read(error, here, workers):
    video = questions()[0]["video"]
    (here / "data" / video).write_bytes(b"no video")
    options = ("run.batch_size_train=12", f"run.num_workers={workers}")
    line = error("own.yaml", *options)
    assert video in line and "'train-00000-q" in line and "datasets.lstp_video_qa.max_bad_fraction allows 0" in line
    options = ("run.task=video_qa", "run.test_splits=[train]", f"run.num_workers={workers}")
    allowed = "datasets.lstp_video_qa.max_bad_fraction=0.5"
    line = error("own.yaml", *options, allowed, main=evaluate.main)
    assert "6 of 12 questions have a prediction; 6 ids ('train-00000-q0'" in line
    command = ["--cfg-path", "own.yaml", "--options", *options, allowed, "run.allow_partial=true"]
    assert evaluate.main(command) == 0
