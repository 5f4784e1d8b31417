"""The seam between choosing and answering: an answerer of a few lines does all that the shipped ones do.

It sees the mean colour of a frame as one token, over a random causal language model whose tokenizer has no begin mark.
Nothing outside this file and the recipes below knows of it, but for its line in `config.model.SOURCES`.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from test_lstp import batch, drained, model_config, row, said
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from lavis_lstp.config.model import SOURCES
from lavis_lstp.data.spans import read_spans
from lavis_lstp.errors import ConfigError
from lavis_lstp.files import read_jsonl
from lavis_lstp.host import evaluate, train
from lavis_lstp.models.answer.language import LanguageAnswerer
from lavis_lstp.models.answer.tiny_tokenizer import tiny_tokenizer
from lavis_lstp.models.lstp import LSTP

SIZES = {"seed": 0, "train_videos": 1, "val_videos": 1, "test_videos": 1, "train_images": 4, "size": 64}


class MeanColour(LanguageAnswerer):
    PARTS = {"projection": ("see.",), "language_model": ("language_model.",)}
    image_size = 64

    def __init__(self, seed: int, **settings):
        super().__init__(tiny_tokenizer(bos=False), **settings)
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        ends = {"eos_token_id": self.tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
        config = Qwen2Config(**sizes, **ends, num_key_value_heads=2, vocab_size=len(self.tokenizer))
        self.language_model = Qwen2ForCausalLM(config)
        self.see = nn.Linear(3, 32)

    def look(self, frames, which, prompts, times_s=None):
        seen = self.see(frames.float().mean(dim=(2, 3)) / 255)  # [U,D]
        return self.reading(seen[which.clamp(min=0)], (which >= 0).long().to(seen.device), prompts)


def build(seed: int = 0, max_text_tokens: int = 128, dtype: str = "float32") -> MeanColour:
    return MeanColour(seed, max_text_tokens=max_text_tokens)


@pytest.fixture(autouse=True)
def source(monkeypatch):
    monkeypatch.setitem(SOURCES, "mean_colour", f"{__name__}:build")


def settings(**overrides) -> dict:
    return {
        **model_config(),
        "backbone": {"source": "mean_colour", "config": None},
        "train": ["projection", "language_model"],
        "selector": {"name": "uniform", "num_selected": 3},
        **overrides,
    }


@pytest.fixture(scope="module")
def model() -> LSTP:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES, "mean_colour", f"{__name__}:build")
        made = LSTP.from_config(settings()).eval()
    torch.manual_seed(5)  # its answers shall differ
    for parameter in made.backbone.language_model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def test_what_uniform_frames_do_not_use_is_not_there(model):
    assert model.sampler is None and model.flow is None
    assert not any(key.startswith(("sampler.", "flow.")) for key in model.state_dict())


def test_uniform_frames_ask_for_no_weights_of_sampler_and_flow():
    """Neither a BERT nor RAFT is anywhere here, and the published models name both."""
    named = {"sampler": {"weights": "nowhere/bert", "tokenizer": "nowhere/bert"}, "flow": {"name": "raft_large"}}
    LSTP.from_config(settings(**named))
    LSTP.from_config({**model_config(), "selector": {"name": "uniform"}, **named})


def test_each_frame_is_seen_once_and_the_rows_are_answered_as_alone(model):
    samples = batch((8, 5, 1))
    together = model.answer(samples)
    assert len(set(together["prediction"])) > 1
    for i in range(3):
        alone = model.answer(row(samples, i))
        assert alone["prediction"] == together["prediction"][i : i + 1]
        assert math.isclose(alone["log_prob"][0]["sum"], together["log_prob"][i]["sum"], abs_tol=1e-3)


def test_the_loss_is_that_of_all_tokens_of_the_answer(model):
    """The first one included, which a cut by one token would lose."""
    samples = {**batch(), "options": [[answer] for answer in batch()["text_output"]]}
    with torch.no_grad():
        loss = model(samples)["lm_loss"].item()
    told = [options[0] for options in model.score_options(samples)["option_log_prob"]]
    assert loss == pytest.approx(-sum(t["sum"] for t in told) / sum(t["tokens"] for t in told), abs=1e-3)
    tokenizer = model.backbone.tokenizer
    assert [t["tokens"] for t in told] == [len(tokenizer(f"{a}</s>")["input_ids"]) for a in samples["text_output"]]


@pytest.mark.parametrize("drawn", [{}, {"do_sample": True, "top_k": 20}])
def test_pieces_of_a_stream_are_the_answers(model, drawn):
    samples, wanted = batch(), {"max_new_tokens": 12, **drawn}
    pieces, result = drained(model.stream(samples, **wanted))
    whole = model.answer(samples, **wanted)
    assert said(pieces) == whole["prediction"] == result["prediction"] and len(pieces) > 1
    assert result["log_prob"] == whole["log_prob"] and result["seconds"]["language"] > 0


def test_a_stream_that_is_closed_ends_the_generation(model):
    made = []
    model.backbone.language_model.register_forward_hook(lambda *_: made.append(1))
    stream = model.stream(batch(), max_new_tokens=4000)
    next(stream)
    stream.close()
    assert len(made) < 3000


def test_a_row_that_is_given_up_ends_and_the_others_do_not(model):
    """By beams and alone, at once and piece by piece."""
    samples = batch()
    for beams in (1, 2):
        wanted = {"max_new_tokens": 12, "num_beams": beams}
        whole = model.answer(samples, **wanted)
        left = model.answer(samples, given_up=lambda row: row == 1, **wanted)
        assert len(left["prediction"][1].split()) < len(whole["prediction"][1].split())
        assert [left["prediction"][row] for row in (0, 2)] == [whole["prediction"][row] for row in (0, 2)]
    stream = model.stream(samples, given_up=lambda row: row == 1, max_new_tokens=12)
    pieces = said(stream)
    assert pieces[0] == model.answer(samples, max_new_tokens=12)["prediction"][0] and len(pieces[1]) < len(pieces[0])


def test_an_error_in_the_making_reaches_whoever_reads_the_pieces(model, monkeypatch):
    with pytest.raises(ConfigError, match="does not go with streaming"):
        list(model.stream(batch(), num_beams=2))
    monkeypatch.setattr(model.backbone, "_generate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(model.stream(batch()))


def test_frames_are_labelled_one_by_one(model):
    """By the answer that each frame alone gives, as it would be with nothing else in the batch."""
    samples = batch((4, 3, 1))
    answers = [
        model.backbone.look(samples["frames"][i, t : t + 1], torch.zeros(1, 1).long(), [model.prompts(samples)[i]])
        .answers(max_new_tokens=8, scored=False)
        .texts[0]
        for i, t in ((0, 2), (1, 1))
    ]
    samples["text_output"] = [answers[0], answers[1], "red"]
    scores = model.pseudo_scores(samples)
    assert scores[0, 2] == 1 and scores[1, 1] == 1 and not scores[2].any() and not scores[1, 3:].any()
    assert torch.equal(scores, model.pseudo_scores(samples, rows=2))


def test_a_setting_that_the_source_has_no_use_for_is_refused():
    with pytest.raises(
        ConfigError, match="attention is for source hub, transformers; source mean_colour has no use for it"
    ):
        LSTP.from_config(settings(backbone={"source": "mean_colour", "config": None, "attention": "sdpa"}))
    with pytest.raises(ConfigError, match="model.train names qformer, which this model has not; it has projection"):
        LSTP.from_config(settings(train=["qformer"]))


def test_the_sampler_in_front_of_it(model):
    """LSTP as published, but for who answers; the sampler's tokenizer is then the built-in one."""
    whole = LSTP.from_config(settings(selector={"name": "lstp", "num_selected": 2})).eval()
    found = whole.answer(batch())
    assert found["start_logits"].shape == (3, 8) and len(found["prediction"]) == 3


