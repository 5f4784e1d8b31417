"""Video question answering benchmarks, in the files their authors publish -> entries as `qa_dataset` wants them.

In: question files (JSON, JSON lines, CSV, TSV, parquet), where the authors split them answer files, and a file of
other video names where one is published. Out: one entry per question. A benchmark is a YAML file in configs/datasets,
whose section `benchmark` describes the files; docs/benchmarks.md says where they come from. Answers are joined to
questions by id, never by position, and ids that differ are an error.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from lavis_lstp.config.data import CONFIGS
from lavis_lstp.data.annotation import (
    MOMENT_SLACK_S,
    SECTION,
    check_moment,
    check_object,
    check_options,
    check_seconds,
    longest,
    parse,
    parse_rows,
    read_text,
    some,
    warn_of_hidden,
)
from lavis_lstp.data.tables import delimited_rows, parquet_rows
from lavis_lstp.data.video.reading import ENDINGS_IN_ANY_CASE, VIDEO_ENDINGS
from lavis_lstp.errors import AnnotationError, ConfigError, unknown_name
from lavis_lstp.files import find_path

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """Meaning of the columns of a file, as `benchmark.forms.<form>` of a YAML file in configs/datasets gives it.

    Templates are filled from a row; {file} is the file's name without ending, {number} the row's place in it.

    Args:
        question_id, video: templates; of several videos the first that exists is meant, without its ending.
        question, answer: columns.
        answer_is: `text`, or an option: `index` counts from 0, `letter` from A. `none`: there is a moment to find.
        options: the column of a list of texts or of {choice: text}, or a column for each.
        lettered: options begin with their letter, as in "A. Apples."; it is checked and removed.
        padding: text of a column that stands for "no such option".
        fewest_options: 2, or 1 where the authors count questions whose only option is right (5 of MVBench's 4,000).
        rows: the column of a list of rows in each row of the file, or parallel lists of which each gives a row.
        reader: one of READERS, for a file that no ending describes.
        delimiter: of a table in text, where its ending says something else.
        clip_s: columns of start and end in seconds of the part that is asked about.
        moments_s: the column of [start, end] in seconds or of a list of them: where the answer is seen.
        overlap: moments of one question may overlap (CG-Bench's do in 8 of 3,000).
        duration_s: the column of the video's length in seconds; moments are checked against it.
        subtitles: template of the file's name; without it that of the video with another ending.
        subtitles_begin_s: the column of where the video begins, in seconds of that file.
        category: axis -> kind of question: a template, or {of: template, pattern: regular expression, names: list}.
        left_out: ids of questions that the authors' file leaves without an answer or with one that is no option.
        files: per file's stem, further columns of its rows; `bounded: false` drops the clip.
    """

    question_id: str
    video: Sequence[str]
    question: str = "question"
    answer: str = "answer"
    answer_is: str = "text"
    options: str | Sequence[str] | None = None
    lettered: bool = False
    padding: str | None = None
    fewest_options: int = 2
    rows: str | Sequence[str] | None = None
    reader: str | None = None
    delimiter: str | None = None
    clip_s: Sequence[str] | None = None
    moments_s: str | None = None
    overlap: bool = False
    duration_s: str | None = None
    subtitles: str | None = None
    subtitles_begin_s: str | None = None
    category: Mapping[str, Any] = field(default_factory=dict)
    left_out: Sequence[str] = ()
    files: Mapping[str, Row] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Columns that every row has, but for the answer."""
        filled = [name for template in (self.question_id, *self.video) for name in _columns(template)]
        options = [self.options] if isinstance(self.options, str) else self.options or []
        return list(dict.fromkeys([*filled, self.question, *options]))


@dataclass(frozen=True)
class Benchmark:
    """Forms by name, the first being the authors', and how many questions a split has."""

    forms: Mapping[str, Form]
    sizes: Mapping[str, int] = field(default_factory=dict)
    answers_choose: bool = False
    """The answer file has a part of the questions, and the split is that part."""


def _columns(template: str) -> list[str]:
    return [name for _, name, *_ in Formatter().parse(template) if name]


def described(content: Mapping[str, Any], path: object) -> Benchmark:
    """The section `benchmark` of a YAML file as what it describes.

    Raises:
        ConfigError: a key that nobody reads, a form without question_id or video, or an unknown `answer_is` or reader.
    """
    given = dict(content)
    forms = {}
    for name, form in given.pop("forms").items():
        known = {one.name for one in fields(Form)}
        for key in form:
            if key not in known:
                raise ConfigError(f"{path}: {unknown_name(f'key of benchmark.forms.{name}', key, known)}")
        if not {"question_id", "video"} <= form.keys():
            raise ConfigError(f"{path}: benchmark.forms.{name} needs question_id and video")
        video = form["video"]
        forms[name] = Form(**{**form, "video": [video] if isinstance(video, str) else video})
        for key, names in (("answer_is", ANSWERS), ("reader", (None, *READERS))):
            if (value := getattr(forms[name], key)) not in names:
                known_names = [str(one) for one in names if one]
                raise ConfigError(f"{path}: {unknown_name(f'benchmark.forms.{name}.{key}', value, known_names)}")
    return Benchmark(forms, **given)


ANSWERS = ("text", "index", "letter", "none")


def _charades(text: str, path: Path) -> list[tuple[str, Any]]:
    """Charades-STA's lines: "VIDEO START END##SENTENCE", times in seconds."""
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            head, mark, sentence = line.partition("##")
            words = head.split()
            place = f"{path}, line {number}"
            if not mark or len(words) != 3 or not all(re.fullmatch(r"\d+(\.\d+)?", word) for word in words[1:]):
                raise AnnotationError(f"{place}: expected 'VIDEO START END##SENTENCE', got {line[:80]!r}")
            rows.append((place, {"video": words[0], "moment": [float(w) for w in words[1:]], "sentence": sentence}))
    return rows


def _lvbench(text: str, path: Path) -> list[tuple[str, Any]]:
    """LVBench's JSON lines: options "(A) ..." stand in the question, `time_reference` is "MM:SS-MM:SS"."""
    rows = []
    for place, video in parse_rows(text, path):
        check_object(video, place, ("key", "qa"))
        info = video.get("video_info")
        minutes = info.get("duration_minutes") if isinstance(info, dict) else None
        outer = {"key": video["key"], "type": video.get("type", "")}
        outer["duration"] = minutes * 60 if type(minutes) in (int, float) else minutes
        for number, row in enumerate(video["qa"] if isinstance(video["qa"], list) else [None]):
            where = f"{place}, qa {number}"
            check_object(row, where, ("uid", "question", "answer", "question_type", "time_reference"), ("question",))
            question, *options = re.split(r"\n\s*(?=\([A-Z]\) ?)", row["question"])
            asked = {"question": question, "options": options, "moment": _clock_span(row["time_reference"], where)}
            rows.append((where, {**row, **outer, **asked}))
    return rows


def _clock_span(text: Any, place: str) -> list[float] | None:
    """ "01:05-01:10", "101:05-101:10" or "1:01:05-1:01:10" in seconds; one time, alone or twice, is the second there.

    None where the authors' file ends a moment before it begins or says "None" (13 and 2 of 1,549): the question is
    asked, and has no gold moment.
    """
    edges = re.split(r"\s*[~\u2013-]\s*", str(text).strip())
    times = [re.fullmatch(r"(?:(\d{1,3}):)?(\d{1,4}):(\d{1,2}(?:\.\d+)?)|None", edge) for edge in edges]
    if len(edges) > 2 or None in times:
        raise AnnotationError(f"{place}: 'time_reference' must be MM:SS-MM:SS or H:MM:SS-H:MM:SS, got {text!r:.80}")
    if "None" in edges:
        return None
    seconds = [int(time[1] or 0) * 3600 + int(time[2]) * 60 + float(time[3]) for time in times]
    start, end = seconds[0], seconds[-1]
    return None if end < start else [start, end if start < end else start + 1]


READERS: dict[str, Callable[[str, Path], list[tuple[str, Any]]]] = {"charades": _charades, "lvbench": _lvbench}
"""Text and path of a file -> (place for messages, row) of each question, where no ending says how it is read."""


def _table() -> dict[str, Benchmark]:
    """The benchmarks that configs/datasets describes."""
    found = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "benchmark" in content:
            found[path.stem] = described(content["benchmark"], path)
    return found


BENCHMARKS: dict[str, Benchmark] = _table()


class Entries(list[Row]):
    """Entries of a split; `unanswerable` lists the ids that the authors' files have beside them."""

    unanswerable: Sequence[str] = ()


QUESTIONS = Benchmark(
    {"questions": Form("{question_id}", ["{video_name}", "v_{video_name}"], category={"type": "{type}"})}
)
"""Anybody's question file and answer file. ActivityNet's videos have "v_" in front of what its questions call them."""


def read_benchmark(
    benchmark: Benchmark,
    paths: Sequence[Path],
    root: Path,
    *,
    split: str = "",
    form: str | None = None,
    answers: Path | None = None,
    video_names: Path | None = None,
    subtitles: bool = False,
    section: str = SECTION,
) -> Entries:
    """Entries of a split.

    Args:
        paths: question files, or a folder of them.
        root: folder of the videos.
        split: only to say when it has another number of questions than published.
        form: of the benchmark's; None = the authors'.
        answers: file of the answers, where the questions have none.
        video_names: file that gives videos other names: a JSON object {name: other}, or lines "other name".
        subtitles: whether entries name the subtitles of their videos.

    Raises:
        ConfigError: the form is not known.
        AnnotationError: file, row and key that are wrong, questions without answer or answers without question.
    """
    form = form or next(iter(benchmark.forms))
    if form not in benchmark.forms:
        raise ConfigError(unknown_name(f"{section}.form", form, benchmark.forms))
    spec = benchmark.forms[form]
    rows = [row for path in paths for file in _files(path, spec) for row in _rows(file, spec, section, form)]
    by_id: dict[str, tuple[str, Row]] = {}
    for place, row in rows:
        key = spec.question_id.format_map(row)
        if key in by_id:
            raise AnnotationError(f"{place}: question id {key!r} occurs twice; ids must be unique")
        by_id[key] = place, row
    if answers is not None:
        by_id = _with_answers(by_id, read_answers(answers, section), answers, benchmark.answers_choose)
    count = len(by_id)
    broken = [key for key in spec.left_out if by_id.pop(key, None)]
    if broken:
        lost = "questions have no right option; they are not asked, and the score says partial"
        logger.warning("%s: %d of %d %s: %s", section, len(broken), count, lost, some(broken))
    grounding = spec.answer_is == "none"
    unknown = [
        key
        for key, (place, row) in by_id.items()
        if (row.get(spec.moments_s) if grounding else _answer(row, spec, place)) is None
    ]
    what = "moment" if grounding else "answer"
    warn_of_hidden(unknown, len(by_id), ", ".join(map(str, paths)), section, what)
    unseen = [key for key, (_, row) in by_id.items() if spec.moments_s and row.get(spec.moments_s) is None]
    if unseen and not grounding:
        logger.warning("%s: %d of %d questions have no gold moment: %s", section, len(unseen), count, some(unseen))
    if split in benchmark.sizes and benchmark.sizes[split] != count:
        published = benchmark.sizes[split]
        logger.warning("%s: split %s has %d questions, published are %d", section, split, count, published)
    if split.startswith("train"):
        by_id = _without_reversed(by_id, spec, section)
    names = read_names(video_names, section) if video_names else {}
    files: dict[tuple[str, ...], tuple[str, str]] = {}
    found = Entries(_entry(key, row, spec, place, root, names, files) for key, (place, row) in by_id.items())
    found.unanswerable = broken
    if subtitles and spec.subtitles:
        for entry, (place, row) in zip(found, by_id.values(), strict=True):
            entry |= _subtitles(row, spec, place)
    return found


def _without_reversed(questions: dict[str, tuple[str, Row]], spec: Form, section: str) -> dict[str, tuple[str, Row]]:
    """Training questions but for those whose only moment does not end after it begins, which are counted.

    The authors' own training files have some (4 of 12,408 in Charades-STA, 4 of 37,421 in ActivityNet-Captions); in a
    split that is evaluated they are an error.
    """
    kept = {}
    for key, (place, row) in questions.items():
        moment = row.get(spec.moments_s or "")
        flat = isinstance(moment, list) and len(moment) == 2 and all(type(edge) in (int, float) for edge in moment)
        if not flat or moment[0] < moment[1]:
            kept[key] = place, row
    if len(kept) < len(questions):
        first = next(key for key in questions if key not in kept)
        lost = len(questions) - len(kept)
        logger.warning("%s: %d moments do not end after they begin and are left out, first %r", section, lost, first)
    return kept


def read_answers(path: Path, section: str = SECTION) -> dict[str, Row]:
    """Answers by question id: rows of {question_id, answer, ...}, or one object {id: answer}.

    Raises:
        AnnotationError: a row has no id, or an id occurs twice. Answers that only their position tells apart are not
            read: nobody could say whether they belong to these questions.
    """
    text = read_text(path, section=section)
    rows = parse_rows(text, path)
    if len(rows) == 1 and text.lstrip()[:1] == "{" and "question_id" not in rows[0][1]:
        content = rows[0][1]
        if all(isinstance(value, dict) and isinstance(value.get("location"), dict) for value in content.values()):
            return {  # NExT-GQA's moments; the answers stand beside the questions
                f"{video}_{question}": {"moments": moments, "duration": row.get("duration")}
                for video, row in content.items()
                for question, moments in row["location"].items()
            }
        return {str(key): {"answer": value} for key, value in content.items()}
    found: dict[str, Row] = {}
    for place, row in rows:
        check_object(row, place, ("question_id", "answer"))
        key = str(row["question_id"])
        if key in found:
            raise AnnotationError(f"{place}: question id {key!r} occurs twice; ids must be unique")
        found[key] = row
    return found


def read_names(path: Path, section: str = SECTION) -> dict[str, str]:
    """Other names of videos: NExT-QA's JSON object {name: other}, or MSVD's lines "other name"."""
    text = read_text(path, section=section)
    if path.suffix.lower() == ".json":
        content = parse(text, path, "file")
        check_object(content, str(path), ())
        return {str(name): str(other) for name, other in content.items()}
    pairs = [line.split() for line in text.splitlines() if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise AnnotationError(f"{path}: expected two words in each line, the file's name and the name in the questions")
    return {name: other for other, name in pairs}


def _files(path: Path, spec: Form) -> list[Path]:
    """The file, or a folder's JSON files; a benchmark in several files has all of them or is not whole."""
    if not path.is_dir():
        return [path]
    missing = [name for name in spec.files if not (path / f"{name}.json").is_file()]
    if missing:
        raise AnnotationError(f"{path}: lacks {len(missing)} of {len(spec.files)} files, first {missing[0]}.json")
    return [path / f"{name}.json" for name in spec.files] or sorted(path.glob("*.json"))


def _rows(path: Path, spec: Form, section: str, form: str) -> list[tuple[str, Row]]:
    if spec.files and path.is_file() and path.stem not in spec.files:
        raise AnnotationError(f"{path}: {unknown_name('task', path.stem, spec.files)}")
    rows = _read(path, spec, section)
    if spec.rows:
        rows = [one for place, row in rows for one in _each(row, place, spec.rows)]
    if not rows:
        raise AnnotationError(f"{path}: holds no question")
    more = {"file": path.stem, **spec.files.get(path.stem, {})}
    needed = tuple(column for column in spec.columns if column not in (*more, "number"))
    found = []
    for number, (place, row) in enumerate(rows):
        try:
            check_object(row, place, needed, (spec.question,))
            row = _named(row, place, spec)
        except AnnotationError as error:
            raise AnnotationError(f"{error}; read as {section}.form: {form}") from None
        found.append((place, {**row, **more, "number": number}))
    return found


def _named(row: Row, place: str, spec: Form) -> Row:
    """Return the row, with whole numbers where ids and names are made of them: pandas makes 7.0 of 7 beside gaps.

    Raises:
        AnnotationError: nothing is asked, or nothing stands in such a column.
    """
    whole = {}
    if spec.question in row and not row[spec.question].strip():
        raise AnnotationError(f"{place}: '{spec.question}' is empty")
    for column in (name for template in (spec.question_id, *spec.video) for name in _columns(template)):
        if column in row and (row[column] is None or not str(row[column]).strip()):
            raise AnnotationError(f"{place}: '{column}' is empty, and names are made of it")
        if isinstance(row.get(column), float) and row[column].is_integer():
            whole[column] = int(row[column])
    return {**row, **whole}


def _read(path: Path, spec: Form, section: str) -> list[tuple[str, Any]]:
    """(place, row) of each row; the file's ending says how it is read."""
    ending = path.suffix.lower()
    if spec.reader is None and ending == ".parquet":
        return parquet_rows(path, section)
    text = read_text(path, section=section)
    if spec.reader is not None:
        return READERS[spec.reader](text, path)
    delimiter = spec.delimiter or {".csv": ",", ".tsv": "\t"}.get(ending)
    if delimiter is not None:
        return delimited_rows(text, path, delimiter)
    if spec.rows and ending == ".json" and text.lstrip()[:1] == "{":  # {name: row of parallel lists}
        content = parse(text, path, "file")
        return [
            (f"{path}, {key!r:.80}", {"key": key, **_object(row, f"{path}, {key!r:.80}")})
            for key, row in content.items()
        ]
    return parse_rows(text, path)


def _object(row: Any, place: str) -> Row:
    check_object(row, place, ())
    return row


def _each(row: Any, place: str, columns: str | Sequence[str]) -> list[tuple[str, Row]]:
    """Rows that lie in a row: a list of objects, or parallel lists; the outer columns go to each of them."""
    names = [columns] if isinstance(columns, str) else columns
    check_object(row, place, tuple(names))
    lists = [row[name] for name in names]
    if not all(isinstance(one, list) for one in lists) or len({len(one) for one in lists}) != 1:
        raise AnnotationError(f"{place}: {' and '.join(names)} must be lists of one length")
    outer = {name: value for name, value in row.items() if name not in names}
    found = []
    for number, values in enumerate(zip(*lists, strict=True)):
        where = f"{place}, {names[0]} {number}"
        inner = _object(values[0], where) if isinstance(columns, str) else dict(zip(names, values, strict=True))
        found.append((where, {**outer, **inner, "index": number}))
    return found


def _with_answers(
    questions: dict[str, tuple[str, Row]], answers: dict[str, Row], path: Path, choose: bool
) -> dict[str, tuple[str, Row]]:
    extra = [key for key in answers if key not in questions]
    missing = [key for key in questions if key not in answers]
    if extra or (missing and not choose):
        raise AnnotationError(
            f"{path}: {len(missing)} questions have no answer here ({some(missing)}) and {len(extra)} answers no "
            f"question ({some(extra)}); these files do not belong together"
        )
    return {key: (place, {**row, **answers[key]}) for key, (place, row) in questions.items() if key in answers}


def _entry(key: str, row: Row, spec: Form, place: str, root: Path, names: Mapping[str, str], files: dict) -> Row:
    candidates = tuple(template.format_map(row) for template in spec.video)
    if candidates not in files:
        files[candidates] = _video_file(root, [names.get(name, name) for name in candidates])
    video, video_id = files[candidates]
    entry = {"question_id": key, "video_id": video_id, "video": video, "question": row[spec.question].strip()}
    answer = _answer(row, spec, place)
    if spec.options:
        entry["options"] = _options(row, spec, place)
        answer = _chosen(answer, entry["options"], spec, place)
        check_options(entry["options"], answer, place, spec.fewest_options)
    entry["answer"] = answer
    kinds = {axis: _kind(row, rule) for axis, rule in spec.category.items()}
    entry["category"] = next(iter(kinds.values()), "")
    if len(kinds) > 1:
        entry["categories"] = {axis: kind for axis, kind in kinds.items() if kind}
    if spec.clip_s and row.get("bounded", True) and row.get(spec.clip_s[0]) is not None:
        entry["clip_s"] = [row[column] for column in spec.clip_s if column in row]
        check_seconds(entry["clip_s"], " and ".join(spec.clip_s), place)
    if spec.moments_s and row.get(spec.moments_s) is not None:
        entry["moments_s"] = _moments(
            row[spec.moments_s], row.get(spec.duration_s or ""), spec.moments_s, place, allow_overlap=spec.overlap
        )
        entry["span_s"] = longest(entry["moments_s"])
    return entry


def _subtitles(row: Row, spec: Form, place: str) -> Row:
    """Keys of an entry that `data.subtitles` reads."""
    needed = [*_columns(spec.subtitles), *([spec.subtitles_begin_s] if spec.subtitles_begin_s else [])]
    check_object(row, place, tuple(needed))
    begin = {"subtitles_begin_s": row[spec.subtitles_begin_s]} if spec.subtitles_begin_s else {}
    return {"subtitles": spec.subtitles.format_map(row), **begin}


def _kind(row: Row, rule: str | Mapping[str, Any]) -> Any:
    """Kind of a question along one axis; a list where the authors count a question in several."""
    rule = {"of": rule} if isinstance(rule, str) else rule
    (column, *more) = _columns(rule["of"])
    if not more and isinstance(row.get(column), list):
        return [str(one) for one in row[column]]
    value = rule["of"].format_map(defaultdict(str, row))
    if "pattern" in rule:
        found = re.search(rule["pattern"], value, re.IGNORECASE)
        value = found[0].lower() if found and rule.get("else") else found[0] if found else rule.get("else", "")
    names = rule.get("names", ())
    return names[int(value)] if value.isdigit() and int(value) < len(names) else value


def _moments(value: Any, duration_s: Any, column: str, place: str, *, allow_overlap: bool = False) -> list[list[float]]:
    """One [start, end] or several, in seconds and in the order of time.

    Raises:
        AnnotationError: a moment is reversed or empty, overlaps another one, or lies behind the end of the video.
    """
    single = isinstance(value, list) and len(value) == 2 and not any(isinstance(one, list) for one in value)
    moments = [value] if single else value
    if not isinstance(moments, list) or not moments:
        raise AnnotationError(f"{place}: '{column}' must be [start, end] or a list of them, got {value!r:.80}")
    for moment in moments:
        check_moment(moment, column, place)
    moments = sorted([list(moment) for moment in moments])
    for one, other in zip(moments, moments[1:], strict=False):
        if other[0] < one[1] and not allow_overlap:
            raise AnnotationError(f"{place}: '{column}' {one} and {other} overlap")
    if duration_s is not None and type(duration_s) not in (int, float):
        raise AnnotationError(f"{place}: the video's length must be a number of seconds, got {duration_s!r:.80}")
    if duration_s is not None and moments[-1][1] > duration_s + MOMENT_SLACK_S:
        raise AnnotationError(f"{place}: '{column}' {moments[-1]} ends behind its video of {duration_s:g} s")
    return moments


def _answer(row: Row, spec: Form, place: str) -> str | None:
    """The answer as a text, None where there is none; nothing but blanks is none, and so is the option number -1."""
    answer = row.get(spec.answer) if spec.answer_is != "none" else None
    if answer is not None and type(answer) not in (str, int, float):
        raise AnnotationError(f"{place}: '{spec.answer}' must be a text or a number, got {answer!r}")
    hidden = answer is None or not str(answer).strip() or (spec.answer_is == "index" and answer in (-1, "-1"))
    return None if hidden else _text_of(answer)


def _text_of(value: Any) -> str:
    """Return a text as it is, and a number as people write it: pandas makes 7.0 of 7 beside gaps."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _options(row: Row, spec: Form, place: str) -> list[str]:
    if isinstance(spec.options, str):
        if not isinstance(row[spec.options], list):
            raise AnnotationError(f"{place}: '{spec.options}' must be a list, got {row[spec.options]!r:.80}")
        found = [_option(item, spec, place) for item in row[spec.options]]
    else:  # columns of a table, in which an empty cell is no option
        found = [row[column] for column in spec.options]
    if spec.answer_is == "text":
        found = [one for one in found if one is not None and one != spec.padding]
    else:  # others keep their number and letter
        while found and (found[-1] is None or found[-1] == spec.padding):
            found.pop()
    if None in found:
        raise AnnotationError(f"{place}: an option before others is empty, got {found!r:.200}")
    texts = [_text_of(one) for one in found]
    if not spec.lettered:
        return texts
    marks = [re.match(r"\(?([A-Z])[.):]\s*(?=\S)", text) for text in texts]
    if [match and match[1] for match in marks] != [chr(ord("A") + number) for number in range(len(texts))]:
        raise AnnotationError(
            f"{place}: '{spec.options}' must begin with their letters, as 'A. ...', got {texts!r:.200}"
        )
    return [text[match.end() :] for text, match in zip(texts, marks, strict=True)]


def _option(item: Any, spec: Form, place: str) -> Any:
    if isinstance(item, dict):
        check_object(item, f"{place}: '{spec.options}'", ("choice",))
        item = item["choice"]
    if item is None:  # pandas makes it of the text "None"
        raise AnnotationError(f"{place}: an option of '{spec.options}' is null; write its text, or leave it out")
    if type(item) not in (str, int, float):
        raise AnnotationError(f"{place}: an option of '{spec.options}' must be a text or a number, got {item!r:.80}")
    return item


def _chosen(answer: str | None, options: Sequence[str], spec: Form, place: str) -> str | None:
    if answer is None or spec.answer_is == "text":
        return answer
    if spec.answer_is == "letter":
        number = ord(answer.strip()) - ord("A") if re.fullmatch(r"\s*[A-Z]\s*", answer) else len(options)
        expected = f"the letter of an option, A to {chr(ord('A') + len(options) - 1)}"
    else:
        number = int(whole[1]) if (whole := re.fullmatch(r"(\d{1,2})(?:\.0)?", answer)) else len(options)
        expected = f"the number of an option, 0 to {len(options) - 1}"
    if number >= len(options):
        raise AnnotationError(f"{place}: '{spec.answer}' must be {expected}, got {answer:.80}")
    return options[number]


def _video_file(root: Path, names: Sequence[str]) -> tuple[str, str]:
    """(file below `root`, name without ending) of the first that is there, else of the first, to be missed by name."""
    for name in names:
        for path in (name, *(name + ending for ending in ENDINGS_IN_ANY_CASE)):
            if find_path(root, path).exists():
                return path, name if path != name else str(Path(name).with_suffix(""))
    first = names[0]
    return (first if first.lower().endswith(VIDEO_ENDINGS) else first + VIDEO_ENDINGS[0]), first
