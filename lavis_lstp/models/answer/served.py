"""Questions about frames for a model behind a server that speaks OpenAI's chat completions, and what it answers.

In: frames as JPEG with their seconds, prompts, settings of generation. Out: answers, whole or in the pieces that the
server sends. Frames go as one video of JPEG pictures with its true seconds (`data:video/jpeg` and `media_io_kwargs`,
which vLLM takes since 2026-04), or, where that is asked for, as images. A server that refuses video is never sent
images instead by itself. `lavis_lstp.endpoint` asks and keeps what was answered, so no question is put twice. Nothing
here needs torch: `Selection.answer` asks without it, `models/answer/endpoint.py` for a model of LSTP.
"""

from __future__ import annotations

import base64
import io
import logging
import queue
import threading
from collections.abc import Generator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from lavis_lstp.data.selections import media_io_kwargs, milliseconds
from lavis_lstp.endpoint import Endpoint, EndpointError, KeptTexts, Reply, message_of, storable
from lavis_lstp.errors import ConfigError
from lavis_lstp.files import cache_folder, json_text, sha256_json
from lavis_lstp.models.answer.answerer import GivenUp, with_times
from lavis_lstp.models.answer.generation import MAX_NEW_TOKENS, checked

logger = logging.getLogger(__name__)

JPEG_QUALITY = 95
TOLD = {"max_new_tokens": "max_completion_tokens", "temperature": "temperature", "top_p": "top_p"}
"""Setting of generation -> OpenAI's name."""
TOLD_TO_VLLM = {"top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty"} | {
    "min_new_tokens": "min_tokens"
}
"""Setting of generation -> a name that vLLM and others have beyond OpenAI's."""
SEEDS = 2**31

Answer = tuple[str, int]
"""The text of an answer, and the number of its tokens as the server says, or 0."""


