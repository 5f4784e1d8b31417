"""Adapters on the language model: what learns, what is saved, and the names of weights with and without them."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from safetensors.torch import save_file
from test_lstp import batch, model_config
from torch import Tensor

from lavis_lstp.errors import ConfigError, WeightsError
from lavis_lstp.models.building import build_backbone
from lavis_lstp.models.lstp import LSTP
from lavis_lstp.models.weights import parts
from lavis_lstp.testing.tiny_checkpoints import write_all

LANGUAGES = [("instructblip", "llama"), ("blip2", "t5")]
ADAPTERS = {"llama": 2 * 2, "t5": 2 * 2 + 2 * 4}
"""Adapted layers of two blocks: queries and values, of T5's decoder also in its cross-attention."""
LORA = {"r": 4, "alpha": 8, "dropout": 0.1, "targets": None}


def build(family: str = "instructblip", language: str = "llama", **settings) -> LSTP:
    lora = settings.pop("lora", LORA)
    return LSTP.from_config({**model_config(family, language, **{"train": ["lora"], **settings}), "lora": lora})


def shake_adapters(model: LSTP, seed: int = 0) -> None:
    """As if they had learnt something; fresh ones are products with 0."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def loss_of(model: LSTP) -> Tensor:
    return model.eval()(batch())["loss"]


@pytest.mark.parametrize(("family", "language"), LANGUAGES)
def test_fresh_adapters_change_nothing_and_lie_where_published(family, language):
    plain, model = build(family, language, lora=None, train=["projection"]), build(family, language)
    assert loss_of(model).item() == loss_of(plain).item()
    trained = model.trainable_state_dict()
    assert len(trained) == 2 * ADAPTERS[language]
    pattern = r"backbone\.model\.language_model\.base_model\.model\..*\.lora_[AB]\.default\.weight"
    assert all(re.fullmatch(pattern, key) for key in trained)
    layers = {key.split(".lora_")[0].rpartition(".")[2] for key in trained}
    assert layers == ({"q_proj", "v_proj"} if language == "llama" else {"q", "v"})
    torch.manual_seed(123)  # they are drawn from backbone.seed alone
    again = build(family, language).trainable_state_dict()
    assert all(torch.equal(value, again[key]) for key, value in trained.items())


@pytest.mark.parametrize(("family", "language"), LANGUAGES)
@pytest.mark.parametrize("train", [["lora"], ["projection", "lora"], ["language_model"]])
def test_what_is_named_learns_and_nothing_else(family, language, train):
    """`language_model` is what was there before the adapters."""
    model = build(family, language, train=train)
    shake_adapters(model)
    model.train()(batch())["loss"].backward()
    learning = {parts.part_of(key) for key, p in model.named_parameters() if p.grad is not None}
    assert learning == set(train)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    counts = model.trained_parts()
    assert list(counts) == train
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    if "lora" in train:
        assert counts["lora"] == sum(v.numel() for k, v in model.state_dict().items() if ".lora_" in k)
    dropouts = [m for key, m in model.named_modules() if "lora_dropout" in key and isinstance(m, torch.nn.Dropout)]
    assert len(dropouts) == ADAPTERS[language]
    assert all(module.training is ("lora" in train) for module in dropouts)
    language_model = model.backbone.language_model.base_model.model
    assert language_model.training is ("language_model" in train)
    assert not any(module.training for module in model.eval().modules())


@pytest.mark.parametrize(("family", "language"), LANGUAGES)
def test_saved_and_loaded_again(family, language, tmp_path):
    model = build(family, language)
    shake_adapters(model)
    wanted = loss_of(model).item()
    file = tmp_path / "model.safetensors"
    save_file(model.trainable_state_dict(), file)
    other = build(family, language, checkpoint=str(file), train=["projection"])
    assert loss_of(other).item() == wanted != loss_of(build(family, language)).item()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    partly = dict(list(model.trainable_state_dict().items())[1:])
    with pytest.raises(WeightsError, match="1 of .* keys missing: '.*lora_A"):
        other.load_trained_state_dict(partly)
    with pytest.raises(WeightsError, match=r"holds LoRA adapters \(.*set model.lora={r: 4, alpha: 32}"):
        build(family, language, lora=None, train=["projection"], checkpoint=str(file))
    with pytest.raises(WeightsError, match=r"\[4, 64\] in the file, \[2, 64\] in the model"):
        build(family, language, lora={**LORA, "r": 2}, checkpoint=str(file))


@pytest.mark.parametrize(("family", "language"), LANGUAGES)
def test_merged_adapters_give_the_same_logits(family, language):
    model = build(family, language).eval()
    shake_adapters(model)
    merged, plain = copy.deepcopy(model.backbone), build(family, language, lora=None, train=["projection"]).backbone
    merged.merge_lora()
    assert merged.state_dict().keys() == plain.state_dict().keys()
    inputs = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": torch.tensor([[0, 3], [0, 4]])} if language == "t5" else {}
    with torch.no_grad():
        logits = [b.eval().language_model(inputs_embeds=inputs, **more).logits for b in (model.backbone, merged, plain)]
    merged_off, plain_off = ((logits[0] - other).abs().max() / logits[0].abs().max() for other in logits[1:])
    assert merged_off < 1e-5 < 1e-2 < plain_off
    keys = merged.state_dict().keys()
    merged.merge_lora()  # nothing left to merge
    assert merged.state_dict().keys() == keys


# ---- names of weights -----------------------------------------------------------------------------------------------


def renamed(state: dict, change) -> dict:
    return {change(key): value for key, value in state.items()}


NAMES = {
    "without adapters": lambda key: key.replace("base_model.model.", "").replace(".base_layer.", "."),
    "peft 0.4": lambda key: key.replace(".base_layer.", "."),
    "peft 0.6 and later": lambda key: key,
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize(("family", "language"), LANGUAGES)
def test_a_language_model_loads_under_any_of_its_names(family, language, names):
    source = build(family, language, backbone={"seed": 5}, train=["language_model"])
    state = renamed(source.trainable_state_dict(), NAMES[names])
    for lora in (LORA, None):
        model = build(family, language, lora=lora, train=["language_model"])
        before = {key: value.clone() for key, value in model.state_dict().items() if ".lora_" in key}
        assert model.load_trained_state_dict(state) == ["language_model"]
        own = renamed(model.trainable_state_dict(), NAMES["without adapters"])
        wanted = renamed(state, NAMES["without adapters"])
        assert all(torch.equal(own[key], value) for key, value in wanted.items())
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_a_published_lora_checkpoint_loads(tmp_path):
    """The whole model under the published names, adapters and all, into a model whose adapters are of today's peft."""
    folders = write_all(tmp_path / "weights", only=["instructblip-vicuna-7b", "lstp-7b-lora"])
    file = torch.load(folders["lstp-7b-lora"], weights_only=True)
    published = {k: v for k, v in file.get("state_dict", file).items() if "language_model" in k}
    assert sum(".lora_" in key for key in published) >= 8
    from lavis_lstp.models.weights.reading import convert_published

    rank = next(len(value) for key, value in published.items() if ".lora_A." in key)
    backbone = build_backbone(
        "instructblip", weights=str(folders["instructblip-vicuna-7b"]), lora={"r": rank, "alpha": 32}
    )
    holder = torch.nn.Module()
    holder.backbone = backbone
    converted = convert_published(published, as_whole=True)
    assert parts.load_parts(holder, converted, "LSTP-7B-lora.ckpt") == ["language_model", "lora"]
    own = renamed(holder.state_dict(), NAMES["without adapters"])
    for key, value in renamed(converted, NAMES["without adapters"]).items():
        assert torch.equal(own[key], value), key


