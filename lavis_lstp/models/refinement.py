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
from lavis_lstp.schema import NO_SPAN

ROWS = 512
"""Frames answered at once; bounds memory."""


@dataclass(frozen=True)
class Refinement:
    """How pseudo spans are made in the training step; see `pseudo_span`. Answers are greedy (published)."""

    subtract_min: bool = True
    smooth: int = 1
    max_new_tokens: int = 127

    def spans(self, model: nn.Module, samples: Mapping) -> Tensor:
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
def pseudo_scores(model: nn.Module, samples: Mapping, generation: Mapping, rows: int = ROWS) -> Tensor:
    """Token recall of each frame's own answer.

    Args:
        model: an LSTP.
        samples: with text_output, the answers to compare with.
        generation: transformers' generation arguments.
        rows: frames answered at once.

    Returns:
        float32 [B,T] on the CPU, 0..1; padded frames, and those of images and texts, score 0.
    """
    frames, mask = samples["frames"], samples["frame_mask"].cpu()
    prompts = model.prompts(samples)
    scores = torch.zeros(mask.shape)
    videos = [row for row, moving in enumerate(moves(samples).tolist()) if moving]
    first, which = distinct_media(samples)
    owner = first[which].tolist()
    steps = [(row, step) for row in sorted({owner[row] for row in videos}) for step in range(int(mask[row].sum()))]
    features = {}  # each video once, however many questions it has
    for chunk in in_pieces(steps, rows, model):
        places = torch.tensor(chunk, dtype=torch.long).view(-1, 2).to(frames.device)
        # a black frame where the other ranks have more to look at than this one
        chosen = frames[places[:, 0], places[:, 1]] if chunk else frames.new_zeros(1, *frames.shape[2:])
        looked = model.image_features(chosen.to(model.device))
        features.update(zip(chunk, looked[: len(chunk)], strict=True))
    pairs = [(row, step) for row in videos for step in range(int(mask[row].sum()))]
    for chunk in in_pieces(pairs, rows, model):
        chosen = torch.stack([features[owner[row], step] for row, step in chunk]) if chunk else looked[:1]
        texts = [prompts[row] for row, _ in chunk] or prompts[:1]
        tokens = model.backbone.frame_tokens(chosen, texts)
        one = torch.ones(len(texts), 1, dtype=torch.long, device=tokens.device)
        prefix, prefix_mask = model.fusion(tokens[:, None], one, model.backbone.project)
        generators = None
        if generation.get("do_sample"):
            names = samples.get("question_id") or samples["text_input"]
            generators = sample_generators((f"{names[row]} {step}" for row, step in chunk or [(0, 0)]), model.seed)
        answers = model.backbone.generate(prefix, prefix_mask, texts, generators=generators, **generation)
        for (row, step), answer in zip(chunk, answers[: len(chunk)], strict=True):
            scores[row, step] = token_recall(samples["text_output"][row], answer)
    return scores
