"""Where to look: a signal of frames, a scorer of candidates and a selector, as one.

In: a batch of samples (`lavis_lstp.schema`). Out: the K frames of each that the answerer is shown, and what they were
chosen by. A selector that asks for nothing needs neither signal nor scorer. The temporal sampler is one scorer; it
turns flow and question into start and end logits. Indices only: an answer's loss gives the sampler no gradient (paper).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lavis_lstp.batch import (
    blank_video,
    distinct_media,
    in_pieces,
    moves,
    several_ranks,
    take_rows,
    weights_are_divided,
)
from lavis_lstp.data.store import Store
from lavis_lstp.errors import ConfigError
from lavis_lstp.models.where.flow import GIVEN, FlowExtractor
from lavis_lstp.models.where.frame_selector import FrameSelector, sample_generators
from lavis_lstp.models.where.scorers import FrameScorer, vectors
from lavis_lstp.models.where.selectors import LazyScores
from lavis_lstp.models.where.temporal_sampler import SamplerOutput, TemporalSampler
from lavis_lstp.schema import Batch

Clock = Callable[[str], AbstractContextManager]
"""Given the name of a stage, measures what is done in it."""


@dataclass(frozen=True)
class Choice:
    """Frames chosen for each sample of a batch.

    Attributes:
        frame_index: int64 [B,K] of 0..T-1, sorted; -1 where a sample has no frame.
        span: int64 [B,2], half-open: where they come from.
        num_filled: int64 [B], those that a rule over scores did not choose itself; None of other rules.
        spans: of each sample all spans that they come from, the likeliest first; None of rules that find one at most.
        num_shown: int64 [B], frames of each sample where the selector decides how many; else None.
        logits: of the temporal sampler, where it was asked.
        scores: float32 [B,T], how much each frame has to do with its question: of the scorer that the selector asks, or
            of 0..1, where there are logits; NaN where a rule that reads few did not ask.
        num_scored: int64 [B], frames that were scored; None where there are no scores.
        flow: float32 [B,T,2,S,S], where it was computed or read.
    """

    frame_index: Tensor
    span: Tensor
    num_filled: Tensor | None
    spans: list[list[tuple[int, int]]] | None = None
    num_shown: Tensor | None = None
    logits: SamplerOutput | None = None
    scores: Tensor | None = None
    flow: Tensor | None = None
    num_scored: Tensor | None = None


def frame_scores(logits: SamplerOutput, flow_mask: Tensor, frame_mask: Tensor) -> Tensor:
    """Return how likely each frame lies in the span: P(start <= t) P(end >= t), over the softmax of each set of logits.

    Args:
        flow_mask: [B,L], 1 = real, of the logits; frame_mask: [B,T]. Where flows are not one a frame, a frame has the
            score of the flow that is as far along.

    Returns:
        float32 [B,T] on the CPU, 0 where padded.
    """
    real = flow_mask.cpu().bool()
    start, end = (x.detach().float().cpu().masked_fill(~real, -torch.inf) for x in logits[1:3])
    begun = start.softmax(dim=1).nan_to_num().cumsum(dim=1)
    open_yet = end.softmax(dim=1).nan_to_num().flip(1).cumsum(dim=1).flip(1)
    scores = (begun * open_yet).clamp(0, 1)
    frames, flows = (mask.cpu().long().sum(dim=1, keepdim=True) for mask in (frame_mask, flow_mask))
    at = torch.arange(frame_mask.shape[1])[None] * (flows - 1).clamp(min=0) // (frames - 1).clamp(min=1)
    return scores.gather(1, at.clamp(max=scores.shape[1] - 1)).where(frame_mask.cpu().bool(), 0.0)


def window_starts(length: int, window: int, overlap: int) -> list[int]:
    """The first flow of each window over `length` flows; the last window ends with them, and so may overlap more.

    >>> window_starts(20, 8, 2)
    [0, 6, 12]
    >>> window_starts(21, 8, 2)
    [0, 6, 12, 13]
    """
    last = length - window
    return [*range(0, last, window - overlap), last] if last > 0 else [0]


def _known(scores: list[LazyScores], frame_mask: Tensor) -> Tensor:
    """float32 [B,T]: NaN where nobody asked, 0 where padded."""
    found = torch.zeros(frame_mask.shape)
    for row, own in enumerate(scores):
        found[row, : len(own)] = torch.from_numpy(own.known).float()
    return found


def _count(scores: Tensor, samples: Batch, by_sampler: bool) -> Tensor:
    """int64 [B], frames with a score; the sampler scores nothing that does not move."""
    count = samples["frame_mask"].sum(dim=1).cpu() - scores.isnan().sum(dim=1)
    return count * moves(samples) if by_sampler else count


class SamplerScorer:
    """The temporal sampler as a scorer: flow and question in, start and end logits of the candidates out.

    A video of more flows than `window` is scored in windows of the length that the sampler was trained on. Where they
    overlap, the logits are averaged, and those near the middle of a window count more: one near its edge knows little
    of what comes next. One head makes all logits, so those of two windows are on one scale.

    Args:
        tokenizer: turns the question into the sampler's token ids.
        mode: "fusion" or "multi_modal", which layers of the sampler run.
        prompt: template with {question}.
        max_tokens: questions are cut to this many tokens.
        window, overlap: flows that are scored at a time, and shared by two windows; None = all at once.

    Raises:
        ConfigError: windows that do not move on, or are longer than the sampler's positions.
    """

    def __init__(
        self,
        sampler: TemporalSampler,
        tokenizer,
        *,
        mode: str = "fusion",
        prompt: str = "{question}",
        max_tokens: int = 128,
        window: int | None = None,
        overlap: int | None = None,
    ):
        if window is None and overlap:
            raise ConfigError("model.sampler.overlap is of windows; set model.sampler.window")
        self.window, self.overlap = window, (window or 0) // 4 if overlap is None else overlap
        if window is not None and not self.overlap < window <= sampler.max_positions - 2:
            raise ConfigError(
                f"model.sampler.window is {window}; expected more than the overlap ({self.overlap}) and at most "
                f"{sampler.max_positions - 2} (model.sampler.max_positions - 2)"
            )
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.mode = mode
        self.prompt = prompt
        self.max_tokens = max_tokens

    def __call__(self, flow: Tensor, mask: Tensor, questions: list[str]) -> SamplerOutput:
        """Logits [B,L]; without gradient unless the sampler learns.

        Args:
            flow: [B,L,2,S,S]; mask: [B,L], 1 = real, real ones first; questions: B strings.
        """
        # with divided weights (ZeRO-3) other ranks may need several windows, and wait until this one runs as often
        if self.window is None or (mask.shape[1] <= self.window and not weights_are_divided(self.sampler)):
            return self._score(flow, mask, questions)
        window, counts, device = min(self.window, mask.shape[1]), mask.sum(dim=1).tolist(), flow.device
        places = torch.arange(window, device=device)
        weight = torch.minimum(places + 1, window - places).float()  # by the distance from the window's edge
        windows = [(b, s) for b, count in enumerate(counts) for s in window_starts(count, window, self.overlap)]
        total = torch.zeros(mask.shape, device=device)
        for row, start in windows:
            total[row, start : start + window] += weight
        joined = torch.zeros(2, *mask.shape, device=device)
        for part in in_pieces(windows, len(mask), self.sampler):  # no more at once than there are rows
            asked = part or [(0, 0)]  # for nothing, where another rank has more windows
            rows = [row for row, _ in asked]
            flows, real = (torch.stack([x[row, start : start + window] for row, start in asked]) for x in (flow, mask))
            logits = torch.stack(self._score(flows, real, [questions[row] for row in rows])[1:]).float()
            if not part:
                joined = joined + 0 * logits.sum()
            for i, (row, start) in enumerate(part):
                own = slice(start, start + window)
                joined[:, row, own] += logits[:, i] * (weight / total[row, own])
        return SamplerOutput(None, *joined)

    def _score(self, flow: Tensor, mask: Tensor, questions: list[str]) -> SamplerOutput:
        tokens = self.tokenizer(
            [self.prompt.replace("{question}", question) for question in questions],
            padding="longest",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
            return_token_type_ids=False,
        ).to(flow.device)
        learns = any(parameter.requires_grad for parameter in self.sampler.parameters())
        with nullcontext() if learns else torch.no_grad():
            return self.sampler(flow, mask, tokens["input_ids"], tokens["attention_mask"], mode=self.mode)


class Chooser:
    """Chooses frames. It owns no weights: `LSTP` registers those of its signal and scorer under their published names.

    Args:
        selector: the rule.
        scorer: None where the selector asks for no logits and no loss trains it.
        signal: uint8 frames [B,T,3,H,W] -> flow [B,T,2,h,w]; None where there is no scorer.
        frame_scorer: gives the scores in place of the sampler; None = the sampler does.
        eyes: gives features of frames where the scorer has none; None = the answerer looks at no frame by itself.
        seed: of selectors that draw, in evaluation.
    """

    def __init__(
        self,
        selector: FrameSelector,
        scorer: SamplerScorer | None = None,
        signal: FlowExtractor | None = None,
        seed: int = 0,
        frame_scorer: FrameScorer | None = None,
        eyes: FrameScorer | None = None,
    ):
        self.frame_scorer = frame_scorer
        self.eyes = frame_scorer if frame_scorer is not None and frame_scorer.has_features else eyes
        self.selector = selector
        self.scorer = scorer
        self.signal = signal
        self.seed = seed
        self.training = False
        self._last_flow: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """The device of the scorer's weights."""
        return next(self.scorer.sampler.parameters()).device

    def keep_in(self, store: Store | None) -> None:
        """From now on flow and a frame scorer's features are kept on disk there; None = nowhere."""
        for part in (self.signal, self.frame_scorer, self.eyes):
            if part is not None:
                part.store = store

    def asks_sampler(self, selector: FrameSelector | None = None) -> bool:
        """Return whether the sampler must be asked before a selector, or the chooser's own, can choose."""
        selector = selector or self.selector
        return selector.needs_logits or (selector.needs_scores and self.frame_scorer is None)

    @property
    def has_features(self) -> bool:
        """Return whether a selector that compares features of frames can choose."""
        return self.eyes is not None

    def forget(self) -> None:
        """Drops the flow that is kept of the last video; weights or devices may have changed."""
        self._last_flow = None

    def __call__(
        self,
        samples: Batch,
        *,
        selector: FrameSelector | None = None,
        flow: Tensor | None = None,
        logits: SamplerOutput | None = None,
        clock: Clock | None = None,
    ) -> Choice:
        """Frames for each sample.

        Args:
            selector: in place of the chooser's own.
            flow: [B,T,2,S,S], logits: of these samples, where they are known already.
            clock: measures the stages "flow", "sampler", "scores" and "selection"; "scores" may lie inside of
                "selection", and is no part of it.

        Raises:
            ConfigError: the samples have not what the selector asks for.
        """
        clock, selector = clock or (lambda stage: nullcontext()), selector or self.selector
        scores = features = None
        if selector.needs_scores and self.frame_scorer is not None:
            if selector.asks_few:
                scores = self.lazy_scores(samples, clock)
            else:
                with clock("scores"):
                    scores = self.frame_scores(samples)
        if selector.needs_features:
            with clock("scores"):
                features = self.features(samples)
        if self.asks_sampler(selector) and logits is None:
            with torch.no_grad():
                if flow is None and moves(samples).any():
                    with clock("flow"):
                        flow = self.flow(samples)
                with clock("sampler"):
                    logits = self.logits(samples, flow)
        with clock("selection"):
            own_flow = self.has_own_flow(samples)
            wanted = selector.needs_scores or selector.adapts or not self.training
            if scores is None and logits is not None and wanted:
                scores = frame_scores(logits, self.flow_mask(samples), samples["frame_mask"])
            found = selector(
                samples["frame_mask"].cpu(),
                start_logits=None if logits is None else logits.start_logits,
                end_logits=None if logits is None else logits.end_logits,
                span=self._given_span(samples, selector),
                generators=self.generators(samples),
                flow_mask=self.flow_mask(samples).cpu() if own_flow else None,
                scores=scores,
                questions=samples["text_input"],
                times_s=samples.get("frame_times"),
                features=features,
                figure=self._figure(samples, selector),
            )
        if isinstance(scores, list):
            scores = _known(scores, samples["frame_mask"])
        num_scored = None if scores is None else _count(scores, samples, logits is not None)
        return Choice(*found, logits, scores, flow, num_scored)

    @property
    def flow_from_data(self) -> str | None:
        """motion_vectors or precomputed where the data must bring the flow; None where it is computed or not used."""
        return self.signal.name if self.signal is not None and self.signal.name in GIVEN else None

    # ---- signal -------------------------------------------------------------------------------------------------

    def has_own_flow(self, samples: Batch) -> bool:
        """Return whether the data bring flow that is not one field a frame (`flow_mask`), and the signal takes it."""
        return "flow_mask" in samples and self.flow_from_data is not None

    def flow_mask(self, samples: Batch) -> Tensor:
        """[B,L], 1 = real: of the flows that the scorer sees."""
        return samples["flow_mask" if self.has_own_flow(samples) else "frame_mask"]

    def flow(self, samples: Batch) -> Tensor:
        """[B,T,2,S,S]; of a video that several questions are about it is computed once, over several batches, too."""
        first, which = distinct_media(samples)
        own = samples["flow_mask"] if self.has_own_flow(samples) else None
        frames, mask, given, own = (
            None if value is None else value[first.to(value.device)].to(self.device)
            for value in (samples["frames"], samples["frame_mask"], samples.get("flow"), own)
        )
        # a video with more questions than a batch has
        alone = len(first) == 1 and given is None and not (self.training or weights_are_divided(self.scorer.sampler))
        if alone and self._last_flow and all(map(torch.equal, self._last_flow, (frames, mask))):
            flow = self._last_flow[-1]
        else:
            with torch.no_grad():
                flow = self.signal(frames, mask, flow=given, flow_mask=own)
            self._last_flow = (frames, mask, flow) if alone else None
        return flow[which.to(self.device)]

    # ---- scores -------------------------------------------------------------------------------------------------

    def frame_scores(self, samples: Batch) -> Tensor:
        """Scores of the frame scorer, float32 [B,T], 0 where padded."""
        found = torch.zeros(samples["frame_mask"].shape)
        for row, seen in enumerate(self._looked_at(samples, self.frame_scorer)):
            if seen is not None:
                found[row, : len(seen)] = self.frame_scorer.scores(seen, samples["text_input"][row])
        return found

    def features(self, samples: Batch) -> list[np.ndarray | None]:
        """A vector for each frame of each row, [T,D]: of the scorer where it has some, else of the answerer's vision
        tower."""
        found = self._looked_at(samples, self.eyes)
        return [None if seen is None else vectors(seen).numpy() for seen in found]

    @staticmethod
    def _looked_at(samples: Batch, scorer: FrameScorer) -> list[Tensor | None]:
        """Features [T,...] of each row's frames, which are looked at once where several questions are about them."""
        first, which = distinct_media(samples)
        counts = samples["frame_mask"].sum(dim=1).tolist()
        rows = first.tolist()
        seen = [scorer.features_of(samples["frames"][row, : counts[row]]) if counts[row] else None for row in rows]
        return [seen[place] for place in which.tolist()]

    def lazy_scores(self, samples: Batch, clock: Clock) -> list[LazyScores]:
        """Scores of each row's frames by the frame scorer, which looks at those alone that a rule asks for."""

        def score(row: int, numbers: np.ndarray) -> Tensor:
            with clock("scores"):
                features = self.frame_scorer.features_of(samples["frames"][row, torch.from_numpy(numbers)])
                return self.frame_scorer.scores(features, samples["text_input"][row])

        counts = samples["frame_mask"].sum(dim=1).tolist()
        return [LazyScores(count, partial(score, row)) for row, count in enumerate(counts)]

    def logits(self, samples: Batch, flow: Tensor | None = None, *, must_reach: bool = False) -> SamplerOutput:
        """Start and end logits [B,T] of the videos; 0 for images and texts, which do not reach the sampler.

        With several ranks a batch without a video runs the sampler on a blank one, times 0: each rank must run the
        same modules in the same order, or those that exchange gradients or weights wait for ever.

        Args:
            must_reach: so, too, where the loss would be left without any gradient.
        """
        is_video = moves(samples)
        if is_video.all():
            return self._of_videos(samples, flow)
        rows = is_video.nonzero()[:, 0]
        zeros = torch.zeros(self.flow_mask(samples).shape, device=self.device)
        if len(rows):
            videos = take_rows(samples, rows)
            found = self._of_videos(videos, None if flow is None else flow[rows.to(flow.device)])
            rows = rows.to(self.device)
            start, end = (zeros.index_copy(0, rows, x.float()) for x in (found.start_logits, found.end_logits))
        elif several_ranks() or must_reach:
            blank = self._of_videos(blank_video(samples))
            nothing = 0 * (blank.start_logits.sum() + blank.end_logits.sum())
            start, end = zeros + nothing, zeros + nothing
        else:
            start, end = zeros, zeros
        return SamplerOutput(None, start, end)

    def _of_videos(self, samples: Batch, flow: Tensor | None = None) -> SamplerOutput:
        flow = self.flow(samples) if flow is None else flow
        return self.scorer(flow, self.flow_mask(samples).to(self.device), samples["text_input"])

    # ---- what a selector is told -----------------------------------------------------------------------------------

    def _given_span(self, samples: Batch, selector: FrameSelector) -> Tensor | None:
        if not selector.needs_span:
            return None
        key = selector.span_key
        if key == "gold_span" and self.training:
            raise ConfigError(
                "selector 'given' with span_key 'gold_span' is for evaluation; training never sees gold spans"
            )
        if key not in samples:
            raise ConfigError(f"selector 'given' needs samples with '{key}'; set datasets.<name>.spans")
        span, count = samples[key].cpu(), samples["frame_mask"].sum(dim=1).cpu()
        whole = torch.stack([torch.zeros_like(count), count], dim=1)
        known = moves(samples)
        if key == "span" and "no_moment" in samples:  # a span file knows the question, and no moment of its video
            known = known & ~samples["no_moment"].cpu().bool()
        return span.where(known[:, None], whole)

    @staticmethod
    def _figure(samples: Batch, selector: FrameSelector) -> Tensor | None:
        name = selector.figure
        if name is not None and name not in samples:
            raise ConfigError(
                f"selector '{selector.name}' needs samples with '{name}'; set datasets.<name>.{name}: true"
            )
        return samples.get(name)

    def generators(self, samples: Batch) -> list[torch.Generator]:
        """One a row: in training from torch's global state, which checkpoints keep; in evaluation from the
        question's id, so that the draw does not depend on batch size, order or rank."""
        if self.training:
            seeds = torch.randint(2**62, (len(samples["text_input"]),)).tolist()
            return [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample_generators(samples.get("question_id") or samples["text_input"], self.seed)
