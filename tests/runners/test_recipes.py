"""Every recipe of projects/lstp, run on tiny weights and data that lie where the recipe looks for them.

The folder is laid out as projects/lstp/README.md says, so a recipe is given sizes and nothing else. Two optimizer steps
with a stop between them, then an evaluation; each recipe reads what the ones before it wrote. All in this process, and
one of each kind as a command.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_files import ORDER, PROJECT, ROOT, TRAINS, commands, config

from lavis_lstp.commands import chain as chains
from lavis_lstp.commands import cli
from lavis_lstp.files import read_jsonl
from lavis_lstp.host import evaluate, train
from lavis_lstp.models.weights.reading import load_state_dict_file
from lavis_lstp.testing import tiny_checkpoints, tiny_instruct
from lavis_lstp.testing.tiny_checkpoints import NUM_FRAMES, Sizes, options_for, write_all
from lavis_lstp.testing.tiny_instruct import write_instruct, write_recipe_inputs

SPLITS = ("train", "val", "test")


FEW = (
    *("model.generation.max_new_tokens=2", "model.refinement.max_new_tokens=2", "run.device=cpu", "run.num_workers=0"),
    *("run.log_freq=1", "run.batch_size_train=3", "run.batch_size_eval=2", "run.max_epoch=2"),
)


def sizes(name: str) -> list[str]:
    """What makes a full-size recipe tiny: no name of anything, no path."""
    return [*options_for(f"projects/lstp/{name}.yaml"), *FEW]


def python(*words: str, status: int = 0) -> str:
    run = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == status, run.stderr[-3000:]
    return run.stdout + run.stderr


def call(name: str, *options: str) -> int:
    module = train if name in TRAINS and "evaluate" not in options else evaluate
    given = [option for option in options if option != "evaluate"]
    return module.main(["--cfg-path", f"projects/lstp/{name}.yaml", "--options", *sizes(name), *given])


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The folder to stand in: inputs as the README says, made of tiny data; weights below `weights`."""
    root = tmp_path_factory.mktemp("recipes")
    before, environment = os.getcwd(), os.environ.get("LAVIS_LSTP_WEIGHTS")
    os.chdir(root)
    write_recipe_inputs("inputs")
    backbones = ["instructblip-vicuna-7b", "instructblip-flan-t5-xl", "blip2-flan-t5-xl"]
    write_all(root / "weights", only=[*backbones, "qwen3_vl", "bert-base-uncased", "raft-sintel", "lstp-7b"])
    os.environ["LAVIS_LSTP_WEIGHTS"] = str(root / "weights")
    yield root
    os.chdir(before)
    os.environ.pop("LAVIS_LSTP_WEIGHTS")
    if environment is not None:
        os.environ["LAVIS_LSTP_WEIGHTS"] = environment


@pytest.fixture(scope="module")
def done(work) -> Path:
    """The folder in which all recipes ran, in an order in which each finds its inputs."""
    side = str(Sizes().flow_size)
    flow = ["flow", "inputs/videoinstruct/video", "output/lstp/flow", "--num-frames", str(NUM_FRAMES)]
    assert cli.main([*flow, "--size", "64", "--flow-size", side]) == 0
    for name in ORDER:
        if name in TRAINS:
            assert call(name, "run.max_steps=1") == 0, name
            assert call(name, "run.max_steps=2", "run.resume_ckpt_path=auto") == 0, name
        else:
            assert call(name) == 0, name
    return work


def test_every_recipe_is_listed_and_run_here(capsys):
    assert cli.main(["list", "recipes"]) == 0
    listed = capsys.readouterr().out.split()
    assert {Path(path).stem for path in listed if "/tiny_" not in path and "/eval/" not in path} == set(ORDER)


# ---- what runs


