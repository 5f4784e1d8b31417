"""OpenAI's chat completions as questions of ours, and our answers in OpenAI's form.

In: the body of a request. Out: a question, the turns before it, what its media are called, and settings. Fields that
would change an answer and are not followed are refused, fields that change nothing are accepted. LLaVA-style messages
(`<image>` in the text), Qwen-style ones ({"type": "video", "video": ...}) and OpenAI's own mean the same here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from lavis_lstp.config.fields import SAMPLING
from lavis_lstp.data.prompts import without_tokens
from lavis_lstp.errors import ConfigError, shortened, unknown_name
from lavis_lstp.inference.prediction import Prediction, Turn
from lavis_lstp.inference.predictor import history_of
from lavis_lstp.inference.settings import GENERATION, OWN
from lavis_lstp.serving.limits import Limits
from lavis_lstp.untrusted import unicode_text

IGNORED = (
    *("user", "metadata", "store", "service_tier", "stream_options", "safety_identifier", "prompt_cache_key"),
    *("parallel_tool_calls", "modalities", "prompt_cache_retention"),
)
"""Fields that change no answer of this model."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "reasoning_effort": (None, "none"),
    "audio": (None,),
    "prediction": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Fields that are not followed, and their values that ask for nothing."""
MEDIA_PARTS = ("image_url", "video_url", "input_video", "input_image", "image", "video", "file")
MOST_STOPS = 8
MOST_SUBTITLES = 1_000_000
"""Characters of a file of subtitles; a film of two hours has about 150,000."""


class Message(BaseModel):
    """A message of a conversation; its content is a text or a list of parts."""

    model_config = ConfigDict(extra="ignore")
    role: str = Field(max_length=20, examples=["user"])
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions. Further fields of OpenAI's and settings of ours are listed in docs."""

    model_config = ConfigDict(extra="allow")
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    model: str | None = Field(None, max_length=1000)
    stream: bool | None = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    subtitles: str | None = Field(None, max_length=MOST_SUBTITLES)
    stream_options: dict[str, Any] | None = None


@dataclass
class Question:
    """The question of a request.

    Attributes:
        media: `data:` URLs, file ids or addresses: none, one, or the pictures of a video.
        instructions: the text of system messages.
        stops: texts at which an answer ends.
        subtitles: the text of a file of the video's subtitles, "" = none.
    """

    question: str
    history: list[Turn]
    media: list[str] = field(default_factory=list)
    instructions: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)
    subtitles: str = ""


def read_request(request: ChatRequest, limits: Limits) -> Question:
    """Return the question. Raises ConfigError for a field that is not followed, or more than one medium."""
    instructions, turns, media = [], [], []
    for number, message in enumerate(request.messages):
        place = f"messages[{number}]"
        text, named = _content(message.content, place)
        if message.role in ("system", "developer"):
            instructions.append(text)
        elif message.role == "user" and turns and turns[-1]["role"] == "user":  # some clients part media and text
            turns[-1]["content"] = f"{turns[-1]['content']}\n{text}".strip()
        elif message.role in ("user", "assistant"):
            turns.append({"role": message.role, "content": text})
        else:
            raise ConfigError(unknown_name(f"role ({place})", message.role, ("user", "assistant", "system")))
        if named and media:
            raise ConfigError(f"{place}: a conversation is about one video, one picture, or pictures of one message")
        media += named
    if len(media) > limits.most_parts or sum(len(turn["content"]) for turn in turns) > limits.most_characters:
        raise ConfigError(f"more than {limits.most_parts} pictures or {limits.most_characters} characters")
    if not turns or turns[-1]["role"] != "user":
        raise ConfigError("the last message must be of role 'user'")
    settings, stops = _settings(request)
    said = "\n".join(filter(None, instructions))
    question, history = turns[-1]["content"], history_of(turns[:-1])
    return Question(question, history, media, said, settings, stops, request.subtitles or "")


