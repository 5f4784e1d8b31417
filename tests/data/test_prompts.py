"""Prompts equal the published ones, character for character."""

from __future__ import annotations

import json

import pytest
from conftest import GOLDEN

from lavis_lstp.config.model import ModelSettings
from lavis_lstp.data.prompts import conversation_prompt, question_prompt
from lavis_lstp.errors import AnnotationError

PROMPTS = json.loads((GOLDEN / "prompts.json").read_text())
CONVERSATIONS = [case for case in PROMPTS["iv"] if "conversations" in case]


def turns(*texts: str, first: str = "human") -> list[dict]:
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_conversations_equal_published(case):
    found = conversation_prompt(case["conversations"])
    template = "{answer}</s>" if "vicuna" in case["processor"] else "{answer}"
    assert found.prompt == case["out"]["question"]
    assert template.replace("{answer}", found.answer) == case["out"]["answer"]


def test_all_published_conversations_are_there():
    assert len(CONVERSATIONS) == 48


def test_questions_about_videos_alone_equal_published():
    golden = PROMPTS["videoinstruct"]
    assert question_prompt("What is it?") == golden["question"]
    assert "{answer} </s>".replace("{answer}", "A dog.") == golden["answer"]


def test_the_models_template_is_the_published_evaluations():
    model = ModelSettings()
    assert model.prompt.replace("{question}", "what is it?") == PROMPTS["eval_inference"]
    assert model.sampler_prompt.replace("{question}", "what is it?") == PROMPTS["eval_sampler_text"]


@pytest.mark.parametrize(
    ("conversation", "question"),
    [
        (turns("What is this?\n<image>", "A dog."), "What is this?"),
        (turns("<video>\nWhat?", "A man.", " Why? ", "Late."), "Why?"),
        (turns("Hello", "Hi <video> there", "Yes", first="gpt"), "Hi  there"),
        (turns("", "x"), ""),
        (turns("a", "x", "b"), "a"),  # the last turn is the user's, and is the answer
        (turns("Only a question"), ""),
    ],
)
def test_the_bare_question_is_the_users_last(conversation, question):
    assert conversation_prompt(conversation).question == question


def test_what_the_recorded_conversations_do_not_have():
    """By the rules of SPEC 7; several media tokens in one turn end up in the reverse of their order in that list."""
    assert conversation_prompt(turns("a", "")).answer == ""
    assert conversation_prompt(turns("<image><video> a", "b")).prompt == "USER: <video>\n<image>\n a  ASSISTANT: "
    assert conversation_prompt(turns("a <image> b <image>", "c")).prompt == "USER: <image>\na  b  ASSISTANT: "
    assert conversation_prompt(turns("<image>", "c")).prompt == "USER: <image>  ASSISTANT: "
    assert conversation_prompt(turns(" a ", " b ")) == ("USER:  a   ASSISTANT: ", " b ", "a")
    assert conversation_prompt(turns("a", "see <image>")).answer == "<image>\nsee"


@pytest.mark.parametrize(
    ("conversation", "said"),
    [
        ([], "no turn of 'human'"),
        (turns("Hello", first="gpt"), "no turn of 'human'"),
        ([{"from": "humam", "value": "a"}], "turn 0: unknown role 'humam'; did you mean 'human'?"),
        ([{"from": "system", "value": "a"}, *turns("b", "c")], "turn 0: unknown role 'system'"),
        ([*turns("a"), *turns("b")], "two turns of 'human' in a row"),
        ([*turns("a", first="gpt"), *turns("b", first="gpt")], "two turns of 'gpt' in a row"),
        ([{"from": "human"}], "turn 0: key 'value' is missing; it has from"),
        ([{"value": "a"}], "turn 0: key 'from' is missing"),
        (["a"], "turn 0: expected {from, value}, got str"),
        ([{"from": "human", "value": None}], "turn 0: 'value' must be a string, got NoneType"),
    ],
)
def test_what_is_wrong_with_a_conversation(conversation, said):
    with pytest.raises(AnnotationError) as error:
        conversation_prompt(conversation)
    assert said in str(error.value) and "\n" not in str(error.value)
