"""`lavis-lstp convert`: every key accounted for, our format out, the same model after it as before."""

import json
import pickle
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import lavis_tiny
import pytest
import torch
import yaml
from conftest import GOLDEN
from safetensors.torch import load_file, save_file
from test_weights import Evil

from lavis_lstp.commands import cli
from lavis_lstp.commands.convert import convert
from lavis_lstp.errors import ConfigError, WeightsError
from lavis_lstp.models.weights import hub
from lavis_lstp.models.weights.parts import part_of
from lavis_lstp.models.weights.published_names import NOT_IN_BERT
from lavis_lstp.models.weights.reading import (
    convert_published,
    load_bert_into_sampler,
    load_state_dict_file,
    weights_file,
)
from lavis_lstp.models.weights.shapes import below
from lavis_lstp.models.weights.sizes import fit
from lavis_lstp.models.where.temporal_sampler import TemporalSampler, sizes_in
from lavis_lstp.testing.tiny_checkpoints import lstp_state_dict, write_all

LSTP = "ColorfulAI/LSTP-Chat/"
INVENTORY = json.loads((GOLDEN / "key_inventory.json").read_text())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Tiny checkpoints under the published names."""
    root = tmp_path_factory.mktemp("tiny")
    names = ("instructblip-vicuna-7b", "bert-base-uncased", "raft-sintel", "lstp-7b", "lstp-7b-lightning")
    write_all(root, only=[*names, "lstp-7b-lora", "lavis-blip2-t5", "lavis-instructblip-vicuna"])
    return root


def converted(source: Path, out: Path, **settings):
    report = convert(str(source), out, **settings)
    return report, load_file(out / "model.safetensors")


def adds_up(report) -> bool:
    left_out = sum(facts["keys"] for facts in report.left_out.values())
    return report.read == sum(report.renamed.values()) + sum(report.dropped.values()) + left_out


# ---- LSTP -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LSTP-7B.ckpt", "LSTP-7B-lightning.ckpt", "LSTP-7B-lora.ckpt"])
def test_lstp(tiny, tmp_path, name):
    """All that can be trained, and RAFT; bit-equal; the frozen rest is counted and left out."""
    source = load_state_dict_file(tiny / LSTP / name)
    report, got = converted(tiny / LSTP / name, tmp_path / "out")
    whole = convert_published(source, as_whole=True)
    assert report.kind == "lstp" and adds_up(report) and report.read == len(source)
    assert set(report.left_out) == {"vision", "language_model"} and report.missing == report.absent == []
    trained = {"sampler", "flow", "qformer", "query_tokens", "projection"} | ({"lora"} if "lora" in name else set())
    assert set(report.renamed) == trained
    assert got.keys() == {key for key in whole if part_of(key) in trained}
    assert all(torch.equal(got[key], whole[key]) for key in got)
    frozen = {key: value for key, value in whole.items() if part_of(key) not in trained}
    assert sum(facts["bytes"] for facts in report.left_out.values()) == sum(v.nbytes for v in frozen.values())


def test_the_folder_is_a_value_of_model_checkpoint(tiny, tmp_path):
    """Built from OUT/config.yaml over the base weights, the model has the numbers of the published file."""
    from omegaconf import OmegaConf

    from lavis_lstp.config import complete_model
    from lavis_lstp.models.lstp import LSTP as Model

    convert(str(tiny / LSTP / "LSTP-7B.ckpt"), tmp_path / "out")
    section = OmegaConf.load(tmp_path / "out" / "config.yaml")
    assert section.model.arch == "lstp_vicuna7b" and section.model.flow.weights == "checkpoint"
    section.model.backbone = {"weights": str(tiny / "Salesforce" / "instructblip-vicuna-7b"), "dtype": "float32"}
    section.model.sampler.tokenizer = str(tiny / "google-bert" / "bert-base-uncased")
    section.model.checkpoint = str(tmp_path / "out")
    ours = Model.from_config(complete_model(section).model).state_dict()
    published = convert_published(load_state_dict_file(tiny / LSTP / "LSTP-7B.ckpt"), as_whole=True)
    assert ours.keys() >= published.keys()
    assert all(torch.equal(ours[key], value) for key, value in published.items())
    assert section.model.flow.flow_size == section.model.sampler.flow_size == 32
    assert section.model.sampler.mode == "multi_modal" and section.model.fusion == "mean"


def test_lora_settings_are_read_off_the_weights(tiny, tmp_path):
    convert(str(tiny / LSTP / "LSTP-7B-lora.ckpt"), tmp_path / "out")
    section = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["model"]
    assert section["model_type"] == "lora" and section["train"][-1] == "lora"
    assert section["lora"] == {"r": 8, "alpha": 32, "dropout": 0.1, "targets": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("backbone", ["instructblip-vicuna-7b", "blip2-flan-t5-xl"])
def test_keep_writes_frozen_parts(tmp_path, backbone, lora):
    """Over another base model the checkpoint makes the published one; T5's one tensor of three names included."""
    from lavis_lstp.inference.loading import model_config
    from lavis_lstp.models.weights.recorded import recorded_model

    published = lstp_state_dict(backbone=backbone, lora=lora)
    torch.save(published, tmp_path / "x.ckpt")
    (base,) = write_all(tmp_path / "hub", only=[backbone], seed=5).values()
    report, got = converted(tmp_path / "x.ckpt", tmp_path / "out", keep=["language_model", "vision"])
    assert not report.left_out and report.renamed["language_model"] > 10 and adds_up(report)
    options = [f"model.backbone.weights={base}", "model.backbone.dtype=float32", "model.sampler.tokenizer=null"]
    model_class, config = model_config(recorded_model(str(tmp_path / "out")), [str(tmp_path / "out")], options)
    own = model_class.from_config(config).state_dict()
    whole = convert_published(published, as_whole=True)
    plain = {key.replace(".base_layer.", "."): value for key, value in own.items()}
    assert plain.keys() == whole.keys()
    assert all(torch.equal(plain[key], value) for key, value in whole.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(tiny, tmp_path, dtype):
    _, full = converted(tiny / LSTP / "LSTP-7B.ckpt", tmp_path / "full")
    _, got = converted(tiny / LSTP / "LSTP-7B.ckpt", tmp_path / "out", dtype=dtype)
    assert all(torch.equal(value, full[key].to(value.dtype)) for key, value in got.items())
    counters = {key for key, value in got.items() if value.dtype == torch.int64}
    assert counters and all(key.endswith("num_batches_tracked") for key in counters)
    assert {value.dtype for key, value in got.items() if key not in counters} == {getattr(torch, dtype)}


def test_float16_that_overflows(tmp_path):
    source = {
        key.removeprefix("sd."): v for key, v in load_file(GOLDEN / "temporal_encoder_weights.safetensors").items()
    }
    source["mrc_head.bias"] = torch.tensor([0.0, 1e6])
    torch.save(source, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="'sampler.head.bias' has numbers that float16 cannot hold"):
        convert(str(tmp_path / "x.pth"), tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pth"]


def test_what_the_folder_says_of_itself(tiny, tmp_path):
    from lavis_lstp.files import sha256_file

    report, _ = converted(tiny / "raft-sintel.pth", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"]["files"]["raft-sintel.pth"]["sha256"] == sha256_file(tiny / "raft-sintel.pth")
    assert manifest["report"]["renamed"] == report.renamed == {"flow": 169}
    assert manifest["report"]["dropped"] == {"norm3, the same module as downsample.1": 10}
    for name, facts in manifest["files"].items():
        assert facts["sha256"] == sha256_file(tmp_path / "out" / name)
    assert weights_file(tmp_path / "out") == tmp_path / "out" / "model.safetensors"
    assert {oct(path.stat().st_mode & 0o444) for path in (tmp_path / "out").iterdir()} == {"0o444"}


def test_printed_report(tiny, tmp_path, capsys):
    source, out = str(tiny / LSTP / "LSTP-7B.ckpt"), str(tmp_path / "out")
    assert cli.main(["convert", source, out, "--dtype", "bfloat16"]) == 0
    text = capsys.readouterr().out
    trained = "if so (published: self-refinement of BLIP-2-FLAN-T5-XL), add --keep language_model\n"
    for line in ("LSTP", "2 temporal_projection, which nothing used", "missing         0", "language_model, ", trained):
        assert line in text, text
    assert cli.main(["convert", source, out]) == 2
    assert capsys.readouterr().err == f"error: '{out}' exists already; expected the name of a new folder\n"


# ---- sizes ----------------------------------------------------------------------------------------------------


def with_lora(layout: dict) -> dict[str, list[int]]:
    """Rank 8 beside q and v, as published, which gives the whole language model longer names."""
    found = {}
    for key, shape in layout.items():
        key = key.replace("model.language_model.", "model.language_model.base_model.model.")
        found[key] = shape
        layer = key.removesuffix(".weight")
        if "language_model." in key and layer.rpartition(".")[2] in ("q_proj", "v_proj", "q", "v"):
            found[f"{layer}.lora_A.default.weight"] = [8, shape[1]]
            found[f"{layer}.lora_B.default.weight"] = [shape[0], 8]
    return found


@pytest.mark.parametrize("name", INVENTORY["layouts"])
def test_full_size_recipes_stay_small(name):
    """Everything that any recipe trains, RAFT included, with adapters: < 1 GB in bfloat16, < 1.5 GB in float32."""
    layout = with_lora({**INVENTORY["shared"], **INVENTORY["layouts"][name]})
    published = {key: torch.zeros(()).expand(shape) for key, shape in layout.items()}  # full size, no memory
    ours = convert_published(published)
    kept = [value.numel() for key, value in ours.items() if part_of(key) not in ("vision", "language_model")]
    assert 2.4e8 < sum(kept) < 3.3e8
    assert 2 * sum(kept) < 1e9 and 4 * sum(kept) < 1.5e9
    for part in ("sampler", "flow", "vision", "qformer", "query_tokens", "projection", "language_model"):
        assert fit(ours, part) == ([], [])
        lost = next(key for key in reversed(ours) if part_of(key) == part)
        excused, problems = fit({key: value for key, value in ours.items() if key != lost}, part)
        assert not excused and len(problems) == 1 and re.fullmatch(rf"1 of \d+ keys missing: '{lost}'", problems[0])


# ---- the other kinds ------------------------------------------------------------------------------------------


def test_bert(tiny, tmp_path):
    report, got = converted(tiny / "google-bert" / "bert-base-uncased", tmp_path / "out")
    assert report.kind == "bert" and adds_up(report)
    assert sorted(report.dropped.values()) == [1, 2, 7] and not report.left_out
    source = load_state_dict_file(weights_file(tiny / "google-bert" / "bert-base-uncased"))
    assert torch.equal(got["sampler.text_embedding.norm.weight"], source["bert.embeddings.LayerNorm.gamma"])
    assert "sampler.flow_rotary" in report.missing and not got.keys() & set(report.missing)
    sizes = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["model"]["sampler"]
    assert sizes["hidden_size"] == 40 and "max_positions" not in sizes


def test_full_size_bert():
    """What a fresh full-size sampler has and BERT has not: as many keys as the patterns say."""
    with torch.device("meta"):
        own = TemporalSampler().state_dict()
    in_bert = {f"sampler.{k}": v for k, v in own.items() if not any(fnmatchcase(k, p) for p in NOT_IN_BERT)}
    missing, problems = fit(in_bert, "sampler", allowed_missing=[f"sampler.{pattern}" for pattern in NOT_IN_BERT])
    assert not problems and fit(in_bert, "sampler")[1]
    assert set(missing) == {f"sampler.{key}" for key in own} - in_bert.keys()
    assert sum(".cross_attention." in key for key in missing) == 6 * 10


def fresh_sampler(state_dict) -> TemporalSampler:
    other = {"num_heads": 4, "fusion_layer": 1, "flow_size": 32, "max_positions": 32}
    return TemporalSampler(**sizes_in(below("sampler.", state_dict)) | other)


@pytest.mark.parametrize("form", ["folder", "converted", "bin", "bare", "sharded"])
def test_bert_into_a_sampler(tiny, tmp_path, form):
    folder = tiny / "google-bert" / "bert-base-uncased"
    source = load_state_dict_file(weights_file(folder))
    path = {"folder": folder}.get(form, tmp_path / form)
    if form == "converted":
        convert(str(folder), path)
    elif form in ("bin", "bare"):
        strip = "bert." if form == "bare" else ""
        path.mkdir()
        torch.save({key.removeprefix(strip): v for key, v in source.items()}, path / "pytorch_model.bin")
    elif form == "sharded":
        write_shards(source, path)
    report, got = converted(folder, tmp_path / "reference")
    sampler = fresh_sampler(got)
    before = {key: value.clone() for key, value in sampler.state_dict().items()}
    fresh = load_bert_into_sampler(sampler, str(path))
    assert {f"sampler.{key}" for key in fresh} == {f"sampler.{key}" for key in before} - got.keys()
    for key, value in sampler.state_dict().items():
        assert torch.equal(value, before[key] if key in fresh else got[f"sampler.{key}"]), key


def write_shards(state_dict: dict, folder: Path) -> None:
    folder.mkdir()
    place = {key: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(state_dict)}
    for name in set(place.values()):
        save_file({key: state_dict[key] for key in place if place[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))


def test_damaged_shards(tmp_path):
    write_shards({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x")
    index = tmp_path / "x" / "model.safetensors.index.json"
    for content, message in (
        ({"weight_map": {"c": "model-00001-of-00002.safetensors"}}, "names 1 keys that its shards have not: 'c'"),
        ({"weight_map": {"a": "gone.safetensors"}}, "no weights file '.*gone.safetensors'"),
        ({"weights": {}}, "damaged or no index"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(WeightsError, match=message):
            load_state_dict_file(index)


def test_bert_of_another_size(tiny):
    sampler = TemporalSampler(hidden_size=16, num_layers=1, num_heads=2, vocab_size=9, text_width=16, fusion_layer=0)
    with pytest.raises(WeightsError, match=r"\(model.sampler.weights\) do not fit TemporalSampler"):
        load_bert_into_sampler(sampler, str(tiny / "google-bert" / "bert-base-uncased"))
    with pytest.raises(WeightsError, match="these are BERT's weights.*set model.sampler.weights"):
        convert_published(load_state_dict_file(weights_file(tiny / "google-bert" / "bert-base-uncased")))


@pytest.mark.parametrize(
    ("file", "kind", "arch"),
    [
        ("blip2_pretrained_flant5xl.pth", "lavis_blip2", "lstp_flant5xl"),
        ("instruct_blip_vicuna7b_trimmed.pth", "lavis_instruct", "lstp_vicuna7b"),
    ],
)
def test_lavis_files(tiny, tmp_path, file, kind, arch):
    report, got = converted(tiny / "lavis" / file, tmp_path / "out")
    assert report.kind == kind and adds_up(report) and set(report.left_out) == {"vision"}
    assert {part_of(key) for key in got} == {"qformer", "query_tokens", "projection"}
    assert report.absent == ["sampler", "flow"]
    section = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["model"]
    learnt = ["qformer", "query_tokens", "projection"]
    assert section == {"arch": arch, "model_type": "base", "train": learnt}
    report, got = converted(tiny / "lavis" / file, tmp_path / "all", keep=["vision"])
    assert adds_up(report) and not report.left_out and any(key.endswith("self_attn.qkv.bias") for key in got)


@pytest.fixture(scope="module")
def lavis_model(tmp_path_factory):
    """LAVIS's own tiny models by name; no bias is zero, as EVA's constructor leaves them."""
    with lavis_tiny.hub(tmp_path_factory.mktemp("lavis")) as root:

        def build(name: str):
            model = lavis_tiny.build(name, root)
            generator = torch.Generator().manual_seed(3)
            for key, parameter in model.named_parameters():
                if key.startswith(("visual_encoder", "ln_vision", "query_tokens", "Qformer")):
                    parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            return model

        yield build


def hf_parts(state_dict: dict, *, instruct: bool):
    """transformers' vision tower, Q-Former, query tokens and projection with converted weights, loaded strictly."""
    import transformers

    family = "InstructBlip" if instruct else "Blip2"
    width, layers = lavis_tiny.WIDTH, lavis_tiny.LAYERS
    common = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": lavis_tiny.HEADS}
    common["num_hidden_layers"] = layers
    vision = getattr(transformers, f"{family}VisionConfig")(
        **common, image_size=lavis_tiny.IMAGE_SIZE, patch_size=14, qkv_bias=True, layer_norm_eps=1e-6
    )
    vocab = {"vocab_size": len(lavis_tiny.BERT_VOCAB) + 1, "max_position_embeddings": 64} if instruct else {}
    qformer = getattr(transformers, f"{family}QFormerConfig")(
        **common, **vocab, encoder_hidden_size=width, cross_attention_frequency=2
    )
    modules = {
        "vision_model": getattr(transformers, f"{family}VisionModel")(vision).eval(),
        "qformer": getattr(transformers, f"{family}QFormerModel")(qformer).eval(),
    }
    for name, module in modules.items():
        prefix = f"backbone.model.{name}."
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        module.load_state_dict(own)
    # LAVIS's norm after the tower has 1e-5 where transformers has 1e-6; no checkpoint says so, trained towers are
    # far above both, and these weights are small enough to feel it
    modules["vision_model"].post_layernorm.eps = 1e-5
    return modules["vision_model"], modules["qformer"]


@pytest.mark.parametrize("name", ["blip2_t5", "blip2"])
def test_lavis_and_transformers_agree(lavis_model, tmp_path, name):
    """LAVIS's modules and transformers' with the converted weights: equal vision and Q-Former outputs.

    `blip2` stands for InstructBLIP, which LAVIS 1.0.2 lacks: its Q-Former reads text by the same code.
    """
    instruct = name == "blip2"
    model = lavis_model(name)
    state_dict = model.state_dict()
    if instruct:
        heads = ("vision_proj", "text_proj", "itm_head", "temp")
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith(heads)}
    torch.save({"model": state_dict}, tmp_path / "x.pth")
    report, got = converted(tmp_path / "x.pth", tmp_path / "out", keep=["vision"])
    assert report.kind == ("lavis_instruct" if instruct else "lavis_blip2") and adds_up(report)
    vision, qformer = hf_parts(got, instruct=instruct)
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(3, 3, lavis_tiny.IMAGE_SIZE, lavis_tiny.IMAGE_SIZE, generator=generator)
    count = lavis_tiny.QUERIES
    text, mask = {}, {}
    if instruct:
        text = {"input_ids": torch.tensor([[3, 7, 9, 4], [3, 8, 4, 0], [3, 5, 6, 4]])}
        mask = {"attention_mask": torch.cat([torch.ones(3, count).long(), (text["input_ids"] != 0).long()], dim=1)}
    with torch.no_grad():
        features = model.ln_vision(model.visual_encoder(images))
        torch.testing.assert_close(vision(pixel_values=images).last_hidden_state, features, atol=1e-5, rtol=0)
        seen = {
            "encoder_hidden_states": features,
            "encoder_attention_mask": torch.ones(features.shape[:2], dtype=torch.long),
            "return_dict": True,
        }
        queries = model.query_tokens.expand(3, -1, -1)
        theirs = model.Qformer.bert(query_embeds=queries, **text, **mask, **seen).last_hidden_state
        assert torch.equal(got["backbone.model.query_tokens"], model.query_tokens)
        ours = qformer(query_embeds=queries, **text, **mask, **seen).last_hidden_state
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours[:, :count], theirs[:, :count], atol=1e-5, rtol=0)
    if not instruct:
        assert torch.equal(got["backbone.model.language_projection.weight"], model.t5_proj.weight)


def test_a_language_model_that_no_config_has(tiny, tmp_path):
    state = load_state_dict_file(tiny / "lavis" / "blip2_pretrained_flant5xl.pth")
    state |= {"t5_proj.weight": torch.zeros(4096, state["t5_proj.weight"].shape[1]), "t5_proj.bias": torch.zeros(4096)}
    torch.save({"model": state}, tmp_path / "xxl.pth")
    convert(str(tmp_path / "xxl.pth"), tmp_path / "out")
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text()) == {"model": {}}


def test_first_stage_of_blip2(lavis_model, tmp_path):
    """Its heads and what reads text are dropped by name: BLIP-2's second stage has neither."""
    torch.save({"model": lavis_model("blip2").state_dict()}, tmp_path / "x.pth")
    report, got = converted(tmp_path / "x.pth", tmp_path / "out", keep=["vision"])
    assert report.kind == "lavis_blip2" and adds_up(report)
    assert {"heads of BLIP-2's first training stage", "the Q-Former's masked-language head"} <= report.dropped.keys()
    hf_parts(got, instruct=False)


# ---- what cannot be converted ---------------------------------------------------------------------------------


def test_a_pickle_that_runs_code(tmp_path, capsys):
    marker, out = tmp_path / "ran", tmp_path / "out"
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps({"state_dict": {"model.query_tokens": Evil(marker)}}, protocol=2))
    assert cli.main(["convert", str(tmp_path / "x.ckpt"), str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "which could run code when read" in error
    assert not marker.exists() and not out.exists()


LM = "model.language_model.model."
WRAPPED = "model.language_model.base_model.model.model.layers.0.self_attn.q_proj."
QFORMER = "model.qformer.encoder.layer."


def refused(state: dict, tmp_path: Path, **settings) -> str:
    """The one line that says why; nothing is written."""
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.raises(WeightsError) as error:
        convert(str(tmp_path / "x.ckpt"), tmp_path / "out", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]
    line = str(error.value)
    assert "\n" not in line and len(line) < 600, line
    return line


@pytest.mark.parametrize(
    "key",
    [
        "model.audio.weight",
        "model.audio.position_ids",
        "model.temporal_projection.scale",
        "model.language_projection.scale",
        "model.language_model.bogus",
        f"{LM}layers.7.mlp.up_proj.weight",
        f"{LM}layers.0.self_attn.q_proj.lora_C.default.weight",
        f"{LM}layers.0.mlp.act.lora_A.default.weight",
        "model.vision_model.encoder.layers.0.bogus",
        f"{QFORMER}9.bogus.weight",
        f"{QFORMER}1.crossattention.attention.key.weight",
        "temporal_encoder.encoder.layer.0.attention.self.query.extra",
        "temporal_encoder.mrc_head.extra",
        "of_extractor.fnet.conv1.extra",
    ],
)
def test_a_key_that_nothing_explains(tiny, tmp_path, key):
    """Below a prefix that is known, too; it is named and nothing else is called wrong."""
    state = load_state_dict_file(tiny / LSTP / "LSTP-7B.ckpt")
    line = refused({**state, key: torch.ones(3, 3)}, tmp_path)
    assert key.rpartition(".")[2] in line and "of another shape" not in line
    if ".lora_" not in key:  # without its other half and its neighbours, an adapter has those to miss
        assert "missing" not in line and ("1 keys the model does not have" in line or f"'{key}' unknown" in line), line


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("temporal_encoder.mrc_head.bias", "sampler, 1 of .* 'sampler.head.bias'"),
        ("temporal_encoder.embeddings.word_embeddings.weight", "sampler, 1 of .* 'sampler.text_embedding.word.weight'"),
        ("of_extractor.fnet.conv2.bias", "flow, 1 of"),
        ("model.language_projection.bias", "projection, 1 of"),
        ("model.language_projection.weight", "projection, 1 of"),
        (f"{QFORMER}1.output_query.dense.bias", "qformer, 1 of"),
        (f"{QFORMER}0.intermediate_query.dense.weight", "qformer, 1 of .* '.*0.intermediate_query.dense.weight'"),
        (f"{QFORMER}0.crossattention.attention.key.weight", "qformer, 1 of"),
        ("model.vision_model.encoder.layers.0.self_attn.qkv.bias", "vision, 1 of"),
        (f"{LM}layers.0.mlp.gate_proj.weight", "language_model, 1 of"),
    ],
)
def test_a_missing_key(tiny, tmp_path, key, part):
    """Of what is written, and of the layers of what is left out."""
    state = load_state_dict_file(tiny / LSTP / "LSTP-7B.ckpt")
    del state[key]
    assert re.search(f"of the part {part}", refused(state, tmp_path))


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        (
            "temporal_encoder.encoder.layer.0.attention.self.query.weight",
            "sampler.layers.0.self_attention.query.weight",
        ),
        ("temporal_encoder.encoder.embed_positions.weight", "sampler.flow_rotary"),
        ("of_extractor.fnet.conv2.bias", "flow.model.feature_encoder.conv.bias"),
        ("model.query_tokens", "backbone.model.query_tokens"),
        ("model.language_projection.weight", "backbone.model.language_projection.weight"),
        (f"{QFORMER}0.attention.attention.query.weight", f"backbone.{QFORMER}0.attention.attention.query.weight"),
        (
            "model.vision_model.encoder.layers.1.mlp.fc1.bias",
            "backbone.model.vision_model.encoder.layers.1.mlp.fc1.bias",
        ),
        (f"{LM}layers.1.mlp.up_proj.weight", f"backbone.{LM}layers.1.mlp.up_proj.weight"),
    ],
)
def test_weights_of_another_shape(tiny, tmp_path, key, ours):
    state = load_state_dict_file(tiny / LSTP / "LSTP-7B.ckpt")
    state[key] = torch.zeros(3, 3)
    assert f"1 of another shape: '{ours}' is [3, 3] in the file" in refused(state, tmp_path)


@pytest.mark.parametrize("key", ["vision_model.embeddings.patch_embedding.bias", "language_model.lm_head.weight"])
def test_what_is_kept_is_whole(tiny, tmp_path, key):
    """What lies in no layer may be missing of a frozen part, not of one that is written."""
    state = load_state_dict_file(tiny / LSTP / "LSTP-7B.ckpt")
    del state[f"model.{key}"]
    for part in ("vision", "language_model"):
        if key.startswith(part):
            assert f"1 of {30 if part == 'vision' else 21} keys missing" in refused(state, tmp_path, keep=[part])
    torch.save(state, tmp_path / "x.ckpt")
    report, _ = converted(tmp_path / "x.ckpt", tmp_path / "out")
    assert adds_up(report)


@pytest.mark.parametrize("backbone", ["blip2-flan-t5-xl", "instructblip-vicuna-7b"])
def test_a_kept_language_model_has_its_output_layer(tmp_path, backbone):
    """T5's as well, which is no other name of the embeddings; of those one name is enough."""
    state = lstp_state_dict(backbone=backbone)
    if "t5" in backbone:
        del state["model.language_model.encoder.embed_tokens.weight"]
        torch.save(state, tmp_path / "x.ckpt")
        converted(tmp_path / "x.ckpt", tmp_path.parent / f"{tmp_path.name}-fits", keep=["language_model"])
    del state["model.language_model.lm_head.weight"]
    assert "language_model.lm_head.weight'" in refused(state, tmp_path, keep=["language_model"])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sd: sd.pop(f"{WRAPPED}lora_A.default.weight"), "keys missing: .*0.self_attn.q_proj.lora_A"),
        (lambda sd: sd.pop(f"{WRAPPED}lora_B.default.weight"), "keys missing: .*0.self_attn.q_proj.lora_B"),
        (
            lambda sd: [sd.pop(f"{WRAPPED}lora_{half}.default.weight") for half in "AB"],
            "2 of .* keys missing: .*0.self_attn.q_proj.lora_A",
        ),
        (
            lambda sd: sd.update({f"{WRAPPED}lora_A.default.weight": torch.ones(3, 32)}),
            r"1 of another shape: .*q_proj.lora_A.default.weight' is \[3, 32\]",
        ),
        (
            lambda sd: sd.update({f"{WRAPPED}lora_A.weight": sd.pop(f"{WRAPPED}lora_A.default.weight")}),
            "1 keys the model does not have: .*q_proj.lora_A.weight",
        ),
    ],
)
def test_adapters_come_in_pairs_and_for_all_layers(tiny, tmp_path, change, message, whole):
    """Beside the language model, and in a file without its frozen weights."""
    state = load_state_dict_file(tiny / LSTP / "LSTP-7B-lora.ckpt")
    if not whole:
        state = {key: v for key, v in state.items() if "language_model" not in key or ".lora_" in key}
        torch.save(state, tmp_path / "x.ckpt")
        report, _ = converted(tmp_path / "x.ckpt", tmp_path.parent / f"{tmp_path.name}-fits")
        assert report.renamed["lora"] == 8
    change(state)
    assert re.search(message, refused(state, tmp_path))


