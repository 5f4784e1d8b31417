"""Each frame alone answers the question; where it answers right is the pseudo span (paper: temporal refinement).

In: the model and a batch with answers. Out: scores per frame, or spans to learn from. The offline step (task
`pseudo_span`) and the step inside the training forward (self-refinement) share this file; both run in eval mode, where
the published code labelled with dropout on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lavis_lstp.batch import distinct_media, in_pieces, moves
from lavis_lstp.metrics.qa import token_recall
from lavis_lstp.models.where.frame_selector import sample_generators
from lavis_lstp.models.where.pseudo_span import pseudo_span
from lavis_lstp.schema import NO_SPAN, Batch

ROWS = 512
"""Frames answered at once; bounds memory."""


@dataclass(frozen=True)
class Refinement:
    """How pseudo spans are made in the training step; see `pseudo_span`. Answers are greedy (published)."""

    subtract_min: bool = True
    smooth: int = 1
    max_new_tokens: int = 127

    def spans(self, model: nn.Module, samples: Batch) -> Tensor:
        """int64 [B,2], half-open; (-1, -1) for images and texts."""
        greedy = {"max_new_tokens": self.max_new_tokens, "num_beams": 1, "do_sample": False}
        with in_eval_mode(model):
            scores = pseudo_scores(model, samples, greedy)
        spans = []
        for row, moving in enumerate(moves(samples).tolist()):
            own = scores[row, : int(samples["frame_mask"][row].sum())].tolist()
            spans.append(tuple(pseudo_span(own, self.subtract_min, smooth=self.smooth)) if moving else NO_SPAN)
        return torch.tensor(spans, dtype=torch.long)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards each as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def pseudo_scores(model: nn.Module, samples: Batch, generation: Mapping, rows: int = ROWS) -> Tensor:
    """Token recall of each frame's own answer.

    Args:
        model: an LSTP.
        samples: with text_output, the answers to compare with.
        generation: transformers' generation arguments.
        rows: frames answered at once.

    Returns:
        float32 [B,T] on the CPU, 0..1; padded frames, and those of images and texts, score 0.
    """
    mask = samples["frame_mask"].cpu()
    prompts = model.prompts(samples)
    scores = torch.zeros(mask.shape)
    _, which = distinct_media(samples)
    videos = [row for row, moving in enumerate(moves(samples).tolist()) if moving]
    # questions about a frame side by side, so that it is looked at once for all of them
    pairs = sorted(
        ((row, step) for row in videos for step in range(int(mask[row].sum()))),
        key=lambda pair: (int(which[pair[0]]), pair[1], pair[0]),
    )
    for chunk in in_pieces(pairs, rows, model):
        # one black frame where the other ranks have more to look at than this one
        asked = chunk or [(0, -1)]
        of, step = torch.tensor(asked).unbind(1)
        reading = model.look(samples, step[:, None], [prompts[row] for row, _ in asked], rows=of)
        generators = None
        if generation.get("do_sample"):
            names = samples.get("question_id") or samples["text_input"]
            generators = sample_generators((f"{names[row]} {step}" for row, step in asked), model.chooser.seed)
        answers = reading.answers(generators=generators, scored=False, **generation).texts
        for (row, step), answer in zip(chunk, answers[: len(chunk)], strict=True):
            scores[row, step] = token_recall(samples["text_output"][row], answer)
    return scores
