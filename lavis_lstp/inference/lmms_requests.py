"""What lmms-eval asks, as questions that `VideoQADataset` reads; nothing of lmms-eval is imported.

In: requests with arguments (context, generation settings or continuation, doc_to_visual, document, task, split), and
the documents. A document's media are as its task hands them over: the path of a video, a picture in memory, or nothing.
Out: rows, each question once however often and with however many continuations it is asked, and each request's row.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lavis_lstp.config.fields import SAMPLING
from lavis_lstp.data.folder import FolderQuestions
from lavis_lstp.data.pictures import ENDINGS as IMAGE_ENDINGS
from lavis_lstp.data.prompts import without_tokens
from lavis_lstp.errors import ConfigError, VideoError, unknown_name
from lavis_lstp.files import expanded

GENERATION = (
    "do_sample",
    "length_penalty",
    "max_new_tokens",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "num_beams",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
)
NOT_OURS = ("image_aspect_ratio", "seed", "skip_special_tokens")
"""Settings of lmms-eval's tasks that concern other models' pictures and tokens, or that lmms-eval sees to (seed)."""


@dataclass(frozen=True)
class Request:
    """The arguments of one request.

    Attributes:
        wanted: settings of an answer to be generated, or the continuation whose likelihood is asked for.
    """

    context: str
    wanted: Any
    doc_to_visual: Callable[[Any], Any] | None
    doc_id: int
    task: str
    split: str

    @classmethod
    def read(cls, arguments: Sequence[Any]) -> Request:
        """Of what a request of lmms-eval has as `args`.

        Raises:
            ConfigError: another number of arguments, as for the likelihood of an answer without its question.
        """
        if len(arguments) != 6:
            raise ConfigError(
                f"expected a request of lmms-eval with 6 arguments, got {len(arguments)}; rounds of a conversation and "
                "answers without a question (metric acc_mutual_info) are not supported by LSTP"
            )
        return cls(*arguments)

    @property
    def document_name(self) -> str:
        return f"{self.task}/{self.split}/{self.doc_id}"

    def visual(self, document: Any) -> Any:
        """The one video or picture of a document, None where it has none.

        Raises:
            ConfigError: there are several.
        """
        found = self.doc_to_visual(document) if self.doc_to_visual else None
        found = found if isinstance(found, (list, tuple)) else [found]
        flat = [item for part in found for item in (part if isinstance(part, (list, tuple)) else [part])]
        flat = [item for item in flat if item is not None]
        if len(flat) > 1:
            raise ConfigError(
                f"{self.document_name}: LSTP answers about one video, one picture or a text alone, and the task hands "
                f"over {len(flat)} media; leave this task out"
            )
        return flat[0] if flat else None


class Questions(FolderQuestions):
    """Rows about files anywhere, and about pictures that documents hold; a picture is asked for when it is read."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], pictures: Mapping[str, Callable[[], Image.Image]]):
        super().__init__(rows, os.sep, section="the request")
        self._pictures = pictures

    def check_files(self, max_bad_fraction: float = 0.0) -> None:
        """Each file was looked for when its row was made; paths are absolute."""

    def medium(self, place: tuple[str, str]) -> tuple[Path | bytes, str]:
        if place[0] not in self._pictures:
            return super().medium(place)
        stored = io.BytesIO()
        self._pictures[place[0]]().convert("RGB").save(stored, "PPM")  # neither packed nor lossy
        return stored.getvalue(), place[0]