def _content(content: str | list[dict[str, Any]] | None, place: str) -> tuple[str, list[str]]:
    """The text of a message, and what its media are called."""
    if content is None or isinstance(content, str):
        return without_tokens(content or ""), []
    texts, media = [], []
    for number, part in enumerate(content):
        kind, where = part.get("type"), f"{place}.content[{number}]"
        if kind in ("text", "input_text"):
            texts.append(_text(part.get("text"), f"{where}.text"))
        elif kind in MEDIA_PARTS:
            media += _media(part.get(kind, part), where)
        else:
            raise ConfigError(unknown_name(f"type of {where}", kind, ("text", *MEDIA_PARTS)))
    return without_tokens("\n".join(texts)), media


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: expected a text, got {type(value).__name__}")
    return unicode_text(value, where)


def _media(value: Any, where: str) -> list[str]:
    """Return the media that a part names: a text, {url}, {file_id}, {data}, {file_data}, or a list of pictures."""
    if isinstance(value, list):
        return [_text(one, where) for one in value]
    if isinstance(value, dict):
        for key in ("url", "file_id", "image_url", "video_url"):
            if value.get(key) is not None:
                return [_text(value[key], f"{where}.{key}")]
        for key in ("data", "file_data"):
            if value.get(key) is not None:
                text = _text(value[key], f"{where}.{key}")
                return [text if text[:5].lower() == "data:" else f"data:;base64,{text}"]
        raise ConfigError(f"{where}: expected one of url, data, file_id")
    return [_text(value, where)]


def _settings(request: ChatRequest) -> tuple[dict[str, Any], list[str]]:
    """Settings of `Predictor.settings`, and texts at which an answer ends."""
    found: dict[str, Any] = {}
    for name, value in (request.model_extra or {}).items():
        if name in OWN or name in GENERATION:
            found[name] = value
        elif name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise ConfigError(f"'{name}' is not supported by this model; leave it out")
        elif name not in IGNORED:
            known = (*OWN, *GENERATION, *NEUTRAL, *IGNORED, *ChatRequest.model_fields)
            raise ConfigError(unknown_name("field", name, known))
    if request.max_tokens is not None or request.max_completion_tokens is not None:
        given = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
        found["max_new_tokens"] = given
    if request.seed is not None:
        found["seed"] = request.seed
    if request.temperature == 0:  # greedy, whatever else is said of sampling
        found = {name: value for name, value in found.items() if name not in SAMPLING} | {"do_sample": False}
    elif request.temperature is not None:
        found.update(do_sample=True, temperature=request.temperature)
    if request.top_p is not None and found.get("do_sample"):
        found["top_p"] = request.top_p
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > MOST_STOPS or not all(stops):
        raise ConfigError(f"'stop' may be at most {MOST_STOPS} texts, none of them empty")
    return found, stops


def cut(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first of `stops`."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def evidence(found: Prediction) -> dict[str, Any]:
    """The field `lstp` of an answer: where it came from."""
    return {
        "span_s": found.span_s,
        "frame_times": found.frame_times_s,
        "frame_index": found.frame_index,
        "candidate_times": found.candidate_times_s,
        "scores": found.scores,
        "log_prob": found.log_prob,
        "seconds": found.seconds,
        **({"subtitles": found.subtitles} if found.subtitles else {}),
    }


def head(kind: str, answer_id: str, model: str) -> dict[str, Any]:
    return {"id": answer_id, "object": kind, "created": int(time.time()), "model": model}


def usage(prompt_tokens: int, found: Prediction) -> dict[str, int]:
    made = int(found.log_prob["tokens"])
    return {"prompt_tokens": prompt_tokens, "completion_tokens": made, "total_tokens": prompt_tokens + made}


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object, one line; half a surrogate pair, which JSON may bring and has no bytes, becomes `?`."""
    line = shortened(" ".join(message.split()), 500).encode("utf-8", "replace").decode()
    return {"error": {"message": line, "type": kind, "param": None, "code": code}}
