"""Words shared by all parts: axis letters, `Span`, and what a sample holds.

Axis letters used in every shape comment of this package:

    B batch      T frames decoded per video (N in the paper)   K frames shown to the language model
    L flow fields (T without flow_mask)    Q query tokens per frame    S text tokens    D features    C, H, W image axes

A *sample* is a dict. A dataset item holds it without the batch axis; the collater adds it. An image is a sample of one
frame, a text one of none: [0,3,H,W], and its frame_mask is all 0. Every data set of this package gives every key but
flow, flow_mask, bit_cost and no_moment, whatever the sample is.

    frames       uint8 [B,T,3,H,W]  RGB, 0..255, not normalised (models normalise, so flow sees pixels)
    frame_mask   int64 [B,T]        1 = real frame, 0 = padding
    frame_times  float32 [B,T]      seconds from the start of the video, 0 where padded
    flow         float32 [B,T,2,h,w]  only where the data set brings it: (u, v) in px per frame, x right, y down
    flow_mask    int64 [B,L]        only with flow [B,L,2,h,w] that is not one field a frame (the published files)
    bit_cost     float32 [B,T]      only with datasets.<name>.bit_cost: the codec's bytes a picture around each frame
    text_input   list of B str      the question alone
    prompt       list of B str      the whole prompt where the data bring one (a conversation), '' = the model makes it
    options      list of B lists of str   what to choose from, [] = the answer is open
    category     list of B str      kind of question, '' = unknown
    categories   list of B dicts        axis -> kind or list of kinds, {} = no more than `category`
    media        list of B str      equal where frames and flow are the same, '' = a text
    text_output  list of B str      the answer to learn or to be compared with, without an end mark, '' = unknown
    answer       list of B str      the same, None = unknown
    span         int64 [B,2]        half-open frame span to learn from (a pseudo span), (-1, -1) = none
    no_moment    int64 [B]          only where a row of a span file says that there is no span: 1, the others 0
    gold_span    int64 [B,2]        for evaluation alone, (-1, -1) = unknown; no training code reads it
    moments_s    list of B lists        gold [start, end] in seconds, [] = unknown; for evaluation alone
    question_id, video_id, instance_id    list of B str
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Span:
    """Half-open range of frames, [start, end), in indices of the T decoded frames.

    The published code uses inclusive ends in one place and seconds in another; both are converted here and
    nowhere else.
    """

    start: int
    end: int

    def __len__(self) -> int:
        return max(0, self.end - self.start)

    def __iter__(self):
        return iter((self.start, self.end))

    @classmethod
    def from_inclusive(cls, start: int, end: int) -> Span:
        """The published form, both ends part of the span."""
        return cls(int(start), int(end) + 1)

    def to_inclusive(self) -> tuple[int, int]:
        return self.start, self.end - 1

    @classmethod
    def from_fractions(cls, start: float, end: float, length: int) -> Span:
        """The published form for videos of any length: first and last frame as shares, 0..1, of the last frame's index.

        Rounded down as published. Round trip for the 32 frames of the published files, and for any length where
        i / (length - 1) * (length - 1) is i in float64.
        """
        return cls.from_inclusive(int(start * (length - 1)), int(end * (length - 1)))

    def to_fractions(self, length: int) -> tuple[float, float]:
        last = max(1, length - 1)
        return self.start / last, (self.end - 1) / last

    @classmethod
    def from_seconds(cls, start_s: float, end_s: float, frame_times: Sequence[float]) -> Span:
        """Frames whose time lies in [start_s, end_s); the nearest single frame where none does.

        Args:
            frame_times: seconds of the T decoded frames, ascending, not empty.
        """
        inside = [i for i, t in enumerate(frame_times) if start_s <= t < end_s]
        if inside:
            return cls(inside[0], inside[-1] + 1)
        middle = (start_s + end_s) / 2
        nearest = min(range(len(frame_times)), key=lambda i: abs(frame_times[i] - middle))
        return cls(nearest, nearest + 1)

    def to_seconds(self, frame_times: Sequence[float], duration_s: float | None = None) -> tuple[float, float]:
        """Time of the first frame and of the frame behind the last one (the end of the video where none is).

        Round trip: `Span.from_seconds(*span.to_seconds(times, d), times) == span` for ascending times and a
        duration greater than the last one.
        """
        start_s = float(frame_times[self.start])
        if self.end < len(frame_times):
            return start_s, float(frame_times[self.end])
        if duration_s is None:
            step = float(frame_times[-1] - frame_times[-2]) if len(frame_times) > 1 else 1.0
            duration_s = float(frame_times[-1]) + max(step, 1e-3)
        return start_s, float(duration_s)

    def iou(self, other: Span) -> float:
        """Intersection over union, 0..1; two empty spans give 0."""
        inter = max(0, min(self.end, other.end) - max(self.start, other.start))
        union = len(self) + len(other) - inter
        return inter / union if union else 0.0


NO_SPAN = (-1, -1)
"""How a sample without a span is written in the tensors `span` and `gold_span`."""
