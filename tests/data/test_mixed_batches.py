"""Videos, images and texts in one batch: each sample gets what it gets alone, on each rank the same modules run."""

from __future__ import annotations

import math

import pytest
import torch
from test_lstp import BACKBONES, batch, model_config

from lavis_lstp import batch as rows
from lavis_lstp.errors import ConfigError
from lavis_lstp.models import refinement
from lavis_lstp.models.lstp import LSTP
from lavis_lstp.models.where import chooser
from lavis_lstp.models.where.pseudo_span import pseudo_span
from lavis_lstp.schema import NO_SPAN

LENGTHS = (8, 1, 0, 2)  # a video, an image, a text, a short video
QUESTIONS = ["what turns?", "what colour is it?", "how many days has a week? think before you answer", "which one?"]
ANSWERS = ["the red star", "blue", "seven", "ring"]
ALL_PARTS = ["sampler", "vision", "qformer", "query_tokens", "projection", "language_model"]


def mixed(lengths=LENGTHS) -> dict:
    longest, count = max(lengths), len(lengths)
    frames = batch((8, 8, 8, 8))["frames"][:count, :longest]
    mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()
    span = torch.tensor([[1, 3], NO_SPAN, NO_SPAN, [0, 1]])
    return {
        "frames": frames * mask[:, :, None, None, None].to(torch.uint8),
        "frame_mask": mask,
        "text_input": QUESTIONS[:count],
        "text_output": ANSWERS[:count],
        "prompt": ["", "", "USER: how many? ASSISTANT: three</s>USER: days? ASSISTANT: ", ""][:count],
        "question_id": [f"q{i}" for i in range(count)],
        "video_id": [f"v{i}" for i in range(count)],
        "span": span[:count],
    }


def alone(samples: dict, i: int) -> dict:
    real = int(samples["frame_mask"][i].sum())
    cut = ("frames", "frame_mask")
    return {k: v[i : i + 1, :real] if k in cut else v[i : i + 1] for k, v in samples.items()}


def answer_tokens(model: LSTP, answer: str) -> int:
    ids = model.backbone.tokenizer(model.answer_template.format(answer=answer))["input_ids"]
    return len(ids) - (not model.backbone.is_encoder_decoder)  # without the beginning mark


@pytest.mark.parametrize("fusion", ["concat", "mean"])
@pytest.mark.parametrize(("family", "language"), BACKBONES)
def test_each_sample_has_the_loss_it_has_alone(family, language, fusion):
    model = LSTP.from_config(model_config(family, language, fusion=fusion)).eval()
    samples = mixed()
    with torch.no_grad():
        together = model(samples)["lm_loss"].item()
        each = [model(alone(samples, i))["lm_loss"].item() for i in range(4)]
    assert all(math.isfinite(loss) for loss in [together, *each])
    weights = [answer_tokens(model, answer) for answer in ANSWERS]
    mean = sum(loss * weight for loss, weight in zip(each, weights, strict=True)) / sum(weights)
    assert together == pytest.approx(mean, rel=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "language"), BACKBONES)
def test_a_text_is_answered_as_without_any_picture(family, language, attention):
    """The masked prefix must leave no trace: the loss of the bare language model on the same tokens."""
    config = model_config(family, language, backbone={"attention": attention})
    model = LSTP.from_config(config).eval()
    samples = alone(mixed(), 2)
    backbone = model.backbone
    prompt, answer = samples["prompt"], [model.answer_template.format(answer=samples["text_output"][0])]
    with torch.no_grad():
        found = model(samples)["lm_loss"]
        empty = torch.zeros(1, 0, backbone.projection.weight.shape[0])
        bare = backbone.lm_loss(empty, torch.zeros(1, 0, dtype=torch.long), prompt, answer)
    assert found.item() == pytest.approx(bare.item(), rel=2e-5)


@pytest.mark.parametrize(("family", "language"), BACKBONES)
def test_answers_in_a_mixed_batch(family, language):
    model = LSTP.from_config(model_config(family, language, fusion="mean")).eval()
    samples = mixed()
    together = model.answer(samples)
    for i in range(4):
        single = model.answer(alone(samples, i))
        assert single["prediction"] == together["prediction"][i : i + 1]
        assert torch.equal(single["frame_index"][0], together["frame_index"][i])
    assert together["frame_index"][1].tolist() == [0, 0, 0, 0]
    assert together["frame_index"][2].tolist() == [-1, -1, -1, -1]
    assert together["prompt"][2] == samples["prompt"][2] and "which one?" in together["prompt"][3]


