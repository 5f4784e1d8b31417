"""Instruction data of others -> entries for `VideoQADataset`: Video-LLaVA's layout, and the published video-only form.

Two forms, named by `datasets.<name>.form` and never guessed:

    conversations   [{"id", "image" | "video" | "model", "conversations": [{"from": "human" | "gpt", "value"}, ...]}]:
                    LLaVA's; a row with neither image nor video (it may have "model") is a text
    questions       {id: {"q", "a", "video_id"}}: all videos; the file is <video_id> with the ending of a video

A data set takes rows of one kind (image, video or text) and leaves others of the same file to the data sets of those
kinds, so that `run.train_dataset_ratios` is the ratio of kinds. Ids repeat in LLaVA's files, and spans and predictions
go by id: the second row of an id is called `<id>#2`, the third `<id>#3`, in the order of the files.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_lstp.data.annotation import SECTION, check_object, parse, parse_rows, read_text
from lavis_lstp.data.prompts import MEDIA_TOKENS, Prompt, conversation_prompt, ends_with_user, question_prompt
from lavis_lstp.data.video.reading import ENDINGS_IN_ANY_CASE
from lavis_lstp.errors import AnnotationError, ConfigError, unknown_name
from lavis_lstp.files import find_path

logger = logging.getLogger(__name__)

FORMS = ("conversations", "questions")
MEDIUM_ELSEWHERE = re.compile(r"(image|img|video|media)s?([_-]?(path|file|url|name)s?)?", re.IGNORECASE)
"""Keys under which others keep what 'image' and 'video' name here; a row of such a key is no text."""


def read_instructions(
    paths: Sequence[Path], *, kind: str, form: str = "conversations", root: Path | None = None, section: str = SECTION
) -> list[dict[str, Any]]:
    """Entries of one kind out of annotation files, with unique ids.

    Args:
        kind: image, video or text.
        form: of FORMS.
        root: folder of the videos, where the form "questions" looks for a name's ending.

    Returns:
        question_id, video_id, image or video (a text has neither), question, prompt and answer of each.

    Raises:
        ConfigError: the form is not known.
        AnnotationError: file, row and key that are wrong, or no row of this kind.
    """
    if form not in FORMS:
        raise ConfigError(unknown_name(f"{section}.form", form, FORMS))
    if form == "questions" and kind != "video":
        raise ConfigError(f"{section}.form: 'questions' is a form of videos alone")
    entries, others = [], 0
    for path in paths:
        if form == "questions":
            entries += _read_questions(path, root or Path(), section)
        else:
            rows = _read_conversations(path, kind, section)
            entries += [row for row in rows if row is not None]
            others += sum(row is None for row in rows)
    files = ", ".join(map(str, paths))
    if not entries:
        raise AnnotationError(f"{files}: no row of the kind '{kind}' among {others} ({section})")
    if others:
        logger.info("%s: %d rows of the kind %s, %d others", files, len(entries), kind, others)
    _make_unique(entries)
    return entries


def _read_conversations(path: Path, kind: str, section: str) -> list[dict[str, Any] | None]:
    """An entry for each row, None for one of another kind."""
    entries: list[dict[str, Any] | None] = []
    odd: dict[str, list[str]] = {}
    for place, row in parse_rows(_text_of_form(path, "conversations", section), path):
        if isinstance(row, dict) and "id" in row:
            place = f"{place} (id {row['id']!r})"
        if kind != _kind(row, place):
            entries.append(None)
            continue
        if not isinstance(row["conversations"], list):
            raise AnnotationError(f"{place}: 'conversations' must be a list, got {type(row['conversations']).__name__}")
        try:
            prompt = conversation_prompt(row["conversations"])
        except AnnotationError as error:
            raise AnnotationError(f"{place}: {error}") from None
        for what in _odd(row, kind, prompt):
            odd.setdefault(what, []).append(place)
        found = {kind: row[kind], "video_id": Path(row[kind]).stem} if kind != "text" else {"video_id": ""}
        texts = {"question": prompt.question, "prompt": prompt.prompt, "answer": prompt.answer}
        entries.append({"question_id": _id(row["id"], place), **found, **texts})
    for what, places in odd.items():
        logger.warning("%s: the first of %d conversations that %s", places[0], len(places), what)
    return entries


def _kind(row: Any, place: str) -> str:
    """Image, video or text; a list of one file becomes the file.

    Raises:
        AnnotationError: the row is of another form, or names its file otherwise.
    """
    for key in ("image", "video"):
        if isinstance(row, dict) and isinstance(row.get(key), list):
            if len(row[key]) != 1:
                raise AnnotationError(f"{place}: '{key}' names {len(row[key])} files; a row has one")
            row[key] = row[key][0]
    check_object(row, place, ("id", "conversations"), ("image", "video", "model"))
    media = [key for key in ("image", "video", "model") if key in row]
    if len(media) > 1:
        raise AnnotationError(f"{place}: has {' and '.join(media)}; expected one, or none of them for a text")
    elsewhere = next(filter(MEDIUM_ELSEWHERE.fullmatch, row), None) if not media else None
    if elsewhere:
        raise AnnotationError(
            f"{place}: has {elsewhere!r}, which is not read; a row has one file, as 'image' or 'video', or none"
        )
    if "chosen" in row or "rejected" in row:
        what = "is a row of preferences ('chosen', 'rejected'), which are not read"
        raise AnnotationError(
            f"{place}: {what}; take them out, and put the answer behind the question as a turn of gpt"
        )
    return media[0] if media and media[0] != "model" else "text"


def _odd(row: Mapping[str, Any], kind: str, prompt: Prompt) -> Iterator[str]:
    """Yield what is learnt of a row otherwise than its author may have thought."""
    if ends_with_user(row["conversations"]):
        yield "end with the user's turn, which is learnt, as published"
    said = "".join(turn["value"] for turn in row["conversations"] if turn["from"] == "gpt")
    if any(token in said for token in MEDIA_TOKENS):
        yield "hold <image> or <video> in an answer, which begins with it then, as published"
    elif kind == "text" and any(token in prompt.prompt for token in MEDIA_TOKENS):
        yield "hold <image> or <video>, name no file and are learnt as texts"
    if not prompt.answer.strip():
        yield "have an empty answer"
    if any(row.get(key) for key in ("system", "system_prompt")):
        yield "have a system prompt, which is not read"


def _read_questions(path: Path, root: Path, section: str) -> list[dict[str, Any]]:
    content = parse(_text_of_form(path, "questions", section), path, "file")
    if not isinstance(content, dict) or not content:
        raise AnnotationError(f"{path}: holds no question")
    entries, files = [], {}
    for name, row in content.items():
        check_object(row, f"{path}, id {name!r}", ("q", "a", "video_id"), ("q", "a", "video_id"))
        video_id = row["video_id"]
        if video_id not in files:
            files[video_id] = _video_file(root, video_id)
        texts = {"question": row["q"], "prompt": question_prompt(row["q"]), "answer": row["a"]}
        entries.append({"question_id": name, "video_id": video_id, "video": files[video_id], **texts})
    return entries


def _video_file(root: Path, video_id: str) -> str:
    """The file of a video below `root`; with the first ending where there is none, which is then missed by name."""
    names = [video_id + ending for ending in ENDINGS_IN_ANY_CASE]
    return next((name for name in names if find_path(root, name).is_file()), names[0])


def _text_of_form(path: Path, form: str, section: str) -> str:
    """The file's text, refused in one clear line where it is of the other form."""
    text = read_text(path, section=section)
    found = "conversations" if text.lstrip()[:1] == "[" else form
    if text.lstrip()[:1] == "{":  # one object by id, or JSON lines, whose first line is a row
        try:
            first = json.JSONDecoder().raw_decode(text.lstrip())[0]
            found = "questions" if any(isinstance(row, dict) for row in first.values()) else "conversations"
            found = found if first else form
        except json.JSONDecodeError:
            pass  # which its reader says, with the place
    if found != form:
        shape = "an object by id" if found == "questions" else "rows of conversations"
        raise AnnotationError(f"{path}: holds {shape}, not the form '{form}'; set {section}.form: {found}")
    return text


def _id(value: Any, place: str) -> str:
    """Ids are texts in most files and whole numbers in others."""
    if type(value) not in (str, int):
        raise AnnotationError(f"{place}: 'id' must be a string or a whole number, got {type(value).__name__}")
    return str(value)


def _make_unique(entries: list[dict[str, Any]]) -> None:
    """The n-th entry of an id becomes `<id>#n`, or the next number that is free."""
    taken, repeats = {entry["question_id"] for entry in entries}, {}
    for entry in entries:
        name = entry["question_id"]
        repeats[name] = count = repeats.get(name, 0) + 1
        if count > 1:
            while f"{name}#{count}" in taken:
                count += 1
            entry["question_id"], repeats[name] = f"{name}#{count}", count
            taken.add(entry["question_id"])
