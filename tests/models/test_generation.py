"""A row of a batch is answered as it is alone, whatever settings of generation are on; or the setting is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from lavis_lstp.config.fields import SAMPLING, generation_over
from lavis_lstp.errors import ConfigError
from lavis_lstp.models.answer.generation import DRAWING, FOLLOWED, HERE, REFUSED, _Drawn, checked
from lavis_lstp.models.answer.language import PrefixReading
from lavis_lstp.models.answer.qformer import Backbone
from lavis_lstp.models.building import build_backbone
from lavis_lstp.models.where.frame_selector import sample_generators

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {
    "llama": {"model_type": "llama", **SMALL, "num_hidden_layers": 2, "initializer_range": 0.4},
    "t5": {
        "model_type": "t5",
        "hidden_size": 16,
        "d_model": 16,
        "d_ff": 16,
        "d_kv": 8,
        "num_layers": 1,
        "num_heads": 2,
    },
}
PROMPTS = [
    "what?",
    "what colour is the thing that moves to the left side of the picture after all?",
    "is it red?",
    "who",
]
IDS = ["q0", "q1", "q2", "q3"]
LENGTH = {"max_new_tokens": 10}


@pytest.fixture(scope="module", params=sorted(TEXT))
def backbone(request) -> Backbone:
    config = {
        "text_config": TEXT[request.param],
        "vision_config": {**SMALL, "image_size": 16, "patch_size": 8},
        "qformer_config": SMALL,
        "num_query_tokens": 2,
    }
    built = build_backbone("blip2", config=config, seed=3).eval()
    if request.param == "t5":  # its random weights say one word again and again
        for parameter in built.language_model.parameters():
            torch.nn.init.normal_(parameter, std=0.6, generator=torch.Generator().manual_seed(parameter.numel()))
    return built


def ask(backbone: Backbone, rows, **settings) -> list[tuple[str, float, int]]:
    """Text, log-probability and number of tokens; the rows have three, one, no and two frames' worth of prefix."""
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randn(4, 6, backbone.projection.out_features, generator=generator)
    mask = (torch.arange(6)[None] < torch.tensor([6, 2, 0, 4])[:, None]).long()
    draw = {"generators": sample_generators([IDS[row] for row in rows])} if settings.get("do_sample") else {}
    found = backbone.generate(
        prefix[rows], mask[rows], [PROMPTS[row] for row in rows], **draw, **{**LENGTH, **settings}
    )
    return list(zip(found[0], found[1].tolist(), found[2].tolist(), strict=True))


def frequent(backbone: Backbone, count: int) -> list[int]:
    """Tokens that the plain answers begin with, so that forbidding them changes an answer."""
    words = [backbone.tokenizer(text, add_special_tokens=False)["input_ids"] for text, *_ in ask(backbone, range(4))]
    return list(dict.fromkeys(ids[-1] for ids in words if ids))[:count]


