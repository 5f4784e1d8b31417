"""What is asked and what is answered: the records that pass between predictor, server, page and terminal.

In and out: nothing is computed here, and neither torch nor LAVIS is imported.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lavis_lstp.errors import LstpError

if TYPE_CHECKING:
    import numpy as np

    from lavis_lstp.inference.candidates import Candidates
    from lavis_lstp.inference.settings import Settings

Turn = tuple[str, str]
"""An earlier question and its answer."""


class Cancelled(LstpError):
    """The answer was given up because whoever asked for it went away or said stop."""


@dataclass(frozen=True)
class Prediction:
    """An answer and where it came from.

    Attributes:
        prediction: the answer.
        span: the half-open range of candidates that the selector chose; None for a picture or a text.
        span_s: the same in seconds.
        frame_index: numbers among the T candidates of the frames that the language model saw, sorted.
        frame_times_s: their seconds.
        candidate_times_s: seconds of all T candidates.
        scores: how likely each candidate lies inside the moment, 0..1: P(start <= t) P(end >= t), or what another
            scorer (`model.scorer`) gives it; None where the selector asks for neither, and in place of scores that a
            rule like focus did without.
        log_prob: of the answer's tokens: sum, mean and their number.
        prompt: what the language model read.
        seconds: by stage; a stage whose result was kept is missing, those of the model are of its whole batch.
        spans_s: with selector.max_spans above 1 all spans in seconds, the likeliest (`span_s`) first; else None.
        subtitles: what of the question's subtitles the prompt has: lines, left_out and window_s (None = all of them).
        flow: float32 [T,2,h,w], (u, v) in px per frame; None where none was needed.
        start_logits, end_logits: T numbers each, where the selector asks the sampler.
    """

    question: str
    prediction: str
    span: tuple[int, int] | None
    span_s: tuple[float, float] | None
    frame_index: list[int]
    frame_times_s: list[float]
    candidate_times_s: list[float]
    scores: list[float | None] | None
    log_prob: dict[str, float]
    prompt: str
    seconds: dict[str, float]
    spans_s: list[tuple[float, float]] | None = None
    subtitles: dict[str, Any] | None = None
    flow: np.ndarray | None = field(default=None, repr=False, compare=False)
    start_logits: list[float] | None = field(default=None, repr=False)
    end_logits: list[float] | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything but arrays and logits, for JSON; spans_s and subtitles where there are some."""
        found = asdict(self)
        left_out = ["flow", "start_logits", "end_logits"]
        left_out += [name for name in ("spans_s", "subtitles") if not found[name]]
        return {key: value for key, value in found.items() if key not in left_out}


@dataclass(frozen=True)
class Asked:
    """A question whose medium has been read; `Predictor.prepare` makes it.

    Attributes:
        instructions: what the language model reads before the question, and the sampler does not.
        subtitles: lines of the video (start_s, end_s, text), of which the settings say which are shown; None = none.
        on_text: called with each further piece of the answer, in the thread of the model.
        cancel: set by whoever asked, to give the answer up.
        seconds: what reading and flow took.
    """

    question: str
    history: tuple[Turn, ...]
    candidates: Candidates
    settings: Settings
    seconds: dict[str, float]
    instructions: str = ""
    subtitles: Sequence[tuple[float, float, str]] | None = None
    on_text: Callable[[str], None] | None = None
    cancel: threading.Event = field(default_factory=threading.Event)