# ---- settings ---------------------------------------------------------------------------------------------------


def test_other_layers_can_be_adapted():
    model = build(lora={**LORA, "targets": ["gate_proj"]})
    assert {key.split(".lora_")[0].rpartition(".")[2] for key in model.trainable_state_dict()} == {"gate_proj"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora": {**LORA, "targets": ["q_prof"]}}, "'q_prof'; did you mean 'q_proj'.*down_proj.*v_proj"),
        ({"lora": {**LORA, "targets": "q_proj"}}, "expected a list of linear layers"),
        ({"lora": {**LORA, "r": 0}}, "rank r >= 1"),
        ({"lora": {**LORA, "dropout": 1.0}}, "dropout < 1"),
        ({"lora": None}, "the model has no adapters; set model.lora"),
    ],
)
def test_settings_that_cannot_be_followed_are_one_line(settings, said):
    with pytest.raises(ConfigError, match=said) as error:
        build(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("family", "language"), LANGUAGES)
def test_adapters_with_gradient_checkpointing_and_bfloat16(family, language):
    """Adapters are held in float32 beside weights in bfloat16; checkpointing changes no gradient."""
    found = []
    for switch in (False, True):
        model = build(family, language, backbone={"gradient_checkpointing": switch})
        shake_adapters(model)
        torch.manual_seed(0)
        model.train()(batch())["loss"].backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys() and len(plain) == 2 * ADAPTERS[language]
    assert all((checkpointed[key] - value).abs().max() < 1e-6 for key, value in plain.items())
    low = build(family, language, backbone={"dtype": "bfloat16"})
    shake_adapters(low)
    assert {p.dtype for key, p in low.named_parameters() if ".lora_" in key} == {torch.float32}
    assert low.backbone.projection.weight.dtype == torch.bfloat16
    assert loss_of(low).item() == pytest.approx(loss_of(model).item(), rel=0.05)  # random T5: logits of 20 and more