class Served:
    """A served model.

    Args:
        weights: the model, as the server calls it.
        frames: video or images.
        image_size: side of the frames, in px.
        cache: file of what was answered; None = `answers.sqlite` in the user's cache.
        times_in_prompt: writes the seconds of the frames in front of the prompt.
        asked: concurrency, retries and timeout_s of `Endpoint`; all but weights and times_in_prompt are keys of
            `config.model.Served`.

    Raises:
        ConfigError: no model is named, or an address with a key in it.
        EndpointError: the openai package is not installed.
    """

    def __init__(
        self,
        weights: str | None,
        *,
        frames: str = "video",
        image_size: int = 448,
        cache: str | None = None,
        times_in_prompt: bool = False,
        **asked: Any,
    ):
        if not weights:
            raise ConfigError(
                "model.backbone.weights is empty: expected the model as the server calls it, for source endpoint"
            )
        self.endpoint = Endpoint(weights, asker="model.backbone.source endpoint", **asked)
        self.form, self.image_size, self.times_in_prompt, self._cache = frames, image_size, times_in_prompt, cache
        if frames == "images" and not times_in_prompt:
            logger.warning(
                "%s is not told when its frames were taken; model.backbone.times_in_prompt writes it to the prompt",
                weights,
            )

    @cached_property
    def kept(self) -> KeptTexts:
        """The cache of answers, opened when it is first asked."""
        return KeptTexts(self._cache or cache_folder() / "answers.sqlite", "answers")

    def request(
        self,
        pictures: Sequence[str],
        prompt: str,
        times_s: Sequence[float] | None,
        generation: Mapping[str, Any],
        seed: int = 0,
    ) -> dict[str, Any]:
        """The arguments of `chat.completions.create` for one question.

        Args:
            pictures: of `jpeg`, in the order of time; times_s: their seconds, None = nobody knows.
            generation: transformers' arguments.
            seed: of an answer that is drawn.

        Raises:
            ConfigError: a setting of generation that servers have no name for.
        """
        content, more = self._content(list(pictures), prompt, times_s)
        settings = checked(generation, encoder_decoder=False)
        drawn = settings.pop("do_sample", False)
        for name, nothing in (("num_beams", 1), ("length_penalty", 1), ("early_stopping", False), ("use_cache", True)):
            if settings.pop(name, nothing) != nothing and name == "num_beams":
                raise ConfigError("generation setting num_beams: an endpoint has no beams; set it to 1")
        if not drawn:
            settings = {name: value for name, value in settings.items() if name not in ("top_p", "top_k", "min_p")}
            settings["temperature"] = 0
        unknown = [name for name in settings if name not in TOLD and name not in TOLD_TO_VLLM]
        if unknown:
            raise ConfigError(f"generation setting {unknown[0]} is not one that an endpoint has a name for")
        told = {TOLD[name]: value for name, value in settings.items() if name in TOLD}
        more = {TOLD_TO_VLLM[name]: value for name, value in settings.items() if name in TOLD_TO_VLLM} | more
        request = {
            "messages": [{"role": "user", "content": content}],
            "max_completion_tokens": MAX_NEW_TOKENS,
            "seed": seed if drawn else 0,
            **told,
        }
        return {**request, "extra_body": more} if more else request

    def _content(
        self, shown: list[str], prompt: str, times_s: Sequence[float] | None
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """What is sent of one question: parts of its message, and fields of the request beside it."""
        if self.times_in_prompt and shown:
            prompt = with_times(prompt, times_s)
        said = {"type": "text", "text": prompt}
        if self.form == "images" or len(shown) < 2 or times_s is None:
            urls = [f"data:image/jpeg;base64,{picture}" for picture in shown]
            return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), said], {}
        url = f"data:video/jpeg;base64,{','.join(shown)}"
        more = {"media_io_kwargs": media_io_kwargs(*milliseconds(times_s))}  # nobody here knows the file's rate
        return [{"type": "video_url", "video_url": {"url": url}}, said], more

    def answers(self, asked: Sequence[Mapping[str, Any]], given_up: GivenUp | None = None) -> list[Answer]:
        """An answer to each request; "" where nobody waits for one.

        Args:
            asked: of `request`.
            given_up: says of a row that nobody waits for its answer any more.

        Raises:
            ConfigError: no key in the environment.
            EndpointError: a question got no answer; those of the others are kept.
        """
        rows = _Rows(self, asked, given_up)
        rows.ask()
        return rows.answers()

    def stream(
        self, asked: Sequence[Mapping[str, Any]], given_up: GivenUp | None = None
    ) -> Generator[list[str], None, list[Answer]]:
        """The answers as the server sends them, a new piece of text for each request at a time.

        The pieces of a row are what `answers` gives for it, cut, and the generator returns what `answers` does; an
        answer that is kept is one piece. Closing the generator ends the questions at the next piece.
        """
        rows = _Rows(self, asked, given_up)
        if any(rows.given):
            yield list(rows.given)
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        failed: list[BaseException] = []

        def work() -> None:
            try:
                rows.ask(on_piece=pieces.put)
            except BaseException as error:  # raised again in the thread that asks
                failed.append(error)
            pieces.put(None)

        threading.Thread(target=work, name="lavis_lstp endpoint", daemon=True).start()
        try:
            while (key := pieces.get()) is not None:
                if new := rows.new_text(key):
                    yield [new if own == key else "" for own in rows.keys]
        finally:
            rows.closed = True
        if failed:
            raise failed[0]
        last = rows.answers()
        rest = [text[len(given) :] for (text, _), given in zip(last, rows.given, strict=True)]
        if any(rest):
            yield rest
        return last


