"""Logits, a given span or nothing -> the K frames the language model sees.

In: start and end logits [B,T] and the mask of real frames. Out: `frame_index` [B,K], sorted, and the half-open
`span` they come from. Indices only: the language model's loss gives the sampler no gradient (paper). The published
rules (`candidate_frames`) draw two noisy candidates and join them; the default here takes the best span, without noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lavis_lstp.config.model import AUTO, FIGURES, SELECTORS
from lavis_lstp.data.frame_numbers import uniform_centres
from lavis_lstp.errors import AnnotationError, ConfigError, unknown_name
from lavis_lstp.models.where import selectors

NUM_CANDIDATES = 2
"""Published: spans drawn per sample."""
SPAN_KEYS = ("span", "gold_span")
FEW_FRAMES = ("double", "keep")


def spread(frames: Sequence[int], num_selected: int) -> list[int]:
    """K frames evenly from a list; fewer than K are first doubled, each beside itself, until there are enough."""
    frames = list(frames)
    while len(frames) < num_selected:
        frames = [frame for frame in frames for _ in range(2)]
    return [frames[i] for i in uniform_centres(num_selected, len(frames))]


def published_grid(num_frames: int, size: int) -> list[int]:
    """The frames that the published evaluation chooses among: not interval centres, but the second of each interval.

    Fewer than `size` are doubled, as in `spread`; exactly `size` are all taken.
    """
    frames = list(range(num_frames))
    while len(frames) < size:
        frames = [frame for frame in frames for _ in range(2)]
    if len(frames) == size:
        return frames
    edges = np.linspace(0, len(frames), size + 1).astype(int)[:-1]
    return [frames[edge + 1] for edge in edges]


def candidate_frames(
    candidates: Iterable[tuple[int, int]], num_frames: int, num_flows: int, mapping: str = "ends"
) -> list[int]:
    """Frames inside any candidate, sorted; all N frames where there is none: published, in its float32 arithmetic.

    Args:
        candidates: (start, end) in flows, as drawn from the logits; they need not be valid spans. One that lies
            behind the last flow, and (0, 0), stand for the whole video. The last frame can not be reached by any.
        num_frames: N, of the video.
        num_flows: V, of the video.
        mapping: of flows to frames, one of `MAPPINGS`.
    """
    frames: set[int] = set()
    for start, end in candidates:
        start, end = int(start), int(end)
        if start >= num_flows or end >= num_flows or start == end == 0:
            start, end = 0, num_flows - 1
        if num_flows > 1:  # else the published code divides by zero; here one flow says nothing, all frames count
            frames.update(range(*(MAPPINGS[mapping](flow, num_frames, num_flows) for flow in (start, end))))
    return sorted(frames) or list(range(num_frames))


MAPPINGS: dict[str, Callable[[int, int, int], int]] = {
    "ends": lambda x, n, v: int(np.float32(x * (n - 1)) / np.float32(v - 1)),
    "ratio": lambda x, n, v: int(np.float32(x) / np.float32(v) * np.float32(n)),
}
"""Flow x of V -> frame of N, in float32. Published evaluation: ends for BLIP-2 (and self-refinement), ratio for
InstructBLIP, whose candidates therefore reach the last frame but one of N = V."""


def best_spans(start_logits: Tensor, end_logits: Tensor, frame_mask: Tensor) -> Tensor:
    """The half-open span with the largest start plus end logit among real frames, start <= last frame.

    Of equal ones the earliest end, then the earliest start. A row without real frames gives (0, 0).

    Args:
        start_logits, end_logits, frame_mask: [B,T].

    Returns:
        int64 [B,2].
    """
    real = frame_mask.bool()
    start = start_logits.float().masked_fill(~real, -torch.inf)
    end = end_logits.float().masked_fill(~real, -torch.inf)
    best_start, first = _running_max(start)
    last = (best_start + end).argmax(dim=1, keepdim=True)
    span = torch.cat([first.gather(1, last), last + 1], dim=1)
    return span * real.any(dim=1, keepdim=True)


def _running_max(values: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value so far along dim 1, and the first index it was seen at (torch.cummax gives the last)."""
    running = values.cummax(dim=1).values
    is_new = torch.ones_like(running, dtype=torch.bool)
    is_new[:, 1:] = running[:, 1:] > running[:, :-1]
    places = torch.arange(values.shape[1], device=values.device).expand_as(values)
    return running, (places * is_new).cummax(dim=1).values