def test_a_language_model_of_no_known_kind(tiny, tmp_path):
    state = load_state_dict_file(tiny / LSTP / "LSTP-7B.ckpt")
    state = {key.replace(f"{LM}layers", "model.language_model.transformer.h"): value for key, value in state.items()}
    assert "language_model, no layers of LLaMA, T5 or OPT among its 21 keys, first 'lm_head" in refused(state, tmp_path)


def test_layers_in_todays_names_of_peft(tiny, tmp_path):
    """`base_layer`, which peft 0.4 did not write; a layer under both names is one too many."""
    state = load_state_dict_file(tiny / LSTP / "LSTP-7B-lora.ckpt")
    old = f"{WRAPPED}weight"
    both = {**state, f"{WRAPPED}base_layer.weight": state[old]}
    assert f"1 keys the model does not have: 'backbone.{old}'" in refused(both, tmp_path)
    del both[old]
    torch.save(both, tmp_path / "x.ckpt")
    assert adds_up(converted(tmp_path / "x.ckpt", tmp_path / "out")[0])


def test_constants_that_old_releases_saved(tiny, tmp_path):
    """LLaMA's rotary frequencies, of transformers < 4.31, beside LAVIS's own names."""
    state = load_state_dict_file(tiny / "lavis" / "instruct_blip_vicuna7b_trimmed.pth")
    state["llm_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save({"model": state}, tmp_path / "x.pth")
    report, _ = converted(tmp_path / "x.pth", tmp_path / "out")
    assert adds_up(report) and report.dropped["constants that are computed"] == 2
    assert set(report.left_out) == {"vision"}


def test_a_bert_with_a_hole(tiny, tmp_path):
    """What no BERT has is missing by design; what this one lost is not."""
    state = load_state_dict_file(weights_file(tiny / "google-bert" / "bert-base-uncased"))
    del state["bert.encoder.layer.0.output.dense.bias"]
    line = refused(state, tmp_path)
    assert "of the part sampler, 1 of" in line and "'sampler.layers.0.feed_forward.down.bias'" in line


@pytest.mark.parametrize("name", ["blip2_t5", "blip2_opt"])
def test_lavis_models_with_their_language_model(lavis_model, tmp_path, name):
    """Whole, as torch saves them, or with nothing but what LAVIS's runner saves."""
    model = lavis_model(name)
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    report, _ = converted(tmp_path / "x.pth", tmp_path / "whole", keep=["language_model"])
    assert adds_up(report) and set(report.left_out) == {"vision"}
    frozen = ("visual_encoder", "t5_model", "opt_model")
    torch.save({"model": {k: v for k, v in model.state_dict().items() if not k.startswith(frozen)}}, tmp_path / "y.pth")
    report, _ = converted(tmp_path / "y.pth", tmp_path / "learnt")
    assert adds_up(report) and report.left_out["vision"]["keys"] == 2
    state = {k: v for k, v in model.state_dict().items() if not re.search(r"_model.*block\.0.*\.q\.|layers\.0\.fc1", k)}
    (tmp_path / "z").mkdir()
    assert "of the part language_model, " in refused({"model": state}, tmp_path / "z")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dtype": "int8"}, ConfigError, r"unknown dtype \(--dtype\) 'int8'"),
        ({"kind": "lavsi"}, ConfigError, "did you mean 'lavis'"),
        ({"keep": ["visoin"]}, ConfigError, "did you mean 'vision'"),
        ({"kind": "lavis"}, WeightsError, "is RAFT of princeton-vl, not of the kind 'lavis'"),
    ],
)
def test_settings(tiny, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        convert(str(tiny / "raft-sintel.pth"), tmp_path / "out", **settings)


def test_our_own_format_needs_no_conversion(tiny, tmp_path):
    convert(str(tiny / "raft-sintel.pth"), tmp_path / "out")
    with pytest.raises(WeightsError, match="has this package's names already; set model.checkpoint to it"):
        convert(str(tmp_path / "out"), tmp_path / "again")


# ---- where weights are looked for -----------------------------------------------------------------------------


def test_hub_files(tiny, tmp_path, monkeypatch):
    """By a name of the hub: below LAVIS_LSTP_WEIGHTS, in the hub's cache, or one line that says what to do."""
    import huggingface_hub.constants
    import huggingface_hub.file_download  # its package gives the name to a function

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAVIS_LSTP_WEIGHTS", str(tiny))
    assert weights_file(f"{LSTP}LSTP-7B.ckpt") == tiny / LSTP / "LSTP-7B.ckpt"
    monkeypatch.delenv("LAVIS_LSTP_WEIGHTS")
    cache = tmp_path / "cache"
    for module in (huggingface_hub.constants, sys.modules["huggingface_hub.file_download"]):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(cache), raising=False)
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True, raising=False)
    snapshot = cache / "models--a--b" / "snapshots" / "0123"
    for file, content in ((snapshot / "c.ckpt", "x"), (snapshot.parent.parent / "refs" / "main", "0123")):
        file.parent.mkdir(parents=True)
        file.write_text(content)
    assert weights_file("a/b/c.ckpt") == snapshot / "c.ckpt"
    with pytest.raises(WeightsError) as error:
        weights_file(f"{LSTP}LSTP-7B.ckpt")
    line = str(error.value)
    assert "\n" not in line
    for part in ("LSTP-7B.ckpt from https://huggingface.co/ColorfulAI/LSTP-Chat", "$LAVIS_LSTP_WEIGHTS/", "convert"):
        assert part in line, line
    with pytest.raises(WeightsError, match="no BERT at 'bert-base-uncased'.*download model.safetensors from"):
        load_bert_into_sampler(TemporalSampler(), "bert-base-uncased")


def test_the_hub_is_asked_for_files_of_repositories_only(tmp_path, monkeypatch):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "hub_file", lambda *args: asked.append(args[:2]) or tmp_path)
    hub.checkpoint_source("a/b/c.ckpt")
    hub.checkpoint_source("a/b/c/d.pth")
    assert asked == [("a/b", "c.ckpt"), ("a/b", "c/d.pth")]
    (tmp_path / "output").mkdir()
    for name in ("output/run/x.pth", "a/b", "./a/b/c.ckpt", "/a/b/c.ckpt", "a/b/c"):
        with pytest.raises(WeightsError, match="expected a run's folder"):
            hub.checkpoint_source(name)


def test_patterns_of_what_bert_lacks_match_something():
    keys = TemporalSampler(num_layers=1, fusion_layer=0, hidden_size=16, num_heads=2, vocab_size=9).state_dict()
    assert all(any(fnmatchcase(key, pattern) for key in keys) for pattern in NOT_IN_BERT)