class _Rows:
    """The requests of a batch, what is kept of their answers, and what has been handed out.

    Attributes:
        keys: of each row; equal for equal requests. given: of each row, the text that was handed out.
        closed: whether nobody waits for anything any more.
    """

    def __init__(self, served: Served, asked: Sequence[Mapping[str, Any]], given_up: GivenUp | None):
        self.served, self.asked, self.closed = served, asked, False
        self._given_up = given_up or (lambda row: False)
        endpoint, kept = served.endpoint, served.kept
        self.keys = [sha256_json(["answer", 1, endpoint.address, endpoint.model, request]) for request in asked]
        self.bodies = {key: body for key in self.keys if (body := kept.get(key)) is not None}
        self.said: dict[str, str] = {}  # by key, what has come so far
        self.given = [_text_of(self.bodies[key])[0] if key in self.bodies else "" for key in self.keys]

    def _waits(self, key: str) -> bool:
        """Return whether anybody waits for the answer of a request."""
        rows = [row for row, own in enumerate(self.keys) if own == key]
        return not self.closed and not all(self._given_up(row) for row in rows)

    def new_text(self, key: str) -> str:
        """What can be handed out of a request's answer beyond what was; blanks at its end may be the answer's end."""
        row, text = self.keys.index(key), self.said[key].strip()
        new = text[len(self.given[row]) :]
        self.given = [text if own == key else given for own, given in zip(self.keys, self.given, strict=True)]
        return new

    def answers(self) -> list[Answer]:
        cut = {key: (text.strip(), 0) for key, text in self.said.items()}  # of rows that were given up
        found = {key: _text_of(body) for key, body in self.bodies.items()}
        return [found.get(key) or cut.get(key, ("", 0)) for key in self.keys]

    def ask(self, on_piece: Any = None) -> None:
        """Put what is not known yet; a refusal is an answer.

        Args:
            on_piece: called with the key of a request of whose answer more has come; None = answers come whole.
        """
        endpoint, kept, failed = self.served.endpoint, self.served.kept, []

        def on_reply(key: str, reply: Reply) -> str | None:
            body, why = reply.body, reply.failed
            if not self._waits(key):
                return None
            if reply.refused is not None:
                body = json_text({"choices": [{"message": {"content": None, "refusal": reply.refused}}]})
            try:
                why = why or _no_text(body)
            except ValueError as error:
                why = str(error)
            if why:
                failed.append(why)
                return why
            kept.put(key, body)
            # Another process may have been first; what was handed out in pieces stays what it was.
            self.bodies[key] = body if key in self.said else kept.get(key)
            return None

        def more(key: str, text: str) -> bool:
            self.said[key] = self.said.get(key, "") + text
            on_piece(key)
            return self._waits(key)

        requests = {key: request for key, request in zip(self.keys, self.asked, strict=True) if key not in self.bodies}
        if not (waiting := [key for key in requests if self._waits(key)]):
            return
        hint = ""
        if any("media_io_kwargs" in request.get("extra_body", ()) for request in self.asked):
            hint = "; for a server that takes no video: model.backbone.endpoint.frames=images"
        still = (key for key in waiting if self._waits(key))
        pieces = {} if on_piece is None else {"on_piece": more}
        try:
            endpoint.ask(still, requests.__getitem__, on_reply, lambda said: f"'{endpoint.model}': {said}", **pieces)
        except EndpointError as error:
            raise EndpointError(f"{error}{hint}") from None
        if failed:
            raise EndpointError(
                f"{endpoint.address} gave no answer to {len(failed)} of {len(waiting)} questions, last: {failed[-1]}; "
                f"those that came are in the cache, call again to go on{hint}"
            )


def jpeg(frame: np.ndarray) -> str:
    """uint8 [3,H,W] as JPEG in base64."""
    stored = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))).save(stored, "JPEG", quality=JPEG_QUALITY)
    return base64.b64encode(stored.getvalue()).decode()


def _no_text(body: str) -> str | None:
    """Why a response is no answer; None where it is one."""
    _, choice = message_of(body)
    if choice["message"].get("content") is None and not choice["message"].get("refusal"):
        return "a message without a text came back"
    return None


def _text_of(body: str) -> Answer:
    """The answer; where the model refuses, its words for that, which no rule counts as right."""
    response, choice = message_of(body)
    message, usage = choice["message"], response.get("usage")
    refusal = message.get("refusal")
    if refusal:
        logger.warning("a question was refused: %s", storable(refusal)[:200])
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    text = (message.get("content") or refusal or "").strip()
    return text, count if isinstance(count, int) and 0 <= count < SEEDS else 0