@pytest.mark.parametrize("name", TRAINS)
def test_two_steps_a_checkpoint_and_a_resume(done, name):
    folder = done / "output" / "lstp" / name
    rows = [row for row in read_jsonl(folder / "log.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2]
    wanted = {f"{loss}_loss" for loss in config(name).model.losses}
    assert all(0 < row[loss] < 100 for row in rows for loss in wanted)
    manifest = json.loads((folder / "run_manifest.json").read_text())
    assert manifest["resumed_from"] == [str(folder / "checkpoints" / "step_00000001")]


LEARNT = ("qformer", "query_tokens", "language_projection")
PARTS = {
    "sf": {"sampler", *LEARNT},
    "sampler": {"sampler"},
    "video": {*LEARNT},
    "ft": {*LEARNT},
    "lora": {*LEARNT, "language_model"},
    "own": {*LEARNT},
    "qwen3vl_lora": {
        "visual",
        "language_model",
    },  # of the vision tower the merger alone, of the language model the adapters
}
"""Of SPEC 8: what each kind of recipe trains, as the first name of its weights."""


@pytest.mark.parametrize("name", TRAINS)
def test_a_checkpoint_holds_what_is_published_to_be_trained(done, name):
    state = load_state_dict_file(done / "output" / "lstp" / name / "checkpoints" / "last" / "model.safetensors")
    (kind,) = {name} & set(PARTS) or set(PARTS) & set(name.split("_"))
    inner = (key.removeprefix("backbone.model.").removeprefix("model.") for key in state)
    assert {key.split(".")[0] for key in inner} == PARTS[kind]
    assert all(".merger." in key or ".deepstack_merger_list." in key for key in state if ".visual." in key)
    adapters = [key for key in state if ".language_model." in key]
    assert all(".lora_" in key for key in adapters)
    projections = ("q_proj", "v_proj") if name.startswith(("vicuna", "qwen")) else (".q.", ".v.")
    assert all(any(part in key for part in projections) for key in adapters)


def test_spans_lead_from_step_to_step(done):
    """Pseudo spans of every question about a video, the sampler's of every one that the mixed recipes learn from."""
    for base, ft in (("flant5xl", "flant5xl_ft"), ("vicuna7b", "vicuna_ft")):
        for kind, data, split in (("spans", "videoinstruct", "train"), ("located", "ivinstruct", "train")):
            written = json.loads((done / "output" / "lstp" / f"{kind}_{base}_{split}.json").read_text())
            content = json.loads((done / "inputs" / data / f"{split}.json").read_text())
            videos = content if kind == "spans" else [row["id"] for row in content if "video" in row]
            assert set(written["spans"]) == set(videos) and len(videos) > 2
            assert all(0 <= a < b <= NUM_FRAMES for a, b in (row["span"] for row in written["spans"].values()))
        assert config(ft).datasets.lstp_video_instruct.spans.train == f"output/lstp/located_{base}_train.json"


def test_labels_of_a_data_set_with_gold_moments_are_measured_by_answers_and_by_scores(done):
    words = commands("spans_nextgqa_qwen3vl")["by scores"]
    assert call("spans_nextgqa_qwen3vl", *words[words.index("--options") + 1 :]) == 0
    for folder in ("spans_nextgqa_qwen3vl", "spans_nextgqa_scores"):
        metrics = json.loads((done / f"output/lstp/{folder}/result/val_pseudo_span_metrics.json").read_text())
        assert metrics["num_gold_spans"] == metrics["labelled"] == metrics["num_questions"] == 6
        assert 0 < metrics["iou_of_whole_video"] < 1 and 0 <= metrics["iou"] <= 1 and "r1_0.5" in metrics["moments"]


def test_gold_and_pseudo_spans_are_learned_together(done):
    found = json.loads(
        (done / "output/lstp/sampler_both_vicuna7b/result/val_temporal_grounding_metrics.json").read_text()
    )
    assert {"iou", "moments", "num_gold_spans"} <= found.keys() and "pseudo_iou" not in found


@pytest.mark.parametrize("name", [name for name in TRAINS if not name.startswith("sampler")])
def test_evaluating_the_checkpoint_gives_the_files_that_training_left(done, name):
    result = done / "output" / "lstp" / name / "result" / "test_video_instruct.jsonl"
    before = result.read_bytes()
    rows = [json.loads(line) for line in before.splitlines()]
    assert rows and all(len([i for i in row["frame_index"] if i >= 0]) >= 1 for row in rows)
    result.unlink()
    assert call(name, "evaluate", "run.resume_ckpt_path=auto") == 0
    assert result.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "data", "out"),
    [("vicuna_ft", "lstp_video_instruct", "answers"), ("qwen3vl_lora", "lstp_video_qa", "answers_qwen3vl")],
)
def test_the_trained_model_answers_about_videos_that_have_no_spans(done, name, data, out):
    """The command of the header, which lets the sampler find them by RAFT."""
    words = commands(name)["other videos"]
    options = words[words.index("--options") + 1 :]
    assert call(name, "evaluate", *options, f"datasets.{data}.spans=null") == 0
    (row,) = read_jsonl(done / "output" / "lstp" / out / "result" / "test_video_instruct.jsonl")
    start, end = row["span"]
    assert 0 <= start < end <= NUM_FRAMES and set(row["frame_index"]) <= {-1, *range(start, end)}


