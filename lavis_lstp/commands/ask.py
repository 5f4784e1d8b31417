"""`lavis-lstp ask VIDEO "question"`: an answer, the frames it came from, the time it took, and a picture of all that.

In: any video file, and a run's folder or checkpoint (without one, the model's default weights). Out: text or JSON, and
a PNG. The model is the one that was trained: its config lies in the checkpoint's manifest.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_lstp.commands.cli import add_model_options, built_predictor, check_model_options
from lavis_lstp.data.store import default_store
from lavis_lstp.errors import ConfigError, LstpError
from lavis_lstp.inference.loading import EXAMPLE
from lavis_lstp.redaction import printable

if TYPE_CHECKING:
    from lavis_lstp.inference.prediction import Prediction

logger = logging.getLogger(__name__)


def as_text(result: Mapping[str, Any]) -> str:
    times = ", ".join(f"{t:.2f}" for t in result["frame_times_s"])
    stages = ", ".join(f"{stage} {value:.0f}" for stage, value in result["milliseconds"].items())
    total = sum(result["milliseconds"].values())
    span = "" if result["span_s"] is None else "span      {:.2f} to {:.2f} s\n".format(*result["span_s"])
    return (
        f"question  {result['question']}\nanswer    {result['prediction']}\n{span}"
        f"frames    {times} s\ntime      {total:.0f} ms ({stages})\npicture   {result['picture']}"
    )


def explain(path: Path, video: str | Path, found: Prediction) -> None:
    """Write the picture that explains an answer about a video."""
    import numpy as np

    from lavis_lstp.inference.contact_sheet import pictures_at
    from lavis_lstp.report.explanation import explanation_picture

    times = found.candidate_times_s
    pictures = pictures_at(video, times)  # in the video's own proportions, where the model sees squares
    explanation_picture(
        path,
        question=found.question,
        prediction=found.prediction,
        title=Path(video).name,
        frames=np.stack([np.asarray(one).transpose(2, 0, 1) for one in pictures]),
        flow=found.flow,
        frame_times=times,
        span=found.span,
        frame_index=found.frame_index,
        start_logits=found.start_logits,
        end_logits=found.end_logits,
    )


def _take_example(args: argparse.Namespace) -> None:
    """Fill in the shipped clip; one word of the user's is another question about it."""
    if args.question is not None:
        raise ConfigError("--example brings its own video; give it a question alone, or nothing")
    rows = json.loads((EXAMPLE / "questions.json").read_text(encoding="utf-8"))
    args.question = args.video or rows[1]["question"]
    args.video = str(EXAMPLE / "clip.mp4")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lavis-lstp ask", description=__doc__.splitlines()[0])
    parser.add_argument("video", nargs="?", help="video or picture file")
    parser.add_argument("question", nargs="?")
    add_model_options(parser)
    parser.add_argument("--subtitles", metavar="FILE", help="SRT, VTT or JSON; lines near the shown frames are read")
    parser.add_argument("--picture", type=Path, help="PNG to write (default: <video>_lstp.png in this folder)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    check_model_options(args)
    if args.example:
        _take_example(args)
    elif args.question is None:
        parser.error("name a video and a question, or --example")
    if not Path(args.video).exists():  # before the seconds that a model takes
        raise LstpError(f"{args.video}: no such video file")
    found = built_predictor(args, store=default_store()).answer(args.video, args.question, subtitles=args.subtitles)
    picture = args.picture or Path(f"{Path(args.video).stem}_lstp.png")
    try:
        explain(picture, args.video, found)
    except OSError as error:
        raise ConfigError(f"--picture {picture}: cannot be written ({error.strerror or error})") from error
    result = {
        "video": args.video,
        **{name: getattr(found, name) for name in ("question", "prediction", "span_s", "frame_times_s")},
        "milliseconds": {stage: round(1000 * seconds, 1) for stage, seconds in found.seconds.items()},
        **({"subtitles": found.subtitles} if found.subtitles else {}),
        "picture": str(picture),
    }
    print(printable(json.dumps(result, ensure_ascii=False) if args.json else as_text(result)))
    return 0