def flows_to_frames(span: Sequence[int], num_frames: int, num_flows: int) -> tuple[int, int]:
    """A half-open span of L flows -> of N frames: the frames as far along as its first and its last flow."""
    if num_flows < 2 or not num_frames:
        return 0, num_frames
    first, last = (edge * (num_frames - 1) // (num_flows - 1) for edge in (span[0], span[1] - 1))
    return first, last + 1


def joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Half-open spans in the order of their rank; those that overlap or touch are one, of the better rank."""
    found: list[tuple[int, int]] = []
    for start, end in spans:
        near = [one for one in found if one[0] <= end and start <= one[1]]
        whole = min(start, *(one[0] for one in near), start), max(end, *(one[1] for one in near), end)
        place = found.index(near[0]) if near else len(found)
        found = [one for one in found if one not in near]
        found.insert(place, whole)
    return found


class Selection(NamedTuple):
    """frame_index int64 [B,K], sorted, -1 where a sample has no frame; span int64 [B,2], half-open; num_filled int64
    [B], frames that a rule over scores did not choose itself, see `selectors.choose`; None of other rules. spans: with
    max_spans above 1, of each sample its spans, the likeliest (`span`) first. num_shown: with num_selected "auto" int64
    [B], the frames of each sample that are no -1; K is then the largest of the batch."""

    frame_index: Tensor
    span: Tensor
    num_filled: Tensor | None
    spans: list[list[tuple[int, int]]] | None = None
    num_shown: Tensor | None = None


class Row(NamedTuple):
    """What a rule sees of one sample: N frames, V flows, its logits on the CPU, best and given spans, generator."""

    num_frames: int
    num_flows: int
    start_logits: Tensor | None
    end_logits: Tensor | None
    best: list[tuple[int, int]] | None
    given: tuple[int, int] | None
    generator: torch.Generator | None
    grid: int | None = None
    mapping: str = "ends"
    marks: int = 0


Rule = Callable[[Row, int], tuple[list[int], tuple[int, int]]]
"""(row, K) -> K frames or fewer to spread over, and the span they come from."""


def uniform(row: Row, num_selected: int) -> tuple[list[int], tuple[int, int]]:
    return list(range(row.num_frames)), (0, row.num_frames)


def random(row: Row, num_selected: int) -> tuple[list[int], tuple[int, int]]:
    order = torch.randperm(row.num_frames, generator=row.generator)
    return sorted(order[:num_selected].tolist()), (0, row.num_frames)


def best(row: Row, num_selected: int) -> tuple[list[int], tuple[int, int]]:
    return sorted(frame for span in row.best for frame in range(*span)), row.best[0]


def given(row: Row, num_selected: int) -> tuple[list[int], tuple[int, int]]:
    start, end = row.given[0], min(row.given[1], row.num_frames)
    return list(range(start, end)), (start, end)


def recorded(row: Row, num_selected: int) -> tuple[list[int], tuple[int, int]]:
    return list(range(row.num_frames)), (0, row.num_frames)


def argmax(row: Row, num_selected: int) -> tuple[list[int], tuple[int, int]]:
    return _published(row, [(int(row.start_logits.argmax()), int(row.end_logits.argmax()))])


def gumbel(row: Row, num_selected: int) -> tuple[list[int], tuple[int, int]]:
    # published: arg max of softmax((logits + noise) / 0.5); neither softmax nor temperature moves an arg max
    candidates = []
    for _ in range(NUM_CANDIDATES):
        noise = -torch.empty(2, len(row.start_logits)).exponential_(generator=row.generator).log()
        noisy = torch.stack([row.start_logits, row.end_logits]) + noise
        candidates.append(tuple(noisy.argmax(dim=1).tolist()))
    return _published(row, candidates)


def _published(row: Row, candidates: list[tuple[int, int]]) -> tuple[list[int], tuple[int, int]]:
    grid = published_grid(row.num_frames, row.grid) if row.grid else range(row.num_frames)
    frames = [grid[i] for i in candidate_frames(candidates, len(grid), row.num_flows + row.marks, row.mapping)]
    return frames, (frames[0], frames[-1] + 1)


class FrameSelector:
    """Picks K frames for each sample of a batch. Made by `build_selector`.

    Attributes:
        by_data: whether a data set says where to look. needs_record: it has chosen, and all its frames are taken.
        needs_logits, needs_scores, needs_features, needs_span, needs_generator: which arguments a call must bring.
        figure: of `config.model.FIGURES` the one that a call must bring; None = none.
        span_key: name in the sample of the span that "given" takes.
        Others: see `build_selector`.
    """

    def __init__(
        self,
        name: str,
        *,
        num_selected: int | str,
        span_key: str,
        context: int,
        few_frames: str,
        grid: int | None,
        mapping: str,
        marks: int,
        mask_padding: bool,
        settings: Mapping[str, object],
        max_spans: int = 1,
        least_selected: int = 1,
        most_selected: int = 16,
        mass: float = 0.8,
    ):
        self.name = name
        self.num_selected = num_selected
        self.span_key = span_key
        self.context = context
        self.few_frames = few_frames
        self.grid = grid
        self.mapping = mapping
        self.marks = marks
        self.mask_padding = mask_padding
        self.max_spans = max_spans
        self.least_selected, self.most_selected, self.mass = least_selected, most_selected, mass
        kind = SELECTORS[name]
        self.by_data = kind.by_data
        self.needs_record = "record" in kind.needs
        self.needs_logits = "logits" in kind.needs
        self.needs_scores = "scores" in kind.needs
        self.needs_features = "features" in kind.needs
        self.needs_span = "span" in kind.needs
        self.figure = next((name for name in FIGURES if name in kind.needs), None)
        self.needs_generator = "rng" in kind.needs
        self.method = kind.rule.partition(":")[2]
        over_scores = self.needs_scores or self.figure is not None
        if settings and not over_scores:
            raise ConfigError(f"model.selector.settings: selector '{name}' has none, got {', '.join(settings)}")
        self.settings = selectors.selector_settings(self.method, dict(settings)) if over_scores else {}
        self.rule: Rule | None = None if over_scores else globals()[self.method]

    @property
    def adapts(self) -> bool:
        """Return whether the number of frames depends on the scores."""
        return self.num_selected == AUTO

    @property
    def asks_few(self) -> bool:
        """Return whether its rule reads the scores of few frames, and so can be given `selectors.LazyScores`."""
        return self.needs_scores and not self.adapts and selectors.asks_few(self.method)

    @property
    def most(self) -> int:
        """The largest number of frames of a sample."""
        return self.most_selected if self.adapts else self.num_selected

    def __repr__(self) -> str:
        return f"FrameSelector({self.name}, num_selected={self.num_selected})"

    def __call__(
        self,
        frame_mask: Tensor,
        start_logits: Tensor | None = None,
        end_logits: Tensor | None = None,
        span: Tensor | None = None,
        generators: Sequence[torch.Generator] | torch.Generator | None = None,
        flow_mask: Tensor | None = None,
        scores: Tensor | Sequence[selectors.LazyScores] | None = None,
        questions: Sequence[str] = (),
        times_s: Tensor | None = None,
        features: Sequence[np.ndarray | None] | None = None,
        figure: Tensor | None = None,
    ) -> Selection:
        """Selects frames.

        Args:
            frame_mask: [B,T], 1 = real, real ones first.
            start_logits, end_logits: [B,T], one flow for each frame; [B,L] with `flow_mask`.
            span: int64 [B,2], half-open, for "given".
            generators: on the CPU; one for each row makes a sample's frames independent of its batch.
            flow_mask: [B,L], 1 = real, real ones first, where flows are not one a frame.
            scores: [B,T], how much each frame has to do with its question; B `LazyScores` where it `asks_few`.
            questions: B strings.
            figure: [B,T], what the codec says of the part of the video around each frame, see the attribute.
            times_s: [B,T], seconds of the frames; without them they are taken for one second apart.
            features: of each row, float [T,D] of its frames.

        Returns:
            On the device of `frame_mask`.

        Raises:
            AnnotationError: "given" and a row whose span is missing or outside its frames.
            ValueError: an argument that this selector needs is missing.
        """
        for argument, value, is_needed in (
            ("start_logits", start_logits, self.needs_logits),
            ("end_logits", end_logits, self.needs_logits),
            ("span", span, self.needs_span),
            ("scores", scores, self.needs_scores or self.adapts),
            ("features", features, self.needs_features),
            (self.figure, figure, self.figure is not None),
            ("generators", generators, self.needs_generator),
        ):
            if is_needed and value is None:
                raise ValueError(f"selector '{self.name}' needs {argument}")
        starts = start_logits.detach().float().cpu() if self.needs_logits else None
        ends = end_logits.detach().float().cpu() if self.needs_logits else None
        has_frames = bool(frame_mask.any())
        counts = [int(n) for n in frame_mask.sum(dim=1).tolist()]
        flows = counts if flow_mask is None else [int(n) for n in flow_mask.sum(dim=1).tolist()]
        best = None
        if self.needs_logits and has_frames:
            if self.max_spans > 1:
                rows = zip(starts.tolist(), ends.tolist(), flows, strict=True)
                best = [selectors.best_spans(s[:n], e[:n], self.max_spans) if n else [(0, 0)] for s, e, n in rows]
            else:
                real = frame_mask if flow_mask is None else flow_mask
                best = [[span] for span in best_spans(starts, ends, real.cpu()).tolist()]
            if flow_mask is not None:
                best = [[flows_to_frames(s, n, v) for s in row] for row, n, v in zip(best, counts, flows, strict=True)]
        given = span.tolist() if self.needs_span else None
        index, spans, filled = [], [], [0] * len(counts)
        several = [[] for _ in counts] if self.max_spans > 1 else None
        for b, count in enumerate(counts):
            if not count:  # a sample without a video
                index.append([])
                spans.append((0, 0))
                continue
            if given:
                self._check_span(b, given[b], count)
            wanted = self.num_selected
            if self.adapts:
                bounds = self.mass, self.least_selected, self.most_selected
                wanted = selectors.num_for_mass(scores[b, :count].double().cpu().numpy(), *bounds)
            seen = flows[b] if self.mask_padding else None
            row = Row(
                num_frames=count,
                num_flows=flows[b],
                start_logits=starts[b, :seen] if self.needs_logits else None,
                end_logits=ends[b, :seen] if self.needs_logits else None,
                best=joined([self._widen(span, count) for span in best[b]]) if best else None,
                given=self._widen(given[b], count) if given else None,
                generator=generators[b] if isinstance(generators, Sequence) else generators,
                grid=self.grid,
                mapping=self.mapping,
                marks=self.marks,
            )
            if self.rule is None:
                figures = scores if self.figure is None else figure
                known = selectors.Row(
                    scores=figures[b, :count].double().cpu().numpy() if torch.is_tensor(figures) else figures[b],
                    num_selected=wanted,
                    times_s=np.arange(count) if times_s is None else times_s[b, :count].double().cpu().numpy(),
                    question=questions[b] if questions else "",
                    features=features[b] if self.needs_features else None,
                    rng=_numpy_generator(row.generator) if self.needs_generator else None,
                )
                frames, filled[b] = selectors.choose(self.method, known, **self.settings)
                found = frames[0], frames[-1] + 1
            else:
                frames, found = self.rule(row, wanted)
            if several is not None:
                several[b] = row.best
            if self.needs_record and len(frames) > wanted:
                raise ConfigError(
                    f"a question has {len(frames)} recorded frames, and model.selector.num_selected is {wanted}; "
                    "set it to the most that a question has"
                )
            if self.adapts or self.needs_record or self.few_frames == "keep":
                wanted = min(wanted, len(frames))
            index.append(spread(frames, wanted))
            spans.append(found)
        device = frame_mask.device
        width = max([1, *map(len, index)]) if self.adapts else self.num_selected
        shown = torch.tensor([len(row) for row in index], dtype=torch.long, device=device) if self.adapts else None
        index = [[*row, *[-1] * (width - len(row))] for row in index]
        return Selection(
            torch.tensor(index, dtype=torch.long, device=device).view(-1, width),
            torch.tensor(spans, dtype=torch.long, device=device).view(-1, 2),
            torch.tensor(filled, dtype=torch.long, device=device) if self.rule is None else None,
            several,
            shown,
        )

    def _widen(self, span: Sequence[int], num_frames: int) -> tuple[int, int]:
        return max(0, span[0] - self.context), min(num_frames, span[1] + self.context)

    def _check_span(self, row: int, span: Sequence[int], num_frames: int) -> None:
        start, end = span
        if not 0 <= start < min(end, num_frames):
            raise AnnotationError(
                f"selector 'given' needs a span within the {num_frames} frames for every sample, row {row} of the "
                f"batch has [{start}, {end}) in '{self.span_key}'; (-1, -1) means that the sample brings none"
            )


def build_selector(
    name: str = "best_span",
    *,
    num_selected: int | str = 4,
    span_key: str = "span",
    context: int = 0,
    few_frames: str = "double",
    grid: int | None = None,
    mapping: str = "ends",
    marks: int = 0,
    mask_padding: bool = True,
    settings: Mapping[str, object] | None = None,
    max_spans: int = 1,
    least_selected: int = 1,
    most_selected: int = 16,
    mass: float = 0.8,
) -> FrameSelector:
    """A selector by its name in SELECTORS.

    Args:
        num_selected: K; the published configurations all have 4. "auto": of each sample as many frames as its best
            scores need to reach the share `mass` of their sum, from least_selected to most_selected, none twice.
        span_key: for "given": "span" (pseudo spans) or "gold_span" (oracle).
        context: frames added on both sides of a best or given span.
        few_frames: of a span with fewer than K frames: "double" them until there are enough (published evaluation),
            or "keep" them, with -1 behind (published image and video training).
        grid: argmax and gumbel choose among so many evenly spaced frames (32 in the published evaluation, whatever
            the number of flows); null = all.
        mapping: argmax and gumbel: one of MAPPINGS.
        marks: argmax and gumbel count so many flows beyond the video's. The published InstructBLIP video recipes count
            2, the marks around the flows (V = N + 2, with the mapping "ratio"), so that the last frames are reached by
            no candidate.
        settings: of a rule over scores, by name.
        mask_padding: False lets padded flows be drawn by argmax and gumbel, as published; one that is drawn stands
            for the whole video.
        max_spans: best_span finds at most so many spans, see `selectors.best_spans`; frames are spread over them all.

    Raises:
        ConfigError: unknown name or key, or a number below its least value.
    """
    if name not in SELECTORS:
        raise ConfigError(unknown_name("selector (model.selector.name)", name, SELECTORS))
    for key, value, known in (
        ("span_key", span_key, SPAN_KEYS),
        ("few_frames", few_frames, FEW_FRAMES),
        ("mapping", mapping, MAPPINGS),
    ):
        if value not in known:
            raise ConfigError(unknown_name(f"model.selector.{key}", value, known))
    for key, value, least in (
        ("num_selected", 1 if num_selected == AUTO else num_selected, 1),
        ("least_selected", least_selected, 1),
        ("most_selected", most_selected, least_selected),
        ("context", context, 0),
        ("grid", grid, 1),
        ("marks", marks, 0),
        ("max_spans", max_spans, 1),
    ):
        if (value is not None or key != "grid") and (not isinstance(value, int) or value < least):
            raise ConfigError(f"model.selector.{key} is {value!r}; expected a whole number of at least {least}")
    if (grid or marks or mapping != "ends") and name not in ("argmax", "gumbel"):
        raise ConfigError(
            f"model.selector.grid, mapping and marks belong to argmax and gumbel, the selector is '{name}'"
        )
    if max_spans > 1 and name not in ("best_span", "lstp"):
        raise ConfigError(f"model.selector.max_spans belongs to best_span (lstp), the selector is '{name}'")
    if num_selected == AUTO and not SELECTORS[name].by_sampler:
        able = ", ".join(one for one, kind in SELECTORS.items() if kind.by_sampler)
        raise ConfigError(f"model.selector.num_selected: auto needs scores, and '{name}' asks for none; choose {able}")
    return FrameSelector(
        name,
        num_selected=num_selected,
        span_key=span_key,
        context=context,
        few_frames=few_frames,
        grid=grid,
        mapping=mapping,
        marks=marks,
        mask_padding=mask_padding,
        settings=settings or {},
        max_spans=max_spans,
        least_selected=least_selected,
        most_selected=most_selected,
        mass=mass,
    )


def _numpy_generator(generator: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))


def sample_generators(ids: Iterable[str], seed: int = 0) -> list[torch.Generator]:
    """A generator for each question id: the same draw whatever the batch, order or process (evaluation)."""
    generators = []
    for key in ids:
        digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1))
    return generators
