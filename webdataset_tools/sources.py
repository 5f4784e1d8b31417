"""What is packed: annotation files of these forms -> media with their questions, in the order of the files.

    annotation   this package's form, a JSON list or JSON lines (`lavis_lstp.data.qa_dataset`), videos and images
    shapes       a folder written by `python -m lavis_lstp.data.shapes.shapes_qa`, with the split to take
    video-llava  Video-LLaVA's layout: rows of conversations about images, videos and nothing (text)
    qa           a benchmark's question file and answer file, joined by question_id, never by position
    lstp_nextqa and the other names of `lavis_lstp.data.benchmarks`: the files of its authors

Errors are those of the readers that training itself uses, so what packs is what trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lavis_lstp.data.annotation import check_object, parse_rows, read_annotation, read_text
from lavis_lstp.data.benchmarks import BENCHMARKS, QUESTIONS, read_benchmark
from lavis_lstp.data.instruct import read_instructions
from lavis_lstp.data.shards.format import IMAGE_MEMBERS, VIDEO_MEMBERS, media_key, media_path
from lavis_lstp.data.subtitles import Subtitles, stored
from lavis_lstp.data.video.picture_folder import pictures_in
from lavis_lstp.errors import AnnotationError, ConfigError, VideoError
from lavis_lstp.files import find_path

FORMS = ("annotation", "shapes", "video-llava", "qa", *BENCHMARKS)


class Unit(NamedTuple):
    """One sample to be: a medium and the questions about it. `source` is "" for a text."""

    key: str
    kind: str
    video_id: str
    source: str
    questions: tuple[Mapping[str, Any], ...]
    subtitles: list[dict[str, Any]] | None = None


def units(
    form: str,
    files: Sequence[Path],
    *,
    root: Path,
    split: str = "train",
    answers: Path | None = None,
    video_names: Path | None = None,
    subtitles: Path | None = None,
) -> list[Unit]:
    """Media and questions of annotation files.

    Args:
        form: of FORMS.
        files: annotation files; for `shapes` the folder.
        root: folder that the files' paths are relative to.
        split: of `shapes`.
        answers: the answer file of `qa`, and of benchmarks that have one.
        video_names: other names of a benchmark's videos, see `lavis_lstp.data.benchmarks.read_names`.
        subtitles: folder of subtitle files, which are packed, too.

    Raises:
        AnnotationError, VideoError, ConfigError: what is wrong or missing, and where.
    """
    if form == "shapes":
        if len(files) != 1 or not (files[0] / f"{split}.json").is_file():
            raise ConfigError(
                f"{files[0]}: holds no {split}.json; expected a folder of lavis_lstp.data.shapes.shapes_qa"
            )
        files, root, form = [files[0] / f"{split}.json"], files[0], "annotation"
    for path in (*files, *(path for path in (answers, video_names) if path)):
        if not path.exists():
            raise AnnotationError(f"{path}: no such file")
    if form == "annotation":
        rows = [row for path in files for row in read_annotation(path, section="pack")]
    elif form == "video-llava":
        rows = [row for kind in ("image", "video", "text") for row in _instructions(files, kind)]
    else:
        if form == "qa" and (len(files) != 1 or answers is None):
            raise ConfigError("--from qa takes one question file and --answers FILE")
        given = {"answers": answers, "video_names": video_names, "section": "pack", "subtitles": subtitles is not None}
        rows = read_benchmark(BENCHMARKS.get(form, QUESTIONS), files, root, **given)
    lines = Subtitles(rows, subtitles, "whole", 0, "pack") if subtitles else None
    return _grouped(rows, root, lines)


def _instructions(files: Sequence[Path], kind: str) -> list[dict[str, Any]]:
    """Entries of one kind, with the conversation itself in place of the prompt made of it."""
    raw = []
    for path in files:
        for place, row in parse_rows(read_text(path, section="pack"), path):
            check_object(row, place, ("id", "conversations"))
            if kind == next((name for name in ("image", "video") if name in row), "text"):
                raw.append(row)
    if not raw:
        return []
    entries = read_instructions(list(files), kind=kind, section="pack")
    assert len(entries) == len(raw)
    for entry, row in zip(entries, raw, strict=True):
        for key in ("question", "prompt", "answer"):
            entry.pop(key)
        entry["conversations"] = row["conversations"]
    return entries


NOT_OF_QUESTIONS = ("image", "video", "video_id", "subtitles", "subtitles_begin_s")


def _grouped(rows: Sequence[Mapping[str, Any]], root: Path, subtitles: Subtitles | None) -> list[Unit]:
    """One unit a medium, in the order of its first question; questions keep theirs."""
    lines: dict[str, list[dict[str, Any]]] = {}
    media: dict[str, tuple[str, str, str, list[Mapping[str, Any]]]] = {}
    seen: set[tuple[str, str]] = set()
    for row in rows:
        kind = next((name for name in ("image", "video") if name in row), "text")
        if (kind, row["question_id"]) in seen:
            raise AnnotationError(f"question_id {row['question_id']!r} occurs twice; a set has each once in a kind")
        seen.add((kind, row["question_id"]))
        source = media_path(row[kind]) if kind != "text" else ""
        key = media_key(kind, source or row["question_id"])
        question = {name: value for name, value in row.items() if name not in NOT_OF_QUESTIONS}
        if subtitles is not None and kind == "video":
            own = stored(subtitles.of_video(row))
            if lines.setdefault(key, own) != own:
                raise AnnotationError(
                    f"{source}: question {row['question_id']!r} has other subtitles than one before it"
                )
        video_id = row["video_id"]
        unit = media.setdefault(key, (kind, video_id, source, []))
        if unit[:2] != (kind, video_id):
            raise AnnotationError(f"{source}: is {unit[0]} '{unit[1]}' in one question, {kind} '{video_id}' in another")
        unit[3].append(question)
    for kind, _, source, _ in media.values():
        _check_file(kind, source, root)
    return [Unit(key, *unit[:3], tuple(unit[3]), lines.get(key)) for key, unit in media.items()]


def _check_file(kind: str, source: str, root: Path) -> None:
    if kind == "text":
        return
    path = find_path(root, source)
    if kind == "video" and path.is_dir():
        pictures_in(path)  # says that there are none
        return
    if not path.is_file():
        raise VideoError(f"{root / source}: no such file; --root is the folder that paths are relative to")
    known = VIDEO_MEMBERS if kind == "video" else IMAGE_MEMBERS
    if member_of(source) not in known:
        raise ConfigError(f"{root / source}: unknown ending for {kind} files; known: {', '.join(known)}")


def member_of(source: str) -> str:
    """The member that a medium becomes."""
    return source.rpartition(".")[2].lower()
