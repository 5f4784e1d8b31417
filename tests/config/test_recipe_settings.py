"""What the recipes of projects/lstp set, against the published settings; and what their headers say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from recipe_files import ORDER, ROOT, TRAINS, commands, config, file, header, options_of, recipe

from lavis_lstp.commands import flow as flow_files
from lavis_lstp.commands.chain import Chain, read_chain
from lavis_lstp.config.run import RunSettings

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
    "own_videos": (2 * 1 * 8, "bf16", 3, "adamw"),  # not published: as vicuna_ft on one GPU
    "sampler_qwen3vl": (32, "fp32", 3, "adam"),  # not published: as sampler_vicuna7b
    "sampler_gold_vicuna7b": (32, "fp32", 3, "adam"),  # not published, like the next one: as sampler_vicuna7b
    "sampler_both_vicuna7b": (32, "fp32", 3, "adam"),
    "qwen3vl_lora": (2 * 1 * 8, "bf16", 3, "adamw"),  # not published: as own_videos
}


def test_every_recipe_that_trains_has_its_published_row():
    assert set(PUBLISHED) == set(TRAINS) and set(SETTINGS) == set(ORDER)


@pytest.mark.parametrize("name", PUBLISHED)
def test_learning_is_as_published(name):
    samples, precision, epochs, optimizer = PUBLISHED[name]
    whole = config(name)
    run = RunSettings.from_config(whole.run)
    assert (run.seed, run.init_lr, run.min_lr, run.warmup_ratio, run.warmup_steps) == (43, 5e-5, 0, 0.05, None)
    assert (run.lr_sched, run.precision, run.max_epoch) == ("linear_warmup_cosine_step", precision, epochs)
    decay = (0.05, 0.999) if optimizer == "adam" else (0.01, 0.98)
    assert (run.optimizer, run.weight_decay, run.beta2) == (optimizer, *decay)
    assert (run.max_grad_norm, run.max_steps, run.train_dataset_ratios) == (None, None, None)
    assert (run.lr_layer_decay, run.early_stop_epochs, run.save_every_epochs, run.eval_every_epochs) == (1, None, 1, 1)
    steps = {label: words for label, words in commands(name).items() if label in ("1 GPU", "8 GPUs", "several nodes")}
    for label, words in steps.items():
        given = RunSettings.from_config(config(name, *options_of(words)).run)
        step = given.batch_size_train * given.accum_grad_iters * processes(words)
        assert step == (8 if (name, label) in TWICE else samples), (label, step)


LEARNT = ["qformer", "query_tokens", "projection"]
ALONE = {"in_loop": False, "subtract_min": True, "smooth": 1, "max_new_tokens": 127}
FRAMES = {
    "num_selected": 4,
    "context": 0,
    "span_key": "span",
    "grid": None,
    "mapping": "ends",
    "marks": 0,
    "settings": {},
    "least_selected": 1,
    "most_selected": 16,
    "mass": 0.8,
    "max_spans": 1,
}
VIDEOS, IMAGES, TEXTS = "lstp_video_instruct", "lstp_image_instruct", "lstp_text_instruct"
MIXED = {
    "selector": {"name": "given", "few_frames": "keep", **FRAMES},
    "data": {VIDEOS: "conversations", IMAGES: None},
    "generation": {"max_new_tokens": 249, "num_beams": 1, "do_sample": False},
}
OF_VIDEOS = {
    "selector": {"name": "lstp", "few_frames": "double", **FRAMES},
    "data": {VIDEOS: "questions"},
    "flow": "precomputed",
    "generation": {"max_new_tokens": 249, "num_beams": 1, "do_sample": False},
    "fusion": "concat",
    "answer_template": "{answer} </s>",
    "max_text_tokens": 128,
}
SELF_REFINED = OF_VIDEOS | {
    "train": ["sampler", *LEARNT],
    "losses": ["lm", "span"],
    "refinement": {**ALONE, "in_loop": True},
    "generation": {"max_new_tokens": 249, "num_beams": 5, "do_sample": False, "repetition_penalty": 1.5},
}
SAMPLER = {
    "selector": OF_VIDEOS["selector"],
    "data": {VIDEOS: "questions"},
    "flow": "precomputed",
    "train": ["sampler"],
    "losses": ["span"],
    "run": {"task": "temporal_grounding", "metric": "pseudo_iou", "valid_splits": ["val"]},
}
OF_GOLD = {
    "data": {"lstp_qvhighlights": "authors", "lstp_charades_sta": "authors", "lstp_nextgqa": "authors"},
    "flow": "raft_large",
    "run": {**SAMPLER["run"], "metric": "iou"},
}
SPANS = OF_VIDEOS | {
    "selector": {"name": "uniform", "few_frames": "double", **FRAMES, "num_selected": 1},
    "flow": "none",
    "train": [],
    "generation": {"max_new_tokens": 127, "num_beams": 1, "do_sample": False},
    "fusion": "mean",  # of one frame: the same as concat
    "run": {
        **{"task": "pseudo_span", "subtract_min": True, "smooth": None, "precision": "bf16", "evaluate": True},
        **{"test_splits": ["train", "val"], "seed": 43},
    },
}
LOCATE = {
    "selector": OF_VIDEOS["selector"],
    "data": {VIDEOS: "conversations"},
    "flow": "precomputed",
    "train": [],
    "run": {"task": "temporal_grounding", "evaluate": True, "test_splits": ["train", "val", "test"], "seed": 43},
}
LORA = {
    "train": [*LEARNT, "lora"],
    "lora": {"r": 8, "alpha": 32, "dropout": 0.1},
    "data": {**MIXED["data"], TEXTS: None},
}
FLOAT32 = {"dtype": "float32"}
FLANT5 = {"answer_template": "{answer}", "arch": "lstp_flant5xl"}
INSTRUCT_FLANT5 = {"arch": "lstp_instruct_flant5xl"}
QWEN3_VL = {
    "arch": "lstp_video_llm",
    "prompt": "{question}",
    "answer_template": "{answer}<|im_end|>",
    "data": {"lstp_video_qa": None},
    "selector": OF_VIDEOS["selector"],
    "flow": "raft_large",
    "train": ["projection"],
}
LARGE = {"image_size": 448}
SETTINGS = {
    "sf_flant5xl": FLANT5 | SELF_REFINED,
    "sf_vicuna7b": SELF_REFINED | FLOAT32,
    "sf_instruct_flant5xl": SELF_REFINED | INSTRUCT_FLANT5,
    "sampler_flant5xl": FLANT5 | SAMPLER,
    "sampler_vicuna7b": SAMPLER,
    "spans_flant5xl": FLANT5 | SPANS,
    "spans_vicuna7b": SPANS,
    "locate_flant5xl": FLANT5 | LOCATE,
    "locate_vicuna7b": LOCATE,
    "video_flant5xl": FLANT5
    | OF_VIDEOS
    | FLOAT32
    | {"flow": "none", "selector": {**OF_VIDEOS["selector"], "name": "uniform"}},
    "video_instruct_flant5xl": OF_VIDEOS | FLOAT32 | INSTRUCT_FLANT5,
    "video_vicuna7b": OF_VIDEOS | FLOAT32,
    "flant5xl_ft": MIXED | FLANT5 | FLOAT32,
    "vicuna_ft": MIXED,
    "flant5xl_lora": MIXED | FLANT5 | LORA,
    "vicuna_lora": MIXED | LORA,
    "own_videos": {
        "selector": OF_VIDEOS["selector"],
        "data": {"lstp_video_qa": None},
        "flow": "raft_large",
        "flow_preset": "published_inference",
        "sampler_mode": "multi_modal",
    },
    "spans_qwen3vl": QWEN3_VL | {key: SPANS[key] for key in ("flow", "selector", "train", "generation", "run")} | LARGE,
    "sampler_qwen3vl": QWEN3_VL | {key: SAMPLER[key] for key in ("train", "losses", "run")},
    "locate_qwen3vl": QWEN3_VL | {key: LOCATE[key] for key in ("train", "run")},
    "spans_nextgqa_qwen3vl": QWEN3_VL
    | {key: SPANS[key] for key in ("flow", "selector", "train", "generation")}
    | {"data": {"lstp_nextgqa": "authors"}, "run": {**SPANS["run"], "test_splits": ["val"]}}
    | LARGE,
    "sampler_gold_vicuna7b": SAMPLER | OF_GOLD,
    "sampler_both_vicuna7b": SAMPLER | OF_GOLD | {"data": {"lstp_qvhighlights": "authors", VIDEOS: "questions"}},
    "qwen3vl_lora": QWEN3_VL
    | LARGE
    | {
        "selector": MIXED["selector"],
        "flow": "none",
        "train": ["projection", "lora"],
        "lora": LORA["lora"],
    },
}
"""As published, but for the repairs that the README lists; what is left out is as in DEFAULTS."""
DEFAULTS = {
    "arch": "lstp_vicuna7b",
    "flow": "none",
    "flow_preset": "none",
    "sampler_mode": "fusion",
    "train": LEARNT,
    "losses": ["lm"],
    "lora": None,
    "refinement": ALONE,
    "generation": {"max_new_tokens": 128, "num_beams": 1, "do_sample": False},
    "fusion": "mean",
    "answer_template": "{answer}</s>",
    "max_text_tokens": 512,
    "dtype": "bfloat16",
    "prompt": "USER: <video>\n{question} ASSISTANT: ",
    "image_size": 224,
    "run": {"task": "video_instruct", "valid_on": "answers", "valid_splits": ["val"], "test_splits": ["test"]},
}


@pytest.mark.parametrize("name", ORDER)
def test_model_and_data_are_the_published_ones(name):
    whole = OmegaConf.to_container(config(name), resolve=True)
    model, data, run = whole["model"], whole["datasets"], whole["run"]
    wanted = DEFAULTS | SETTINGS[name]
    found = {key: model[key] for key in ("arch", "selector", "train", "losses", "lora", "refinement", "generation")}
    found |= {key: model[key] for key in ("fusion", "answer_template", "prompt")}
    (found["image_size"],) = {section["image_size"] for section in data.values()}
    found |= {key: model["backbone"][key] for key in ("max_text_tokens", "dtype")}
    found |= {"flow": model["flow"]["name"], "flow_preset": model["flow"]["flow_preset"]}
    found |= {"sampler_mode": model["sampler"]["mode"]}
    found |= {"data": {key: section.get("form") for key, section in data.items()}}
    found |= {"run": {key: run.get(key) for key in wanted["run"]}}
    assert found == wanted
    assert (model["mask_padding"], model["sampler_prompt"]) == (True, "{question}")
    assert (model["sampler"]["max_text_tokens"], model["sampler"]["rotary_init"]) == (128, "sinusoid")
    for key, section in data.items():
        if "video" in key:
            assert (section["num_frames"], section["fps"], section["max_bad_fraction"]) == (32, None, 0)
            assert section["flow"] == ("precomputed" if wanted["flow"] == "precomputed" else "none")


TWICE = {("sf_vicuna7b", "8 GPUs"), ("sf_vicuna7b", "several nodes")}
"""Four samples cannot be shared among eight GPUs."""


@pytest.mark.parametrize("name", ["flant5xl", "vicuna7b"])
def test_a_chain_learns_as_its_recipes_do(name):
    found = commands(f"chains/{name}")
    assert set(found) == {"1 GPU", "8 GPUs", "several nodes"}
    for label, words in found.items():
        chain = Chain(Path("out"), options_of(words))
        steps = [step for step in read_chain(file(f"chains/{name}")) if step.kind == "train"]
        assert len(steps) == 2
        for step in steps:
            run = RunSettings.from_config(config(Path(step.recipe).stem, *options_of(chain.command(step))).run)
            size = run.batch_size_train * run.accum_grad_iters * processes(words)
            assert size == PUBLISHED[Path(step.recipe).stem][0], (label, step.name)


@pytest.mark.parametrize("readme", ["docs/training.md", "projects/lstp/README.md"])
def test_readmes_start_the_chain_as_its_header_does(readme):
    lines = [
        line.split("#")[0] for line in (ROOT / readme).read_text(encoding="utf-8").splitlines() if "--nproc " in line
    ]
    assert [shlex.split(line) for line in lines] == [commands("chains/vicuna7b")["8 GPUs"]]


def processes(words: list[str]) -> int:
    """How many a command of a header starts."""
    if "--nproc" in words:
        return int(words[words.index("--nproc") + 1])
    if words[0] == "torchrun":
        return int(words[words.index("--nproc_per_node") + 1])
    given = dict(word.split("=") for word in words if word.startswith(("--nodes=", "--ntasks-per-node=")))
    return int(given.get("--nodes", 1)) * int(given.get("--ntasks-per-node", 1))


# ---- headers


@pytest.mark.parametrize("name", ORDER)
def test_the_header_says_how_to_run_it_and_nothing_that_does_not_exist(name):
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
        r"(inputs|output|Salesforce|google-bert|ColorfulAI|Qwen)/\S+", section
    )
    return {section} if is_name else inner


@pytest.mark.parametrize("name", ORDER)
def test_the_header_names_every_input_and_what_makes_it(name):
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