def questions_of(
    requests: Sequence[Request],
    documents: Mapping[str, Mapping[str, Any]],
    *,
    question_key: str,
    as_prompt: Callable[[str], str],
    options: Sequence[str] | None = None,
    apart: bool = False,
) -> tuple[Questions, list[str]]:
    """Rows, and the id of the row that each request is about.

    Args:
        documents: task -> split -> documents by number, lmms-eval's `task_dict`.
        question_key: of documents, the bare question, by which frames are found; where a document has none, or its
            context does not hold it, the whole context is read.
        as_prompt: makes a model's prompt of a context.
        options: the continuation of each request, to be scored; requests with the same context are one row.
        apart: the same request again is another row, as for answers that are drawn.
    """
    rows: dict[str, dict[str, Any]] = {}
    known: dict[tuple[str, str], str] = {}
    pictures: dict[str, Callable[[], Image.Image]] = {}
    times: Counter = Counter()
    asked = []
    for number, request in enumerate(requests):
        key = (request.document_name, request.context)
        if apart or key not in known:
            of_document = times[request.document_name]
            times[request.document_name] += 1
            name = request.document_name + (f"#{of_document}" if of_document else "")
            document = documents[request.task][request.split][request.doc_id]
            medium = _medium(request, request.visual(document))
            if medium.get("image") == request.document_name:
                pictures[request.document_name] = _Picture(request, documents)
            context = without_tokens(request.context)
            rows[name] = {
                "question_id": name,
                "video_id": str(medium.get("video", "")),
                "question": bare_question(document, question_key, context),
                "prompt": as_prompt(context),
                "answer": None,
                "options": [],
                **medium,
            }
            known[key] = name
        asked.append(known[key])
        if options is not None and options[number] not in rows[asked[-1]]["options"]:
            rows[asked[-1]]["options"].append(options[number])
    return Questions(list(rows.values()), pictures), asked


@dataclass(frozen=True)
class _Picture:
    """A picture in a document: the document is read again for it, so that pictures of a whole task need no memory."""

    request: Request
    documents: Mapping[str, Mapping[str, Any]]

    def __call__(self) -> Image.Image:
        request = self.request
        return request.visual(self.documents[request.task][request.split][request.doc_id])


def bare_question(document: Any, question_key: str, context: str) -> str:
    """The document's question where its context holds it, else the whole context."""
    found = document.get(question_key) if isinstance(document, Mapping) else None
    found = found.strip() if isinstance(found, str) else ""
    return found if found and found in context else context


def _medium(request: Request, visual: Any) -> dict[str, Any]:
    """{} for a text, else what a row says of its video or image.

    Raises:
        ConfigError: not a medium that can be read.
        VideoError: no such file.
    """
    if visual is None:
        return {}
    if isinstance(visual, Image.Image):
        return {"image": request.document_name}
    clip = None
    if isinstance(visual, Mapping) and visual.get("type", "video") in ("image", "video"):
        clip = (visual.get("video_start"), visual.get("video_end"))
        visual = visual.get("path") or visual.get("url") or visual
    if not isinstance(visual, (str, os.PathLike)) or "://" in str(visual):
        what = str(visual)[:80] if isinstance(visual, (str, os.PathLike)) else f"a {type(visual).__name__}"
        raise ConfigError(
            f"{request.document_name}: expected the path of a video, a picture or nothing, got {what}, which LSTP "
            "does not read"
        )
    path = expanded(visual).absolute()
    if not path.exists():
        raise VideoError(f"{path}: no such file, needed by {request.document_name}; check where the task looks for it")
    if path.suffix.lower() in IMAGE_ENDINGS:
        return {"image": str(path)}
    if clip is None or clip == (None, None):
        return {"video": str(path)}
    return {"video": str(path), "clip_s": [float(clip[0] or 0), float("inf" if clip[1] is None else clip[1])]}


def generation_settings(wanted: Mapping[str, Any], place: str) -> tuple[dict[str, Any], list[str]]:
    """Settings of an answer as transformers has them, and the strings before which it ends.

    Temperature 0 means greedy, as it does in lmms-eval; what a task does not set, the model's own settings decide.

    Raises:
        ConfigError: a setting that is not known.
    """
    settings = {name: value for name, value in wanted.items() if value is not None and name not in NOT_OURS}
    until = settings.pop("until", [])
    until = [until] if isinstance(until, str) else list(until)
    for name in settings:
        if name not in GENERATION:
            raise ConfigError(f"{place}: {unknown_name('generation_kwargs', name, (*GENERATION, 'until'))}")
    if "do_sample" in settings or "temperature" in settings:
        settings["do_sample"] = bool(settings.get("do_sample", True)) and settings.get("temperature") != 0
        if not settings["do_sample"]:
            settings = {name: value for name, value in settings.items() if name not in SAMPLING}
    return settings, [mark for mark in until if mark]


def cut(text: str, until: Sequence[str]) -> str:
    """`text` before the first of these strings, without outer blanks."""
    for mark in until:
        text = text.split(mark)[0]
    return text.strip()