SETTINGS = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.8},
    "penalty of a whole number": {"repetition_penalty": 3},
    "penalty below 1": {"repetition_penalty": 0.5},
    "beams": {"num_beams": 3},
    "beams and penalties": {
        "num_beams": 3,
        "repetition_penalty": 1.8,
        "length_penalty": 2.0,
        "no_repeat_ngram_size": 2,
    },
    "beams, early": {"num_beams": 3, "early_stopping": True, "length_penalty": -1.0},
    "beams, never": {"num_beams": 3, "early_stopping": "never"},
    "n-grams": {"no_repeat_ngram_size": 1},
    "at least": {"min_new_tokens": 9},
    "bad words": {"bad_words_ids": lambda ids: [[i] for i in ids]},
    "bias": {"sequence_bias": lambda ids: [[[i], -100.0] for i in ids]},
    "suppressed": {"suppress_tokens": lambda ids: ids},
    "suppressed at the beginning": {"begin_suppress_tokens": lambda ids: ids},
    "forced end": {"forced_eos_token_id": 5, "max_new_tokens": 3, "min_new_tokens": 3},
    "decay": {"exponential_decay_length_penalty": (2, 2.0), "renormalize_logits": True, "remove_invalid_values": True},
    "drawn": {"do_sample": True},
    "drawn and penalised": {"do_sample": True, "temperature": 1.7, "top_k": 12, "repetition_penalty": 2.0},
    "drawn of few": {"do_sample": True, "top_p": 0.7, "min_p": 0.01, "typical_p": 0.9},
    "drawn above": {"do_sample": True, "epsilon_cutoff": 0.001, "eta_cutoff": 0.001, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_in_a_batch_as_alone(backbone, name):
    ids = frequent(backbone, 3)
    settings = {key: value(ids) if callable(value) else value for key, value in SETTINGS[name].items()}
    together = ask(backbone, [0, 1, 2, 3], **settings)
    alone = [ask(backbone, [row], **settings)[0] for row in range(4)]
    for (text, log_prob, count), (own_text, own_log_prob, own_count) in zip(together, alone, strict=True):
        assert (text, count) == (own_text, own_count)
        assert log_prob == pytest.approx(own_log_prob, abs=1e-3)
    assert ask(backbone, [2, 0], **settings) == [pytest.approx(together[i], abs=1e-3) for i in (2, 0)]


@pytest.mark.parametrize(
    "name", ["penalty", "n-grams", "bad words", "bias", "suppressed", "drawn", "beams and penalties"]
)
def test_a_setting_changes_answers(backbone, name):
    """Equal answers in a batch and alone prove nothing about a setting that is without effect."""
    ids = frequent(backbone, 3)
    settings = {key: value(ids) if callable(value) else value for key, value in SETTINGS[name].items()}
    assert [text for text, *_ in ask(backbone, range(4), **settings)] != [text for text, *_ in ask(backbone, range(4))]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("stop_strings", ["e"]), ("max_time", 1e-9), ("num_return_sequences", 3), ("prompt_lookup_num_tokens", 2)),
        *(("guidance_scale", 3.0), ("token_healing", True), ("min_length", 30), ("max_length", 1)),
        *(("encoder_repetition_penalty", 2.0), ("encoder_no_repeat_ngram_size", 1), ("penalty_alpha", 0.6)),
    ],
)
def test_what_is_refused_counts_no_more_where_a_checkpoint_brings_it(backbone, monkeypatch, name, value):
    plain, model = ask(backbone, range(4)), backbone.language_model
    monkeypatch.setattr(model.generation_config, name, value, raising=False)
    assert ask(backbone, range(4)) == plain
    assert getattr(model.generation_config, name) == value  # it is the checkpoint's, and is saved with it