def test_the_model_trained_on_own_videos_answers_a_question(done, capsys):
    video, checkpoint = "inputs/own/videos/clip-5.mp4", "output/lstp/own_videos"
    assert cli.main(["ask", video, "Which colour has the shape?", "--checkpoint", checkpoint, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert isinstance(answer["prediction"], str) and 0 <= answer["span_s"][0] < answer["span_s"][1]


def test_a_video_is_never_in_two_splits(tmp_path):
    raw = write_instruct(tmp_path)
    python(str(PROJECT / "split_video_llava.py"), str(raw["train"]), str(raw["val"]), "--out", str(tmp_path / "inputs"))
    for data, key in (("ivinstruct", "video"), ("videoinstruct", "video_id")):
        content = [json.loads((tmp_path / f"inputs/{data}/{split}.json").read_text()) for split in SPLITS]
        rows = [list(own.values()) if isinstance(own, dict) else own for own in content]
        videos = [{row[key] for row in own if key in row} for own in rows]
        assert [len(own) for own in videos] == [4, 1, 1] and len(set.union(*videos)) == 6
    (name, first), *_ = content[0].items()
    assert first == {"q": "What appears in the video?", "a": first["a"], "video_id": name.rpartition("_")[0]}


def test_a_row_that_is_no_conversation_is_named(work):
    Path("wrong.json").write_text('[{"id": 1, "video": "v.mp4"}]', encoding="utf-8")
    said = python(str(PROJECT / "split_video_llava.py"), "wrong.json", status=1)
    assert said.splitlines()[-1].startswith("error: wrong.json, entry 0: key 'conversations' is missing")


# ---- the lines of projects/lstp/README.md

PROGRAMS = {
    "lavis.train": train.main,
    "lavis.evaluate": evaluate.main,
    "lavis_lstp": cli.main,
    "lavis_lstp.testing.tiny_checkpoints": tiny_checkpoints.main,
    "lavis_lstp.testing.tiny_instruct": tiny_instruct.main,
}


def typed(words: list[str]) -> int:
    """A command, in this process."""
    words = ["-m", "lavis_lstp", *words[1:]] if words[0] == "lavis-lstp" else words[1:]
    return PROGRAMS[words[1]](words[2:])


def test_a_chain_and_own_videos_run_by_the_lines_of_the_readme(tmp_path, monkeypatch, capsys):
    """As a shell reads them, and with nothing but them; steps of the chain in this process too."""
    section = (PROJECT / "README.md").read_text().split("## On a laptop")[1].split("##")[0]
    lines = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chains, "_call", lambda command, output, lock, going_on, warm: (typed(list(command)), False))
    variables = {}
    for line in lines:
        if line.startswith("export "):
            monkeypatch.setenv(*line.removeprefix("export ").split("="))
        elif re.match(r"\w+=\S+$", line):
            variables.update([line.split("=")])
        else:
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            if inner := re.search(r"\$\((.*)\)", line):
                capsys.readouterr()
                assert typed(shlex.split(inner[1])) == 0
                line = line.replace(inner[0], capsys.readouterr().out)
            assert typed(shlex.split(line)) == 0, line
    steps = ("spans", "sampler", "locate", "lstp")
    assert all((tmp_path / "output/vicuna7b" / step / "done.json").is_file() for step in steps)
    for folder, count in (("vicuna7b/sampler", 3), ("vicuna7b/lstp", 3), ("lstp/own_videos", 3)):
        losses = [row["loss"] for row in read_jsonl(tmp_path / "output" / folder / "log.jsonl") if "loss" in row]
        assert len(losses) == count and all(0 < loss < 100 for loss in losses), folder
    config = json.loads((tmp_path / "output/vicuna7b/lstp/run_manifest.json").read_text())["config"]
    assert config["datasets"]["lstp_video_instruct"]["spans"]["train"] == "output/vicuna7b/located_train.json"
    for folder in ("vicuna7b/lstp", "lstp/own_videos"):
        (row,) = read_jsonl(tmp_path / "output" / folder / "result/test_video_instruct.jsonl")
        assert isinstance(row["prediction"], str)


# ---- as commands


def test_a_recipe_as_a_command(done):
    """From a folder without a checkout, as a user types it."""
    options = [*sizes("vicuna_ft"), "run.max_steps=1", "run.output_dir=output/again", "run.test_splits=[]"]
    python("-m", "lavis.train", "--cfg-path", "projects/lstp/vicuna_ft.yaml", "--options", *options)
    folder = done / "output/again/checkpoints/last"
    first = done / "output/lstp/vicuna_ft/checkpoints/step_00000001"
    assert (folder / "model.safetensors").stat().st_size == (first / "model.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flant5xl", "vicuna7b"])
