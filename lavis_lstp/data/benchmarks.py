"""Video question answering benchmarks, in the files their authors publish -> entries as `qa_dataset` wants them.

In: question files (JSON, JSON lines, CSV), where the authors split them answer files, and a file of other video names
where one is published. Out: one entry per question. A benchmark is a row of a table here and a YAML file in
configs/datasets; docs/benchmarks.md says where the files come from. Answers are joined to questions by id, never by
position, and ids that differ are an error.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from lavis_lstp.data.annotation import SECTION, check_object, check_options, check_seconds, parse, parse_rows, read_text
from lavis_lstp.data.video.reading import VIDEO_ENDINGS
from lavis_lstp.errors import AnnotationError, ConfigError, unknown_name
from lavis_lstp.files import find_path

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """What the columns of a file mean. Templates are filled from a row, {file} and {number} say where it stands.

    Args:
        question_id, video: templates; of several videos the first that exists is meant, without its ending.
        question, answer: columns.
        options: the column of a list of texts or of {choice: text}, or a column for each.
        answer_is_index: of an option, counted from 0; else the answer is a text.
        delimiter: of a table in text.
        clip_s: columns of start and end in seconds of the part that is asked about.
        category: from a row to the kind of question.
        of_file: per file's stem, further columns of its rows; None in one of them drops the clip.
    """

    question_id: str
    video: tuple[str, ...]
    question: str = "question"
    answer: str = "answer"
    options: str | tuple[str, ...] = ()
    answer_is_index: bool = False
    delimiter: str | None = None
    clip_s: tuple[str, str] | None = None
    category: Callable[[Row], str] = lambda row: ""
    of_file: Mapping[str, Row] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """That every row has, but for the answer."""
        templates = (self.question_id, *self.video)
        filled = [name for template in templates for _, name, *_ in Formatter().parse(template) if name]
        options = [self.options] if isinstance(self.options, str) else self.options
        return list(dict.fromkeys([*filled, self.question, *options]))


@dataclass(frozen=True)
class Benchmark:
    """Forms by name, the first being the authors', and how many questions a split has."""

    forms: Mapping[str, Form]
    sizes: Mapping[str, int]
    answers_choose: bool = False
    """The answer file has a part of the questions, and the split is that part."""


def first_word(row: Row) -> str:
    """what, who, how, when or where: the kinds that the authors of MSVD-QA and MSRVTT-QA report."""
    word = str(row["question"]).split(" ")[0].lower()
    return word if word in ("what", "who", "how", "when", "where") else "other"


def named(column: str, names: Sequence[str]) -> Callable[[Row], str]:
    """The kind whose number stands in a column."""

    def category(row: Row) -> str:
        number = str(row.get(column, ""))
        return names[int(number)] if number.isdigit() and int(number) < len(names) else number

    return category


ACTIVITYNET_TYPES = ("motion", "spatial", "temporal", "yes/no", "color", "object", "location", "number", "other")
TGIF_TYPES = ("object", "number", "color", "location")

MVBENCH: dict[str, Row] = {
    task: {"folder": folder, "bounded": bounded}
    for task, folder, bounded in (
        ("action_sequence", "star/Charades_v1_480", True),
        ("action_prediction", "star/Charades_v1_480", True),
        ("action_antonym", "ssv2_video", False),
        ("fine_grained_action", "Moments_in_Time_Raw/videos", False),
        ("unexpected_action", "FunQA_test/test", False),
        ("object_existence", "clevrer/video_validation", False),
        ("object_interaction", "star/Charades_v1_480", True),
        ("object_shuffle", "perception/videos", False),
        ("moving_direction", "clevrer/video_validation", False),
        ("action_localization", "sta/sta_video", True),
        ("scene_transition", "scene_qa/video", False),
        ("action_count", "perception/videos", False),
        ("moving_count", "clevrer/video_validation", False),
        ("moving_attribute", "clevrer/video_validation", False),
        ("state_change", "perception/videos", False),
        ("fine_grained_pose", "nturgbd", False),
        ("character_order", "perception/videos", False),
        ("egocentric_navigation", "vlnqa", False),
        ("episodic_reasoning", "tvqa/frames_fps3_hq", True),
        ("counterfactual_inference", "clevrer/video_validation", False),
    )
}
"""Tasks, the folders of their videos, and whether `start` and `end` bound what is shown."""


def questions_form(*videos: str, category: Callable[[Row], str] = lambda row: "") -> Form:
    """Question file and answer file of ActivityNet-QA, into which Video-ChatGPT and later work brought the others."""
    return Form("{question_id}", videos or ("{video_name}",), category=category)