def test_every_setting_of_transformers_is_followed_or_refused():
    """Those that neither list names are unknown, and refused as such."""
    for name in GenerationConfig().to_dict():
        lists = [name in FOLLOWED, name in HERE, name in DRAWING, name in REFUSED]
        assert sum(lists) <= 1
        if not any(lists):
            with pytest.raises(ConfigError, match=f"unknown generation setting '{name}'"):
                checked({name: 1}, encoder_decoder=True)
    for name, reason in REFUSED.items():
        with pytest.raises(ConfigError) as caught:
            checked({name: 7}, encoder_decoder=True)
        assert str(caught.value) == f"generation setting {name}=7 is not supported: {reason}"
        assert checked({name: None, "num_beams": 2}, encoder_decoder=False) == {"num_beams": 2}
    assert checked({"num_return_sequences": 1, "min_length": 0}, encoder_decoder=False) == {}


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"num_return_sequences": 2, "num_beams": 2}, "num_return_sequences=2 is not supported: a question has one"),
        ({"do_sample": True, "num_beams": 2}, "num_beams=2 is not supported with do_sample"),
        ({"do_sample": True, "temperature": 0}, "temperature must be at least 1e-20 where do_sample is true, got 0;"),
        (
            {"do_sample": True, "temperature": 1e-39},
            "at least 1e-20 where do_sample is true, got 1e-39; do_sample=false",
        ),
        ({"do_sample": True, "top_k": -3}, "top_k must be a whole number of at least 0 or null, got -3"),
        ({"repetition_penalty": -1}, "repetition_penalty must be a number above 0 or null, got -1"),
        ({"repetition_penalty": "much"}, "repetition_penalty must be a number above 0 or null, got 'much'"),
        ({"num_beams": 0}, "num_beams must be a whole number of at least 1 or null, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1 or null, got 0"),
        ({"max_new_tokens": 5, "min_new_tokens": 10}, "min_new_tokens must be at most max_new_tokens (5), got 10"),
        *(
            ({name: 0.5 if name != "top_k" else 5}, f"generation.{name}=")
            for name in DRAWING  # settings of sampling without sampling
        ),
        ({"temperature": 0.7, "do_sample": False}, "set model.generation.do_sample=true"),
        ({"num_beam": 2}, "unknown generation setting 'num_beam'"),
        (
            {"bad_words_ids": [3, 4]},
            "bad_words_ids[0] must be a list [a whole number of at least 0, ...], got 3",
        ),
        ({"bad_words_ids": [[5], [999]]}, "bad_words_ids: token 999 is not one of the language model's"),
        ({"sequence_bias": [[[5, 999], 2.0]]}, "sequence_bias: token 999 is not one of the language model's"),
        ({"suppress_tokens": [999]}, "suppress_tokens: token 999 is not one of the language model's"),
        ({"forced_eos_token_id": 999}, "forced_eos_token_id: token 999 is not one of the language model's"),
        ({"exponential_decay_length_penalty": [3]}, "exponential_decay_length_penalty must be a list [a whole number"),
        ({"early_stopping": "maybe"}, "early_stopping must be true or false or never, got 'maybe'"),
    ],
)
def test_one_line_on_what_cannot_be(backbone, settings, line):
    with pytest.raises(ConfigError) as caught:
        ask(backbone, [0], **settings)
    assert line in str(caught.value) and "\n" not in str(caught.value)


NUMBERS = [0, 1, 3, 10**6, 10**30, -1, 0.5, -2.5, 1e300, float("nan"), float("inf")]
ODD = [*NUMBERS, True, False, "", "never", "3", [], {}, [None], ["a"], [[]], [[[]]], {3: 2.0}, {(3,): 2.0}, {"a": 1}]
ODD += [wrapped for number in NUMBERS[:8] for wrapped in ([number], [[number]], [number, 2.0], [[[number], number]])]
ODD += [[1, 2, 3], [[1], [2, 3]], [[[1], 2.0], [[2, 3], -1]], (1, 2.0), torch.tensor([1])]


@pytest.mark.parametrize("name", sorted({*FOLLOWED, *HERE, *DRAWING}))
def test_any_value_is_followed_or_refused_in_one_line(backbone, name):
    """Nothing is left to transformers to refuse in the middle of an answer, nor to torch as a place in the scores."""
    kinds = set()
    for value in ODD:
        more = {"do_sample": True} if name in DRAWING else {}
        more |= {"max_new_tokens": 2} if name != "max_new_tokens" else {}
        if value == 10**6 and name in ("max_new_tokens", "num_beams"):
            continue  # legal, and long
        try:
            ask(backbone, [1], **more, **{name: value})
            kinds.add("followed")
        except ConfigError as error:
            assert "\n" not in str(error)
            kinds.add("refused")
    assert kinds == {"followed", "refused"} or (name == "forced_bos_token_id" and kinds == {"refused"})


def test_what_asks_for_no_sampling_goes_without_it():
    neutral = {name: value for name, value in SAMPLING.items() if value is not None} | {"min_p": 0}
    assert checked(neutral, encoder_decoder=False) == neutral
    assert checked({"temperature": 0}, encoder_decoder=False) == {"temperature": 0}  # greedy, as it says
    own = {"do_sample": True, "temperature": 0.2, "num_beams": 1}
    assert generation_over(own, {"do_sample": False}) == {"num_beams": 1, "do_sample": False}
    assert generation_over(own, {"top_p": 0.9}) == own | {"top_p": 0.9}


def test_a_begin_mark_is_forced_on_a_t5_alone():
    assert checked({"forced_bos_token_id": 3}, encoder_decoder=True) == {"forced_bos_token_id": 3}
    with pytest.raises(ConfigError, match="forced_bos_token_id=3 is not supported"):
        checked({"forced_bos_token_id": 3}, encoder_decoder=False)


