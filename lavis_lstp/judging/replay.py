"""Verdicts recorded earlier, by anyone: a table is recomputed without a judge.

In: JSON lines with question, answer, prediction, judge, and pred and score, or status where there is no verdict: the
export of a cache, or the verdict file of an earlier call. Out: the recorded verdict on a case, found by these three
texts, so that none is used for a prediction it was not about. Nothing is decided anew here, not even by rules.
"""

from __future__ import annotations

import os

from lavis_lstp.errors import AnnotationError, ConfigError
from lavis_lstp.judging.published import published_verdict
from lavis_lstp.judging.rows import Row, case_of, read_rows
from lavis_lstp.judging.verdict import JUDGED, MAX_SCORE, MISSING, OPEN, PREDS, UNJUDGED, UNPARSABLE, Case, Verdict

FORMS = ("documented", "published")


class Replay:
    """Recorded verdicts by case.

    Args:
        path: the record.
        only: take verdicts of judges whose identity has this text in it, and those of rules.
        form: "documented", or "published": pred and score as gpt-3.5 said them ("Yes.", "unknown", 4.8).

    Raises:
        AnnotationError: a row of another form.
        ConfigError: two different verdicts on one case, or no judge is called like `only`.
    """

    def __init__(self, path: str | os.PathLike, *, only: str | None = None, form: str = FORMS[0]):
        self._verdicts: dict[Case, Verdict] = {}
        judges: set[str] = set()
        for where, row in read_rows(path):
            verdict = published_verdict(where, row) if form == "published" else read_verdict(where, row)
            judges.add(verdict.judge)
            if verdict.status in OPEN or not (only is None or only in verdict.judge or is_rules(verdict.judge)):
                continue
            case = _case(where, row)
            known = self._verdicts.setdefault(case, verdict)
            if _word(known) != _word(verdict):
                raise ConfigError(
                    f"{where}: another verdict on the same question, answer and prediction stands before; name one "
                    f"judge by --only. Judges: '{known.judge}', '{verdict.judge}'"
                )
        if only is not None and not any(only in judge for judge in judges):
            raise ConfigError(f"{path}: no judge with '{only}' in its identity; there are: {', '.join(sorted(judges))}")

    def get(self, case: Case) -> Verdict:
        return self._verdicts.get(case) or Verdict("nobody", MISSING)


def read_verdict(where: str, row: Row) -> Verdict:
    """The verdict in a row.

    Raises:
        AnnotationError: the row has none of the documented form.
    """
    status, judge = row.get("status", JUDGED), row.get("judge")
    if not isinstance(judge, str) or not judge or status not in (JUDGED, *UNJUDGED, *OPEN):
        raise AnnotationError(
            f"{where}: no verdict: expected judge, and pred and score, or status; `lavis-lstp judge` makes such files"
        )
    rule, note = row.get("rule", ""), row.get("note", {})
    tokens = note.get("tokens", [0, 0]) if isinstance(note, dict) else None
    if not isinstance(rule, str) or not isinstance(tokens, list) or [type(count) for count in tokens] != [int, int]:
        raise AnnotationError(f"{where}: rule or note is not of the form that `lavis-lstp judge` writes: {note!r:.80}")
    pred, score = row.get("pred"), row.get("score")
    if status != JUDGED:
        counts = status == UNPARSABLE and type(score) is int and 0 <= score <= MAX_SCORE  # of the published form
        return Verdict(judge, status, score=score if counts else None, rule=rule, note=note)
    if pred not in PREDS or type(score) is not int or not 0 <= score <= MAX_SCORE:
        raise AnnotationError(
            f"{where}: expected pred 'yes' or 'no' and score 0 to {MAX_SCORE}, got {pred!r}, {score!r}"
        )
    return Verdict(judge, JUDGED, pred == "yes", score, rule, note)


def _case(where: str, row: Row) -> Case:
    for name in Case._fields:
        if not isinstance(row.get(name), str):
            raise AnnotationError(f"{where}: expected {name} as a text, got {row.get(name)!r}")
    return case_of(row)


def is_rules(judge: str) -> bool:
    return judge.split(" ")[0] == "rules"


def _word(verdict: Verdict) -> tuple:
    return verdict.status, verdict.correct, verdict.score
