"""What to say: the contract of everything that looks at frames and answers, and how one is found by its source.

In: frames of a batch, which of them each question is shown, and prompts. Out: a `Reading`, from which come the loss of
given answers, answers, their pieces as they are made, and how likely given answers are. `LSTP` knows no more of an
answerer than this file says.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from lavis_lstp.config.model import SOURCES, Backbone
from lavis_lstp.errors import ConfigError, unknown_name

if TYPE_CHECKING:  # a served model is asked where there is no torch
    import torch
    from torch import Tensor


def with_times(prompt: str, times_s: Sequence[float] | None) -> str:
    """Return a prompt behind the seconds of its frames, as `model.backbone.times_in_prompt` wants it."""
    if not times_s:
        return prompt
    return f"The frames show these seconds of the video: {', '.join(f'{t:.1f}' for t in times_s)}.\n{prompt}"


def refuse_marks(prompt: str, marks: Sequence[str]) -> None:
    """Raise ConfigError for a prompt with a mark that the model reads as a turn's end, an image or a video."""
    if mark := next((mark for mark in marks if mark in prompt), None):
        raise ConfigError(
            f"the prompt {prompt[:80]!r} contains {mark!r}, a mark of the model's own; questions may not, and "
            "model.prompt needs none with source transformers: set it to '{question}'"
        )


class Answers(NamedTuple):
    """Answers, and how sure the language model was of each.

    texts: B strings. log_probs: float32 [B], the log-probability of the tokens up to the end mark, itself included,
    summed. counts: int64 [B], the number of these tokens. Probabilities are the model's own, before temperature, top_p
    and penalties; None where nobody asked for them.
    """

    texts: list[str]
    log_probs: Tensor | None
    counts: Tensor | None


GivenUp = Callable[[int], bool]
"""Given the number of a row, says whether nobody waits for its answer any more; asked at every token."""


class Reading(Protocol):
    """B prompts with the frames that they are about, as a model has read them."""

    def loss(self, answers: list[str]) -> Tensor:
        """Cross entropy of the answers' tokens, [], the mean over all answer tokens of the batch, with gradients.

        Args:
            answers: B strings with their end marks. Where none has a token the loss is 0, and still part of the graph.
        """

    def answers(
        self,
        *,
        generators: Sequence[torch.Generator] | None = None,
        scored: bool = True,
        given_up: GivenUp | None = None,
        **generation: Any,
    ) -> Answers:
        """An answer to each prompt; that of a row does not depend on the other rows.

        Args:
            generators: one a row, on the CPU, where tokens are drawn (do_sample).
            scored: False leaves out the log-probabilities, and the memory that they take.
            given_up: a row of which it says True is cut short there.
            generation: transformers' generation arguments, see `generation.py`.

        Raises:
            ConfigError: a setting is not known or not supported.
        """

    def stream(
        self,
        *,
        generators: Sequence[torch.Generator] | None = None,
        given_up: GivenUp | None = None,
        **generation: Any,
    ) -> Iterator[list[str]]:
        """The answers as they are made: B new pieces of text at a time, "" for a row with none.

        The pieces of a row are what `answers` gives for it, cut; the generator returns these `Answers`. Closing it ends
        the generation. Arguments are those of `answers`.
        """

    def log_probs(self, rows: list[int], answers: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return how likely given answers are, end mark included; a prompt is read once for all answers to it.

        Args:
            rows: which prompt each answer is to, M numbers of 0..B-1.
            answers: M strings.

        Returns:
            sum over the answer's tokens, float32 [M]; their number, int64 [M]; and bool [M], whether each of them is
            the likeliest one at its place, so that greedy generation would have said the same.
        """


class Answerer(Protocol):
    """A model that looks at frames and answers; in fact a `torch.nn.Module`, whose weights `LSTP` trains and saves.

    PARTS: names of `config.model.PARTS` that it has -> how the keys of their weights begin. image_size: side of the
    frames that it takes, in px. is_encoder_decoder: whether an answer goes on from the prompt (False) or has a begin
    mark of its own. num_tokens: how many tokens it has scores for; None = nobody can tell. max_text_tokens: prompts and
    answers are cut to so many. `LanguageAnswerer` has the rest.
    """

    PARTS: Mapping[str, tuple[str, ...]]
    image_size: int
    is_encoder_decoder: bool
    num_tokens: int | None
    max_text_tokens: int

    def look(self, frames: Tensor, which: Tensor, prompts: list[str], times_s: Tensor | None = None) -> Reading:
        """Reads prompts with their frames.

        Args:
            frames: uint8 [U,3,H,W], RGB; each is looked at once, however many questions are shown it.
            which: int64 [B,K], the frames each prompt is shown, in the order of time; -1 where it has fewer than K. A
                row without any is a text. Frames that no row names are looked at, and count for nothing: several ranks
                run the same modules.
            prompts: B strings.
            times_s: float32 [B,K], seconds of the frames from the start of the video; None where nobody knows.
        """

    def matched(self, state_dict: Mapping[str, Tensor], source: str, before: str = "") -> dict[str, Tensor]:
        """A state dict under this model's names, see `LanguageAnswerer.matched`."""


NAMES = ("family", "arch", "model_type", "fusion", "seed")
"""Settings that say whose model it is, are of the Q-Former alone, or are for adapters and sampler as well; a source
leaves those that it has no use for alone."""


def build_answerer(source: str, settings: Mapping[str, Any]) -> Any:
    """The answerer of a source, built from the settings that its builder takes.

    Args:
        source: a key of `config.model.SOURCES`.
        settings: `model.backbone` without source, and model.fusion; values that a builder has no argument for must be
            the defaults.

    Raises:
        ConfigError: the source is not known, or has no use for a setting.
        WeightsError: weights are missing or do not fit.
    """
    if source not in SOURCES:
        raise ConfigError(unknown_name("source (model.backbone.source)", source, SOURCES))
    build = _builder(source)
    taken, defaults = inspect.signature(build).parameters, asdict(Backbone())
    for key, value in settings.items():
        if key not in taken and key not in NAMES and value != defaults.get(key):
            users = [other for other in SOURCES if key in inspect.signature(_builder(other)).parameters]
            raise ConfigError(
                f"model.backbone.{key} is for source {', '.join(users)}; source {source} has no use for it, set it "
                f"to {'null' if defaults.get(key) is None else defaults[key]}"
            )
    return build(**{key: value for key, value in settings.items() if key in taken})


def _builder(source: str) -> Callable[..., Any]:
    module, _, function = SOURCES[source].partition(":")
    return getattr(importlib.import_module(module), function)