def test_draws_follow_the_distribution():
    """20,000 draws of four tokens, one of them impossible: each within 4 standard deviations of its probability."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.tensor([0.5, 0.0, 0.3, 0.2]).log()
    drawn = _Drawn([], [generator] * 20_000)(torch.zeros(20_000, 0), scores.expand(20_000, -1)).argmax(1)
    counts = drawn.bincount(minlength=4).tolist()
    assert counts[1] == 0
    for count, share in zip(counts, (0.5, 0.0, 0.3, 0.2), strict=True):
        assert abs(count - 20_000 * share) <= 4 * (20_000 * share * (1 - share)) ** 0.5


# ---- marks ----------------------------------------------------------------------------------------------------


class Marked:
    """A tokenizer that puts other marks around texts than the one it stands in front of."""

    def __init__(self, tokenizer, front: list[int], behind: list[int]):
        self.tokenizer, self.front, self.behind = tokenizer, front, behind

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, *, add_special_tokens=True, **settings):
        found = self.tokenizer(texts, add_special_tokens=False, **settings)
        if not (self.front or self.behind):
            return found
        if add_special_tokens and isinstance(texts, list):
            found["input_ids"] = [self.front + ids + self.behind for ids in found["input_ids"]]
        elif add_special_tokens:
            found["input_ids"] = self.front + found["input_ids"] + self.behind
        return found


@pytest.mark.parametrize(("front", "behind"), [([], []), ([1], []), ([], [2]), ([1, 4], [2])])
def test_answers_lose_just_what_the_tokenizer_puts_in_front(backbone, front, behind, monkeypatch):
    plain = [backbone.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a dog", "", "no")]
    monkeypatch.setattr(backbone, "tokenizer", Marked(backbone.tokenizer, front, behind))
    assert backbone.answer_ids(["a dog", "", "no"]) == [ids + behind for ids in plain]


def test_a_model_without_a_begin_mark_learns_and_scores_the_first_token(backbone, monkeypatch):
    """Its loss is that of all tokens of the answer: as it is of the same ids behind a begin mark."""
    if backbone.is_encoder_decoder:
        pytest.skip("a T5 has no begin mark in front of an answer")
    bare = Marked(backbone.tokenizer, [], [])
    monkeypatch.setattr(backbone, "tokenizer", bare)
    prefix, mask = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(0)), torch.ones(1, 2, dtype=torch.long)
    sums, counts, _ = PrefixReading(backbone, prefix, mask, ["what?"]).log_probs([0], ["red</s>"])
    assert counts.item() == len(bare("red</s>")["input_ids"])
    loss = backbone.lm_loss(prefix, mask, ["what?"], ["red</s>"])
    assert loss.item() == pytest.approx(-sums.item() / counts.item(), abs=1e-4)


@pytest.mark.parametrize(
    ("config", "generation_eos", "ends"),
    [
        ({"pad_token_id": -1, "bos_token_id": 0, "eos_token_id": 1}, None, [2, 1, 0]),  # published LLaMA
        ({"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, 2, [2, 0]),  # Vicuna, and the tiny ones
        ({"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}, [2, 9], [2, 9]),  # id 0 is a word
        ({"pad_token_id": 7, "bos_token_id": 1, "eos_token_id": [2, 9]}, 2, [2, 7, 9]),  # as Qwen's and Llama 3's
    ],
)
def test_marks_that_end_an_answer(backbone, config, generation_eos, ends, monkeypatch):
    """They come from the tokenizer (end 2, begin 1) and the configs."""
    if backbone.is_encoder_decoder:
        assert backbone._end_ids == [backbone.tokenizer.eos_token_id]
        return
    for name, value in config.items():
        monkeypatch.setattr(backbone.language_model.config, name, value)
    monkeypatch.setattr(backbone.language_model.generation_config, "eos_token_id", generation_eos)
    monkeypatch.setattr(backbone, "tokenizer", SimpleNamespace(bos_token_id=1, eos_token_id=2))
    assert backbone._end_ids == ends
