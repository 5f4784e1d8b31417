"""Annotation files -> checked entries, or one line that names file, entry and key.

The form of this package's own files is told in `qa_dataset`; others' are read by `instruct` into the same entries.
"""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_lstp.errors import AnnotationError, no_value
from lavis_lstp.files import HalfCharacter, json_rows, strict_json
from lavis_lstp.redaction import printable

log = logging.getLogger(__name__)

SECTION = "datasets.<name>"
"""Where in a configuration the settings of a data set lie; builders know the name."""

REQUIRED = ("question_id", "video", "image", "question", "answer")
OPTIONAL = ("video_id", "span_s", "moments_s", "clip_s", "category", "categories", "options", "prompt")
ELSEWHERE = dict.fromkeys(("choices", "candidates", "answer_choices", "mc_options", "a0", "option0"), "options")
ELSEWHERE |= dict.fromkeys(("start", "end", "start_time", "end_time"), "clip_s")
"""Other projects have these names for a key that may be left out, and they are not spelled alike."""
MOST_OPTIONS = 26
MOST_SECONDS = 1e9
"""30 years, which no video has; JSON's 1e999 and a number of 400 digits are more."""


class Entry(dict):
    """A question, and where it stands: "FILE, entry 3", for messages."""

    __slots__ = ("stands",)

    def __init__(self, row: Mapping[str, Any], stands: str = ""):
        super().__init__(row)
        self.stands = stands


def read_annotation(path: str | Path, *, section: str = SECTION) -> list[dict[str, Any]]:
    """Entries of an annotation file, checked.

    Args:
        section: of the configuration that names the file, for messages.

    Raises:
        AnnotationError: file, entry and key that are wrong.
    """
    path = Path(path)
    rows = parse_rows(read_text(path, section=section), path)
    seen: set[str] = set()
    for place, row in rows:
        _check_entry(row, place, seen)
    warn_of_hidden([row["question_id"] for _, row in rows if row["answer"] is None], len(rows), str(path), section)
    _warn_of_misspelt(path, [row for _, row in rows])
    return [Entry(row, place) for place, row in rows]


def parse_rows(text: str, path: Path) -> list[tuple[str, Any]]:
    """(place, row) of each row of a JSON list or of JSON lines; `place` names file and row, for messages.

    Raises:
        AnnotationError: not JSON, or nothing.
    """
    rows = json_rows(text, path, _parse)
    if not rows:
        raise AnnotationError(f"{path}: holds no question")
    return rows


def read_text(path: Path, *, section: str = SECTION) -> str:
    """The file's text.

    Raises:
        AnnotationError: there is no such file, or it is not UTF-8.
    """
    if not path.is_file():
        raise AnnotationError(f"{path}: no such annotation file ({section}.build_info.annotations){no_value(path)}")
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows programs begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8") from None


def parse(text: str, path: Path, place: str) -> Any:
    """JSON of a file or a line of it.

    Raises:
        AnnotationError: it is none.
    """
    return _parse(text, f"{path}, {place}")


def _parse(text: str, place: str) -> Any:
    try:
        return strict_json(text)
    except HalfCharacter as error:
        raise AnnotationError(f"{place}, {error}; mend it, or take it out") from None
    except ValueError as error:
        raise AnnotationError(f"{place}: not JSON ({error}); expected a list or JSON lines") from None


def warn_of_hidden(unknown: Sequence[str], count: int, files: str, section: str, what: str = "answer") -> None:
    """Warns where none of `count` questions has an answer, as in a test set.

    Raises:
        AnnotationError: some have one, and `unknown` have none: a score would be over part of the data.
    """
    if unknown and len(unknown) < count:
        raise AnnotationError(f"{files}: {len(unknown)} of {count} questions have no {what}: {some(unknown)}")
    if unknown:
        log.warning("%s: the %d questions have no %ss; predictions are written, not scored", section, count, what)


def some(keys: Sequence[object]) -> str:
    """Return the first five keys, for a message; "none" where there are none."""
    return ", ".join(map(str, keys[:5])) + (", ..." if len(keys) > 5 else "") or "none"


def check_object(row: Any, place: str, required: tuple[str, ...], texts: tuple[str, ...] = ()) -> None:
    """Raises AnnotationError where a row is no object, lacks a required key, or has something else than a text."""
    if not isinstance(row, dict):
        raise AnnotationError(f"{place}: expected an object, got {type(row).__name__}")
    for key in required:
        if key not in row:
            raise AnnotationError(f"{place}: key '{key}' is missing; it has {some(list(row))}")
    for key in texts:
        if key in row and not isinstance(row[key], str):
            raise AnnotationError(f"{place}: '{key}' must be a string, got {type(row[key]).__name__} {row[key]!r}")


def check_seconds(span: Any, key: str, place: str) -> None:
    """Raises AnnotationError for what is neither null nor [start, end]."""
    if span is None:
        return
    numbers = isinstance(span, list) and len(span) == 2 and all(type(x) in (int, float) for x in span)
    if not numbers or not 0 <= span[0] < span[1] <= MOST_SECONDS:
        raise AnnotationError(f"{place}: '{key}' must be [start, end] in seconds with start < end, got {span!r:.80}")


MOMENT_SLACK_S = 1.0
"""A gold moment may begin so much before its video and end so much behind it: authors round (NExT-GQA: -0.1, 0.5 s)."""


