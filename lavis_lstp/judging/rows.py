"""Files that are judged or hold verdicts: JSON lines or a JSON list, one object per question, joined by question_id.

In: a predictions file, perhaps the answers in a file of their own, verdict files. Out: dicts by question_id. A row that
cannot be read is an error with its line, never a row less.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lavis_lstp.errors import AnnotationError, ConfigError, CoverageError
from lavis_lstp.files import HalfCharacter, json_rows, strict_json
from lavis_lstp.judging.verdict import JUDGED, Case, Verdict
from lavis_lstp.metrics.coverage import join_by_id
from lavis_lstp.schema import Prediction

Row = dict[str, Any]
"""As it is read, of a predictions or of a verdict file; see `schema.Prediction`."""


def read_rows(path: str | os.PathLike) -> list[tuple[str, Row]]:
    """(where it stands, object) of each entry.

    Raises:
        AnnotationError: no such file, or a line that is not a complete JSON object.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path}: cannot be read ({error})") from None
    entries = json_rows(text, path, _json)
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise AnnotationError(f"{where}: expected an object, got {type(entry).__name__}")
    if not entries:
        raise AnnotationError(f"{path}: holds no row")
    return entries


def _json(text: str, where: str) -> Any:
    try:
        # numbers are checked by those who use them, with the question's id
        return strict_json(text, finite=False, names=False)
    except HalfCharacter as error:
        raise AnnotationError(f"{where}, {error}") from None
    except ValueError as error:
        raise AnnotationError(f"{where}: no complete JSON ({error}); was its writer stopped? let it finish") from None


def by_question_id(path: str | os.PathLike) -> dict[str, Row]:
    """Rows by their question_id.

    Raises:
        AnnotationError: a row without one.
        CoverageError: two rows with the same one.
    """
    found: dict[str, Row] = {}
    for where, row in read_rows(path):
        if not isinstance(row.get("question_id"), str | int):
            raise AnnotationError(f"{where}: expected a question_id, got {row.get('question_id')!r}")
        key = str(row["question_id"])
        if key in found:
            raise CoverageError(f"{where}: question_id '{key}' has more than one row; ids must be unique")
        found[key] = row
    return found


def read_predictions(
    predictions: str | os.PathLike, answers: str | os.PathLike | None = None, *, allow_partial: bool = False
) -> tuple[dict[str, Prediction], dict[str, Any]]:
    """Rows with question, answer and prediction by question_id, and the coverage.

    Args:
        answers: file with question_id, answer and perhaps question, where the predictions bring none; it also says
            which questions there are. Without it they are those of the predictions and of their `_missing.jsonl`.
        allow_partial: go on with questions that have a prediction where others have none.

    Raises:
        AnnotationError: a row lacks one of the three.
        CoverageError: predictions and answers are not one to one, and not `allow_partial`.
    """
    predicted = by_question_id(predictions)
    missing = Path(predictions).with_name(f"{Path(predictions).stem}_missing.jsonl")
    unanswered = by_question_id(missing) if missing.is_file() else {}
    golds: Mapping[str, Row] = by_question_id(answers) if answers is not None else {**unanswered, **predicted}
    ids, *_, coverage = join_by_id(predicted, golds, allow_partial=allow_partial)
    rows = {}
    for key in ids:
        row = {**golds[key], **{name: value for name, value in predicted[key].items() if value is not None}}
        for name in Case._fields:
            if not isinstance(row.get(name), str) or (name == "answer" and not row[name].strip()):
                raise AnnotationError(
                    f"{predictions}: question_id '{key}' has no {name} to judge by (a text), got {row.get(name)!r}; "
                    "questions and answers may also come from a file of their own, --answers"
                )
            if answers is not None and name != "prediction" and row[name] != golds[key].get(name, row[name]):
                raise AnnotationError(
                    f"question_id '{key}' has another {name} in {predictions} ({row[name]!r}) than in {answers} "
                    f"({golds[key][name]!r}); these files do not belong together"
                )
        rows[key] = row
    return rows, coverage


def case_of(row: Prediction) -> Case:
    return Case(*(row[name] for name in Case._fields))


def verdict_row(question_id: str, row: Prediction, verdict: Verdict) -> Row:
    """A line of a verdict file."""
    kept = {name: row[name] for name in ("video_id", "category", *Case._fields) if row.get(name) is not None}
    return {"question_id": question_id, **kept, **verdict_fields(verdict)}


def verdict_fields(verdict: Verdict) -> Row:
    fields: Row = {"status": verdict.status}
    if verdict.status == JUDGED:
        fields.update(pred="yes" if verdict.correct else "no", score=verdict.score)
    elif verdict.score is not None:
        fields["score"] = verdict.score
    if verdict.rule:
        fields["rule"] = verdict.rule
    return {**fields, "judge": verdict.judge, **({"note": dict(sorted(verdict.note.items()))} if verdict.note else {})}


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns what the system says against writing `path` into one line."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); name another file") from None


def named(ids: Iterable[str], count: int = 5) -> str:
    ids = list(ids)
    shown = ", ".join(repr(key) for key in ids[:count]) + (", ..." if len(ids) > count else "")
    return f"{len(ids)} ({shown})" if ids else "0"
