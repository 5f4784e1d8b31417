"""Options: asked, read out of an answer or weighed by likelihood, counted; and a video looked at once for all."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_lstp import BACKBONES, batch, model_config, row
from test_mixed_batches import divide_weights
from toy import make_runner
from video_files import numbered_video

from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.data.video import reading
from lavis_lstp.errors import ConfigError
from lavis_lstp.files import read_jsonl
from lavis_lstp.host import evaluate
from lavis_lstp.metrics.choice import choice_prompt, parse_choice
from lavis_lstp.metrics.qa import accuracy, accuracy_interval
from lavis_lstp.models.answer.language import IGNORED, _left_padded
from lavis_lstp.models.lstp import LSTP
from lavis_lstp.runners.data_order import eval_units
from lavis_lstp.runners.evaluation import steps
from lavis_lstp.tasks import VideoQATask
from lavis_lstp.testing.tiny_benchmarks import write_benchmarks

OPT = {
    "model_type": "opt",
    "hidden_size": 64,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "init_std": 0.1,
}
OPTIONS = ["red", "the blue one", "a dog", "a dog house"]

# ---- asking and reading -------------------------------------------------------------------------------------------


def test_the_prompt_is_changed_on_purpose_only():
    assert (
        choice_prompt("what?", ["red", "blue"])
        == "what?\n(A) red\n(B) blue\nAnswer with the letter of the right option."
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        ("B.", 1),
        ("B) the blue one", 1),
        ("(B) Blue one", 1),
        ("D: a dog house", 3),
        ("The answer is (C).", 2),
        ("the right option is C", 2),
        ("Answer: (C)", 2),
        ("(B) the blue one. (B)", 1),
        ("(A) or (B)", None),
        ("A, B", None),
        ("A) or C)", None),
        ("(B) the blue one (A) red", None),
        ("A: red because the blue one is wrong", 0),
        ("it is not red", None),
        ("It isn't red", None),
        ("Red.", 0),
        ("It is red, I think.", 0),
        ("A dog", 2),  # words, not the letter A
        ("a dog house", 3),  # not the dog in it
        ("A", 0),
        # nothing is guessed
        ("", None),
        ("E", None),
        ("(A) the blue one", None),
        ("red or the blue one", None),
        ("the answer is (A), no, the answer is (B)", None),
        ("A cat", None),
        ("I do not know", None),
        ("Bred", None),
    ],
)
def test_an_answer_names_one_option_or_none(text, number):
    assert parse_choice(text, OPTIONS) == number


YES_NO, THREE = ["yes", "no", "not sure"], ["a dog", "a person", "a car"]


@pytest.mark.parametrize(
    ("options", "text", "number"),
    [
        # yes and no are read alike, and as `lavis-lstp judge` reads them
        (YES_NO, "No, there isn't.", 1),
        (YES_NO, "No, there isn\u2019t.", 1),
        (YES_NO, "Yes, it is.", 0),
        (YES_NO, "Yeah!", 0),
        (YES_NO, "**No**", 1),
        (YES_NO, "The answer is no.", 1),
        (YES_NO, "The answer is no because he left", 1),
        (YES_NO, "I think yes", 0),
        (YES_NO, "B. No, it isn't", 1),
        (YES_NO, "No\nThere is nothing on the table.", 1),
        (YES_NO, "Not sure.", 2),
        (YES_NO, "No, I am not sure", None),
        (YES_NO, "A. No", None),
        (YES_NO, "Yes and no", None),
        (YES_NO, "Yes, but not really", None),
        (YES_NO, "There is no doubt about it", None),
        (YES_NO, "No\nYes", None),
        # words before letters, the text as it is before what is left of it without punctuation
        (["p.m.", "a.m."], "a.m.", 1),
        (["a.m.", "p.m."], "P.M.", 1),
        (["-1", "1"], "1", 1),
        (["-1", "1"], "\u22121", 0),
        (["-1", "1"], "It is 1.", 1),
        (["-5 degrees", "5 degrees"], "5 degrees", 1),
        (["-5 degrees", "5 degrees"], "about 5 degrees", 1),
        (["11-1", "1-11"], "1-11", 1),
        (["1-11", "11-1"], "they won 11-1", 1),
        (["a+b", "a-b"], "a-b", 1),
        (["C++", "C#", "C"], "C#", 1),
        (["C++", "C#", "C"], "It is written in C#.", 1),
        (["C++", "C#", "C"], "C", 2),
        (["50", "50%"], "50%", 1),
        (["1/2", "12"], "It is 12", 1),
        (["caf\u00e9", "bar"], "the cafe\u0301", 0),
        (["the dog\u2019s", "a cat"], "The dog's.", 0),
        (["rock-n-roll", "rock'n'roll!"], "rocknroll", None),  # equal without punctuation, and different options
        (["<answer>", "<b>"], "<b>", 1),
        # a letter that is a word too
        (["M", "A", "T"], "T", 2),
        (["M", "A", "T"], "A", None),
        (["M", "A", "T"], "(B)", 1),
        (["B", "A"], "a", None),
        (["A", "B"], "B", 1),
        # as models write letters
        (THREE, "**B**", 1),
        (THREE, "[B]", 1),
        (THREE, "`b`", 1),
        (THREE, "\uff08\uff22\uff09", 1),
        (THREE, "B\u3002", 1),
        (THREE, "\\boxed{B}", 1),
        (THREE, "<answer>B</answer>", 1),
        (THREE, "<think>(A) or (C)?</think>\n<answer> (B) a person </answer>", 1),
        (THREE, "<answer>A</answer> <answer>B</answer>", None),
        (THREE, "<answer>A</answer> <answer>who knows</answer>", None),
        (THREE, "<think>The answer is A, no, wait.</think>\nThe answer is C.", 2),
        (YES_NO, "<think>no, wait</think> Yes", 0),
        (THREE, "<think>The answer is A", None),  # it never came to an end
        (THREE, "The correct answer is b.", 1),
        (THREE, "the answer is a good question", None),
        (THREE, "\u9009\u9879 (B)\u3002", 1),
        (THREE, "\u7b54\u6848\uff1aB", 1),
        (THREE, "The answer is **B**.", 1),
        (THREE, "B - a person", 1),
        (THREE, "B - a dog", None),
        (THREE, "B\nExplanation: the dog is not there.", 1),
        (THREE, "There is a dog and a person.\n\nB", 1),
        (THREE, "B\nSo the answer is (C).", None),
        (THREE, "A\nB", None),
        (THREE, "(B)\n(B)", 1),
        # an explanation before the answer (EvolvingLMMs-Lab/lmms-eval#1434)
        (OPTIONS, "A shows red, B the blue one. The correct answer is (B).", 1),
        (OPTIONS, "Red comes first, then the blue one. Answer: B", 1),
        (OPTIONS, "Red comes first, then the blue one. The answer is (B), red.", None),
        (OPTIONS, "Red comes first, then a dog. The answer is (B).", 1),
        (OPTIONS, "Red, then the blue one. The answer is (A). The answer is (B).", None),
        (OPTIONS, "Red comes first, then the blue one. Option B is wrong.", None),
        # an explanation behind the line that answers (openai/simple-evals#33, jundot/omlx#3668)
        (THREE, "Answer: B\n\nExplanation: option A shows a dog.", 1),
        (THREE, "**Final answer:** B\nA is a common distractor.", 1),
        (THREE, "Option A is wrong, and so is option C.\n\nB", 1),
        (THREE, "Answer: a person\nOption A is a dog.", 1),
        (THREE, "Answer: A\nAnswer: B", None),
        # in TeX (NVIDIA-NeMo/Skills#1526), JSON, marks of lists and of models, characters that nobody sees
        (THREE, "The final answer is: $\\boxed{B}$", 1),
        (THREE, "$$\\boxed{\\text{B. a person}}$$", 1),
        (THREE, "\\[\\boxed{\\textbf{(B)}}\\]", 1),
        (YES_NO, "\\(\\boxed{\\text{No}}\\)", 1),
        (["$5", "5"], "$5", 0),
        (THREE, '{"answer": "B"}', 1),
        (THREE, '```json\n{"answer": "a person", "why": "A is a dog"}\n```', 1),
        (THREE, "- B", 1),
        (THREE, "> **B**", 1),
        (THREE, "\u200bB<|im_end|>", 1),
        # a letter that is called right, chosen, or set in brackets
        (THREE, "B is the correct answer.", 1),
        (THREE, "I think it is (B).", 1),
        (THREE, "I would choose B.", 1),
        (THREE, "Ans: B", 1),
        (THREE, "\u9009B", 1),
        (THREE, "(A) is shown first, then (B).", None),
        (THREE, "A is right of the tree", None),
        # what is denied is no answer
        (THREE, "Option B is wrong.", None),
        (THREE, "It is not option B.", None),
        (THREE, "I would not choose B.", None),
        (THREE, "(B) isn't correct.", None),
        (THREE, "The answer is B, not A.", 1),
    ],
)
def test_one_reading_or_none(options, text, number):
    assert parse_choice(text, options) == number


@pytest.mark.parametrize("options", [YES_NO, THREE, OPTIONS, ["-1", "1", "+1"], ["a.m.", "p.m."], ["C", "C++", "C#"]])
@pytest.mark.parametrize("written", ["{}", " {}\n", "{}.", '"{}"', "\u201c{}\u201d", "**{}**", "<answer>{}</answer>"])
def test_every_option_is_read_from_its_own_words(options, written):
    for number, option in enumerate(options):
        found = parse_choice(written.format(option), options)
        assert found == number or (found is None and option == "C"), "C is the letter of C# as well"


def test_equal_options_are_one_answer():
    assert parse_choice("it is red", ["blue", "red", "red"]) == 1
    assert parse_choice("two", ["one", "two", "two"]) == 1
    assert parse_choice("(C) two", ["one", "two", "two"]) == 2


def test_options_may_hold_letters_and_not():
    assert parse_choice("(A) plan B", ["plan B", "plan A"]) == 0
    assert parse_choice("A. It waves in the U.S.", OPTIONS) == 0  # no option has the letter U or S
    assert parse_choice("He does not fall.", ["does not fall", "he jumps"]) == 0


def test_accuracy_has_an_interval_for_each_kind():
    found = accuracy({"a": True, "b": False, "c": True}, {"a": "x", "b": "y", "c": "x"})
    assert found["accuracy"] == pytest.approx(2 / 3) and found["accuracy_interval"] == accuracy_interval(2, 3)
    assert found["by_category"]["x"]["accuracy"] == 1.0 and found["by_category"]["y"]["questions"] == 1
    assert found["mean_of_categories"] == 0.5
    assert "by_category" not in accuracy({"a": True}, {"a": ""})


# ---- the task -----------------------------------------------------------------------------------------------------


class Says(torch.nn.Module):
    """Answers what it is told to, as a model of LSTP, and keeps what it was asked."""

    def __init__(self, *answers: str):
        super().__init__()
        self.says, self.asked = list(answers), []

    def prompts(self, samples, template=None):
        return [f"USER: {text}" for text in samples["text_input"]]

    def answer(self, samples, **generation):
        self.asked.append(samples)
        return {"prediction": self.says, "prompt": samples["prompt"]}


def questions(**changes) -> dict:
    given = {
        "question_id": ["q0", "q1"],
        "text_input": ["which?", "what?"],
        "prompt": ["", ""],
        "options": [["red", "blue"], ["red", "blue"]],
        "category": ["x", ""],
        "text_output": ["blue", "red"],
        "answer": ["blue", "red"],
    }
    return {**given, **changes}


def test_the_language_model_reads_the_options_and_the_sampler_the_question():
    model = Says("B", "no idea")
    records = VideoQATask().valid_step(model, questions())
    (asked,) = model.asked
    assert asked["text_input"] == ["which?", "what?"]
    assert asked["prompt"] == [f"USER: {choice_prompt(q, ['red', 'blue'])}" for q in ("which?", "what?")]
    assert [(r["choice"], r["correct"], r["prediction"]) for r in records] == [
        ("B", True, "B"),
        (None, False, "no idea"),
    ]
    assert records[0]["category"] == "x" and "category" not in records[1]
    metrics = VideoQATask().metrics(records)
    assert (metrics["accuracy"], metrics["num_unparsable"], metrics["unparsable"]) == (0.5, 1, ["q1"])
    assert metrics["chosen_by"] == "generate" and metrics["by_category"]["x"]["accuracy"] == 1.0


def test_hidden_answers_give_predictions_and_no_score(tmp_path):
    task = VideoQATask()
    records = task.valid_step(Says("B", "A"), questions(text_output=["", ""], answer=[None, None]))
    assert [(r["answer"], r["choice"], r["correct"]) for r in records] == [(None, "B", None), (None, "A", None)]
    asked = SimpleNamespace(question_ids=["q0", "q1"], annotation=[{}, {}])
    found = task.after_evaluation(records, "test", 0, dataset=asked, result_dir=tmp_path)
    assert "nothing was scored" in found["note"]
    assert (found["num_questions"], found["num_scored"], found["num_missing"]) == (2, 0, 0)


def test_laviss_models_read_the_options_as_their_question():
    class Blip(torch.nn.Module):
        def predict_answers(self, samples, **unused):
            return samples["text_input"]

    (first, _) = VideoQATask().valid_step(Blip(), questions())
    assert first["prediction"] == choice_prompt("which?", ["red", "blue"]) and first["question"] == "which?"


@pytest.mark.parametrize(
    ("run", "changes", "said"),
    [
        ({"choose": "guess"}, {}, "unknown run.choose 'guess'"),
        ({"option_score": "max"}, {}, "unknown run.option_score 'max'"),
        ({"choose": "likelihood"}, {}, "needs a model of LSTP, got Says"),
        ({"choose": "likelihood"}, {"options": [["a", "b"], []]}, "needs options with every question"),
    ],
)
def test_what_cannot_be_chosen_is_said(run, changes, said):
    with pytest.raises(ConfigError, match=said):
        VideoQATask(run).valid_step(Says(), questions(**changes))


# ---- likelihood ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "language"), BACKBONES)
def test_an_options_log_probability_is_that_of_learning_it_alone(family, language):
    model = LSTP.from_config(model_config(family, language, selector={"name": "uniform"})).eval()
    samples = {**batch((8, 5)), "options": [["red", "blue circle", "a green star"], ["red", "star"]]}
    scored = model.score_options(samples)
    for i, options in enumerate(samples["options"]):
        for option, found in zip(options, scored["option_log_prob"][i], strict=True):
            with torch.no_grad():
                loss = model({**row(samples, i), "text_output": [option]})["lm_loss"]
            assert found["mean"] == pytest.approx(-float(loss), abs=2e-4) and found["tokens"] > 1
            assert found["sum"] == pytest.approx(found["mean"] * found["tokens"], rel=1e-4)


@pytest.mark.parametrize(("family", "language"), [*BACKBONES, ("blip2", "opt")])
def test_a_prompt_is_read_once_for_all_its_options(family, language, monkeypatch):
    """And each option is as likely as where prompt and option are read together, whatever else is in the batch."""
    monkeypatch.setattr("lavis_lstp.models.answering.DECIMALS", 9)  # what is written is rounded
    config = model_config(family, "llama" if language == "opt" else language, selector={"name": "uniform"})
    if language == "opt":
        config["backbone"]["config"]["text_config"] = dict(OPT)
    model = LSTP.from_config(config).eval()
    samples = {**batch((8, 5, 1)), "options": [["red", "a blue circle", ""], ["star"], ["it is a green star", "red"]]}
    reader = model.backbone.language_model
    reader = reader.get_encoder() if model.backbone.is_encoder_decoder else reader
    widths = []
    reader.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    scored = model.score_options(samples)
    assert [rows for rows, width in widths if width > 15] == [3], "the prompts, once"
    with torch.no_grad():
        prompts = model.prompts(samples)
        reading = model.look(samples, scored["frame_index"], prompts)
        prefix, mask = reading.prefix, reading.prefix_mask
        for i, options in enumerate(samples["options"]):
            for option, found, said in zip(
                options, scored["option_log_prob"][i], scored["option_greedy"][i], strict=True
            ):
                told = [model.answer_template.replace("{answer}", option)]
                one = slice(i, i + 1)
                logits, labels = model.backbone._answer_logits(prefix[one], mask[one], prompts[one], told)
                counted = labels[0] != IGNORED
                own = logits[0, counted].log_softmax(-1).gather(1, labels[0, counted, None])
                assert found["tokens"] == int(counted.sum()) > 0
                assert found["mean"] == pytest.approx(float(own.mean()), rel=1e-6, abs=1e-5)
                assert said == bool((logits[0, counted].argmax(-1) == labels[0, counted]).all())


def test_ranks_weigh_options_equally_often_where_weights_are_divided(monkeypatch):
    """A rank with fewer options weighs some that do not count while the others go on."""
    model = LSTP.from_config(model_config(selector={"name": "uniform"})).eval()
    samples = {**batch((2, 2)), "options": [["red", "blue"], ["star"]]}
    expected = model.score_options(samples)["option_log_prob"]
    ran = []
    model.backbone.language_model.register_forward_pre_hook(lambda *_: ran.append(1))
    divide_weights(model, monkeypatch, most=4)
    assert model.score_options(samples)["option_log_prob"] == expected
    assert len(ran) == 1 + 4


def test_mean_and_sum_may_choose_differently_and_equal_ones_give_the_first():
    class Scores(Says):
        def score_options(self, samples):
            long, short = {"sum": -3.0, "mean": -0.5, "tokens": 6}, {"sum": -2.0, "mean": -2.0, "tokens": 1}
            return {"prompt": ["", ""], "option_log_prob": [[short, long], [short, short]]}

    for score, letters in (("mean", ["B", "A"]), ("sum", ["A", "A"])):
        records = VideoQATask({"choose": "likelihood", "option_score": score}).valid_step(Scores(), questions())
        assert [record["choice"] for record in records] == letters
        assert [record["prediction"] for record in records] == [
            record["options"]["AB".index(record["choice"])] for record in records
        ]
        assert (
            records[0]["option_log_prob"][0]["tokens"] == 1 and records[0]["log_prob"] in records[0]["option_log_prob"]
        )


# ---- how sure an answer is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "language"), BACKBONES)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_predictions_log_probability_is_the_language_models_own(family, language, beams, monkeypatch):
    """Compared with one forward pass over the tokens that were generated; penalties do not count, the end mark does."""
    model = LSTP.from_config(model_config(family, language, selector={"name": "uniform"})).eval()
    backbone, made = model.backbone, []
    plain = backbone._generate
    backbone._generate = lambda *args, **kwargs: made.append((args, plain(*args, **kwargs))) or made[-1][1]
    settings = {"num_beams": beams, "repetition_penalty": 1.3, "max_new_tokens": 5}
    model.answer(batch((8, 5, 3)), **settings)
    said = made.pop()[1].sequences[0, -4]
    monkeypatch.setattr(type(backbone), "_end_ids", [int(said)])  # the first row ends with what it said second
    result = model.answer(batch((8, 5, 3)), **settings)
    (prefix, mask, prompts, _), output = made[0]
    text = backbone._tokenize(backbone.tokenizer, prompts, "right")
    inputs, mask, _ = backbone._with_prefix(prefix, mask, text["input_ids"], text["attention_mask"])
    start = 1 if backbone.is_encoder_decoder else 0
    ids = output.sequences[:, start:]
    with torch.no_grad():
        if backbone.is_encoder_decoder:
            logits = backbone.language_model(
                inputs_embeds=inputs, attention_mask=mask, decoder_input_ids=output.sequences[:, :-1]
            ).logits
        else:
            inputs, mask = _left_padded(inputs, mask)
            told = backbone.language_model.get_input_embeddings()(ids)
            whole, ones = torch.cat([inputs, told], 1), torch.cat([mask, torch.ones_like(ids)], 1)
            positions = (ones.cumsum(1) - 1).clamp(min=0)
            found = backbone.language_model(inputs_embeds=whole, attention_mask=ones, position_ids=positions).logits
            logits = found[:, inputs.shape[1] - 1 : -1]
    log_probs = logits.float().log_softmax(-1).gather(2, ids[:, :, None])[:, :, 0]
    for i, found in enumerate(result["log_prob"]):
        ends = [n for n, token in enumerate(ids[i].tolist()) if token in backbone._end_ids]
        count = ends[0] + 1 if ends else ids.shape[1]
        assert found["tokens"] == count
        assert found["sum"] == pytest.approx(float(log_probs[i, :count].sum()), abs=2e-3)
        assert found["mean"] == pytest.approx(found["sum"] / count, abs=1e-4)
    assert beams > 1 or said in ids[0], "greedy search says the same again, and it ends the answer"


# ---- once per video -----------------------------------------------------------------------------------------------


def test_units_are_whole_groups():
    assert eval_units([[0, 3], [1], [2, 4, 5]], 3) == [(0, 3, 1), (2, 4, 5)]
    assert eval_units([[0], [1, 2, 3, 4, 5], [6]], 3) == [(0,), (1, 2, 3, 4, 5), (6,)]
    assert eval_units([], 3) == []


@pytest.fixture
def asked(tmp_path) -> VideoQADataset:
    """Thirteen questions about three videos, in turn: eleven about the first."""
    for name in "abc":
        numbered_video(tmp_path / f"{name}.mp4", 6, width=64, height=64)
    videos = ["a", "b", "a", "c", *"aaaaaaaaa"]
    rows = [
        {"question_id": f"q{i}", "video": f"{v}.mp4", "video_id": v, "question": "what " * (1 + i % 3), "answer": "it"}
        for i, v in enumerate(videos)
    ]
    return VideoQADataset(rows, tmp_path, num_frames=4, image_size=64)


class Shown(torch.nn.Module):
    """Keeps the questions and the videos of each batch."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def predict_answers(self, samples, **unused):
        self.batches.append(samples["question_id"])
        return samples["video_id"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_video_is_decoded_once_for_all_its_questions(asked, tmp_path, monkeypatch, workers):
    def counted(source, plain=reading.read_frames, **kwargs):
        with open(tmp_path / "decoded.txt", "a", encoding="utf-8") as file:  # by whichever process
            file.write(f"{Path(source).stem}\n")
        return plain(source, **kwargs)

    monkeypatch.setattr(reading, "read_frames", counted)
    runner = make_runner(
        tmp_path / "run", task="video_qa", evaluate=True, test_splits=["test"], batch_size_eval=4, num_workers=workers
    )
    runner.datasets = {"videos": {"test": asked}}
    runner.bare_model = Shown()
    runner.evaluate()
    assert sorted((tmp_path / "decoded.txt").read_text().split()) == ["a", "b", "c"]
    sizes = [len(names) for names in runner.bare_model.batches]
    assert max(sizes) == 4 and sum(sizes) == 13
    records = list(read_jsonl(tmp_path / "run/result/test_video_qa.jsonl"))
    assert [record["question_id"] for record in records] == [f"q{i}" for i in range(13)], "in the order of the file"
    assert all(record["prediction"] == record["video_id"] for record in records)


@pytest.mark.parametrize("family", ["instructblip", "blip2"])
def test_vision_and_flow_run_once_per_video_and_answers_stay(asked, family):
    model = LSTP.from_config(model_config(family)).eval()
    samples = asked.collater([asked[i] for i in (0, 1, 2, 4)])
    seen = {"vision": [], "flow": []}
    model.backbone.vision_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen["vision"].append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    model.flow.register_forward_pre_hook(lambda _, args: seen["flow"].append(len(args[0])))
    shared = model.answer(samples)
    assert seen["flow"] == [2]
    pairs = {
        (name, int(i)) for name, index in zip(samples["video_id"], shared["frame_index"], strict=True) for i in index
    }
    assert seen["vision"] == [len(pairs)] and len(pairs) < 16
    apart = model.answer({key: value for key, value in samples.items() if key != "media"})
    assert seen["flow"] == [2, 4]
    assert shared["prediction"] == apart["prediction"] and torch.equal(shared["frame_index"], apart["frame_index"])
    for one, other in zip(shared["log_prob"], apart["log_prob"], strict=True):
        assert one["tokens"] == other["tokens"] and math.isclose(one["sum"], other["sum"], abs_tol=1e-4)


def test_flow_runs_once_for_a_video_with_more_questions_than_a_batch(asked):
    model, ran = LSTP.from_config(model_config()).eval(), []
    model.flow.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    samples = asked.collater([asked[i] for i in (0, 2, 4, 5, 6)])
    (whole,) = steps(lambda batch: [model.answer(batch)], samples, 5)
    model.chooser.forget()
    parts = steps(lambda batch: [model.answer(batch)], samples, 2)
    assert ran == [1, 1] and len(parts) == 3
    for key in ("start_logits", "flow"):
        torch.testing.assert_close(torch.cat([part[key] for part in parts]), whole[key])
    other = asked.collater([asked[1]])
    other["frames"] = 255 - other["frames"].flip(1)
    assert not torch.equal(model.answer(other)["flow"][0], whole["flow"][0]) and len(ran) == 3
    model.double().chooser.flow(other)
    model.eval().chooser.flow(other)
    assert len(ran) == 5, "what other weights, or weights elsewhere, made is not kept"
    model.train()
    model.chooser.flow(other)
    model.chooser.flow(other)
    assert len(ran) == 7, "of the training step nothing is kept"


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_each_token_is_read_once(language):
    """The KV cache is on, whatever a checkpoint's generation config says."""
    model = LSTP.from_config(model_config("instructblip", language, selector={"name": "uniform"})).eval()
    told = model.backbone.language_model
    told.generation_config.use_cache = False
    first = told.decoder.block[0] if language == "t5" else told.model.layers[0]
    widths = []
    first.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append((args[0] if args else kwargs["hidden_states"]).shape[1]), with_kwargs=True
    )
    model.answer(batch((8, 5)))
    assert len(widths) > 2 and set(widths[1:]) == {1}


