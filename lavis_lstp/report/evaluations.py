"""What an evaluation left behind -> `Evaluation`: predictions with a verdict on each, timings, the run's manifest.

In: folders of runs (`OUT/result/*.jsonl`), folders of such folders (what `ablate` and `demo` write), predictions or
verdict files. Out: one `Evaluation` for each predictions file and judge. Files are told by what is in them: rows with a
judge are verdicts, rows with a prediction are predictions. A verdict that is about another prediction is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavis_lstp.errors import AnnotationError, CoverageError
from lavis_lstp.files import read_jsonl, sha256_file, strict_json
from lavis_lstp.judging.compare import ITSELF, Judged
from lavis_lstp.judging.replay import read_verdict
from lavis_lstp.judging.rows import Row, by_question_id, named
from lavis_lstp.judging.verdict import JUDGED, MISSING, Case, Verdict
from lavis_lstp.metrics.choice import LETTERS
from lavis_lstp.metrics.qa import exact_match
from lavis_lstp.metrics.resampling import RESAMPLES
from lavis_lstp.schema import Prediction

logger = logging.getLogger(__name__)

EXACT = "nobody: exact match"
"""In place of a judge where nobody judged open answers."""
NOT_PREDICTIONS = ("_timings.jsonl", "_missing.jsonl")
MANIFESTS = ("evaluate_manifest.json", "run_manifest.json")


@dataclass
class Evaluation:
    """Predictions of one run, judged by one judge.

    Attributes:
        name: what tables call it; letter: what plots call it.
        rows: all predictions; judged: those with a gold answer. Both by question_id.
        answers: whether questions were answered; else moments were located, as by the task temporal_grounding.
        num_questions: questions with a gold answer, more than `judged` where some have no line.
        missing: ids of those, where the evaluation listed them.
        resamples, seed: of the bootstrap, as the judge's own result has them.
        timings: seconds by stage, a dict a question.
        digests: of the weights and the data, as the evaluation wrote them.
        manifest: of the run, {} where there is none; manifest_file: that file; run_dir: its folder.
    """

    name: str
    predictions: Path
    rows: dict[str, Prediction]
    judged: dict[str, Judged]
    verdicts: Path | None = None
    answers: bool = True
    num_questions: int = 0
    missing: list[str] = field(default_factory=list)
    resamples: int = RESAMPLES
    seed: int = 0
    timings: list[Row] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    manifest_file: Path | None = None
    letter: str = ""

    @property
    def run_dir(self) -> Path:
        parent = self.predictions.parent
        return parent.parent if parent.name == "result" else parent

    @property
    def coverage(self) -> dict[str, Any]:
        """As `metrics.coverage.join_by_id` gives it."""
        lost = self.num_questions - len(self.judged)
        return {
            "num_questions": self.num_questions,
            "num_scored": len(self.judged),
            "num_missing": lost,
            "num_extra": 0,
            "coverage": len(self.judged) / max(1, self.num_questions),
            "partial": lost > 0,
        }

    @property
    def unjudged_by_anyone(self) -> bool:
        return any(one.verdict.judge == EXACT for one in self.judged.values())


def find_evaluations(paths: Sequence[str | Path]) -> list[Evaluation]:
    """All evaluations in files and folders, in the order of `table.json` where there is one, else of the names.

    Raises:
        AnnotationError: nothing is there, or a file that cannot be read to its end.
        CoverageError: verdicts about other predictions.
    """
    predictions: dict[Path, dict[str, Prediction]] = {}
    verdicts: dict[Path, dict[str, Row]] = {}
    located: dict[Path, dict[str, Row]] = {}
    titles: dict[str, str] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise AnnotationError(f"{path}: no such file or folder; expected the output folder of an evaluation")
        titles.update(_titles(path))
        for file in _candidates(path):
            rows = by_question_id(file)
            first = next(iter(rows.values()))
            if "judge" in first:
                verdicts[file] = rows
            elif "prediction" in first:
                predictions[file] = rows
            elif _is_located(first):
                located[file] = rows
            else:
                raise AnnotationError(f"{file}: neither predictions nor verdicts: a row has {', '.join(first)}")
    if not predictions and not verdicts:  # a folder with answers, too, is about these
        predictions = located
    if not predictions and not verdicts:
        raise AnnotationError(
            f"{', '.join(map(str, paths))}: no predictions; expected result/<split>_video_qa.jsonl, as an evaluation "
            "of the task video_qa writes it (python -m lavis.evaluate), or verdicts of `lavis-lstp judge`"
        )
    pairs = _pairs(predictions, verdicts)
    found = [_evaluation(rows, file, verdict_file, verdicts.get(verdict_file)) for file, rows, verdict_file in pairs]
    _name(found, titles)
    place = {name: number for number, name in enumerate(titles)}
    found.sort(key=lambda one: place.get(one.run_dir.name, len(place)))  # stable: others stay as they came
    for number, one in enumerate(found):
        one.letter = chr(ord("A") + number) if number < 26 else str(number + 1)
    return found


def read_evaluation(predictions: Path, verdicts: Path | None = None) -> Evaluation:
    """The evaluation of one file of predictions, and of verdicts about them.

    Raises:
        AnnotationError, CoverageError: as `find_evaluations`.
    """
    rows = by_question_id(predictions)
    one = _evaluation(rows, predictions, verdicts, by_question_id(verdicts) if verdicts else None)
    _name([one], {})
    return one


def _candidates(path: Path) -> list[Path]:
    """The file itself, or what in a folder may be predictions or verdicts."""
    if path.is_file():
        return [path]
    folders = [path, path / "result", *sorted(path.glob("*/result"))]
    files = [file for folder in folders for file in sorted(folder.glob("*.jsonl"))]
    return [file for file in files if not file.name.endswith(NOT_PREDICTIONS) and _is_ours(file)]


def _is_ours(file: Path) -> bool:
    """Whether the first line says so; one that cannot be read is for `by_question_id` to complain about."""
    with open(file, encoding="utf-8-sig", errors="replace") as handle:
        line = handle.readline()
    try:
        row = strict_json(line, finite=False)
    except ValueError:
        return bool(line.strip())
    return (
        isinstance(row, dict)
        and "question_id" in row
        and (bool({"prediction", "judge"} & row.keys()) or _is_located(row))
    )


def _is_located(row: Row) -> bool:
    """Whether it is one of the task temporal_grounding: a span to be compared, and no answer."""
    return "span" in row and bool({"gold_span", "moments_s"} & row.keys())


def _titles(path: Path) -> dict[str, str]:
    """Folder -> title, of the `table.json` that `ablate` and `demo` write."""
    rows = _json(path / "table.json").get("rows") if path.is_dir() else None
    rows = rows if isinstance(rows, list) else []
    named_rows = [r for r in rows if isinstance(r, dict) and {"name", "title"} <= r.keys()]
    return {f"{prefix}{r['name']}": str(r["title"]) for prefix in ("", "eval_") for r in named_rows}


def _json(path: Path, forms: Mapping[str, Callable[[Any], bool]] | None = None) -> dict[str, Any]:
    """An object, {} where there is none.

    Args:
        forms: key -> whether its value, where it is there, is of the form that this package writes.

    Raises:
        AnnotationError: one is not.
    """
    try:
        value = strict_json(path.read_text(encoding="utf-8-sig"), finite=False)
    except (OSError, ValueError):
        return {}
    value = value if isinstance(value, dict) else {}
    if _is_deep(value):
        raise AnnotationError(f"{path}: is nested deeper than {DEEPEST} levels, and nothing that is written here is")
    for name, is_good in (forms or {}).items():
        if name in value and not is_good(value[name]):
            raise AnnotationError(f"{path}: {name} is not of the form that is written: {value[name]!r:.80}")
    return value


DEEPEST = 50


def _is_deep(value: Any, left: int = DEEPEST) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not left or any(_is_deep(one, left - 1) for one in parts if isinstance(one, (dict, list)))


def _pairs(
    predictions: Mapping[Path, dict[str, Prediction]], verdicts: Mapping[Path, dict[str, Row]]
) -> list[tuple[Path, dict[str, Prediction], Path | None]]:
    """(predictions file, its rows, verdict file): verdicts by the digest in their result, else by their name."""
    digests = {sha256_file(path): path for path in predictions}
    of: dict[Path, list[Path]] = {path: [] for path in predictions}
    alone = []
    for file in verdicts:
        about = _json(file.with_suffix(".json"), RESULT_FORMS).get("predictions", {})
        beside = [p for p in predictions if p.parent == file.parent and file.stem.startswith(f"{p.stem}_judged")]
        home = digests.get(about.get("sha256", "")) or (max(beside, key=lambda p: len(p.stem)) if beside else None)
        (alone if home is None else of[home]).append(file)
    pairs = [(path, rows, file) for path, rows in predictions.items() for file in of[path] or [None]]
    return pairs + [(file, verdicts[file], file) for file in alone]


def _evaluation(
    rows: dict[str, Prediction], file: Path, verdict_file: Path | None, verdicts: Mapping[str, Row] | None
) -> Evaluation:
    if verdicts is not None:
        _check_same(rows, file, verdicts, verdict_file)
    answers = verdicts is not None or "prediction" in next(iter(rows.values()))
    whole, judged = {}, {}
    wild: list[str] = []
    for key, row in rows.items():
        given = (verdicts or {}).get(key)
        # a judge that was given --answers knows what the predictions do not say
        texts = {name: given[name] for name in TEXTS if name in given} if given else {}
        row = {
            "question": "",
            **({} if answers else {"prediction": ""}),
            **texts,
            **{name: value for name, value in row.items() if value is not None},
        }
        wild += [f"question_id '{key}': {what}" for what in _check_row(f"{file}: question_id '{key}'", row)]
        whole[key] = row
        if "answer" in row:  # else it is hidden
            judged[key] = Judged(row, _verdict(row, verdict_file, key, given))
    if wild:
        what = f"NaN, infinite or beyond {LARGEST:g}, and left out of the page"
        logger.warning("%s: %d numbers are %s; first %s", file, len(wild), what, wild[0])
    result = _json(verdict_file.with_suffix(".json"), RESULT_FORMS) if verdict_file else {}
    metrics = _json(file.with_name(f"{file.stem}_metrics.json"), RESULT_FORMS)
    expected = max(len(rows), *(one.get("num_questions", 0) for one in (metrics, result)))
    timings, missing = (file.with_name(f"{file.stem}{end}") for end in NOT_PREDICTIONS)
    bootstrap = result.get("bootstrap", {})
    one = Evaluation(
        name="",
        predictions=file,
        rows=whole,
        judged=judged,
        answers=answers,
        verdicts=verdict_file,
        num_questions=expected if judged else expected - len(whole),
        missing=[str(row.get("question_id")) for row in read_jsonl(missing)] if missing.is_file() else [],
        resamples=bootstrap.get("resamples", RESAMPLES),
        seed=bootstrap.get("seed", 0),
        timings=_timings(timings, rows) if timings.is_file() else [],
        digests=_json(file.with_name(f"{file.stem}_digests.json"), DIGEST_FORMS),
    )
    for path in (one.run_dir / name for name in MANIFESTS):
        if content := _json(path, MANIFEST_FORMS):
            one.manifest, one.manifest_file = content, path
            break
    return one


TEXTS = ("question", "answer", "video_id", "category")
LARGEST = 1e9
"""Frames, seconds and log-probabilities are smaller; a number of JSON may be 1e308, NaN, or have 400 digits."""


def _timings(path: Path, rows: Mapping[str, Prediction]) -> list[Row]:
    """Seconds by stage of the questions in `rows`."""
    found = []
    for number, row in enumerate(read_jsonl(path), 1):
        seconds = [value for name, value in row.items() if name != "question_id"]
        if not isinstance(row.get("question_id"), str | int) or not _numbers(seconds, None, (int, float)):
            raise AnnotationError(f"{path}, line {number}: expected question_id and seconds by stage, got {row!r:.80}")
        if str(row["question_id"]) in rows:
            found.append(row)
    return found


def _is_number(value: Any, kinds: tuple[type, ...] = (int, float)) -> bool:
    return type(value) in kinds and abs(value) <= LARGEST


def _numbers(value: Any, count: int | None = None, kinds: tuple[type, ...] = (int,)) -> bool:
    if not isinstance(value, list) or count not in (None, len(value)):
        return False
    for one in value:  # a loop, because a page of 100,000 questions asks three million times
        if type(one) not in kinds or not (one is None or -LARGEST <= one <= LARGEST):
            return False
    return True


def _likelihood(value: Any) -> bool:
    """Whether these are sum, mean and number of tokens; null stands for what was infinite or NaN."""
    kinds = (int, float, type(None))
    found = [value.get(key) for key in ("sum", "mean", "tokens")] if isinstance(value, dict) else []
    return _numbers(found, 3, kinds) and found[2] is not None


FORMS: dict[str, Callable[[Any], bool]] = {
    "video_id": lambda value: type(value) in (str, int),
    "category": lambda value: type(value) in (str, int),
    "question": lambda value: isinstance(value, str),
    "answer": lambda value: isinstance(value, str),
    "prediction": lambda value: isinstance(value, str),
    "span": lambda value: _numbers(value, 2),
    "gold_span": lambda value: _numbers(value, 2),
    "span_s": lambda value: _numbers(value, 2, (int, float)),
    "moments_s": lambda value: (
        isinstance(value, list) and bool(value) and all(_numbers(one, 2, (int, float)) for one in value)
    ),
    "num_frames": lambda value: _is_number(value, (int,)) and value > 0,
    "num_scored": lambda value: _is_number(value, (int,)) and value >= 0,
    "frame_index": _numbers,
    "subtitles": lambda value: (
        isinstance(value, dict)
        and _numbers([value.get("lines"), value.get("left_out")], 2)
        and _numbers([value.get("window_s")], 1, (int, float, type(None)))
    ),
    "frame_times": lambda value: _numbers(value, None, (int, float, type(None))),
    "entropy": lambda value: (
        isinstance(value, dict) and _numbers([value.get("start"), value.get("end")], 2, (int, float))
    ),
    "log_prob": _likelihood,
    "options": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    "choice": lambda value: isinstance(value, str) and len(value) == 1,
    "option_log_prob": lambda value: isinstance(value, list) and all(map(_likelihood, value)),
}
"""What the page reads of a row, and whether a value is of the form that evaluations write."""
RESULT_FORMS: dict[str, Callable[[Any], bool]] = {
    "num_questions": lambda value: _is_number(value, (int,)),
    "predictions": lambda value: isinstance(value, dict) and isinstance(value.get("sha256", ""), str),
    "bootstrap": lambda value: (
        isinstance(value, dict)
        and type(value.get("resamples", 1)) is int
        and 1 <= value.get("resamples", 1) <= 1_000_000
        and type(value.get("seed", 0)) is int
        and 0 <= value.get("seed", 0) < 1 << 64
    ),
}
"""Keys of metrics and of a judge's result that the page reads, and their forms."""
DIGEST_FORMS = dict.fromkeys(("weights", "data"), lambda value: isinstance(value, str))
MANIFEST_FORMS: dict[str, Callable[[Any], bool]] = {
    "config": lambda value: (
        isinstance(value, dict)
        and all(isinstance(section, dict) for section in value.values())
        and all(isinstance(section, dict) for section in (value.get("datasets") or {}).values())
        and isinstance(value.get("model", {}).get("selector") or {}, dict)
    ),
    "versions": lambda value: isinstance(value, dict),
    "cwd": lambda value: isinstance(value, str) and "\0" not in value,
}
"""Keys of a run's manifest that the page reads, and their forms."""


