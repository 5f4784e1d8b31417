"""Answers in pieces: what transformers' `generate` makes in another thread, as text that no later token changes.

In: a function that generates while it is watched, and how tokens become text. Out: an iterator of pieces. Giving an
answer up works here as well: a row that nobody waits for ends at its next token.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lavis_lstp.errors import ConfigError
from lavis_lstp.models.answer.answerer import Answers, GivenUp


def refuse_beams(generation: Mapping[str, Any]) -> None:
    """Raise ConfigError where answers are asked for piece by piece and with beams."""
    if (generation.get("num_beams") or 1) > 1:
        raise ConfigError(
            f"generation setting num_beams={generation['num_beams']!r} does not go with streaming: beams are "
            "chosen at the end; set it to 1"
        )


class EndsGivenUp:
    """A stopping criterion of transformers that ends the rows that nobody waits for.

    Args:
        rows: B, the number of prompts; each has the same number of beams.
    """

    def __init__(self, given_up: GivenUp, rows: int):
        self.given_up, self.rows = given_up, rows

    def __call__(self, input_ids: Tensor, scores: Any = None, **unused: Any) -> Tensor:
        """ids of the answers so far [B*beams,S] -> bool [B*beams]."""
        beams = len(input_ids) // self.rows
        ended = [self.given_up(row) for row in range(self.rows) for _ in range(beams)]
        return torch.tensor(ended, device=input_ids.device)


class Pieces:
    """A streamer of transformers that turns tokens into new pieces of text a row.

    A piece ends where a word does, so that no later token changes it; what is held back comes with the end.

    Args:
        rows: B.
        text_of: ids [1,S] -> their text.
        ends: ids that end an answer.
        device: where the model computes, "cpu" or "cuda".
    """

    def __init__(self, rows: int, *, text_of: Callable[[Tensor], list[str]], ends: Collection[int], device: str):
        self.text_of, self.ends, self.device = text_of, ends, device
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.said = [""] * rows
        self.tokens: queue.Queue[list[int] | None] = queue.Queue()

    # what transformers calls; `put` is given the prompt's ids [B,S] first
    def put(self, value: Tensor) -> None:
        if value.ndim == 1:
            self.tokens.put(value.tolist())

    def end(self) -> None:
        pass

    def of(self, generate: Callable[[Pieces, GivenUp], Answers], given_up: GivenUp | None) -> Iterator[list[str]]:
        """The pieces of what `generate` makes while it hands its tokens to the streamer; see `Reading.stream`."""
        autocast = torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)  # a thread has its own
        closed = threading.Event()
        outcome: list[Answers | BaseException] = []

        def work() -> None:
            try:
                with torch.autocast(self.device, dtype=autocast[1], enabled=autocast[0]):
                    outcome.append(generate(self, lambda row: closed.is_set() or bool(given_up and given_up(row))))
            except BaseException as error:  # raised again where the pieces are read
                outcome.append(error)
            self.tokens.put(None)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (tokens := self.tokens.get()) is not None:
                new = [self._piece(row, token) for row, token in enumerate(tokens)]
                if any(new):
                    yield new
        finally:
            closed.set()
            thread.join()
        (made,) = outcome
        if isinstance(made, BaseException):
            raise made
        last = [text[len(said) :] for text, said in zip(made.texts, self.said, strict=True)]
        if any(last):
            yield last
        return made

    def _piece(self, row: int, token: int) -> str:
        ids = self.ids[row]
        if ids and ids[-1] in self.ends:
            return ""
        ids.append(token)
        (text,) = self.text_of(torch.tensor([ids]))
        text = text[: max(0, text.rfind(" "))]
        if not text.startswith(self.said[row]):
            return ""
        new = text[len(self.said[row]) :]
        self.said[row] = text
        return new
