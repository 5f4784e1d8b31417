"""Every type of every full-size model, built as `load_model` builds it, from tiny weights in the hub's layout."""

from __future__ import annotations

import pytest
from lavis.common.registry import registry
from lavis.models import load_model
from test_lstp import batch

from lavis_lstp.errors import WeightsError
from lavis_lstp.models.variants import MODEL_TYPES
from lavis_lstp.models.weights import hub
from lavis_lstp.testing.tiny_checkpoints import Sizes, write_all
from lavis_lstp.testing.tiny_video_llms import VIDEO_LLMS, can_be_written

TYPES = [
    (name, kind)
    for name, types in MODEL_TYPES.items()
    if name != "lstp_tiny"
    for kind in types
    if kind != "endpoint"  # has no weights: test_endpoint.py
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    out = tmp_path_factory.mktemp("weights")
    names = ("instructblip-vicuna-7b", "instructblip-flan-t5-xl", "blip2-flan-t5-xl", "bert-base-uncased")
    others = VIDEO_LLMS if can_be_written() else ()
    write_all(out, only=[*names, *others, "raft-sintel", "lstp-7b"])
    return out


def samples() -> dict:
    made = batch((3, 2, 1))
    side = Sizes().image_size
    return {**made, "frames": made["frames"][..., :side, :side]}


@pytest.mark.parametrize(("name", "kind"), TYPES)
def test_a_type_is_built_and_answers(weights, monkeypatch, name, kind):
    """The folder brings its sizes along."""
    if name == "lstp_video_llm" and not can_be_written():
        pytest.skip("needs transformers 5")
    monkeypatch.setenv(hub.ENVIRONMENT, str(weights))
    model = load_model(name, kind, is_eval=True)
    assert len(model.generate(samples(), max_length=2)) == 3
    assert ("lora" in model.trained_parts()) == (kind == "lora")
    assert model.chooser.scorer.tokenizer.truncation_side == "right"
    # a word of the Q-Former's tokenizer alone must not be one of the sampler's
    model.locate({**samples(), "text_input": ["[DEC] who?"] * 3})


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            '{"model": {"sampler": {"hidden_size": "${oc.env:HOME}"}}}',
            r"at least 1, got hidden_size: '\$",
        ),
        ('{"model": {"flow": {"a.b": 3}}}', "got a.b: 3"),
        ('{"model": []', "cannot be read as sizes"),
        ("[1]", "cannot be read as sizes"),
        ('{"model": {"sampler": 3}}', "cannot be read as sizes"),
    ],
)
def test_sizes_are_whole_numbers_and_nothing_else(tmp_path, monkeypatch, text, line):
    (tmp_path / hub.SIZES_FILE).write_text(text)
    monkeypatch.setenv(hub.ENVIRONMENT, str(tmp_path))
    with pytest.raises(WeightsError, match=line):
        load_model("lstp_vicuna7b", "base")


def test_a_model_of_random_weights_keeps_its_own_sizes(weights, monkeypatch):
    cls = registry.get_model_class("lstp_tiny")
    before = cls.default_config()
    monkeypatch.setenv(hub.ENVIRONMENT, str(weights))
    assert cls.default_config() == before


def test_all_that_is_missing_is_said_at_once(tmp_path, monkeypatch, weights):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    monkeypatch.setenv(hub.ENVIRONMENT, str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        load_model("lstp_flant5xl")
    line = str(caught.value)
    for name in ("Salesforce/blip2-flan-t5-xl", "google-bert/bert-base-uncased", "raft-sintel.pth"):
        assert f"put it at {tmp_path}/{name}" in line
    assert "(model.sampler.weights, model.sampler.tokenizer)" in line and "\n" not in line
    with pytest.raises(WeightsError, match="LSTP-7B.ckpt"):  # before 16 GB of base weights are read
        load_model("lstp_vicuna7b")
    assert not hub.is_missing(str(weights / "google-bert" / "bert-base-uncased"), "config.json")
    assert hub.is_missing(str(tmp_path / "nowhere"), "config.json")
