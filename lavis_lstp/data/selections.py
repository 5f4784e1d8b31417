"""Recorded frames: which frames a selector, ours or another's, chose for each question of a file.

    jsonl  a line a question, as `lavis-lstp select` writes it: frame numbers, seconds, the video's SHA-256
    aks    [[frame number, ...], ...], a list for each question, in the order of the question file
    bolt   {video: [{"question_id": ..., "question": ..., "frames": [seconds, ...]}, ...]}
    vllm   a line a question: {"question_id": ..., "video": ..., "media_io_kwargs": {"video": {...}}}, the argument of
           vLLM's chat completions for frames that are sent as `data:video/jpeg`

In: such a file, told by its content, and the questions that it is for. Out: the frames of each question; or the text of
such a file. A file of other questions is refused here, one of other videos where their digest is compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_lstp.data.annotation import MOST_SECONDS, parse, read_text
from lavis_lstp.errors import AnnotationError, ConfigError
from lavis_lstp.files import json_rows, json_text

FORMS = ("jsonl", "aks", "bolt", "vllm")
FORMAT, VERSION = "lavis_lstp.selection", 1
MILLISECONDS = 1000.0
"""Frames a second of the clock on which times that keep no rate are told."""
MOST_FRAMES = 1 << 31


@dataclass(frozen=True)
class Recorded:
    """Frames that were chosen for a question.

    Attributes:
        numbers: in the file, ascending; None where the form keeps seconds alone.
        times_s: seconds since the start of the file, ascending; None where the form keeps numbers alone.
        question, sha256: the question's text and the digest of the video's content; None where the form has none.
    """

    numbers: tuple[int, ...] | None = None
    times_s: tuple[float, ...] | None = None
    question: str | None = None
    sha256: str | None = None

    @property
    def frames(self) -> dict[str, list]:
        """The argument of `read_frames` that names these frames."""
        return {"indices": list(self.numbers)} if self.numbers is not None else {"times_s": list(self.times_s)}

    def check_video(self, digest: Callable[[], str], name: str) -> None:
        """Raises ConfigError where the video is not the one that the frames were chosen of."""
        if self.sha256 and digest() != self.sha256:
            raise ConfigError(f"{name}: is not the video that these frames were selected from; select again")


def timing(
    numbers: Sequence[int], times_s: Sequence[float], fps: float, total: int, duration_s: float
) -> tuple[float, list[int], int]:
    """Frames a second, frame numbers and number of frames under which number / rate is each frame's true time.

    They are the file's own where these tell its times to 2 ms, else milliseconds.
    """
    if all(abs(number / fps - seconds) < 2 / MILLISECONDS for number, seconds in zip(numbers, times_s, strict=True)):
        return fps, list(numbers), total
    return milliseconds(times_s, duration_s)


def milliseconds(times_s: Sequence[float], duration_s: float = 0.0) -> tuple[float, list[int], int]:
    """Return what `timing` does, on a clock of milliseconds, for times alone."""
    told = [round(seconds * MILLISECONDS) for seconds in times_s]
    return MILLISECONDS, told, max([round(duration_s * MILLISECONDS), *(number + 1 for number in told)])


def media_io_kwargs(fps: float, numbers: Sequence[int], total: int) -> dict[str, Any]:
    """vLLM's request field of this name for frames that are sent (its PR #40133); without num_frames it keeps 32."""
    told = {"fps": fps, "frames_indices": list(numbers), "total_num_frames": total, "num_frames": len(numbers)}
    return {"video": told}