def test_recipes_train_label_answer_and_choose(tmp_path: Path):
    """Through LAVIS's own commands; the checkpoint holds what learnt, and no more."""
    data = {"root": str(tmp_path / "data"), "num_frames": 8, "generate": SIZES, "flow": "motion_vectors"}
    section = {"arch": "lstp_tiny", "backbone": {"source": "mean_colour", "config": None}, "fusion": "mean"}

    def run(module, name: str, model: dict, run: dict) -> Path:
        recipe = {
            "model": {**section, "selector": {"name": "uniform"}, **model},
            "datasets": {"lstp_shapes": data},
            "run": {
                "runner": "runner_lstp",
                "device": "cpu",
                "num_workers": 0,
                "output_dir": str(tmp_path / name),
                **run,
            },
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        assert module.main(["--cfg-path", str(file)]) == 0
        return tmp_path / name

    steps = {
        "task": "video_instruct",
        "init_lr": 1e-3,
        "train_splits": ["train"],
        "max_steps": 2,
        "max_epoch": 1,
        "batch_size_train": 2,
    }
    trained = run(train, "train", {"train": ["projection", "language_model"], "losses": ["lm"]}, steps)
    tested = {"train": [], "checkpoint": str(trained)}
    spans = {"task": "pseudo_span", "test_splits": ["val"], "spans_out": str(tmp_path / "spans.json"), "evaluate": True}
    run(evaluate, "spans", tested, spans)
    assert read_spans(tmp_path / "spans.json", 8)
    answered = run(evaluate, "eval", tested, {"task": "video_qa", "test_splits": ["test"], "evaluate": True})
    records = list(read_jsonl(answered / "result" / "test_video_qa.jsonl"))
    assert records and all(len(record["frame_index"]) == 4 for record in records)
    again = LSTP.from_config({**settings(), "checkpoint": str(trained)})
    untrained = LSTP.from_config(settings())
    assert not torch.equal(again.backbone.see.weight, untrained.backbone.see.weight)
