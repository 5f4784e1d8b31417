"""Weights: every published key accounted for, nothing executed, nothing loaded by half."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file
from torch import nn

from lavis_lstp.errors import WeightsError
from lavis_lstp.models.answer.loading import model_classes
from lavis_lstp.models.answer.lora import add_lora, matched
from lavis_lstp.models.weights import hub
from lavis_lstp.models.weights.published_sizes import PUBLISHED_SIZES
from lavis_lstp.models.weights.reading import (
    convert_published,
    convert_published_with_report,
    load_state_dict_file,
    load_strict,
    weights_file,
)
from lavis_lstp.models.where.temporal_sampler import TemporalSampler

RAFT = json.loads((GOLDEN / "raft.json").read_text())
INVENTORY = json.loads((GOLDEN / "key_inventory.json").read_text())
LAYOUTS = INVENTORY["layouts"]


def meta(shapes: dict) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def raft() -> nn.Module:
    from torchvision.models.optical_flow import raft_large

    return raft_large(weights=None)


@pytest.fixture(scope="module")
def sampler_keys() -> dict[str, torch.Tensor]:
    weights = load_file(GOLDEN / "temporal_encoder_weights.safetensors")
    return {key.removeprefix("sd."): value for key, value in weights.items()}


# ---- RAFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
def test_raft_keys_are_the_golden_ones(prefix):
    table = RAFT["mapping_ref_to_torchvision"]
    converted = convert_published({prefix + key: key for key in table})
    assert len(table) == 179 and len(converted) == 169
    assert {(old, new) for new, old in converted.items()} <= set(table.items())
    assert set(converted) == set(table.values())


def test_raft_fits_torchvision(raft):
    published = meta(RAFT["shapes"])
    converted = convert_published(published)
    assert {key: list(value.shape) for key, value in converted.items()} == shapes(raft)
    assert sum(p.numel() for p in raft.parameters()) == RAFT["params"]


def test_raft_takes_every_value_along(raft):
    published = {key: torch.full(shape, float(i)) for i, (key, shape) in enumerate(RAFT["shapes"].items())}
    load_strict(raft, convert_published(published))
    own = raft.state_dict()
    for i, (old, new) in enumerate(RAFT["mapping_ref_to_torchvision"].items()):
        if ".norm3." not in old:
            assert (own[new] == i).all(), (old, new)


# ---- the sampler ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
def test_sampler_alone(sampler_keys, prefix):
    report = convert_published_with_report({prefix + key: value for key, value in sampler_keys.items()})
    assert report.alone == "sampler"
    assert sorted(report.dropped) == ["embeddings.position_embeddings.weight", "temporal_embeddings.position_ids"]
    inside = convert_published(sampler_keys, as_whole=True)
    assert inside.keys() == {f"sampler.{key}" for key in report.state_dict}
    whole = convert_published({f"temporal_encoder.{key}": value for key, value in sampler_keys.items()})
    assert whole.keys() == inside.keys()


# ---- the whole model ------------------------------------------------------------------------------------------


def full_size(name: str) -> nn.Module:
    """The transformers model of a published layout, on the meta device, at the sizes this package says it has."""
    blip2, vicuna = "BLIP-2" in name, "Vicuna" in name
    hub_id = "blip2-flan-t5-xl" if blip2 else f"instructblip-{'vicuna-7b' if vicuna else 'flan-t5-xl'}"
    config_class, model_class = model_classes("blip2" if blip2 else "instructblip")
    config = config_class(**copy.deepcopy(PUBLISHED_SIZES[f"Salesforce/{hub_id}"]))
    with torch.device("meta"):
        return model_class(config)


@pytest.mark.parametrize("name", LAYOUTS)
def test_full_size_layout_is_ours_in_key_and_shape(name, raft):
    """Backbone.model, sampler and torchvision's RAFT, at full size, want exactly what the checkpoint gives."""
    with torch.device("meta"):
        parts = {"backbone.model.": full_size(name), "sampler.": TemporalSampler(), "flow.model.": raft}
    wanted = {prefix + key: shape for prefix, module in parts.items() for key, shape in shapes(module).items()}
    published = {**INVENTORY["shared"], **LAYOUTS[name]}
    report = convert_published_with_report(meta(published))
    got = {key: list(value.shape) for key, value in report.state_dict.items()}
    assert {key: got.get(key) for key in wanted} == wanted
    assert got.keys() == wanted.keys()
    assert report.alone is None
    assert len(report.dropped) == len(published) - len(got) == 14
    assert {"model.temporal_projection.weight", "model.temporal_projection.bias"} <= set(report.dropped)


