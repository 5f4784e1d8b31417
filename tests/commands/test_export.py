"""`lavis-lstp export`: plain transformers gets exactly our weights, and our own loader the same model back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from lavis_lstp.commands import cli
from lavis_lstp.commands.convert import convert
from lavis_lstp.commands.export import export
from lavis_lstp.errors import ConfigError
from lavis_lstp.inference import loading
from lavis_lstp.testing.tiny_checkpoints import lstp_state_dict, write_all

BACKBONES = {
    "lstp_vicuna7b": "instructblip-vicuna-7b",
    "lstp_flant5xl": "blip2-flan-t5-xl",
    "lstp_instruct_flant5xl": "instructblip-flan-t5-xl",
}
CASES = [(name, lora) for name in BACKBONES for lora in (False, True)]
OTHER = ROOT / ".venv-tf457" / "bin" / "python"
"""The other transformers release that is supported, where `make test-matrix` has installed it."""
TEXT = "USER: <video>\nwhat is red, and where? ASSISTANT: "


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """Tiny checkpoints in the hub's place."""
    root = tmp_path_factory.mktemp("hub")
    write_all(root, only=[*BACKBONES.values(), "bert-base-uncased"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAVIS_LSTP_WEIGHTS", str(root))
        yield root


@pytest.fixture(scope="module")
def exported(hub, tmp_path_factory):
    """(name, lora) -> (published state dict, what `convert` made of it, what `export` made of that); once each."""
    made = {}

    def make(name: str, lora: bool):
        if (name, lora) not in made:
            root = tmp_path_factory.mktemp("export")
            published = lstp_state_dict(backbone=BACKBONES[name], lora=lora)
            torch.save(published, root / "published.ckpt")
            convert(str(root / "published.ckpt"), root / "converted")
            assert cli.main(["export", str(root / "converted"), str(root / "out"), "--dtype", "float32"]) == 0
            made[name, lora] = published, root / "converted", root / "out"
        return made[name, lora]

    return make


def expected(published: dict) -> dict[str, torch.Tensor]:
    """The backbone's weights with adapters merged by hand: W + alpha / r * B A."""
    model = {key.removeprefix("model."): value for key, value in published.items() if key.startswith("model.")}
    plain = {}
    for key, value in model.items():
        layer = key.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in model:
            value = value + 4 * model[f"{layer}.lora_B.default.weight"] @ model[f"{layer}.lora_A.default.weight"]
        if ".lora_" not in key and not key.startswith("temporal_projection."):
            plain[key.replace("language_model.base_model.model.", "language_model.")] = value
    return plain


def hf_class(name: str):
    import transformers

    return getattr(transformers, f"{'Blip2' if name == 'lstp_flant5xl' else 'InstructBlip'}ForConditionalGeneration")


@pytest.mark.parametrize(("name", "lora"), CASES)
def test_plain_transformers_has_exactly_our_weights(exported, name, lora):
    published, _, out = exported(name, lora)
    model, found = hf_class(name).from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values())
    own, want = model.state_dict(), expected(published)
    assert own.keys() == want.keys()
    adapted = {key.partition(".lora_")[0].replace("base_model.model.", "") for key in published if ".lora_A." in key}
    for key, value in want.items():
        if f"model.{key.removesuffix('.weight')}" in adapted:  # merged: another order of the same sums
            torch.testing.assert_close(own[key], value, atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(own[key], value), key
    assert bool(adapted) == lora


def test_adapters_are_merged_before_they_are_rounded(exported, tmp_path):
    """In bfloat16 as in float32: W + BA is rounded once, not B and A before."""
    published, converted, _ = exported("lstp_vicuna7b", True)
    assert cli.main(["export", str(converted), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    own = hf_class("lstp_vicuna7b").from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    rounded = {
        k: v.bfloat16().float() if v.is_floating_point() and ".lora_" not in k else v for k, v in published.items()
    }
    compared = 0
    for key, value in expected(rounded).items():
        if not torch.equal(value, expected(published)[key].bfloat16().float()):  # has an adapter
            assert (own[key] != value.bfloat16()).float().mean() < 0.01, key
            compared += 1
    assert compared == 4  # q_proj and v_proj of two layers


@pytest.mark.parametrize(("name", "lora"), CASES)
def test_the_way_back(exported, name, lora):
    """`backbone.weights: OUT` and OUT/sampler make the model that was exported, answers included."""
    _, converted, out = exported(name, lora)
    fp32 = ["model.backbone.dtype=float32"]
    original = build(loading.recorded_model(str(converted)), [str(converted)], fp32)
    original.backbone.merge_lora()
    section = loading.recorded_model(str(out / "sampler"))
    assert section["lora"] is None and section["model_type"] == "base" and section["sampler"]["mode"] == "multi_modal"
    section["backbone"]["weights"], section["sampler"]["tokenizer"] = str(out), str(out / "sampler")
    again = build(section, [str(out / "sampler")], fp32)
    for part in ("backbone", "sampler", "flow"):
        mine, theirs = getattr(original, part).state_dict(), getattr(again, part).state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 3, 28, 28), generator=generator, dtype=torch.uint8)
    assert answers(original.backbone, frames) == answers(again.backbone, frames)
    tokens = [model.chooser.scorer.tokenizer(["where is it?"])["input_ids"] for model in (original, again)]
    assert tokens[0] == tokens[1]


def build(section: dict, checkpoints: list[str], options: list[str]):
    model_class, config = loading.model_config(section, checkpoints, options)
    return model_class.from_config(config).eval()


def answers(backbone, frames) -> list[str]:
    prompts = [TEXT, "what moves? " + TEXT]
    with torch.no_grad():
        tokens = backbone.project(backbone.frame_tokens(backbone.image_features(frames), prompts))
    mask = torch.ones(tokens.shape[:2], dtype=torch.long)
    return backbone.generate(tokens, mask, prompts, max_new_tokens=6).texts


LOAD = """
import transformers
import torch


def load(name, out):
    "What plain transformers makes of an exported folder: weights, token ids, a sum of logits, the size of pixels."
    kind = "Blip2" if name == "lstp_flant5xl" else "InstructBlip"
    model = getattr(transformers, kind + "ForConditionalGeneration").from_pretrained(out, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(out)
    tokenizers = [processor.tokenizer, getattr(processor, "qformer_tokenizer", None)]
    tokenizers.append(transformers.AutoTokenizer.from_pretrained(out + "/sampler"))
    ids = [t and t("USER: <video>\\nwhat is red, and where? ASSISTANT: ")["input_ids"] for t in tokenizers]
    x = torch.linspace(-1, 1, 5 * model.config.text_config.hidden_size).view(1, 5, -1)
    more = {"decoder_input_ids": torch.tensor([[0, 5]])} if model.config.text_config.model_type == "t5" else {}
    with torch.no_grad():
        logits = model.language_model(inputs_embeds=x, **more).logits.flatten()[:50].tolist()
    pixels = processor.image_processor(torch.full((3, 40, 50), 100, dtype=torch.uint8), return_tensors="pt")
    facts = {"ids": ids, "logits": logits, "size": list(pixels["pixel_values"].shape)}
    return {key: value.clone() for key, value in model.state_dict().items()}, facts
"""
ELSEWHERE = f"""
import json, sys
from safetensors.torch import save_file
{LOAD}
results = {{"version": transformers.__version__}}
for name, out in json.loads(sys.argv[1]).items():
    weights, results[name] = load(name, out)
    save_file(weights, sys.argv[2] + "/" + name + ".safetensors")
print(json.dumps(results))
"""


def load_elsewhere(folders: dict[str, Path], to: Path) -> dict:
    """`load` of exported folders in the other release, in a process without this package; the weights go to `to`."""
    given = json.dumps({name: str(out) for name, out in folders.items()})
    environment = {**os.environ, "LAVIS_LSTP_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(OTHER), "-c", ELSEWHERE, given, str(to)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=to, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def from_nothing(tmp_path_factory):
    """The backbone of a model with random weights and the built-in tokenizer, and what `export` made of it."""
    from lavis.models import load_model

    root = tmp_path_factory.mktemp("nothing")
    model = load_model("lstp_tiny")
    save_file(model.trainable_state_dict(), root / "x.safetensors")
    assert cli.main(["export", str(root / "x.safetensors"), str(root / "out"), "--model", "lstp_tiny"]) == 0
    return model.backbone, root / "out"


def test_a_model_from_nothing(from_nothing):
    backbone, out = from_nothing
    model, found = hf_class("lstp_tiny").from_pretrained(out, output_loading_info=True)
    assert not any(found.values())
    own = model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in backbone.model.state_dict().items())


def test_both_transformers_load_the_same_model(exported, from_nothing, tmp_path):
    """FLAN-T5's input and output embeddings differ, and one release ties what the other's config calls tied."""
    if not OTHER.is_file() or Path(sys.executable) == OTHER:
        pytest.skip("no other transformers: make test-matrix installs 4.57 into .venv-tf457")
    folders = {name: exported(name, False)[2] for name in BACKBONES} | {"lstp_tiny": from_nothing[1]}
    there = load_elsewhere(folders, tmp_path)
    space = {}
    exec(LOAD, space)
    assert space["transformers"].__version__ != there["version"]
    for name, out in folders.items():
        ours, here = space["load"](name, str(out))
        theirs = load_file(tmp_path / f"{name}.safetensors")
        published = expected(exported(name, False)[0]) if name in BACKBONES else from_nothing[0].model.state_dict()
        for key, value in published.items():
            assert torch.equal(ours[key], value) and torch.equal(theirs[key], value), (name, key)
        assert here["ids"] == there[name]["ids"] and here["size"] == there[name]["size"]
        assert here["logits"] == pytest.approx(there[name]["logits"], abs=1e-4), name
        if "t5" in name:
            shared, head = (ours[f"language_model.{key}.weight"] for key in ("shared", "lm_head"))
            assert not torch.equal(shared, head)
            assert json.loads((out / "config.json").read_text())["text_config"]["tie_word_embeddings"] is False


def test_bfloat16(exported, tmp_path):
    """In the dtype of `model.backbone.dtype`: what learns is held in float32 and rounded once."""
    published, converted, _ = exported("lstp_vicuna7b", False)
    assert cli.main(["export", str(converted), str(tmp_path / "out")]) == 0
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(got[key], value.bfloat16()) for key, value in expected(published).items())
    model = hf_class("lstp_vicuna7b").from_pretrained(tmp_path / "out", dtype="auto")
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}


