"""`lavis-lstp import-answers merge.jsonl --verdicts gpt3.5`: results of the published evaluation, read by `judge`.

In: answers as the published inference writes them, a JSON object {id, question, answer, pred} a line, and verdicts as
its evaluation keeps them: a folder of `<id>.json`, or the file they were combined to. Each verdict is a pair of what
the judge said, {pred, score}, and what it was asked, {q, a, pred}. Out: predictions with question_id, question, answer
and prediction, and a record for `judge --judge replay --form published`. Nothing in these files is evaluated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_lstp.errors import AnnotationError, ConfigError, CoverageError
from lavis_lstp.files import strict_json, write_jsonl
from lavis_lstp.judging.rows import Row, named, read_rows, writing
from lavis_lstp.judging.verdict import JUDGED, MAX_SCORE, UNPARSABLE, Verdict, storable

RECORDED = "gpt-3.5-turbo form=published"
"""Identity of the judge where nobody names it: the published evaluation asks this model, by no fixed snapshot."""
END = "</s>"
"""The published evaluation cuts answers here."""


def read_answers(path: Path) -> dict[str, Row]:
    """Rows by question_id, with the names that `judge` reads; a prediction ends in front of its end mark.

    Raises:
        AnnotationError: no such file, or a row that is not {id, question, answer, pred}.
        CoverageError: two rows with one id.
    """
    rows: dict[str, Row] = {}
    for where, entry in read_rows(path):
        key = entry.get("id")
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise AnnotationError(f"{where}: expected an id, a text or a whole number, got {key!r}")
        texts = _texts(where, entry, ("question", "answer", "pred"))
        if str(key) in rows:
            raise CoverageError(f"{where}: id '{key}' has more than one row; ids must be unique")
        rows[str(key)] = _row(str(key), *texts)
    return rows


def read_record(path: Path, judge: str = RECORDED) -> list[Row]:
    """Rows of a record: question, answer, prediction, judge, and pred and score as the judge said them.

    Raises:
        AnnotationError: nothing there, or an entry that is not a pair of {pred, score} and {q, a, pred}.
    """
    rows = []
    for where, key, entry in _entries(path):
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, dict) for part in entry)):
            raise AnnotationError(f"{where}: expected [{{pred, score}}, {{q, a, pred}}], got {_short(entry)}")
        said, asked = entry
        row = _row(key, *_texts(where, asked, ("q", "a", "pred")))
        rows.append({**row, "judge": judge, "pred": said.get("pred"), "score": said.get("score")})
    if not rows:
        raise AnnotationError(f"{path}: holds no verdict; expected <id>.json files, or the file they were combined to")
    return rows


def _entries(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(where it stands, id, content), by id in the order of names."""
    if path.is_dir():
        for file in sorted(path.glob("*.json")):
            yield str(file), file.stem, _json(file)
        return
    combined = _json(path)
    if not isinstance(combined, dict):
        raise AnnotationError(f"{path}: expected {{id: verdict}} or a folder of verdicts, got {_short(combined)}")
    for key, entry in combined.items():
        yield f"{path}: id '{key}'", key, entry


def _json(path: Path) -> Any:
    try:
        return strict_json(path.read_text(encoding="utf-8-sig"), finite=False)
    except (OSError, ValueError) as error:
        raise AnnotationError(f"{path}: cannot be read as JSON ({error})") from None


def _short(value: Any) -> str:
    return f"{value!r:.80}"


def _texts(where: str, row: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    for key in keys:
        if not isinstance(row.get(key), str):
            raise AnnotationError(f"{where}: expected {key} as a text, got {row.get(key)!r:.80}")
    return [row[key] for key in keys]


def _row(key: str, question: str, answer: str, pred: str) -> Row:
    return {"question_id": key, "question": question, "answer": answer, "prediction": pred.split(END)[0]}


def published_verdict(where: str, row: Row) -> Verdict:
    """A recorded verdict as the published evaluation counts it.

    A pred with "yes" in it is a yes, otherwise one with "no" in it a no ("unknown" is one), whatever its case. A score
    is cut to a whole number (4.8 is 4). One that is none counts as 0, and its pred does not count.

    Raises:
        AnnotationError: a score that is not 0 to 5.
    """
    pred, score, judge = row.get("pred"), row.get("score"), row.get("judge") or RECORDED
    if not isinstance(judge, str):
        raise AnnotationError(f"{where}: expected judge as a text, got {judge!r}")
    try:
        points = int(score)
    except (TypeError, ValueError, OverflowError):
        return Verdict(judge, UNPARSABLE, score=0, note=_said(pred, score))
    if not 0 <= points <= MAX_SCORE:
        raise AnnotationError(f"{where}: expected a score of 0 to {MAX_SCORE}, got {score!r}")
    word = pred.lower() if isinstance(pred, str) else ""
    if "yes" not in word and "no" not in word:
        return Verdict(judge, UNPARSABLE, score=points, note=_said(pred, score))
    return Verdict(judge, JUDGED, "yes" in word, points)


def _said(pred: Any, score: Any) -> dict[str, str]:
    return {"text": storable(f"pred {pred!r}, score {score!r}")}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lavis-lstp import-answers",
        description="Turn results of the published evaluation into files that `lavis-lstp judge` reads.",
    )
    parser.add_argument("answers", type=Path, help="JSON lines of {id, question, answer, pred} (merge.jsonl)")
    parser.add_argument("--verdicts", type=Path, help="folder of <id>.json (gpt3.5), or the file combined from it")
    parser.add_argument("--judge-name", default=RECORDED, help="who gave the verdicts (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="predictions to write, *.jsonl")
    args = parser.parse_args(argv)
    record_file = args.out.with_name(f"{args.out.stem}_verdicts.jsonl")
    given = {path.resolve() for path in (args.answers, args.verdicts) if path}
    if given & {args.out.resolve(), record_file.resolve()}:
        raise ConfigError(f"--out {args.out} would replace what is read; name another file")
    answers = read_answers(args.answers)
    record = read_record(args.verdicts, args.judge_name) if args.verdicts else []
    with writing(args.out):
        write_jsonl(args.out, answers.values())
        if record:
            write_jsonl(record_file, record)
    print(f"{len(answers)} answers written to {args.out}")
    if record:
        judged = {row["question_id"] for row in record}
        print(f"{len(record)} verdicts written to {record_file}")
        for ids, what in (
            (answers.keys() - judged, "answers without a verdict"),
            (judged - answers.keys(), "verdicts on no answer"),
        ):
            if ids:
                print(f"{what}: {named(sorted(ids))}")
        print(f"the table: lavis-lstp judge {args.out} --judge replay --form published --verdicts {record_file}")
    return 0
