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
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from omegaconf import OmegaConf

from lavis_lstp import chain as chains
from lavis_lstp import cli, evaluate, flow_files, train
from lavis_lstp.config import Config
from lavis_lstp.files import read_jsonl
from lavis_lstp.models.weights import load_state_dict_file
from lavis_lstp.runners.settings import RunSettings
from lavis_lstp.testing.tiny_checkpoints import Sizes, size_options, write_all
from lavis_lstp.testing.tiny_instruct import write_instruct

ROOT = Path(__file__).resolve().parent.parent
PROJECT = ROOT / "projects" / "lstp"
NUM_FRAMES = 8
SPLITS = ("train", "val", "test")
ORDER = (
    *("spans_flant5xl", "spans_vicuna7b", "sampler_flant5xl", "sampler_vicuna7b", "locate_flant5xl", "locate_vicuna7b"),
    *("sf_flant5xl", "sf_vicuna7b", "sf_instruct_flant5xl"),
    *("video_flant5xl", "video_instruct_flant5xl", "video_vicuna7b"),
    *("flant5xl_ft", "vicuna_ft", "flant5xl_lora", "vicuna_lora", "own_videos"),
)
TRAINS = [name for name in ORDER if not name.startswith(("spans", "locate"))]


def recipe(name: str) -> dict:
    return yaml.safe_load((PROJECT / f"{name}.yaml").read_text())


def sizes(name: str) -> list[str]:
    """What makes a full-size recipe tiny: no name of anything, no path."""
    data = [f"datasets.{key}.image_size={Sizes().image_size}" for key in recipe(name)["datasets"]]
    data += [f"datasets.{key}.num_frames={NUM_FRAMES}" for key in recipe(name)["datasets"] if "video" in key]
    few = ["model.generation.max_new_tokens=2", "model.refinement.max_new_tokens=2", "model.flow.iterations=1"]
    run = [
        "run.log_freq=1",
        "run.device=cpu",
        "run.batch_size_train=3",
        "run.batch_size_eval=2",
        "run.num_workers=0",
        "run.max_epoch=2",
    ]
    return [*size_options(), *data, *few, *run]


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
    raw = write_instruct(root / "inputs" / "ivinstruct", num_frames=NUM_FRAMES)
    annotations = root / "inputs/ivinstruct/annotations"
    annotations.mkdir()
    files = [str(raw[name].rename(annotations / f"{name}.json")) for name in ("train", "val")]
    python(str(PROJECT / "split_video_llava.py"), *files)
    (root / "inputs/videoinstruct/video").symlink_to("../ivinstruct/videochatgpt_tune")
    (root / "inputs/own").mkdir()
    for split in SPLITS:
        shutil.copy(raw["eval"], root / "inputs/own" / f"{split}.json")
    (root / "inputs/own/videos").symlink_to("../ivinstruct")
    backbones = ["instructblip-vicuna-7b", "instructblip-flan-t5-xl", "blip2-flan-t5-xl"]
    write_all(root / "weights", only=[*backbones, "bert-base-uncased", "raft-sintel", "lstp-7b"])
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


def config(name: str, *options: str):
    """The complete configuration."""
    return Config(SimpleNamespace(cfg_path=f"projects/lstp/{name}.yaml", options=list(options))).config


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
}
"""Of SPEC 8: what each kind of recipe trains, as the first name of its weights."""


@pytest.mark.parametrize("name", TRAINS)
def test_a_checkpoint_holds_what_is_published_to_be_trained(done, name):
    state = load_state_dict_file(done / "output" / "lstp" / name / "checkpoints" / "last" / "model.safetensors")
    (kind,) = set(PARTS) & set(name.split("_"))
    assert {key.removeprefix("backbone.model.").split(".")[0] for key in state} == PARTS[kind]
    adapters = [key for key in state if ".language_model." in key]
    assert all(".lora_" in key for key in adapters)
    projections = ("q_proj", "v_proj") if name.startswith("vicuna") else (".q.", ".v.")
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


@pytest.mark.parametrize("name", [name for name in TRAINS if not name.startswith("sampler")])
def test_evaluating_the_checkpoint_gives_the_files_that_training_left(done, name):
    result = done / "output" / "lstp" / name / "result" / "test_video_instruct.jsonl"
    before = result.read_bytes()
    rows = [json.loads(line) for line in before.splitlines()]
    assert rows and all(len([i for i in row["frame_index"] if i >= 0]) >= 1 for row in rows)
    result.unlink()
    assert call(name, "evaluate", "run.resume_ckpt_path=auto") == 0
    assert result.read_bytes() == before