def check_moment(moment: Any, key: str, place: str) -> None:
    """Raises AnnotationError for what is not [start, end] in seconds; see MOMENT_SLACK_S."""
    if moment is None:
        raise AnnotationError(f"{place}: '{key}' has null in place of [start, end]")
    first = moment[0] if isinstance(moment, list) and moment else None
    early = type(first) in (int, float) and -MOMENT_SLACK_S <= first < 0
    check_seconds([0, *moment[1:]] if early else moment, key, place)


def longest(moments: Sequence[Sequence[float]]) -> list[float]:
    """Return the longest of checked moments as a `span_s`, of equally long ones the earliest."""
    start, end = max(moments, key=lambda moment: (moment[1] - moment[0], -moment[0]))
    return [max(0, start), end]


def check_options(options: Any, answer: str | None, place: str, fewest: int = 1) -> None:
    """Raises AnnotationError for options that cannot be told apart by what they say, or lack the answer."""
    if not isinstance(options, list) or len(options) < fewest or not all(isinstance(o, str) and o for o in options):
        raise AnnotationError(f"{place}: 'options' must be {fewest} or more texts, got {options!r}")
    if len(options) > MOST_OPTIONS:
        raise AnnotationError(f"{place}: 'options' must be {MOST_OPTIONS} at most, one a letter, got {len(options)}")
    if answer is not None and answer not in options:
        raise AnnotationError(f"{place}: the answer {answer!r} is none of the options {options!r}")


def check_optional(row: Mapping[str, Any], place: str) -> None:
    """Raises AnnotationError for what may be left out of a question, or be null, and is there in another form."""
    for key in ("prompt", "category"):
        if not isinstance(row.get(key) or "", str):
            raise AnnotationError(f"{place}: '{key}' must be a string, got {row[key]!r:.80}")
    axes = {} if row.get("categories") is None else row["categories"]
    if not isinstance(axes, dict) or not all(_is_kind(kind) for kind in axes.values()):
        raise AnnotationError(f"{place}: 'categories' must be {{axis: kind or [kinds]}} of texts, got {axes!r:.80}")
    for key in ("span_s", "clip_s"):
        check_seconds(row.get(key), key, place)
    moments = [] if row.get("moments_s") is None else row["moments_s"]
    if not isinstance(moments, list):
        raise AnnotationError(f"{place}: 'moments_s' must be [[start, end], ...] in seconds, got {moments!r:.80}")
    for moment in moments:
        check_moment(moment, "moments_s", place)
    if row.get("options") is not None:
        check_options(row["options"], row.get("answer"), place)


def _is_kind(kind: Any) -> bool:
    return isinstance(kind, str) or (isinstance(kind, list) and all(isinstance(one, str) for one in kind))


def _warn_of_misspelt(path: Path, rows: list[dict[str, Any]]) -> None:
    """Warn once of each key that is not read, and looks like one that is left out or stands for it elsewhere."""
    keys = Counter(key for row in rows for key in row)
    for key in keys.keys() - {*REQUIRED, *OPTIONAL}:
        close = difflib.get_close_matches(key.lower(), [one for one in OPTIONAL if one not in keys], n=1, cutoff=0.8)
        meant = close[0] if close else ELSEWHERE.get(key.lower())
        if meant and meant not in keys:
            log.warning(
                "%s: '%s', in %d of %d entries, is not read; did you mean '%s'?",
                *(path, printable(key), keys[key], len(rows), meant),
            )


def _check_entry(row: Any, place: str, seen: set[str]) -> None:
    if isinstance(row, dict):
        if "question_id" in row:
            place = f"{place} (question_id {row['question_id']!r})"
        for key in [key for key in OPTIONAL if row.get(key, "") is None]:
            del row[key]
        if isinstance(row.get("answer"), str) and not row["answer"].strip():
            row["answer"] = None
        if "conversations" in row and "question_id" not in row:
            names = "lstp_image_instruct, lstp_video_instruct and lstp_text_instruct"
            raise AnnotationError(
                f"{place}: is a conversation, as LLaVA's; the data sets {names} read it, and pack --from video-llava"
            )
    media = "image" if isinstance(row, dict) and "image" in row else "video"
    hidden = isinstance(row, dict) and row.get("answer", "") is None
    texts = ("question_id", "video_id", media, "question", *(() if hidden else ("answer",)))
    check_object(row, place, ("question_id", media, "question", "answer"), texts)
    if "image" in row and "video" in row:
        raise AnnotationError(f"{place}: has both 'image' and 'video'; a question is about one of them")
    for key in ("question_id", "question"):
        if not row[key].strip():
            raise AnnotationError(f"{place}: '{key}' is empty")
    if not Path(row[media]).name or not row[media].strip():
        raise AnnotationError(f"{place}: '{media}' must name a file (or a folder of pictures), got {row[media]!r}")
    row.setdefault("video_id", Path(row[media]).stem)
    check_optional(row, place)
    if row.get("moments_s") and "span_s" not in row:
        row["span_s"] = longest(row["moments_s"])
    if row["question_id"] in seen:
        raise AnnotationError(f"{place}: 'question_id' {row['question_id']!r} occurs twice; ids must be unique")
    seen.add(row["question_id"])