def test_a_sampler_that_nobody_trained_is_said_to_be_fresh(exported, hub, tmp_path, capsys):
    _, converted, _ = exported("lstp_vicuna7b", False)
    state = load_file(converted / "model.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith(("sampler.", "flow."))}, tmp_path / "x.safetensors")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((converted / "config.yaml").read_text())
    assert cli.main(["export", str(tmp_path / "x.safetensors"), str(tmp_path / "out"), "--cfg-path", str(recipe)]) == 0
    assert "sampler: the temporal sampler; no checkpoint holds one, so it is as untrained" in capsys.readouterr().out
    assert not any(key.startswith("flow.") for key in load_file(tmp_path / "out" / "sampler" / "model.safetensors"))
    assert cli.main(["export", str(converted), str(tmp_path / "again")]) == 0
    assert "sampler: the temporal sampler and RAFT\n" in capsys.readouterr().out


def test_what_cannot_be_exported(exported, tmp_path, capsys):
    _, converted, _ = exported("lstp_vicuna7b", False)
    with pytest.raises(ConfigError, match="transformers has no class for LAVIS's models"):
        options = ["model.backbone.source=lavis", "model.backbone.arch=blip2_t5"]
        export([str(converted)], tmp_path / "out", options=options)
    with pytest.raises(ConfigError, match=r"unknown dtype \(--dtype\) 'bf16'; did you mean"):
        export([str(converted)], tmp_path / "out", dtype="bf16")
    assert cli.main(["export", str(tmp_path / "gone"), str(tmp_path / "out")]) == 2
    assert "no weights at" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {}\n")
    with pytest.raises(ConfigError, match="expected a section 'model' with the key 'arch'"):
        export([str(converted)], tmp_path / "out", recipe=str(recipe))
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