def test_both_ways_of_the_speed_benchmark_answer_alike(monkeypatch, capsys):
    """benchmarks/evaluation.py on two videos ends with an error where predictions, spans or frames differ."""
    path = Path(__file__).resolve().parents[2] / "benchmarks/evaluation.py"
    spec = importlib.util.spec_from_file_location("evaluation_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    threads = torch.get_num_threads()
    monkeypatch.setattr("sys.argv", ["evaluation.py", "--videos", "2", "--workers", "0", "--repeats", "2"])
    monkeypatch.setattr(benchmark, "TARGET", 0)  # how fast either is depends on the machine
    try:
        assert benchmark.main() == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["questions"] == 20
    for way in ("alone", "together, one process"):
        assert {"decode", "flow", "sampler", "selection", "vision", "language"} <= found["ms"][way].keys()


# ---- the whole of it ----------------------------------------------------------------------------------------------


def run(folder: Path, *options: str) -> dict:
    (folder / "run.yaml").write_text(
        "model: {arch: lstp_tiny, flow: {name: dis}}\n"
        "datasets: {lstp_nextqa: {image_size: 64, num_frames: 4}}\n"
        "run: {task: video_qa, evaluate: true, device: cpu, num_workers: 0, batch_size_eval: 2, test_splits: [val]}\n"
    )
    assert evaluate.main(["--cfg-path", str(folder / "run.yaml"), "--options", *options]) == 0
    (out,) = [option.partition("=")[2] for option in options if option.startswith("run.output_dir")]
    return json.loads((folder / out / "result/val_video_qa_metrics.json").read_text())


def test_a_benchmark_is_chosen_from_both_ways_and_repeats_to_the_byte(tmp_path, monkeypatch):
    write_benchmarks(tmp_path, ["nextqa"])
    monkeypatch.chdir(tmp_path)
    likely = run(tmp_path, "run.output_dir=likely", "run.choose=likelihood")
    assert likely["num_unparsable"] == 0 and likely["chosen_by"] == "likelihood" and likely["questions"] == 6
    assert set(likely["by_category"]) == {"DO", "TN"} and likely["coverage"] == 1.0
    said = [run(tmp_path, f"run.output_dir={name}") for name in ("one", "two")]
    assert said[0] == said[1] and said[0]["num_unparsable"] > 0  # random weights: noise, and counted as wrong
    files = [(tmp_path / name / "result/val_video_qa.jsonl").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    record = json.loads(files[0].splitlines()[0])
    keys = {
        "question_id",
        "question",
        "answer",
        "prediction",
        "prompt",
        "span",
        "frame_index",
        "frame_times",
        "log_prob",
    }
    assert keys | {"options", "choice", "correct", "category", "video_id"} <= set(record)
    assert "\n(A) " in record["prompt"] and "(A)" not in record["question"]
    timings = list(read_jsonl(tmp_path / "one/result/val_video_qa_timings.jsonl"))
    assert {"flow", "sampler", "vision", "language"} <= set(timings[0])


def test_missing_questions_are_listed_and_a_partial_score_says_so(tmp_path, monkeypatch, capsys):
    write_benchmarks(tmp_path, ["nextqa"])
    monkeypatch.chdir(tmp_path)
    os.remove("inputs/nextqa/NExTVideo/0101/4001.mp4")
    partial = run(tmp_path, "run.output_dir=out", "datasets.lstp_nextqa.max_bad_fraction=0.7", "run.allow_partial=true")
    assert partial["partial"] is True and partial["coverage"] == pytest.approx(4 / 6) and partial["questions"] == 4
    missing = list(read_jsonl(tmp_path / "out/result/val_video_qa_missing.jsonl"))
    assert [row["question_id"] for row in missing] == ["4001_0", "4001_1"]
    assert {row["video_id"] for row in missing} == {"0101/4001"}
    command = ["--cfg-path", "run.yaml", "--options", "run.output_dir=strict"]
    assert evaluate.main([*command, "datasets.lstp_nextqa.max_bad_fraction=0.7"]) == 2
    said = capsys.readouterr().err
    assert "4 of 6 questions have a prediction; 2 ids ('4001_0', '4001_1') missing" in said
    assert "run.allow_partial" in said
    assert not Path("strict/result/val_video_qa_metrics.json").exists()
    assert len(list(read_jsonl("strict/result/val_video_qa_missing.jsonl"))) == 2