SHOWN_ONLY = ("span_s", "frame_times", "entropy", "log_prob", "option_log_prob")
"""Numbers of a row that the page shows and no score is made of."""


def _tame(value: Any, depth: int = 2) -> Any:
    """The value with None for each number, at most so deep, that is NaN, infinite or larger than an evaluation's."""
    if depth and isinstance(value, dict):
        return {key: _tame(one, depth - 1) for key, one in value.items()}
    if depth and isinstance(value, list):
        return [_tame(one, depth - 1) for one in value]
    return value if type(value) not in (int, float) or _is_number(value) else None


def _check_row(where: str, row: Prediction) -> list[str]:
    """Remove what a page only shows and no number of JSON or of a video can be; returns what it was.

    Raises:
        AnnotationError: anything else is not of the form that an evaluation writes.
    """
    wild = []
    for name, is_good in FORMS.items():
        if (name in row or name == "prediction") and not is_good(value := row.get(name)):
            scored = name not in SHOWN_ONLY or (name == "span_s" and "moments_s" in row)
            if scored or (tame := _tame(value)) == value:
                raise AnnotationError(f"{where}: {name} is not of the form that an evaluation writes: {value!r:.80}")
            wild.append(f"{name} {value!r:.80}")
            row[name] = tame
            if not is_good(tame):  # a span of one end is none
                del row[name]
    count = len(row.get("options", ()))
    if row.get("choice", "A") not in LETTERS[: max(1, count)] or len(row.get("option_log_prob", "." * count)) != count:
        raise AnnotationError(f"{where}: choice or option_log_prob are not about its {count} options")
    return wild