def test_a_whole_chain_as_commands(done, name):
    steps = chains.read_chain(ROOT / "projects/lstp/chains" / f"{name}.yaml")
    for_all = sorted(set.intersection(*(set(sizes(Path(step.recipe).stem)) for step in steps)))
    own = [f"{step.name}:{o}" for step in steps for o in sizes(Path(step.recipe).stem) if o not in for_all]
    words = ["chain", f"projects/lstp/chains/{name}.yaml", "--out", f"output/chain_{name}", "--options", *for_all, *own]
    said = python("-m", "lavis_lstp", *words, "run.max_steps=2")
    assert all(f"{step.name} " in said for step in steps)
    last = done / f"output/chain_{name}/lstp/checkpoints/last/model.safetensors"
    assert load_state_dict_file(last)
    manifest = json.loads((done / f"output/chain_{name}/lstp/run_manifest.json").read_text())
    spans = manifest["config"]["datasets"]["lstp_video_instruct"]["spans"]
    assert spans["train"] == f"output/chain_{name}/located_train.json"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
@pytest.mark.parametrize("name", TRAINS)
def test_every_recipe_under_torchrun(done, name, engine):
    """Two gloo ranks: batches of images, videos and texts differ between them."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lavis.train")
    out = f"output/{engine}/{name}"
    options = [*sizes(name), "run.max_steps=2", f"run.output_dir={out}"]
    if engine == "zero3":
        options += ["run.runner=runner_deepspeed", "run.deepspeed=projects/lstp/deepspeed/zero3.json"]
    python(*launcher, "--cfg-path", f"projects/lstp/{name}.yaml", "--options", *options)
    assert (done / out / "checkpoints/step_00000002/model.safetensors").is_file()
