"""A model behind a server as the answerer of an LSTP: vLLM's, llama.cpp's, OpenAI's.

In: frames, prompts and the frames' seconds. Out: answers. No weights are here and nothing learns; how likely an answer
is nobody tells. What is sent and kept: `models/answer/served.py`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lavis_lstp.endpoint import CHARACTERS_PER_TOKEN
from lavis_lstp.errors import ConfigError
from lavis_lstp.models.answer.answerer import Answers, GivenUp
from lavis_lstp.models.answer.served import SEEDS, Answer, Served, jpeg


class EndpointAnswerer(nn.Module):
    """A served model.

    Args:
        max_text_tokens: about so many tokens of a conversation are sent.
    """

    PARTS: Mapping[str, tuple[str, ...]] = {}
    is_encoder_decoder = False
    num_tokens = None

    def __init__(self, served: Served, *, max_text_tokens: int = 512):
        super().__init__()
        self.served, self.image_size, self.max_text_tokens = served, served.image_size, max_text_tokens
        self.anchor = nn.Parameter(torch.zeros(0), requires_grad=False)  # says on which device the model is

    def tokenizer(self, text: str) -> dict[str, list[int]]:
        """Return about as many ids as the text has tokens: a server does not say which tokenizer is its own."""
        return {"input_ids": [0] * -(-len(text) // CHARACTERS_PER_TOKEN)}

    def look(self, frames: Tensor, which: Tensor, prompts: list[str], times_s: Tensor | None = None) -> EndpointReading:
        """See `Answerer.look`; frames, uint8 [U,3,H,W], are encoded here, and sent when an answer is asked for."""
        pictures = [jpeg(frame) for frame in frames.cpu().numpy()]
        asked = []
        for row, prompt in enumerate(prompts):
            real = which[row].cpu() >= 0
            seconds = None if times_s is None else times_s[row].cpu()[real].tolist()
            asked.append(([pictures[i] for i in which[row].cpu()[real].tolist()], prompt, seconds))
        return EndpointReading(self.served, asked)

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
    """A `Reading` of questions that a server is asked.

    Args:
        asked: pictures, prompt and seconds of each row.
    """

    def __init__(self, served: Served, asked: list[tuple[list[str], str, list[float] | None]]):
        self.served, self.asked = served, asked

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
            ConfigError, EndpointError: see `Served.request` and `Served.answers`.
        """
        return _answers(self.served.answers(self._requests(generation, generators), given_up), scored)

    def stream(
        self,
        *,
        generators: Sequence[torch.Generator] | None = None,
        given_up: GivenUp | None = None,
        **generation: Any,
    ) -> Generator[list[str], None, Answers]:
        """See `Reading.stream`; the pieces are the server's."""
        return _answers((yield from self.served.stream(self._requests(generation, generators), given_up)), True)

    def _requests(
        self, generation: Mapping[str, Any], generators: Sequence[torch.Generator] | None
    ) -> list[dict[str, Any]]:
        seeds = [0] * len(self.asked)
        if generation.get("do_sample") and generators is not None:
            seeds = [int(torch.randint(SEEDS, (1,), generator=one)) for one in generators]
        return [self.served.request(*row, generation, seed) for row, seed in zip(self.asked, seeds, strict=True)]


def _answers(found: Sequence[Answer], scored: bool) -> Answers:
    texts = [text for text, _ in found]
    if not scored:
        return Answers(texts, None, None)
    return Answers(texts, torch.full((len(texts),), torch.nan), torch.tensor([count for _, count in found]))


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
        max_text_tokens: see `EndpointAnswerer`; times_in_prompt: see `Served`.

    Raises:
        ConfigError, EndpointError: see `Served`.
    """
    return EndpointAnswerer(
        Served(weights, times_in_prompt=times_in_prompt, **(endpoint or {})), max_text_tokens=max_text_tokens
    )