def _verdict(row: Prediction, verdict_file: Path | None, key: str, given: Row | None) -> Verdict:
    if verdict_file is not None:
        where = f"{verdict_file}: question_id '{key}'"
        return Verdict("nobody", MISSING) if given is None else read_verdict(where, given)
    if isinstance(row.get("correct"), bool):
        return Verdict(ITSELF, correct=row["correct"])
    return Verdict(EXACT, JUDGED, exact_match(row["answer"], row["prediction"]) == 1)


def _check_same(
    rows: Mapping[str, Prediction], file: Path, verdicts: Mapping[str, Row], verdict_file: Path | None
) -> None:
    other = [key for key in verdicts if key not in rows]
    for key in verdicts.keys() & rows.keys():
        same = (verdicts[key].get(name) in (None, rows[key].get(name)) for name in Case._fields if rows[key].get(name))
        if not all(same):
            other.append(key)
    if other:
        raise CoverageError(
            f"{verdict_file}: its verdicts are not about {file}: question, answer or prediction differ in "
            f"{named(sorted(other))} of {len(verdicts)}; judge these predictions again (lavis-lstp judge)"
        )


def _name(found: Sequence[Evaluation], titles: Mapping[str, str]) -> None:
    """The run's title or folder, and as much more as tells two apart."""
    for one in found:
        one.name = titles.get(one.run_dir.name) or one.run_dir.resolve().name
    for more in (lambda one: one.predictions.stem, lambda one: f"judged: {one.verdicts.stem}" if one.verdicts else ""):
        names = [one.name for one in found]
        for one in found:
            if names.count(one.name) > 1 and more(one):
                one.name = f"{one.name}, {more(one)}"