def test_the_trained_model_answers_about_videos_that_have_no_spans(done):
    """The command of the header, which lets the sampler find them by RAFT."""
    words = commands("vicuna_ft")["other videos"]
    options = words[words.index("--options") + 1 :]
    assert call("vicuna_ft", "evaluate", *options, "datasets.lstp_video_instruct.spans=null") == 0
    (row,) = read_jsonl(done / "output" / "lstp" / "answers" / "result" / "test_video_instruct.jsonl")
    start, end = row["span"]
    assert 0 <= start < end <= NUM_FRAMES and set(row["frame_index"]) <= {-1, *range(start, end)}


def test_the_model_trained_on_own_videos_answers_a_question(done, capsys):
    video, checkpoint = "inputs/own/videos/videochatgpt_tune/clip-5.mp4", "output/lstp/own_videos"
    assert cli.main(["ask", video, "Which colour has the shape?", "--checkpoint", checkpoint, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert isinstance(answer["prediction"], str) and 0 <= answer["span_s"][0] < answer["span_s"][1]


def test_a_video_is_never_in_two_splits(work):
    for data, key in (("ivinstruct", "video"), ("videoinstruct", "video_id")):
        content = [json.loads(Path(f"inputs/{data}/{split}.json").read_text()) for split in SPLITS]
        rows = [list(own.values()) if isinstance(own, dict) else own for own in content]
        videos = [{row[key] for row in own if key in row} for own in rows]
        assert [len(own) for own in videos] == [4, 1, 1] and len(set.union(*videos)) == 6
    (name, first), *_ = content[0].items()
    assert first == {"q": "What appears in the video?", "a": first["a"], "video_id": name.rpartition("_")[0]}


def test_a_row_that_is_no_conversation_is_named(work):
    Path("wrong.json").write_text('[{"id": 1, "video": "v.mp4"}]')
    said = python(str(PROJECT / "split_video_llava.py"), "wrong.json", status=1)
    assert said.splitlines()[-1].startswith("error: wrong.json, entry 0: key 'conversations' is missing")


# ---- what they reproduce

PUBLISHED = {
    # samples a step (batch, GPUs, nodes, accumulation), precision, epochs, optimizer
    "sf_flant5xl": (2 * 4, "bf16", 2, "adam"),
    "sf_vicuna7b": (1 * 4, "fp32", 1, "adam"),
    "sf_instruct_flant5xl": (2 * 4, "bf16", 1, "adam"),
    "sampler_flant5xl": (32, "fp32", 3, "adam"),
    "sampler_vicuna7b": (32, "fp32", 3, "adam"),
    "video_flant5xl": (8 * 4, "fp32", 2, "adamw"),
    "video_instruct_flant5xl": (4 * 4, "fp32", 1, "adamw"),
    "video_vicuna7b": (2 * 4, "fp32", 1, "adamw"),
    "flant5xl_ft": (4 * 4, "fp32", 3, "adamw"),
    "vicuna_ft": (2 * 4 * 2 * 8, "bf16", 3, "adamw"),
    "flant5xl_lora": (4 * 4, "bf16", 3, "adamw"),
    "vicuna_lora": (1 * 4 * 4, "bf16", 2, "adamw"),
}


def test_every_recipe_that_trains_has_its_published_row():
    assert set(PUBLISHED) == set(TRAINS) - {"own_videos"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(work, name):
    samples, precision, epochs, optimizer = PUBLISHED[name]
    whole = config(name)
    run, model = RunSettings.from_config(whole.run), whole.model
    assert (run.seed, run.init_lr, run.min_lr, run.warmup_ratio) == (43, 5e-5, 0, 0.05)
    assert (run.lr_sched, run.precision, run.max_epoch) == ("linear_warmup_cosine_step", precision, epochs)
    assert (run.optimizer, run.weight_decay, run.beta2) == (
        optimizer,
        *((0.05, 0.999) if optimizer == "adam" else (0.01, 0.98)),
    )
    assert model.selector.num_selected == 4
    assert model.backbone.dtype == ("float32" if precision == "fp32" and "sampler" not in name else "bfloat16")
    for label, words in commands(name).items():
        if words[0] == "lavis-lstp" or label in ("evaluation", "other videos"):
            continue
        given = RunSettings.from_config(config(name, *options_of(words)).run)
        step = given.batch_size_train * given.accum_grad_iters * processes(words)
        assert step == (8 if (name, label) in TWICE else samples), (label, step)
    mixed = name.endswith(("_ft", "_lora"))
    assert model.fusion == ("concat" if name.startswith(("sf", "video")) else "mean")
    assert model.backbone.max_text_tokens == (128 if name.startswith(("sf", "video")) else 512)
    if not name.startswith("sampler"):
        ends = {"mixed": "{answer}</s>" if "vicuna" in name else "{answer}", "video": "{answer} </s>"}
        assert model.answer_template == ends["mixed" if mixed else "video"]
    kinds = {"lstp_video_instruct", *(["lstp_image_instruct"] if mixed else [])}
    assert set(whole.datasets) == kinds | ({"lstp_text_instruct"} if name.endswith("lora") else set())
    if name.endswith("lora"):
        assert OmegaConf.to_container(model.lora) == {"r": 8, "alpha": 32, "dropout": 0.1}


TWICE = {("sf_vicuna7b", "8 GPUs"), ("sf_vicuna7b", "several nodes")}
"""Four samples cannot be shared among eight GPUs."""


def processes(words: list[str]) -> int:
    """How many a command of a header starts."""
    if words[0] == "torchrun":
        return int(words[words.index("--nproc_per_node") + 1])
    given = dict(word.split("=") for word in words if word.startswith(("--nodes=", "--ntasks-per-node=")))
    return int(given.get("--nodes", 1)) * int(given.get("--ntasks-per-node", 1))


# ---- headers


def header(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return [line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]


def commands(name: str) -> dict[str, list[str]]:
    """{label: words} of the header's commands."""
    found = (re.match(r"(1 GPU|8 GPUs|several nodes|evaluation|other videos): +(.*)", x) for x in header(file(name)))
    return {match[1]: shlex.split(match[2]) for match in found if match}


def file(name: str) -> Path:
    return PROJECT / f"{name}.yaml"


def options_of(words: list[str]) -> list[str]:
    return words[words.index("--options") + 1 :] if "--options" in words else []


@pytest.mark.parametrize("name", ORDER)
def test_the_header_says_how_to_run_it_and_nothing_that_does_not_exist(work, name):
    found = commands(name)
    assert {"1 GPU", "8 GPUs", "several nodes"} <= set(found)
    assert ("evaluation" in found) == (name in TRAINS)
    module = "lavis.train" if name in TRAINS else "lavis.evaluate"
    for label, words in found.items():
        assert words[words.index("--cfg-path") + 1] == f"projects/lstp/{name}.yaml"
        assert module in words or label in ("evaluation", "other videos")
        config(name, *options_of(words))  # every key is known
        for word in words:
            assert not word.startswith("projects/") or (ROOT / word).is_file(), word
    text = "\n".join(header(file(name)))
    assert "Hardware" in text and "ime" in text and "umber" in text and "not published" in text


def inputs(path: Path) -> dict[str, str]:
    """What a header says a file reads -> what makes it; {a,b} stands for both."""
    lines = header(path)
    lines = lines[lines.index("Inputs, and what makes them:") + 1 :]
    joined = "\n".join(lines).replace(":\n", ": ").splitlines()
    found = {}
    for line in joined:
        names, _, how = line.partition(": ")
        for name in names.split(", "):
            match = re.match(r"(.*)\{(.*)\}(.*)", name)
            found |= {match[1] + x + match[3]: how for x in match[2].split(",")} if match else {name: how}
    return found


def read_by(section) -> set[str]:
    """Every path and hub id in a configuration."""
    values = section.values() if isinstance(section, dict) else section if isinstance(section, list) else ()
    inner = set().union(*(read_by(value) for value in values)) if values else set()
    is_name = isinstance(section, str) and re.fullmatch(
        r"(inputs|output|Salesforce|google-bert|ColorfulAI)/\S+", section
    )
    return {section} if is_name else inner


@pytest.mark.parametrize("name", ORDER)
def test_the_header_names_every_input_and_what_makes_it(work, name):
    whole = OmegaConf.to_container(config(name))
    needed = read_by(whole["model"]) | read_by(whole["datasets"])
    named = inputs(file(name))
    missing = {path for path in needed if not any(path == x or x.startswith(f"{path}/") for x in named)}
    assert not missing, f"no word on {missing}"
    for path, how in named.items():
        words = shlex.split(how)
        if words[:2] == ["hf", "download"]:
            assert "/".join(words[2:]) == path and path in needed
        elif how.startswith("projects/lstp/README.md"):
            assert path.startswith("inputs/")
        elif words[0] == "lavis-lstp":
            assert words[:4] == ["lavis-lstp", "flow", "inputs/videoinstruct/video", path]
            assert words[words.index("--num-frames") + 1] == str(whole["datasets"]["lstp_video_instruct"]["num_frames"])
            flow_files._parser().parse_args(words[2:])
        else:  # another recipe: it writes there
            other = recipe(Path(words[words.index("--cfg-path") + 1]).stem)["run"]
            splits = other.get("test_splits", [])
            written = {other.get("spans_out", "").replace("{split}", split) for split in splits}
            assert path in written | {other["output_dir"]}, path


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
@pytest.mark.parametrize("name", TRAINS)
def test_every_recipe_under_torchrun(done, name):
    """Two gloo ranks: batches of images, videos and texts differ between them."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lavis.train")
    options = [*sizes(name), "run.max_steps=2", f"run.output_dir=output/two/{name}"]
    python(*launcher, "--cfg-path", f"projects/lstp/{name}.yaml", "--options", *options)
    assert (done / f"output/two/{name}/checkpoints/step_00000002/model.safetensors").is_file()
