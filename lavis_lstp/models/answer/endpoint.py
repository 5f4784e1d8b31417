"""A model behind a server that speaks OpenAI's chat completions, as an answerer: vLLM's, llama.cpp's, OpenAI's.

In: frames, prompts and the frames' seconds. Out: answers. Frames go as one video of JPEG pictures with its true seconds
(`data:video/jpeg` and `media_io_kwargs`, which vLLM takes since 2026-04), or, where that is asked for, as images. A
server that refuses video is never sent images instead by itself. No weights are here and nothing learns; how likely an
answer is nobody tells. `lavis_lstp.endpoint` asks and keeps what was answered, so no question is put twice.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor, nn

from lavis_lstp.data.selections import media_io_kwargs, milliseconds
from lavis_lstp.endpoint import (
    CHARACTERS_PER_TOKEN,
    Endpoint,
    EndpointError,
    KeptTexts,
    Reply,
    message_of,
    storable,
)
from lavis_lstp.errors import ConfigError
from lavis_lstp.files import cache_folder, json_text, sha256_json
from lavis_lstp.models.answer.answerer import TIMES, Answers, GivenUp
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


class EndpointAnswerer(nn.Module):
    """A served model.

    Args:
        endpoint: the model of a server.
        form: video or images.
        image_size: side of the frames, in px.
        times_in_prompt: writes the seconds of the frames in front of the prompt.
        max_text_tokens: about so many tokens of a conversation are sent.
        cache: file of what was answered; None = `answers.sqlite` in the user's cache.
    """

    PARTS: Mapping[str, tuple[str, ...]] = {}
    is_encoder_decoder = False

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        form: str = "video",
        image_size: int = 448,
        times_in_prompt: bool = False,
        max_text_tokens: int = 512,
        cache: str | None = None,
    ):
        super().__init__()
        self.endpoint, self.form, self.image_size = endpoint, form, image_size
        self.times_in_prompt, self.max_text_tokens = times_in_prompt, max_text_tokens
        self._cache = cache
        self.anchor = nn.Parameter(torch.zeros(0), requires_grad=False)  # says on which device the model is
        if form == "images" and not times_in_prompt:
            logger.warning(
                "%s is not told when its frames were taken; model.backbone.times_in_prompt writes it to the prompt",
                endpoint.model,
            )

    @cached_property
    def kept(self) -> KeptTexts:
        """The cache of answers, opened when it is first asked."""
        return KeptTexts(self._cache or cache_folder() / "answers.sqlite", "answers")

    def tokenizer(self, text: str) -> dict[str, list[int]]:
        """Return about as many ids as the text has tokens: a server does not say which tokenizer is its own."""
        return {"input_ids": [0] * -(-len(text) // CHARACTERS_PER_TOKEN)}

    def look(self, frames: Tensor, which: Tensor, prompts: list[str], times_s: Tensor | None = None) -> EndpointReading:
        """See `Answerer.look`; frames, uint8 [U,3,H,W], are encoded here, and sent when an answer is asked for."""
        pictures = [_jpeg(frame) for frame in frames.cpu()]
        contents, clocks = [], []
        for row, prompt in enumerate(prompts):
            real = which[row].cpu() >= 0
            shown = [pictures[i] for i in which[row].cpu()[real].tolist()]
            seconds = None if times_s is None else times_s[row].cpu()[real].tolist()
            content, clock = self._content(shown, prompt, seconds)
            contents.append(content)
            clocks.append(clock)
        return EndpointReading(self, contents, clocks)

    def _content(
        self, shown: list[str], prompt: str, times_s: list[float] | None
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """What is sent of one question: parts of its message, and fields of the request beside it."""
        if self.times_in_prompt and times_s and shown:
            prompt = TIMES.format(", ".join(f"{t:.1f}" for t in times_s)) + prompt
        said = {"type": "text", "text": prompt}
        if self.form == "images" or len(shown) < 2 or times_s is None:
            urls = [f"data:image/jpeg;base64,{picture}" for picture in shown]
            return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), said], {}
        url = f"data:video/jpeg;base64,{','.join(shown)}"
        more = {"media_io_kwargs": media_io_kwargs(*milliseconds(times_s))}  # nobody here knows the file's rate
        return [{"type": "video_url", "video_url": {"url": url}}, said], more

    def matched(self, state_dict: Mapping[str, Tensor], source: str, before: str = "") -> dict[str, Tensor]:
        """Weights of other parts alone fit; see `Answerer.matched`."""
        return dict(state_dict)

    def _nothing_here(self, *_: Any, **__: Any) -> None:
        raise ConfigError(
            "model.backbone.source endpoint has no weights here; lora, gradient_checkpointing, compile and merging are "
            "for other sources"
        )

    add_lora = merge_lora = checkpoint_gradients = compile_layers = _nothing_here


class EndpointReading:
    """A `Reading` of questions that a server is asked."""

    def __init__(self, answerer: EndpointAnswerer, contents: list[list[dict]], fields: list[dict[str, Any]]):
        self.answerer, self.contents, self.fields = answerer, contents, fields

    def loss(self, answers: list[str]) -> NoReturn:
        raise ConfigError("nothing learns behind an endpoint; train another model.backbone.source")

    def log_probs(self, rows: list[int], answers: list[str]) -> NoReturn:
        raise ConfigError("an endpoint does not tell how likely given answers are; set run.choose=generate")

    def answers(
        self,
        *,
        generators: Sequence[torch.Generator] | None = None,
        scored: bool = True,
        given_up: GivenUp | None = None,
        **generation: Any,
    ) -> Answers:
        """See `Reading.answers`; log-probabilities are NaN, and counts what the server says, or 0.

        Raises:
            ConfigError: a setting of generation that servers have no name for, or no key in the environment.
            EndpointError: a question got no answer; those of the others are kept.
        """
        asked = [self._request(row, generation, generators) for row in range(len(self.contents))]
        endpoint, kept = self.answerer.endpoint, self.answerer.kept
        keys = [sha256_json(["answer", 1, endpoint.address, endpoint.model, request]) for request in asked]
        bodies = {key: body for key in keys if (body := kept.get(key)) is not None}
        given_up = given_up or (lambda row: False)
        open_rows = [row for row, key in enumerate(keys) if key not in bodies and not given_up(row)]
        self._ask({keys[row]: asked[row] for row in open_rows}, bodies)
        read = [message_of(bodies[key]) if key in bodies else ({}, {"message": {}}) for key in keys]
        texts = [_text(choice["message"]) for _, choice in read]
        if not scored:
            return Answers(texts, None, None)
        counts = torch.tensor([_tokens(response) for response, _ in read])
        return Answers(texts, torch.full((len(texts),), torch.nan), counts)

    def _ask(self, requests: Mapping[str, Mapping[str, Any]], bodies: dict[str, str]) -> None:
        """Put what is not known yet; a refusal is an answer."""
        endpoint, kept, failed = self.answerer.endpoint, self.answerer.kept, []

        def on_reply(key: str, reply: Reply) -> str | None:
            body, why = reply.body, reply.failed
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
            bodies[key] = kept.get(key)  # another process may have been first
            return None

        if not requests:
            return
        hint = ""
        if any("media_io_kwargs" in fields for fields in self.fields):
            hint = "; for a server that takes no video: model.backbone.endpoint.frames=images"
        try:
            endpoint.ask(requests, requests.__getitem__, on_reply, lambda said: f"'{endpoint.model}': {said}")
        except EndpointError as error:
            raise EndpointError(f"{error}{hint}") from None
        if failed:
            raise EndpointError(
                f"{endpoint.address} gave no answer to {len(failed)} of {len(requests)} questions, last: {failed[-1]}; "
                f"those that came are in the cache, call again to go on{hint}"
            )

    def stream(self, **how: Any) -> Iterator[list[str]]:
        """Each answer as one piece."""
        found = self.answers(**how)
        if any(found.texts):
            yield list(found.texts)
        return found

    def _request(
        self, row: int, generation: Mapping[str, Any], generators: Sequence[torch.Generator] | None
    ) -> dict[str, Any]:
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
        more = {TOLD_TO_VLLM[name]: value for name, value in settings.items() if name in TOLD_TO_VLLM}
        seed = 0
        if drawn and generators is not None:
            seed = int(torch.randint(SEEDS, (1,), generator=generators[row]))
        request = {
            "messages": [{"role": "user", "content": self.contents[row]}],
            "max_completion_tokens": MAX_NEW_TOKENS,
            "seed": seed,
            **told,
        }
        more |= self.fields[row]
        return {**request, "extra_body": more} if more else request


def _jpeg(frame: Tensor) -> str:
    """uint8 [3,H,W] as JPEG in base64."""
    stored = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(stored, "JPEG", quality=JPEG_QUALITY)
    return base64.b64encode(stored.getvalue()).decode()


def _no_text(body: str) -> str | None:
    """Why a response is no answer; None where it is one."""
    _, choice = message_of(body)
    if choice["message"].get("content") is None and not choice["message"].get("refusal"):
        return "a message without a text came back"
    return None


def _text(message: Mapping[str, Any]) -> str:
    """The answer; where the model refuses, its words for that, which no rule counts as right."""
    refusal = message.get("refusal")
    if refusal:
        logger.warning("a question was refused: %s", storable(refusal)[:200])
    return (message.get("content") or refusal or "").strip()


def _tokens(response: Mapping[str, Any]) -> int:
    usage = response.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and 0 <= count < SEEDS else 0


def build(
    *,
    weights: str | None = None,
    endpoint: Mapping[str, Any] | None = None,
    max_text_tokens: int = 512,
    times_in_prompt: bool = False,
) -> EndpointAnswerer:
    """Source `endpoint`: a model of a server, whose address and key are in the environment.

    Args:
        weights: the model, as the server calls it.
        endpoint: the section `model.backbone.endpoint`.
        max_text_tokens, times_in_prompt: see `EndpointAnswerer`.

    Raises:
        ConfigError: no model is named, or an address with a key in it.
        EndpointError: the openai package is not installed.
    """
    if not weights:
        raise ConfigError(
            "model.backbone.weights is empty: expected the model as the server calls it, for source endpoint"
        )
    settings = dict(endpoint or {})
    form, size, cache = (settings.pop(name) for name in ("frames", "image_size", "cache"))
    asked = Endpoint(weights, asker="model.backbone.source endpoint", **settings)
    return EndpointAnswerer(
        asked,
        form=form,
        image_size=size,
        cache=cache,
        max_text_tokens=max_text_tokens,
        times_in_prompt=times_in_prompt,
    )
