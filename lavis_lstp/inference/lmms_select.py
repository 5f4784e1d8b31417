"""Any model of lmms-eval behind a selection of frames, as its model `lstp_select`:

    python -m lmms_eval --model lstp_select --model_args inner=qwen3_vl,method=bitcost,k=8,pretrained=... --tasks TASK

In: requests of lmms-eval. Out: the answers of the inner model, which is handed the chosen frames as images with their
seconds in place of a video, so that it reads none itself. Whatever is no video goes through as it is. Nothing of
lmms-eval is copied or replaced.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lavis_lstp.data.selections import Recorded, read_recorded
from lavis_lstp.data.store import default_store
from lavis_lstp.errors import ConfigError
from lavis_lstp.files import strict_json, write_jsonl
from lavis_lstp.inference.lmms_requests import IMAGE_ENDINGS, bare_question
from lavis_lstp.inference.selection import Selection, load_options, select
from lavis_lstp.models.answer.answerer import with_times

NAME = "lstp_select"
SECONDS = "<{:.1f} seconds>"
"""Written before each frame of a conversation, as Qwen3-VL writes it."""


def __getattr__(name: str) -> type:
    """`lstp_select`: a subclass of lmms-eval's base class, so made when lmms-eval asks for it."""
    if name != NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms

    made = type(NAME, (Selecting, lmms), {"__module__": __name__})
    globals()[NAME] = made
    return made


