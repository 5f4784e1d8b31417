"""What is judged, what a verdict is, and the one JSON form in which a language model may give it.

In: question, gold answer and prediction. Out: `Verdict`. A model's text is a verdict only if all of it is
{"pred": "yes" or "no", "score": 0 to 5}: nothing is searched for in prose, nothing is filled in.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from lavis_lstp.endpoint import storable
from lavis_lstp.files import sha256_json, strict_json

MAX_SCORE = 5
PREDS = ("yes", "no")
SCHEMA = {
    "type": "object",
    "properties": {
        "pred": {"type": "string", "enum": list(PREDS)},
        "score": {"type": "integer", "enum": list(range(MAX_SCORE + 1))},
    },
    "required": ["pred", "score"],
    "additionalProperties": False,
}

JUDGED = "judged"
REFUSED = "refused"
UNPARSABLE = "unparsable"
UNJUDGED = (REFUSED, UNPARSABLE)
"""A judge was asked and gave no verdict: final, counted as wrong, shown."""
FAILED = "failed"
UNASKED = "not asked"
MISSING = "missing"
OPEN = (FAILED, UNASKED, MISSING)
"""No judge has answered yet: there is no score over these."""


class Case(NamedTuple):
    """One prediction and what it is compared with. Equal cases get one verdict, whatever their question ids."""

    question: str
    answer: str
    prediction: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A judge's word on a case.

    Attributes:
        judge: identity of who said it, one line (see `identity`).
        status: "judged", or why there is no verdict.
        correct, score: whether the prediction is right, and 0..5; None unless judged. A verdict of the published form
            that is unparsable has a score, which the published style counts.
        rule: the rule that decided, "" where a judge did.
        note: what else is worth keeping: the text that could not be read, the model that served, tokens.
    """

    judge: str
    status: str = JUDGED
    correct: bool | None = None
    score: int | None = None
    rule: str = ""
    note: dict[str, Any] = dataclasses.field(default_factory=dict)


def identity(kind: str, **facts: object) -> str:
    """`kind name=value ...` on one line, the same for the same judge; what makes another judge must be in it."""
    words = (f"{name}={'_'.join(str(value).split())}" for name, value in facts.items() if value is not None)
    return " ".join([kind, *words])


def case_key(judge: str, prompt: object, case: Case) -> str:
    """Digest under which a verdict is cached."""
    return sha256_json([judge, prompt, *case])


def parse_verdict(text: str | None, judge: str, note: dict[str, Any] | None = None) -> Verdict:
    """The verdict that `text` is, or one of status "unparsable" that keeps the text."""
    note = dict(note or {})
    try:
        value = strict_json(text or "")
    except ValueError:
        value = None
    if (
        isinstance(value, dict)
        and set(value) == set(SCHEMA["required"])
        and value["pred"] in PREDS
        and type(value["score"]) is int
        and 0 <= value["score"] <= MAX_SCORE
    ):
        return Verdict(judge, JUDGED, value["pred"] == "yes", value["score"], note=note)
    return Verdict(judge, UNPARSABLE, note={**note, "text": storable(text)})