BENCHMARKS: dict[str, Benchmark] = {
    "lstp_msvd_qa": Benchmark(
        {
            "authors": Form("{id}", ("vid{video_id}",), category=first_word),
            "questions": questions_form(category=first_word),
        },
        {"train": 30933, "val": 6415, "test": 13157},
    ),
    "lstp_msrvtt_qa": Benchmark(
        {
            "authors": Form("{id}", ("video{video_id}",), category=first_word),
            "questions": questions_form(category=first_word),
        },
        {"train": 158581, "val": 12278, "test": 72821},
    ),
    "lstp_activitynet_qa": Benchmark(
        {"authors": questions_form("v_{video_name}", "{video_name}", category=named("type", ACTIVITYNET_TYPES))},
        {"train": 32000, "val": 18000, "test": 8000},
    ),
    "lstp_tgif_qa": Benchmark(
        {
            "authors": Form("{vid_id}", ("{gif_name}",), delimiter="\t", category=named("type", TGIF_TYPES)),
            "questions": questions_form(),
        },
        {"train": 39392, "test": 13691},
    ),
    "lstp_nextqa": Benchmark(
        {
            "authors": Form(
                "{video}_{qid}",
                ("{video}",),
                options=("a0", "a1", "a2", "a3", "a4"),
                answer_is_index=True,
                delimiter=",",
                category=lambda row: str(row.get("type", "")),
            )
        },
        {"train": 34132, "val": 4996, "test": 8564},
    ),
    "lstp_star": Benchmark(
        {
            "authors": Form(
                "{question_id}",
                ("{video_id}",),
                options="choices",
                clip_s=("start", "end"),
                category=lambda row: str(row["question_id"]).split("_")[0],
            )
        },
        {"train": 45731, "val": 7098, "test": 7377},
    ),
    "lstp_egoschema": Benchmark(
        {
            "authors": Form(
                "{q_uid}", ("{q_uid}",), options=tuple(f"option {i}" for i in range(5)), answer_is_index=True
            )
        },
        {"subset": 500, "test": 5031},
        answers_choose=True,
    ),
    "lstp_mvbench": Benchmark(
        {
            "authors": Form(
                "{file}/{number}",
                ("{folder}/{video}",),
                options="candidates",
                clip_s=("start", "end"),
                category=lambda row: str(row["file"]),
                of_file=MVBENCH,
            )
        },
        {"test": 4000},
    ),
}


