"""A loaded model that answers questions about videos: `lavis_lstp.load(...)`.

In: a model's name, a run's folder, a checkpoint, or "example" for the one that ships. Out: a `Predictor`, whose
`answer` gives the answer and the frames that it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_lstp.inference.loading import EXAMPLE, ask, build_model, recorded_frames
from lavis_lstp.models.variants import MODEL_TYPES


@dataclass(frozen=True)
class Predictor:
    """An LSTP in eval mode.

    Args:
        model: the model.
        num_frames: T, evenly spaced frames read of each video.
        notes: what whoever reads the answers should know, such as that the weights are random.
    """

    model: Any
    num_frames: int
    notes: tuple[str, ...] = ()

    def answer(self, video: str | Path, question: str) -> dict[str, Any]:
        """Answers one question about one video file.

        Returns:
            video, question, prediction, span_s [start, end] in seconds, frame_times_s of the frames that the language
            model saw, and milliseconds by stage.

        Raises:
            VideoError: the file is missing or not a readable video.
        """
        result = ask(self.model, video, question, num_frames=self.num_frames)
        return {key: value for key, value in result.items() if key != "evidence"}


def load(what: str | Path = "example", model_type: str | None = None, options: Sequence[str] = ()) -> Predictor:
    """A predictor.

    Args:
        what: a name of `lavis-lstp list models` that is this package's, the folder of a run, one of its checkpoints, a
            weights file, or "example".
        model_type: of a named model; None means its default.
        options: `model.a.b=c` overrides.

    Raises:
        ConfigError, WeightsError: it cannot be built; one line on why.
    """
    if what in MODEL_TYPES:
        model, notes = build_model(str(what), model_type, None, options)
        return Predictor(model, recorded_frames(None), tuple(notes))
    checkpoint = str(EXAMPLE if what == "example" else what)
    model, notes = build_model("lstp_tiny", model_type, checkpoint, options)
    return Predictor(model, recorded_frames(checkpoint), tuple(notes))
