"""Prompts that a video language model has read as a conversation: loss, answers, pieces and likelihood.

In: rows that go through the model together, and the model. Out: a `Reading`. Rows that cannot be laid side by side are
groups of their own, read one after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lavis_lstp.errors import ConfigError
from lavis_lstp.models.answer.answerer import Answers, GivenUp
from lavis_lstp.models.answer.language import IGNORED, LanguageAnswerer, cache_of, scored_answers
from lavis_lstp.models.answer.streaming import refuse_beams


class Rows(NamedTuple):
    """Prompts that go through the model together.

    rows: their places in the batch; a last one of None counts for nothing. tokens: name -> [R,P], padded on the left.
    positions: int64 [R,P], or [4,R,P] where the model has several axes of them. frames: all other inputs.
    """

    rows: list[int | None]
    tokens: dict[str, Tensor]
    positions: Tensor
    frames: dict[str, Tensor]


class ChatReading:
    """A `Reading` by a `video_llm.VideoLLM`, in groups of rows that fit into one call.

    Args:
        answerer: the model.
        groups: every row of the batch is in one of them.
        rows: their number.
    """

    def __init__(self, answerer: LanguageAnswerer, groups: list[Rows], rows: int):
        self.answerer, self.groups, self.rows = answerer, groups, rows
        self._read: dict[int, tuple[str, Any, Tensor]] = {}

    def loss(self, answers: list[str]) -> Tensor:
        """See `Reading.loss`: float32 []."""
        total, count = 0, 0
        for group in self.groups:
            sums, labels = self._loss(group, [answers[row] if row is not None else "" for row in group.rows])
            total, count = total + sums, count + int((labels != IGNORED).sum())
        return total / max(1, count)

    def _loss(self, group: Rows, answers: list[str]) -> tuple[Tensor, Tensor]:
        """Sum of the cross entropy of the answers' tokens, and their labels; padding stands behind, not in front."""
        more, labels = self._behind(group, answers)
        tokens = {key: torch.cat([value, more[key]], 1) for key, value in group.tokens.items()}
        positions = torch.cat([group.positions, self._next(group.positions, labels.shape[1])], -1)
        labels = torch.cat([labels.new_full(group.tokens["input_ids"].shape, IGNORED), labels], 1)
        order = torch.argsort(tokens["attention_mask"], dim=1, stable=True, descending=True)
        tokens = {key: value.gather(1, order) for key, value in tokens.items()}
        positions = positions.gather(-1, order.expand(positions.shape))
        labels = labels.gather(1, order)[:, 1:]
        kept = (labels != IGNORED).any(0).nonzero()[:, 0]
        if not len(kept):
            kept = labels.new_zeros(1)
        logits = self.answerer.forward_model(
            tokens, positions, **group.frames, use_cache=False, logits_to_keep=kept
        ).logits
        labels = labels[:, kept]
        counted = labels != IGNORED
        nothing = 0 * logits[~counted].sum() if group.rows[-1] is None or not counted.any() else 0
        return cross_entropy(logits[counted].float(), labels[counted], reduction="sum") + nothing, labels

    def answers(self, *, scored: bool = True, given_up: GivenUp | None = None, **how: Any) -> Answers:
        made = [self._answers(group, scored=scored, given_up=_within(group, given_up), **how) for group in self.groups]
        return self._together(made, scored)

    def _answers(self, group: Rows, *, generators: Sequence[torch.Generator] | None = None, **how: Any) -> Answers:
        """Of a group's rows, in their order; a row that counts for nothing draws from a generator of its own."""
        if generators is not None:
            spare = torch.Generator().manual_seed(0)
            generators = [spare if row is None else generators[row] for row in group.rows]
        return self.answerer.write(
            lambda wanted: self.answerer.generate_group(group, wanted),
            len(group.rows),
            generators=generators,
            **how,
        )

    def _together(self, made: list[Answers], scored: bool) -> Answers:
        texts = [""] * self.rows
        sums, counts = torch.zeros(self.rows), torch.zeros(self.rows, dtype=torch.long)
        for group, answers in zip(self.groups, made, strict=True):
            for i, row in enumerate(group.rows):
                if row is None:
                    continue
                texts[row] = answers.texts[i]
                if scored:
                    sums[row], counts[row] = answers.log_probs[i], answers.counts[i]
        return Answers(texts, sums if scored else None, counts if scored else None)

    def stream(self, *, given_up: GivenUp | None = None, **how: Any) -> Iterator[list[str]]:
        refuse_beams(how)
        made = []
        for group in self.groups:
            pieces = self.answerer.pieces(len(group.rows)).of(
                lambda streamer, ended, group=group: self._answers(group, streamer=streamer, given_up=ended, **how),
                _within(group, given_up),
            )
            made.append((yield from self._spread(group, pieces)))
        return self._together(made, True)

    def _spread(self, group: Rows, pieces: Iterator[list[str]]) -> Iterator[list[str]]:
        """Pieces of a group's rows as pieces of all rows."""
        try:
            while True:
                try:
                    new = next(pieces)
                except StopIteration as end:
                    return end.value
                spread = [""] * self.rows
                for row, piece in zip(group.rows, new, strict=True):
                    if row is not None:
                        spread[row] = piece
                if any(spread):
                    yield spread
        finally:
            pieces.close()

    @torch.no_grad()
    def log_probs(self, rows: list[int], answers: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """See `Reading.log_probs`: float32 [M], int64 [M], bool [M]."""
        sums, counts = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.long)
        greedy = torch.ones(len(rows), dtype=torch.bool)
        for number, group in enumerate(self.groups):
            places = [i for i, row in enumerate(rows) if row in group.rows]
            if not places:
                continue
            within = torch.tensor([group.rows.index(rows[i]) for i in places], device=group.positions.device)
            found = scored_answers(*self._logits(number, within, [answers[i] for i in places]))
            at = torch.tensor(places)
            for whole, part in zip((sums, counts, greedy), found, strict=True):
                whole[at] = part.cpu()
        return sums, counts, greedy

    def _logits(self, number: int, rows: Tensor, answers: list[str]) -> tuple[Tensor, Tensor]:
        """Logits [M,A,V] and labels [M,A] of answers to rows of a group, whose prompts are read once."""
        group = self.groups[number]
        if number not in self._read:
            read = self.answerer.forward_model(
                group.tokens, group.positions, **group.frames, use_cache=True, logits_to_keep=1
            )
            self._read[number] = *cache_of(self.answerer.model, read), read.logits[:, -1]
        name, cache, first = self._read[number]
        more, labels = self._behind(group, answers)
        own = copy.deepcopy(cache)
        own.batch_select_indices(rows)
        tokens = {key: value for key, value in more.items() if key != "attention_mask"}
        tokens["attention_mask"] = torch.cat([group.tokens["attention_mask"][rows], more["attention_mask"]], 1)
        positions = self._next(group.positions[..., rows, :], labels.shape[1])
        logits = self.answerer.forward_model(tokens, positions, use_cache=True, **{name: own}).logits
        return torch.cat([first[rows, None], logits[:, :-1]], dim=1), labels

    def _behind(self, group: Rows, answers: list[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Return what stands behind prompts: inputs by token [M,A], and labels [M,A]."""
        told = self.answerer.answer_ids(answers)
        for answer, ids in zip(answers, told, strict=True):
            if self.answerer.of_frames.intersection(ids):
                raise ConfigError(f"the answer {answer[:80]!r} contains a mark that stands for frames; answers may not")
        width = max(1, *map(len, told)) if told else 1
        device = group.positions.device
        labels = torch.tensor([ids + [IGNORED] * (width - len(ids)) for ids in told], device=device)
        real = (labels != IGNORED).long()
        made = {key: torch.zeros_like(real) for key in group.tokens}
        made["attention_mask"] = real
        made["input_ids"] = labels.where(real.bool(), labels.new_full((), self.answerer._pad_id))
        return made, labels

    @staticmethod
    def _next(positions: Tensor, count: int) -> Tensor:
        """Positions of `count` tokens behind those at hand; as in transformers, behind the farthest of all axes."""
        last = positions[..., -1:]
        return last + 1 + torch.arange(count, device=positions.device)


def _within(group: Rows, given_up: GivenUp | None) -> GivenUp | None:
    """The same by the numbers of a group's rows."""
    if given_up is None:
        return None
    return lambda number: group.rows[number] is not None and given_up(group.rows[number])