def test_a_text_brings_no_visual_token():
    """What stands in the blank frame of a text must not matter."""
    model = LSTP.from_config(model_config()).eval()
    samples = mixed()
    before = model(samples)["lm_loss"]
    samples["frames"][2] = 255
    assert torch.equal(model(samples)["lm_loss"], before)


@pytest.mark.parametrize("lengths", [(0, 0), (1, 1), (0, 1)])
def test_batches_without_a_video(lengths):
    config = model_config(train=ALL_PARTS, losses=["lm", "span"])
    model = LSTP.from_config(config).train()
    losses = model(mixed(lengths))
    assert losses["span_loss"].item() == 0
    losses["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert not any(p.grad is not None and p.grad.any() for p in model.sampler.parameters())
    found = model.eval().answer(mixed(lengths))
    assert len(found["prediction"]) == 2 and found["span"].shape == (2, 2)
    assert model.locate(mixed(lengths))["frame_index"].shape == (2, 4)


def test_a_sampler_learns_nothing_from_a_batch_without_a_video():
    """The span loss alone must still be something that a backward pass can be asked of."""
    model = LSTP.from_config(model_config(train=["sampler"], losses=["span"])).train()
    loss = model(mixed((1, 0)))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_images_and_texts_do_not_touch_the_sampler(monkeypatch):
    model = LSTP.from_config(model_config(train=ALL_PARTS, losses=["lm", "span"])).eval()
    seen = []
    forward = model.sampler.forward
    monkeypatch.setattr(
        model.sampler, "forward", lambda flow, mask, *a, **k: seen.append(mask) or forward(flow, mask, *a, **k)
    )
    samples = mixed()
    loss = model(samples)["span_loss"]
    assert [int(n) for mask in seen for n in mask.sum(1)] == [8, 2]
    seen.clear()
    model(mixed((1, 0)))
    assert not seen
    videos = {k: [v[0], v[3]] if isinstance(v, list) else v[[0, 3]] for k, v in samples.items()}
    assert loss.item() == pytest.approx(model(videos)["span_loss"].item(), rel=1e-6)
    samples["span"][1:3] = torch.tensor([[0, 1], [0, 0]])  # whatever a file says of them
    assert loss.item() == pytest.approx(model(samples)["span_loss"].item(), rel=1e-6)


def test_a_given_span_is_not_asked_of_images_and_texts():
    model = LSTP.from_config(model_config(selector={"name": "given"})).eval()
    found = model.locate(mixed())
    assert found["frame_index"].tolist() == [[1, 1, 2, 2], [0, 0, 0, 0], [-1, -1, -1, -1], [0, 0, 0, 0]]


def test_each_rank_runs_the_same_modules(monkeypatch):
    """With several ranks, whatever a batch holds; collectives inside modules (ZeRO-3) would wait for ever otherwise."""
    monkeypatch.setattr(chooser, "several_ranks", lambda: True)
    config = model_config(train=ALL_PARTS, losses=["lm", "span"])
    config["backbone"]["config"]["text_config"]["num_hidden_layers"] = 1
    model = LSTP.from_config(config).train()
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    ran, grads = [], []
    for lengths in ((8, 2, 8), (0, 0, 0), (1, 1, 1), (8, 1, 0)):
        calls.clear()
        model.zero_grad(set_to_none=True)
        model(mixed(lengths))["loss"].backward()
        ran.append(list(calls))
        grads.append({name for name, p in model.named_parameters() if p.grad is not None})
    assert ran[0] and ran[0] == ran[1] == ran[2] == ran[3]
    assert grads[0] == grads[1] == grads[2] == grads[3]
    assert "sampler.head.weight" in grads[1] and "backbone.model.query_tokens" in grads[1]


def test_each_frame_chosen_twice_is_looked_at_once(monkeypatch):
    model = LSTP.from_config(model_config(selector={"name": "uniform"})).eval()
    looked = []
    own = model.backbone.image_features
    monkeypatch.setattr(model.backbone, "image_features", lambda frames: looked.append(len(frames)) or own(frames))
    model(mixed())
    assert looked == [4 + 1 + 2]  # the short video has two frames, each shown twice


# ---- self-refinement ------------------------------------------------------------------------------------------------


def refining(**more) -> LSTP:
    settings = {"in_loop": True, "max_new_tokens": 3, **more}
    return LSTP.from_config(model_config(train=ALL_PARTS, losses=["lm", "span"], refinement=settings))


def test_spans_made_in_the_step_are_those_of_the_offline_step():
    model = refining()
    samples = mixed()
    samples["text_output"] = ["h 4 , e turns", "x", "y", "one h"]
    model.generation = {"max_new_tokens": 3}
    scores = model.eval().pseudo_scores(samples)
    expected = [tuple(pseudo_span(scores[0])), NO_SPAN, NO_SPAN, tuple(pseudo_span(scores[3, :2]))]
    before = torch.get_rng_state()
    spans = model.train().refinement.spans(model, samples)
    assert [tuple(span) for span in spans.tolist()] == expected
    assert torch.equal(torch.get_rng_state(), before)  # no dropout was drawn
    assert model.training and model.sampler.training and not model.flow.training


def test_refinement_trains_the_sampler_on_its_own_spans():
    model = refining().train()
    samples = mixed()
    del samples["span"]
    samples["text_output"] = ["h 4 , e turns", "x", "y", "one h"]
    losses = model(samples)
    assert losses["span_loss"].item() > 0
    losses["loss"].backward()
    assert model.sampler.head.weight.grad.abs().sum() > 0
    with pytest.raises(ConfigError, match="add it to model.losses"):
        LSTP.from_config(model_config(losses=["lm"], refinement={"in_loop": True}))


def divide_weights(model: LSTP, monkeypatch, most: int) -> None:
    """As at stage 3 on several ranks, one of which has `most` pieces of whatever is asked for."""
    next(model.parameters()).ds_id = 0
    monkeypatch.setattr(rows, "several_ranks", lambda: True)
    monkeypatch.setattr(rows.dist, "all_reduce", lambda tensor, op: tensor.clamp_(min=most))


def test_ranks_answer_equally_often_where_weights_are_divided(monkeypatch):
    """A rank with less work goes on as long as the others do, with frames that count for nothing."""
    model = LSTP.from_config(model_config()).eval()
    samples = mixed((2, 1))
    expected = refinement.pseudo_scores(model, samples, {"max_new_tokens": 1})
    divide_weights(model, monkeypatch, most=3)
    assert list(rows.in_pieces([1, 2, 3], 2, model)) == [[1, 2], [3], []]
    assert list(rows.in_pieces([1, 2, 3], 1, model)) == [[1], [2], [3]]
    answered = []
    plain = model.backbone.generate
    monkeypatch.setattr(model.backbone, "generate", lambda *a, **k: answered.append(1) or plain(*a, **k))
    assert refinement.pseudo_scores(model, mixed((0, 0)), {"max_new_tokens": 1}).shape == (2, 0)
    assert torch.equal(refinement.pseudo_scores(model, samples, {"max_new_tokens": 1}), expected)
    assert len(answered) == 3 + 3


def test_ranks_with_whole_weights_ask_nobody(monkeypatch):
    def never(*unused):
        raise AssertionError("the other ranks may be done with their batches")

    monkeypatch.setattr(rows, "several_ranks", lambda: True)
    monkeypatch.setattr(rows.dist, "all_reduce", never)
    model = LSTP.from_config(model_config()).eval()
    assert list(rows.in_pieces([1, 2, 3], 2, model)) == [[1, 2], [3]]
    assert list(rows.in_pieces([], 2, model)) == []
    assert refinement.pseudo_scores(model, mixed((2, 0)), {"max_new_tokens": 1}).shape == (2, 2)


def test_published_padding():
    """mask_padding: false lets padded flows compete: in the loss, and when a candidate is drawn."""
    samples = {**batch((8, 4)), "span": torch.tensor([[1, 3], [0, 2]])}
    losses, drawn = {}, {}
    for masked in (True, False):
        config = model_config(train=["sampler"], losses=["span"], mask_padding=masked, selector={"name": "argmax"})
        model = LSTP.from_config(config).eval()
        losses[masked] = model(samples)["span_loss"].item()
        logits = torch.zeros(2, 8)
        logits[1, 6] = 5.0  # padding
        logits[:, 1] = 1.0
        drawn[masked] = model.selector(samples["frame_mask"], logits, logits.roll(1, 1)).span.tolist()
    assert losses[True] < losses[False]
    assert drawn[True][1] == [1, 2] and drawn[False][1] == [0, 3]
