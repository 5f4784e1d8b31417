"""What the language model reads and learns, as strings: the published prompts, character for character (SPEC 7).

    conversation_prompt([{"from": "human", "value": "What is this?\\n<image>"}, {"from": "gpt", "value": "A dog."}])
    -> Prompt(prompt="USER: <image>\\nWhat is this?  ASSISTANT: ", answer="A dog.", question="What is this?")

The end mark is not part of an answer here: a model's `answer_template` adds it, "{answer}</s>" for Vicuna,
"{answer}" for FLAN-T5, whose tokenizer ends every answer itself, "{answer} </s>" for the published video-only recipes.
The prompt of an evaluation is a model's template, `model.prompt`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lavis_lstp.errors import AnnotationError, unknown_name

MEDIA_TOKENS = ("<image>", "<video>", "<audio>", "<thermal>", "<depth>")
"""In the order in which they are put in front: of several in one turn, the last of these comes first."""

ROLES = {"human": "USER", "gpt": "ASSISTANT"}
SEPARATORS = {"human": " ", "gpt": "</s>"}
"""What follows a turn and its blank, where the turn has text."""


class Prompt(NamedTuple):
    """A conversation, cut where the model is to go on.

    Attributes:
        prompt: everything before the answer, as the language model reads it.
        answer: the last turn.
        question: the user's last turn before it, without media tokens; "" where there is none.
    """

    prompt: str
    answer: str
    question: str


def conversation_prompt(conversations: Sequence[Mapping[str, Any]]) -> Prompt:
    """A LLaVA conversation -> prompt and answer.

    A first turn that is not the user's is dropped. The last turn is the answer, whoever said it (published).

    Raises:
        AnnotationError: a turn without a key or a role that is known, roles that do not take turns, or no turn left.
    """
    turns = [_turn(number, turn) for number, turn in enumerate(conversations)]
    if turns and turns[0][0] != "human":
        turns = turns[1:]
    if not turns:
        raise AnnotationError("'conversations' has no turn of 'human'")
    prompt, question = "", ""
    for number, (role, text) in enumerate(turns):
        if role != ("human", "gpt")[number % 2]:
            raise AnnotationError(f"'conversations' has two turns of {role!r} in a row; human and gpt must alternate")
        prompt += ROLES[role] + ": "
        if number < len(turns) - 1:
            prompt += _token_first(text) + " " + (SEPARATORS[role] if text else "")
            question = without_tokens(text) if role == "human" else question
    return Prompt(prompt, _token_first(text), question)


def ends_with_user(conversations: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last turn, which is learnt, is the user's: an odd number of turns."""
    return conversations[-1]["from"] == "human"


def question_prompt(question: str) -> str:
    """The published video-only recipes' prompt, with no blank before ASSISTANT."""
    return f"USER: {question}ASSISTANT: "


def without_tokens(text: str) -> str:
    """`text` without media tokens and outer blanks."""
    for token in MEDIA_TOKENS:
        text = text.replace(token, "")
    return text.strip()


def _token_first(text: str) -> str:
    """Media tokens move to the front, each on its own line; a text without any stays as it is, blanks included."""
    for token in MEDIA_TOKENS:
        if token in text:
            text = f"{token}\n{text.replace(token, '').strip()}".strip()
    return text


def _turn(number: int, turn: Any) -> tuple[str, str]:
    """(human or gpt, text) of a turn."""
    place = f"'conversations', turn {number}"
    if not isinstance(turn, Mapping):
        raise AnnotationError(f"{place}: expected {{from, value}}, got {type(turn).__name__}")
    for key in ("from", "value"):
        if key not in turn:
            raise AnnotationError(f"{place}: key '{key}' is missing; it has {', '.join(map(str, turn)) or 'none'}")
        if not isinstance(turn[key], str):
            raise AnnotationError(f"{place}: '{key}' must be a string, got {type(turn[key]).__name__} {turn[key]!r}")
    if turn["from"] not in ROLES:
        raise AnnotationError(f"{place}: {unknown_name('role', turn['from'], ROLES)}")
    return turn["from"], turn["value"]
