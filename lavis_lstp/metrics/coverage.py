"""Joins predictions with what they are compared to, by id, and refuses gaps.

A score over the questions that happened to be answered is not the score of the data set; lists aligned by position
have been a source of silent errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from lavis_lstp.errors import CoverageError

T = TypeVar("T")
Items = Mapping[str, T] | Iterable[tuple[str, T]]


def join_by_id(
    predictions: Items[T], golds: Items[T], *, allow_partial: bool = False
) -> tuple[list[str], dict[str, T], dict[str, T], dict[str, int | float | bool]]:
    """Ids that are scored, both sides as dicts, and the coverage to report with the score.

    Args:
        predictions, golds: mappings, or pairs (id, value), among which an id must occur once.
        allow_partial: score what is there; the result then says "partial": True where anything is missing or
            unknown.

    Returns:
        ids (in the order of `golds`), predictions, golds, and num_questions, num_scored, num_missing, num_extra,
        coverage (0..1), partial.

    Raises:
        CoverageError: an id occurs twice, no question has an answer, or, unless `allow_partial`, an id is on one
            side only.
    """
    predicted, expected = _unique(predictions, "prediction"), _unique(golds, "question")
    missing = [key for key in expected if key not in predicted]
    extra = [key for key in predicted if key not in expected]
    ids = [key for key in expected if key in predicted]
    if (missing or extra) and not allow_partial:
        raise CoverageError(
            f"{len(ids)} of {len(expected)} questions have a prediction; {_named(missing)} missing, "
            f"{_named(extra)} unknown; predict every question once, or allow a partial score "
            "(run.allow_partial; of a judge --allow-partial)"
        )
    if not ids:
        raise CoverageError(
            f"nothing to score: {len(expected)} questions, {len(predicted)} predictions, none in common"
        )
    return (
        ids,
        predicted,
        expected,
        {
            "num_questions": len(expected),
            "num_scored": len(ids),
            "num_missing": len(missing),
            "num_extra": len(extra),
            "coverage": len(ids) / len(expected),
            "partial": bool(missing or extra),
        },
    )


def _unique(items: Items[T], what: str) -> dict[str, T]:
    if isinstance(items, Mapping):
        return dict(items)
    result: dict[str, T] = {}
    twice: dict[str, None] = {}
    for key, value in items:
        if key in result:
            twice[key] = None
        result[key] = value
    if twice:
        raise CoverageError(f"{_named(list(twice))} with more than one {what}; ids must be unique")
    return result


def _named(keys: list[str], count: int = 5) -> str:
    if not keys:
        return "0 ids"
    shown = ", ".join(repr(key) for key in keys[:count]) + (", ..." if len(keys) > count else "")
    return f"{len(keys)} ids ({shown})"