@pytest.mark.parametrize("layout", ["peft 0.4", "peft today"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_full_size_layout_with_lora(name, layout):
    """With the published adapters on the real classes: what either peft wrote is what our model has, key and shape."""
    begin = "model.language_model."
    published = {}
    for key, shape in LAYOUTS[name].items():
        renamed = key.replace(begin, f"{begin}base_model.model.") if key.startswith(begin) else key
        layer = renamed.removesuffix(".weight")
        if key.startswith(begin) and layer.rpartition(".")[2] in ("q_proj", "v_proj", "q", "v"):
            published[f"{layer}.lora_A.default.weight"] = [8, shape[1]]
            published[f"{layer}.lora_B.default.weight"] = [shape[0], 8]
            renamed = renamed if layout == "peft 0.4" else f"{layer}.base_layer.weight"
        published[renamed] = shape
    module = full_size(name)
    with torch.device("meta"):
        module.language_model = add_lora(module.language_model)
    wanted = {f"backbone.model.{key}": shape for key, shape in shapes(module).items()}
    got = matched(convert_published(meta(published)), wanted, ["backbone.model.language_model."], "the file")
    assert {key: list(value.shape) for key, value in got.items()} == wanted
    assert sum(".lora_" in key for key in got) == (128 if "Vicuna" in name else 288)


def test_lightning_checkpoint_lora_and_constants(sampler_keys):
    keys = {
        "model.language_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": 1,
        "model.qformer.embeddings.position_ids": 2,
        "model.language_model.model.layers.0.self_attn.rotary_emb.inv_freq": 3,
        "temporal_encoder.mrc_head.bias": 4,
    }
    assert convert_published({"state_dict": keys, "epoch": 3}) == {
        "backbone.model.language_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": 1,
        "sampler.head.bias": 4,
    }


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.audio_model.weight", "'model.audio_model.weight' unknown"),
        ("temporal_encoder.encoder.layer.0.attention.self.gate.weight", "self.gate.weight' unknown"),
        ("of_extractor.fnet.layer1.0.attn.weight", "layer1.0.attn.weight' unknown"),
        ("optimizer", "'optimizer' unknown"),
        (None, "no key unknown"),
    ],
)
def test_unexplained_keys_are_named(key, message):
    known = {"temporal_encoder.mrc_head.bias": 0} if key else {}
    with pytest.raises(WeightsError, match=message):
        convert_published({**known, **({key: 0} if key else {})})


def test_many_unexplained_keys_are_counted():
    with pytest.raises(WeightsError, match=r"'a', 'b', 'c' and 2 more unknown; expected a whole LSTP checkpoint"):
        convert_published(dict.fromkeys("abcde", 0))


def test_two_keys_for_one_name():
    with pytest.raises(WeightsError, match="two keys give 'head.bias'"):
        convert_published({"module.mrc_head.bias": 0, "mrc_head.bias": 1})