QUESTIONS = Benchmark(
    {"questions": questions_form("{video_name}", "v_{video_name}", category=lambda row: str(row.get("type", "")))}, {}
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
    section: str = SECTION,
) -> list[Row]:
    """Entries of a split.

    Args:
        paths: question files, or a folder of them.
        root: folder of the videos.
        split: only to say when it has another number of questions than published.
        form: of the benchmark's; None = the authors'.
        answers: file of the answers, where the questions have none.
        video_names: file that gives videos other names: a JSON object {name: other}, or lines "other name".

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
    unknown = [key for key, (place, row) in by_id.items() if _answer(row, spec, place) is None]
    if unknown and len(unknown) < len(by_id):
        raise AnnotationError(
            f"{', '.join(map(str, paths))}: {len(unknown)} of {len(by_id)} questions have no answer: {_some(unknown)}"
        )
    if unknown:
        logger.warning("%s: the %d questions have no answers; predictions are written, not scored", section, len(by_id))
    if split in benchmark.sizes and benchmark.sizes[split] != len(by_id):
        published = benchmark.sizes[split]
        logger.warning("%s: split %s has %d questions, published are %d", section, split, len(by_id), published)
    names = read_names(video_names, section) if video_names else {}
    files: dict[tuple[str, ...], tuple[str, str]] = {}
    return [_entry(key, row, spec, place, root, names, files) for key, (place, row) in by_id.items()]


def read_answers(path: Path, section: str = SECTION) -> dict[str, Row]:
    """Answers by question id: rows of {question_id, answer, ...}, or one object {id: answer}.

    Raises:
        AnnotationError: a row has no id, or an id occurs twice. Answers that only their position tells apart are not
            read: nobody could say whether they belong to these questions.
    """
    text = read_text(path, section=section)
    if text.lstrip()[:1] == "{" and '"question_id"' not in text.splitlines()[0]:
        content = parse(text, path, "file")
        return {str(key): {"answer": value} for key, value in content.items()}
    found: dict[str, Row] = {}
    for place, row in parse_rows(text, path):
        check_object(row, place, ("question_id", "answer"))
        key = str(row["question_id"])
        if key in found:
            raise AnnotationError(f"{place}: question id {key!r} occurs twice; ids must be unique")
        found[key] = row
    return found


def read_names(path: Path, section: str = SECTION) -> dict[str, str]:
    """Other names of videos: NExT-QA's JSON object {name: other}, or MSVD's lines "other name"."""
    text = read_text(path, section=section)
    if path.suffix == ".json":
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
    missing = [name for name in spec.of_file if not (path / f"{name}.json").is_file()]
    if missing:
        raise AnnotationError(f"{path}: lacks {len(missing)} of {len(spec.of_file)} files, first {missing[0]}.json")
    return [path / f"{name}.json" for name in spec.of_file] or sorted(path.glob("*.json"))


def _rows(path: Path, spec: Form, section: str, form: str) -> list[tuple[str, Row]]:
    text = read_text(path, section=section)
    if spec.of_file and path.stem not in spec.of_file:
        raise AnnotationError(f"{path}: {unknown_name('task', path.stem, spec.of_file)}")
    if spec.delimiter is None:
        rows = parse_rows(text, path)
    else:
        # TGIF-QA's quotes are part of the text; in a table with commas they hold cells together.
        quoting = csv.QUOTE_NONE if spec.delimiter == "\t" else csv.QUOTE_MINIMAL
        table = csv.DictReader(io.StringIO(text.lstrip("\ufeff")), delimiter=spec.delimiter, quoting=quoting)
        rows = [(f"{path}, line {table.line_num}", row) for row in table]
        for place, row in rows:
            if None in row or None in row.values():
                raise AnnotationError(f"{place}: expected {len(table.fieldnames)} cells, as in the first line")
    if not rows:
        raise AnnotationError(f"{path}: holds no question")
    more = {"file": path.stem, **spec.of_file.get(path.stem, {})}
    needed = tuple(column for column in spec.columns if column not in (*more, "number"))
    found = []
    for number, (place, row) in enumerate(rows):
        try:
            check_object(row, place, needed, (spec.question,))
        except AnnotationError as error:
            raise AnnotationError(f"{error}; read as {section}.form: {form}") from None
        found.append((place, {**row, **more, "number": number}))
    return found


def _with_answers(
    questions: dict[str, tuple[str, Row]], answers: dict[str, Row], path: Path, choose: bool
) -> dict[str, tuple[str, Row]]:
    extra = [key for key in answers if key not in questions]
    missing = [key for key in questions if key not in answers]
    if extra or (missing and not choose):
        raise AnnotationError(
            f"{path}: {len(missing)} questions have no answer here ({_some(missing)}) and {len(extra)} answers no "
            f"question ({_some(extra)}); these files do not belong together"
        )
    return {key: (place, {**row, **answers[key]}) for key, (place, row) in questions.items() if key in answers}


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "") or "none"


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
        check_options(entry["options"], answer, place)
    entry["answer"] = answer
    entry["category"] = spec.category(row)
    if spec.clip_s and row.get("bounded", True) and row.get(spec.clip_s[0]) is not None:
        entry["clip_s"] = [row[column] for column in spec.clip_s if column in row]
        check_seconds(entry["clip_s"], " and ".join(spec.clip_s), place)
    return entry


def _answer(row: Row, spec: Form, place: str) -> str | None:
    """The answer as a text, None where there is none; nothing but blanks is none."""
    answer = row.get(spec.answer)
    if answer is not None and type(answer) not in (str, int, float):
        raise AnnotationError(f"{place}: '{spec.answer}' must be a text or a number, got {answer!r}")
    return None if answer is None or not str(answer).strip() else str(answer)


def _options(row: Row, spec: Form, place: str) -> list[str]:
    if not isinstance(spec.options, str):
        return [str(row[column]) for column in spec.options]
    if not isinstance(row[spec.options], list):
        raise AnnotationError(f"{place}: '{spec.options}' must be a list, got {row[spec.options]!r}")
    return [str(item.get("choice") if isinstance(item, dict) else item) for item in row[spec.options]]


def _chosen(answer: str | None, options: Sequence[str], spec: Form, place: str) -> str | None:
    if answer is None or not spec.answer_is_index:
        return answer
    if not answer.isdigit() or int(answer) >= len(options):
        raise AnnotationError(
            f"{place}: '{spec.answer}' must be the number of an option, 0 to {len(options) - 1}, got {answer}"
        )
    return options[int(answer)]


def _video_file(root: Path, names: Sequence[str]) -> tuple[str, str]:
    """(file below `root`, name without ending) of the first that is there, else of the first, to be missed by name."""
    for name in names:
        for path in (name, *(name + ending for ending in VIDEO_ENDINGS)):
            if find_path(root, path).exists():
                return path, name if path != name else str(Path(name).with_suffix(""))
    first = names[0]
    return (first if first.lower().endswith(VIDEO_ENDINGS) else first + VIDEO_ENDINGS[0]), first
