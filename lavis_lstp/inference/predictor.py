"""A loaded model that answers questions about videos: `lavis_lstp.load(...)`.

In: a model's name, a run's folder, a checkpoint, or "example" for the one that ships; then videos (paths, bytes, file
objects), pictures or nothing, questions, and the turns before them. Out: a `Prediction`, the answer and its frames.
`ask`, `chat`, the page, the server and lmms-eval hold the same object.

Threads may share a predictor. Reading and flow run in the thread that asks; the model answers one batch at a time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_lstp.data.pictures import DEFAULT_MAX_MEGAPIXELS
from lavis_lstp.data.store import Store
from lavis_lstp.data.subtitles import Line, read_subtitles
from lavis_lstp.errors import ConfigError
from lavis_lstp.inference.candidates import Medium, Reader
from lavis_lstp.inference.loading import EXAMPLE, build_model
from lavis_lstp.inference.prediction import Asked, Cancelled, Prediction, Turn
from lavis_lstp.inference.settings import Settings, settings_of
from lavis_lstp.models.variants import MODEL_TYPES
from lavis_lstp.models.weights.recorded import recorded_frames, recorded_reading
from lavis_lstp.untrusted import unicode_text

CACHE_BYTES = 1 << 30
"""Frames and flow that are kept: 30 videos of 64 candidates with flow at 224 px."""


class Predictor:
    """An LSTP in eval mode.

    Args:
        model: the model.
        num_frames: T, evenly spaced frames read of each video where a call does not say.
        notes: what whoever reads the answers should know, such as that the weights are random.
        cache_bytes: of candidates and flow that are kept in memory.
        max_seconds: a longer video is refused; None = any.
        max_megapixels: a larger picture, or video with larger pictures, is refused.
        decoders: media that are decoded at a time.
        reading: how videos are read, by the keys `recorded.READING` of a data set; default: as data sets do.
        store: where frames and flow are kept on disk for other processes; None = nowhere.
    """

    def __init__(
        self,
        model: Any,
        num_frames: int,
        notes: Sequence[str] = (),
        *,
        cache_bytes: int = CACHE_BYTES,
        max_seconds: float | None = None,
        max_megapixels: float = DEFAULT_MAX_MEGAPIXELS,
        decoders: int = 8,
        reading: Mapping[str, Any] | None = None,
        store: Store | None = None,
    ):
        self.model, self.num_frames, self.notes = model, num_frames, tuple(notes)
        self.reader = Reader(
            model,
            cache_bytes=cache_bytes,
            max_seconds=max_seconds,
            max_megapixels=max_megapixels,
            decoders=decoders,
            reading=reading,
            store=store,
        )
        self._model_lock = threading.Lock()

    @classmethod
    def build(
        cls,
        name: str,
        model_type: str | None = None,
        checkpoint: str | None = None,
        options: Sequence[str] = (),
        *,
        num_frames: int | None = None,
        device: str | None = None,
        **limits: Any,
    ) -> Predictor:
        """A predictor of a model's name and a checkpoint, as on a command line; see `load` and `build_model`.

        Videos are read as the checkpoint's run read them.
        """
        import torch

        model, notes = build_model(name, model_type, checkpoint, options)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        reading, more = recorded_reading(checkpoint)
        limits = {"reading": reading, **limits}
        return cls(model, num_frames or recorded_frames(checkpoint), [*notes, *more], **limits)

    def settings(self, **given: Any) -> Settings:
        """The settings of a call, checked.

        Args:
            given: num_frames (T), fps (so many candidates a second where these are at most T), num_selected (K),
                selector, rule (settings of a selector over scores), seed, frames and flow_pairs (how candidates are
                read, in place of the predictor's own way), subtitles_window_s (2, or "whole"), and transformers'
                generation arguments.

        Raises:
            ConfigError: a setting is not known, or its value cannot be used; one line on why.
        """
        return settings_of(self._open_model(), self.num_frames, given)

    def prepare(
        self,
        video: Medium,
        question: str,
        *,
        history: Sequence[Turn] = (),
        settings: Settings | None = None,
        name: str | None = None,
        instructions: str = "",
        subtitles: Path | str | Sequence[Line] | None = None,
        on_text: Callable[[str], None] | None = None,
        cancel: threading.Event | None = None,
        clip_s: Sequence[float] | None = None,
    ) -> Asked:
        """Everything before the model: the medium is read, and its flow computed, where they are not kept.

        Args:
            clip_s: start and end in seconds of the part of the video that is asked about; None = all of it.

        Raises:
            VideoError: the medium is missing or unreadable.
            AnnotationError: the subtitles are.
            ConfigError: the question is no text, or empty.
        """
        self._open_model()
        settings = settings or self.settings()
        if not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history):
            raise ConfigError(f"history is a list of (question, answer), got {history!r:.80}")
        for text in (question, *(text for turn in history for text in turn)):
            if not isinstance(text, str):
                raise ConfigError(f"a question and its history are texts, got {type(text).__name__}")
            unicode_text(text, "a question and its history")
        if not question.strip():
            raise ConfigError("the question is empty")
        cancel = cancel or threading.Event()
        _unless(cancel)
        lines = read_subtitles(Path(subtitles)) if isinstance(subtitles, str | Path) else subtitles
        needs = {"flow": self._open_model().chooser.asks_sampler(settings.selector), "figure": settings.selector.figure}
        how = {"name": name, "fps": settings.fps, "reading": settings.reading, "clip_s": clip_s}
        candidates, seconds = self.reader.read(video, settings.num_frames, **needs, **how)
        _unless(cancel)
        return Asked(question, tuple(history), candidates, settings, seconds, instructions, lines, on_text, cancel)

    def answer(
        self,
        video: Medium,
        question: str,
        *,
        history: Sequence[Turn] = (),
        subtitles: Path | str | Sequence[Line] | None = None,
        name: str | None = None,
        cancel: threading.Event | None = None,
        **settings: Any,
    ) -> Prediction:
        """Answers one question.

        Args:
            video: path, bytes or seekable binary file of a video or picture; a list of pictures' bytes; None for a
                question without a medium.
            history: earlier questions and their answers, the oldest first. The oldest are left out where the prompt
                would become longer than the model reads.
            subtitles: of the video, a file (SRT, VTT or JSON) or lines (start_s, end_s, text); the language model reads
                those near the shown frames before the question.
            name: what errors call the video.
            cancel: set it in another thread to give up.
            settings: see `settings`.

        Raises:
            VideoError: the medium is missing or unreadable.
            ConfigError: a setting, the question, its history or the kind of medium cannot be used.
            Cancelled: `cancel` was set.
        """
        checked = self.settings(**settings)
        more = {"subtitles": subtitles, "name": name, "cancel": cancel}
        asked = self.prepare(video, question, history=history, settings=checked, **more)
        return self.answer_many([asked])[0]

    def stream(
        self, video: Medium, question: str, *, cancel: threading.Event | None = None, **how: Any
    ) -> Iterator[str | Prediction]:
        """The answer in pieces as they are found, then the `Prediction`; leaving the loop early gives the answer up.

        Args and errors as for `answer`. The pieces joined are the prediction; with several beams it is one piece.
        """
        pieces: queue.SimpleQueue[str | Prediction | BaseException] = queue.SimpleQueue()
        cancel = cancel or threading.Event()
        more = {name: how.pop(name) for name in ("history", "subtitles", "name") if name in how}
        checked = self.settings(**how)

        def work() -> None:
            try:
                asked = self.prepare(video, question, settings=checked, on_text=pieces.put, cancel=cancel, **more)
                pieces.put(self.answer_many([asked])[0])
            except BaseException as error:  # raised again in the thread that asks
                pieces.put(error)

        worker = threading.Thread(target=work, name="lavis_lstp answer", daemon=True)
        worker.start()
        try:
            while True:
                piece = pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if isinstance(piece, Prediction):
                    return
        finally:
            cancel.set()
            worker.join()

    def answer_many(self, asked: Sequence[Asked]) -> list[Prediction]:
        """Answers questions with equal settings in one batch.

        Raises:
            Cancelled: the only question was given up; of several, the others are answered, and its row is cut short.
        """
        from lavis_lstp.inference.batch import answer_batch

        with self._model_lock:
            model = self._open_model()
            if all(one.cancel.is_set() for one in asked):
                raise Cancelled("the answer was given up")
            found = answer_batch(model, asked)
        if all(one.cancel.is_set() for one in asked):
            raise Cancelled("the answer was given up")
        return found

    def choose(self, asked: Asked) -> Any:
        """The `Choice` of frames for one prepared question, without an answer."""
        from lavis_lstp.inference.batch import choose

        with self._model_lock:
            return choose(self._open_model(), asked)

    def close(self) -> None:
        """Let the model and everything that is kept go; a later call is refused."""
        with self._model_lock:
            self.model = None
        self.reader.kept.clear()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_model(self) -> Any:
        model = self.model
        if model is None:
            raise ConfigError("the predictor is closed; load it again")
        return model


def _unless(cancel: threading.Event) -> None:
    if cancel.is_set():
        raise Cancelled("the answer was given up")


def load(
    what: str | Path = "example", model_type: str | None = None, options: Sequence[str] = (), **how: Any
) -> Predictor:
    """A predictor.

    Args:
        what: a name of `lavis-lstp list models` that is this package's, the folder of a run, one of its checkpoints, a
            weights file, or "example".
        model_type: of a named model; None means its default.
        options: `model.a.b=c` overrides.
        how: num_frames (T where a call does not say; default: as many as the checkpoint's run read, else 64), device
            (default: the GPU where there is one), and cache_bytes, max_seconds, max_megapixels, decoders, reading,
            store of `Predictor`; `data.store.default_store()` is what `ask` and `chat` share.

    Raises:
        ConfigError, WeightsError: it cannot be built; one line on why.
    """
    if what in MODEL_TYPES:
        return Predictor.build(str(what), model_type, None, options, **how)
    return Predictor.build("lstp_tiny", model_type, str(EXAMPLE if what == "example" else what), options, **how)


def history_of(turns: Sequence[Mapping[str, str]]) -> list[Turn]:
    """[{"role": "user" | "assistant", "content"}, ...] -> earlier questions with their answers.

    Raises:
        ConfigError: the roles do not take turns, beginning with the user's and ending with the assistant's.
    """
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2):
        raise ConfigError(
            f"messages before the last must be user, assistant, user, ... in turn, got {', '.join(roles)}"
        )
    return [(turns[i]["content"], turns[i + 1]["content"]) for i in range(0, len(turns), 2)]