class Selecting:
    """A model as lmms-eval calls it, which chooses frames in front of another one.

    Args (lmms-eval's --model_args):
        inner: name of the model that answers; what is not named here goes to it.
        method, k, seed: of `lavis_lstp.select`; settings: of the method, "power=2.0 depth=3".
        checkpoint: whose sampler is asked, where the method asks one and no scorer is named.
        scorer: in place of the sampler: "NAME" or "NAME=WEIGHTS", see `lavis_lstp.select`.
        num_candidates: frames that are scored, evenly spaced.
        selection: file of recorded frames in place of a method, in any form of `data/selections.py`.
        log: file for a line of JSON a question: task, split, doc_id, method, and of each video the frames and seconds
            shown; ranks above 0 put their number before its ending. (lmms-eval's own files leave arguments out.)
        question_key, id_key: of documents, the bare question that frames are found by, and the id in `selection`.
    """

    is_simple = False  # the inner model says, when it is there

    def __init__(
        self,
        inner: str | None = None,
        method: str | None = None,
        k: int = 8,
        seed: int = 0,
        settings: str = "",
        checkpoint: str | None = None,
        scorer: str | None = None,
        num_candidates: int | None = None,
        selection: str | None = None,
        log: str | None = None,
        question_key: str = "question",
        id_key: str = "question_id",
        **of_inner: Any,
    ):
        super().__init__()
        if not inner or (method is None) == (selection is None):
            raise ConfigError(f"--model_args of {NAME} need inner=MODEL and either method=NAME or selection=FILE")
        self.how = {"k": int(k), "method": method, "seed": int(seed)}
        for name, given, value in (word.partition("=") for word in str(settings).split()):
            if not given:
                raise ConfigError(f"--model_args settings={settings}: expected NAME=VALUE, with blanks between them")
            self.how[name] = _value(value)
        self.how |= {} if num_candidates is None else {"num_candidates": int(num_candidates)}
        self.how |= {} if scorer is None else {"scorer": scorer}
        options = None if method is None else load_options(method, scorer)
        if options is not None:
            if checkpoint is None:
                raise ConfigError(f"method {method} asks a temporal sampler; name checkpoint=RUN, or a scorer=NAME")
            from lavis_lstp.inference.predictor import load

            self.how["predictor"] = load(checkpoint, options=options, store=default_store())
        self.selection, self.question_key, self.id_key = selection, question_key, id_key
        self.inner = self._inner(inner, of_inner)
        self.is_simple = self.inner.is_simple
        self.inner.task_dict = self.task_dict = {}
        self._recorded: dict[tuple[str, str], dict[str, Recorded]] = {}
        self._found: dict[tuple[str, str, str, Any], Selection] = {}
        self.log, self._lines = log, []

    def _inner(self, name: str, arguments: Mapping[str, Any]) -> Any:
        from lmms_eval.models import get_model

        return get_model(name)(**arguments)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the inner model's: its device, accelerator, chat template."""
        if name in ("inner", "_inner"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def world_size(self) -> int:
        return self.inner.world_size

    def set_cache_hook(self, cache_hook: Any) -> None:
        self.inner.set_cache_hook(cache_hook)

    def clean(self) -> None:
        self.inner.clean()

    # ---- what lmms-eval calls -----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any]) -> list:
        return self._through("generate_until", requests)

    def loglikelihood(self, requests: Sequence[Any]) -> list:
        return self._through("loglikelihood", requests)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list:
        raise ConfigError(f"{NAME} chooses frames for one question at a time; leave out tasks of several rounds")

    def _through(self, kind: str, requests: Sequence[Any]) -> list:
        """The inner model's answers; afterwards each request, which lmms-eval logs, says what was shown."""
        given = [request.arguments for request in requests]
        self._check_records(given)
        shown: list[dict[int, Selection]] = [{} for _ in requests]
        try:
            for request, told, own in zip(requests, given, shown, strict=True):
                if request.arguments is told:  # repeats are one object
                    request.arguments = self._with_frames(told, own)
            answers = getattr(self.inner, kind)(requests)
        finally:
            for request, told in zip(requests, given, strict=True):
                request.arguments = told
        for request, own in zip(requests, shown, strict=True):
            if own:
                videos = [{"frame_index": one.frame_index, "times_s": one.times_s} for one in own.values()]
                told = {"method": next(iter(own.values())).method, "videos": videos}
                doc_id, task, split = request.arguments[-3:]
                self._lines.append({"task": task, "split": split, "doc_id": doc_id, **told})
                request.arguments = (*request.arguments, {NAME: told})
        if self.log is not None:
            path = Path(self.log)
            write_jsonl(path.with_suffix(f".{self.rank}{path.suffix}") if self.rank else path, self._lines)
        return answers

    def _with_frames(self, arguments: tuple, shown: dict[int, Selection]) -> tuple:
        """The same arguments, whose function for media gives chosen frames where it gave a video.

        A conversation's is the second argument; a simple model's the third, behind its settings or continuation, and
        its text begins with the seconds.
        """
        context, *_, doc_id, task, split = arguments
        document = self.task_dict[task][split][doc_id]
        question = bare_question(document, self.question_key, str(context))

        def chosen(video: Any, place: int) -> Selection:
            shown[place] = self._selection(video, question, document, doc_id, (task, split))
            return shown[place]

        if not self.is_simple:  # frames are decoded when the model asks, so that those of a task need no memory
            return (context, lambda doc: [_with_images(one, chosen) for one in arguments[1](doc)], *arguments[2:])
        media = _listed(arguments[2](document))
        times = [t for place, one in enumerate(media) if _is_video(one) for t in chosen(one, place).times_s]

        def visual(doc: Any) -> list:
            found = enumerate(_listed(arguments[2](doc)))
            return [
                part for place, one in found for part in (_pictures(chosen(one, place)) if _is_video(one) else [one])
            ]

        return (with_times(context, times), arguments[1], visual, *arguments[3:])

    # ---- which frames -------------------------------------------------------------------------------------------

    def _selection(self, video: Any, question: str, document: Any, doc_id: int, place: tuple[str, str]) -> Selection:
        path, clip_s = _part(video)
        key = (path, question, self._id(document, doc_id), clip_s)
        if key not in self._found:
            if self.selection is not None:
                self._found[key] = Selection.recorded(path, question, self._recorded[place][key[2]])
            else:
                self._found[key] = select(path, question, clip_s=clip_s, **self.how)
        return self._found[key]

    def _id(self, document: Any, doc_id: int) -> str:
        found = document.get(self.id_key) if isinstance(document, Mapping) else None
        return str(doc_id if found is None else found)

    def _check_records(self, given: Sequence[tuple]) -> None:
        """Read the recorded frames of each task's documents, and refuse a file that is for others."""
        places = dict.fromkeys((arguments[-2], arguments[-1]) for arguments in given)
        for task, split in places if self.selection is not None else ():
            if (task, split) in self._recorded:
                continue
            asked = {arguments[-3] for arguments in given if arguments[-2:] == (task, split)}
            rows = []
            for number, document in enumerate(self.task_dict[task][split]):
                question = document.get(self.question_key)
                row = {"question_id": self._id(document, number), "question": question if question else ""}
                rows.append({**row, "video": ""} if number in asked and question else row)
            self._recorded[task, split] = read_recorded(Path(self.selection), rows, "selection")


def _value(text: str) -> Any:
    try:
        return strict_json(text)
    except ValueError:
        return text


def _part(video: Any) -> tuple[str, tuple[float, float] | None]:
    """The path of a video, and the seconds of the part that is asked about, None = all of it."""
    clip_s = None
    if isinstance(video, Mapping):
        start, end = video.get("video_start"), video.get("video_end")
        if (start, end) != (None, None):
            clip_s = float(start or 0), math.inf if end is None else float(end)
        video = video.get("path") or video.get("url")
    if not isinstance(video, str | os.PathLike) or "://" in str(video):
        raise ConfigError(f"{NAME}: expected the path of a video, got {str(video)[:80]!r}")
    return os.fspath(video), clip_s


def _is_video(medium: Any) -> bool:
    if isinstance(medium, Mapping):
        return medium.get("type", "video") == "video" and not {"array", "sampling_rate"} & medium.keys()
    return isinstance(medium, str | os.PathLike) and Path(medium).suffix.lower() not in IMAGE_ENDINGS


def _pictures(found: Selection) -> list[Image.Image]:
    return [Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))) for frame in found.frames()]


def _with_images(message: Mapping[str, Any], chosen: Callable[[Any, int], Selection]) -> dict[str, Any]:
    """A message whose videos are frames with their seconds before each."""
    content = []
    for place, part in enumerate(message["content"]):
        if not isinstance(part, Mapping) or part.get("type") != "video":
            content.append(part)
            continue
        edges = {"video_start": part.get("start_time"), "video_end": part.get("end_time")}
        found = chosen({"path": part.get("url"), **edges}, place)
        for seconds, picture in zip(found.times_s, _pictures(found), strict=True):
            content += [{"type": "text", "text": SECONDS.format(seconds)}, {"type": "image", "url": picture}]
    return {**message, "content": content}


def _listed(media: Any) -> list:
    return list(media) if isinstance(media, list | tuple) else [] if media is None else [media]