def text_of(form: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """The text of a file of a form.

    Args:
        form: of FORMS.
        rows: `Selection.to_json()` of each question, with its question_id where it has one.

    Raises:
        ConfigError: two videos have one name, by which BOLT's form knows them.
    """
    rows = list(rows)
    if form == "jsonl":
        return "".join(json_text(row) + "\n" for row in rows)
    if form == "aks":
        return json.dumps([row["frame_index"] for row in rows]) + "\n"
    if form == "vllm":
        return "".join(json_text(_vllm_line(row)) + "\n" for row in rows)
    found: dict[str, list[dict[str, Any]]] = {}
    paths: dict[str, str] = {}
    for row in rows:
        name = Path(row["video"]).stem
        if paths.setdefault(name, row["video"]) != row["video"]:
            raise ConfigError(
                f"form bolt knows videos by their names, and {paths[name]} and {row['video']} have the same; use jsonl"
            )
        told = {"question_id": row.get("question_id", ""), "question": row["question"], "frames": row["times_s"]}
        found.setdefault(name, []).append(told)
    return json_text(found) + "\n"


def _vllm_line(row: Mapping[str, Any]) -> dict[str, Any]:
    clock = timing(row["frame_index"], row["times_s"], row["fps"], row["num_frames"], row["duration_s"])
    told = {"video": row["video"], "media_io_kwargs": media_io_kwargs(*clock)}
    return {"question_id": row["question_id"], **told} if "question_id" in row else told


def read_recorded(path: Path, questions: Sequence[Mapping[str, Any]], section: str) -> dict[str, Recorded]:
    """The frames of each question about a video, by question_id.

    Args:
        questions: entries of the question file, in its order.
        section: of the configuration that names the file, for messages.

    Raises:
        AnnotationError: not a file of a form, or one of other questions.
    """
    if not path.is_file():
        raise AnnotationError(f"{path}: no such file of selected frames ({section}); `lavis-lstp select` writes one")
    text = read_text(path)
    try:
        content = parse(text, path, "file")
    except AnnotationError:  # JSON lines
        content = [row for _, row in json_rows(text, path, lambda line, place: parse(line, path, place))]
    if isinstance(content, list) and content and all(isinstance(one, list) for one in content):
        return _by_position(content, path, questions)
    found = _by_id(content, path)
    for row in questions:
        if "video" not in row:
            continue
        place = f"question {row['question_id']!r}"
        if row["question_id"] not in found:
            raise AnnotationError(f"{path}: has no frames for {place}; it was made for other questions, select again")
        asked = found[row["question_id"]].question
        if asked is not None and asked.strip() != row["question"].strip():
            raise AnnotationError(
                f"{path}: the frames of {place} were selected for {asked[:60]!r}, and it asks "
                f"{row['question'][:60]!r}; select again"
            )
    return found


def _by_position(content: list, path: Path, questions: Sequence[Mapping[str, Any]]) -> dict[str, Recorded]:
    if len(content) != len(questions):
        raise AnnotationError(
            f"{path}: has frames for {len(content)} questions by their place, and there are {len(questions)}; it was "
            "made for another question file"
        )
    places = [f"{path}, entry {number}" for number in range(len(content))]
    read = [Recorded(numbers=_numbers(one, place)) for one, place in zip(content, places, strict=True)]
    return {row["question_id"]: one for row, one in zip(questions, read, strict=True)}


def _by_id(content: Any, path: Path) -> dict[str, Recorded]:
    rows = content if isinstance(content, list) else [content]
    if isinstance(content, dict) and not {"format", "media_io_kwargs"} & content.keys():
        rows = [row for own in content.values() for row in (own if isinstance(own, list) else [own])]
    found: dict[str, Recorded] = {}
    for number, row in enumerate(rows):
        place = f"{path}, entry {number}"
        if not isinstance(row, dict) or not isinstance(row.get("question_id"), str | int):
            raise AnnotationError(
                f"{place}: not a question with its frames; expected a file of the form {', '.join(FORMS)}"
            )
        name = str(row["question_id"])
        if name in found:
            raise AnnotationError(f"{place}: question_id {name!r} occurs twice; use a form that has unique ids")
        found[name] = _recorded(row, place)
    return found


def _recorded(row: Mapping[str, Any], place: str) -> Recorded:
    if "media_io_kwargs" in row:
        told = (row["media_io_kwargs"] or {}).get("video") if isinstance(row["media_io_kwargs"], dict) else None
        fps = told.get("fps") if isinstance(told, dict) else None
        if type(fps) not in (int, float) or not 0 < fps <= 1e6:
            raise AnnotationError(f"{place}: media_io_kwargs.video.fps must be a number above 0, got {fps!r:.80}")
        return Recorded(times_s=tuple(number / fps for number in _numbers(told.get("frames_indices"), place)))
    if row.get("format") is None:
        question = row.get("question")
        return Recorded(times_s=_times(row.get("frames"), place), question=None if question is None else str(question))
    if (row["format"], row.get("version")) != (FORMAT, VERSION):
        raise AnnotationError(f"{place}: not a selection (format {FORMAT}, version {VERSION}); select again")
    if not all(isinstance(row.get(key), str) for key in ("question", "sha256")):
        raise AnnotationError(f"{place}: a selection without question or sha256; select again")
    numbers, times_s = _numbers(row.get("frame_index"), place), _times(row.get("times_s"), place)
    return Recorded(numbers, times_s, row["question"], row["sha256"])


def _numbers(given: Any, place: str) -> tuple[int, ...]:
    if not isinstance(given, list) or not all(type(one) is int and 0 <= one < MOST_FRAMES for one in given):
        raise AnnotationError(f"{place}: expected a list of frame numbers, got {given!r:.80}")
    return _some(given, place)


def _times(given: Any, place: str) -> tuple[float, ...]:
    if not isinstance(given, list) or not all(type(t) in (int, float) and 0 <= t <= MOST_SECONDS for t in given):
        raise AnnotationError(f"{place}: expected a list of seconds, got {given!r:.80}")
    return _some(given, place)


def _some(given: list, place: str) -> tuple:
    """Ascending, each once: no frame is shown twice."""
    if not given:
        raise AnnotationError(f"{place}: has no frame; another selector must stand in for none, select again")
    return tuple(sorted(set(given)))