# ---- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda sd: sd, lambda sd: {"state_dict": sd, "epoch": 1}, lambda sd: {"model": sd}])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files(tmp_path, wrap, legacy):
    state = {"a.weight": torch.randn(3, 2), "b": torch.arange(4)}
    file = tmp_path / "x.pth"
    torch.save(wrap(state), file, _use_new_zipfile_serialization=not legacy)
    loaded = load_state_dict_file(file)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_safetensors_files(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert torch.equal(load_state_dict_file(str(tmp_path / "x.safetensors"))["a"], torch.ones(2))


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("suffix", [".pth", ".ckpt"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, suffix):
    marker, file = tmp_path / "ran", tmp_path / f"x{suffix}"
    if suffix == ".pth":
        torch.save({"a": torch.ones(1), "b": Evil(marker)}, file)
    else:
        file.write_bytes(pickle.dumps({"a": Evil(marker)}, protocol=2))
    with pytest.raises(WeightsError, match="more than tensors, which could run code"):
        load_state_dict_file(file)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_files(tmp_path, name, damage):
    file = tmp_path / name
    state = {"a": torch.ones(1000)}
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    content = {"cut": file.read_bytes()[:2500], "empty": b"", "text": b"version https://git-lfs.github.com"}[damage]
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=f"'{file}' is damaged or"):
        load_state_dict_file(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "'epoch' are not tensors"),
        ([torch.ones(1)], "it holds a list"),
        ({}, "it holds a dict"),
    ],
)
def test_files_without_a_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=message):
        load_state_dict_file(tmp_path / "x.pth")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=f"no weights file '{tmp_path / 'gone.pth'}'"):
        load_state_dict_file(tmp_path / "gone.pth")
    with pytest.raises(WeightsError, match=f"no weights at '{tmp_path / 'gone'}': expected a run's folder"):
        weights_file(tmp_path / "gone")
    with pytest.raises(WeightsError, match=f"no weights in folder '{tmp_path}'.*has the run saved a checkpoint"):
        weights_file(tmp_path)


def test_folders_stand_for_their_best_weights(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for step in ("step_00000001", "step_00000002"):
        (checkpoints / step).mkdir(parents=True)
        (checkpoints / step / "model.safetensors").touch()
    (checkpoints / "last").symlink_to("step_00000002")
    assert weights_file(tmp_path) == checkpoints / "last" / "model.safetensors"
    (checkpoints / "best").symlink_to("step_00000001")
    assert weights_file(tmp_path) == checkpoints / "best" / "model.safetensors"
    assert weights_file(checkpoints) == checkpoints / "best" / "model.safetensors"
    file = checkpoints / "step_00000002" / "model.safetensors"
    assert weights_file(file.parent) == weights_file(file) == file


# ---- strict loading -------------------------------------------------------------------------------------------


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def test_strict_loads_everything():
    source, target = net(), net()
    assert load_strict(target, source.state_dict()) == []
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sd: sd.pop("0.bias"), "my.pth do not fit Sequential: 1 of 4 keys missing: '0.bias'$"),
        (lambda sd: sd.update(extra=torch.ones(1)), "1 keys the model does not have: 'extra'$"),
        (
            lambda sd: sd.update({"1.weight": torch.ones(1, 4)}),
            r"1 of another shape: '1.weight' is \[1, 4\] in the file, \[1, 3\] in the model$",
        ),
    ],
)
def test_strict_refuses_and_changes_nothing(change, message):
    target = net()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    state = net().state_dict()
    change(state)
    with pytest.raises(WeightsError, match=message):
        load_strict(target, state, what="my.pth")
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_allowed_missing():
    state = net().state_dict()
    del state["0.bias"], state["0.weight"]
    assert load_strict(net(), state, allowed_missing=["0.*"]) == ["0.weight", "0.bias"]
    with pytest.raises(WeightsError, match="1 of 4 keys missing: '0.bias'"):
        load_strict(net(), state, allowed_missing=["0.weight"])


def test_tied_weights():
    model = net()
    model.append(nn.Linear(3, 1))
    model[2].weight = model[1].weight
    state = model.state_dict()
    one = {key: value for key, value in state.items() if key != "2.weight"}
    assert load_strict(model, one) == []
    torn = {**state, "2.weight": torch.zeros(1, 3)}
    with pytest.raises(WeightsError, match="'1.weight' and '2.weight' differ in the file but are one tensor"):
        load_strict(model, torn)


@pytest.mark.parametrize("content", ["[]", '[{"a": 1}]', "null", "7", "{", '{"a": 1, "a": 2}', "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "qformer_tokenizer/tokenizer_config.json"])
def test_a_configuration_that_is_no_object_is_named_before_transformers_meets_it(name, content, tmp_path):
    from lavis_lstp.models.answer.loading import load_published

    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(WeightsError, match=rf"{tmp_path / name}: ") as caught:
        load_published(str(tmp_path), family="instructblip")
    assert "\n" not in str(caught.value)


def test_a_file_in_place_of_a_folder_in_the_hubs_layout(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"a.json' is a file; expected a folder in the hub's layout"):
        hub.where_from(str(tmp_path / "a.json"))
