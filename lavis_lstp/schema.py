"""Words shared by all parts: axis letters, the records `Sample` and `Prediction`, and `Span`.

Axis letters used in every shape comment of this package:

    B batch      T frames decoded per video (N in the paper)   K frames shown to the language model
    L flow fields (T without flow_mask)    Q query tokens per frame    S text tokens    D features    C, H, W image axes
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from torch import Tensor


class _SampleWhereGiven(TypedDict, total=False):
    flow: Tensor  # float16 or float32 [L,2,h,w], where the data set brings it: (u, v) in px per frame, x right, y down
    flow_mask: Tensor  # int64 [L], only where flow is not one field a frame (the published files)
    any_span: Tensor  # int64 [M,2], where several gold spans are learned: finding any one is right; (-1, -1) = none
    no_moment: Tensor  # int64 [], 1 where a row of a span file says that there is no span
    bit_cost: Tensor  # float32 [T], with datasets.<name>.bit_cost: the codec's bytes a picture around each frame
    motion_energy: Tensor  # float32 [T], with datasets.<name>.motion_energy: how much moves around each frame
    subtitles: list[tuple[float, float, str]]  # where the data set shows some: (start_s, end_s, text) of each line
    subtitles_window_s: float  # with them: lines so near a chosen frame are shown, infinity = all
    image: Tensor  # [3,h,w], or [K,3,h,w] with image_frames, where there is a vis_processor: for LAVIS's own models


class Sample(_SampleWhereGiven):
    """An item of a data set. An image is a sample of one frame, a text one of none, frames [0,3,H,W]."""

    frames: Tensor  # uint8 [T,3,H,W], RGB, 0..255, not normalised (models normalise, so flow sees pixels)
    frame_times: Tensor  # float32 [T], seconds from the start of the video
    end_s: float | None  # when the last frame ends: the end of the video or of its clip, None = unknown or no video
    text_input: str  # the question alone
    prompt: str  # the whole prompt where the data bring one (a conversation), '' = the model makes it
    options: list[str]  # what to choose from, [] = the answer is open
    category: str  # kind of question, '' = unknown
    categories: dict[str, Any]  # axis -> kind or list of kinds, {} = no more than `category`
    media: str  # equal where frames and flow are the same, '' = a text
    text_output: str  # the answer to learn or to be compared with, without an end mark, '' = unknown
    answer: str | None  # the same, None = unknown
    span: Tensor  # int64 [2], half-open frame span to learn from (a pseudo span, or the gold one), (-1, -1) = none
    span_weight: Tensor  # float32 [], factor on the span loss
    gold_span: Tensor  # int64 [2], for evaluation alone, (-1, -1) = unknown; no training code reads it
    moments_s: list[list[float]]  # gold [start, end] in seconds, [] = unknown; for evaluation alone
    question_id: str
    instance_id: str  # LAVIS's word for question_id
    video_id: str


Batch = Mapping[str, Any]
"""Samples together, as a collater makes them: the keys of `Sample`, each tensor with an axis B in front and T or L
padded with zeros, everything else a list of B; and `frame_mask` int64 [B,T], 1 = real frame, 0 = padding.

What flow, flow_mask, no_moment or subtitles one sample has, all have. LAVIS's own data sets give fewer keys.
"""


class _Named(TypedDict):
    question_id: str


class Prediction(_Named, total=False):
    """What a task says of one question: a line of `result/<split>_<task>.jsonl` (docs/benchmarks.md).

    A key is missing where the task, the data or the model has nothing to say. Whoever asks one question gets an
    `inference.prediction.Prediction`, an object with arrays, too; names that both have mean the same.
    """

    video_id: str
    category: str
    categories: dict[str, Any]
    question: str
    answer: str | None  # None = hidden
    prediction: str
    options: list[str]
    choice: str | None  # letter of an option, None = no option can be read out of the prediction
    correct: bool | None  # of a choice, None = the answer is hidden
    option_log_prob: list[dict[str, float]]  # as log_prob, of each option
    prompt: str  # what the language model read
    subtitles: dict[str, Any]  # what of the subtitles the prompt has: lines and left_out, their numbers, and window_s
    log_prob: dict[str, float]  # of the answer's tokens: sum, mean, and tokens, their number
    span: list[int] | None  # half-open range of the frames that were read, None = a span file's "there is none"
    span_s: list[float]  # the same in seconds
    spans: list[list[int]]  # with selector.max_spans above 1: all spans as `span`, the likeliest first
    spans_s: list[list[float]]  # the same in seconds
    num_frames: int  # that were read
    frame_index: list[int]  # frames shown to the language model, numbers among those that were read, -1 = none
    frame_times: list[float | None]  # their seconds
    num_filled: int  # of these, how many the selector's rule did not choose itself
    num_shown: int  # where the selector decides how many frames are shown
    num_scored: int  # frames that were given a score for this question, where the selector asks for scores
    entropy: dict[str, float]  # of the sampler's start and end, in bits
    scores: list[float]  # of each frame that was read, 0..1: how well it alone answers (pseudo_span)
    gold_span: list[int]  # as in `Sample`; pseudo_span: its `span`
    pseudo_span: list[int]
    moments_s: list[list[float]]
    loss: float  # of the sample's batch (video_instruct)
    seconds: dict[str, float]  # by stage; written to a file of its own, as predictions are equal in each run


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
        """Return the frames whose time lies in [start_s, end_s); where none does, the one that is on screen then.

        A frame is on screen from its time to that of the next one, the first also before.

        Args:
            frame_times: seconds of the T decoded frames, ascending, not empty.
        """
        start, end = bisect_left(frame_times, start_s), bisect_left(frame_times, end_s)
        return cls(start, end) if start < end else cls(max(0, start - 1), max(1, start))

    def to_seconds(self, frame_times: Sequence[float], end_s: float | None) -> tuple[float, float]:
        """Return the time of the first frame and of the frame behind the last one, `end_s` where none is.

        Round trip: `Span.from_seconds(*span.to_seconds(times, end_s), times) == span` for ascending times.

        Args:
            end_s: when the last of the frames ends, at the end of the video or of its clip; None where nobody knows,
                and then it is taken to last as long as the one before, or a second.
        """
        start_s = float(frame_times[self.start])
        if self.end < len(frame_times):
            return start_s, float(frame_times[self.end])
        if end_s is None:
            end_s = float(frame_times[-1] + (frame_times[-1] - frame_times[-2] if len(frame_times) > 1 else 1.0))
        return start_s, max(float(end_s), float(frame_times[-1]) + 1e-3)

    def iou(self, other: Span) -> float:
        """Intersection over union, 0..1; two empty spans give 0."""
        inter = max(0, min(self.end, other.end) - max(self.start, other.start))
        union = len(self) + len(other) - inter
        return inter / union if union else 0.0


NO_SPAN = (-1, -1)
"""How a sample without a span is written in the tensors `span` and `gold_span`."""
