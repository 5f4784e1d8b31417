"""`lavis-lstp ask VIDEO "question"`: an answer, the frames it came from, the time it took, and a picture of all that.

In: any video file, and a run's folder or checkpoint (without one, the model's default weights). Out: text or JSON, and
a PNG. The model is the one that was trained: its config lies in the checkpoint's manifest.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_lstp.errors import ConfigError, LstpError
from lavis_lstp.inference.loading import EXAMPLE
from lavis_lstp.redaction import printable

if TYPE_CHECKING:
    import numpy as np

    from lavis_lstp.inference.prediction import Prediction

logger = logging.getLogger(__name__)

PICTURE_SIDE = 320  # px, longer side of a frame in the picture


def picture_frames(video: str | Path, num_frames: int) -> np.ndarray:
    """uint8 [T,3,h,w]: the frames of `ask` once more in the video's own proportions, where the model sees squares."""
    import numpy as np

    from lavis_lstp.data.pictures import open_picture
    from lavis_lstp.data.video.reading import probe, read_frames
    from lavis_lstp.inference.candidates import is_picture

    if is_picture(video):
        picture = open_picture(Path(video), str(video))
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        return np.asarray(picture).transpose(2, 0, 1)[None]
    info = probe(video)
    scale = min(1.0, PICTURE_SIDE / max(info.height, info.width))
    size = (max(1, round(info.height * scale)), max(1, round(info.width * scale)))
    return read_frames(video, num=num_frames, size=size).frames


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
    from lavis_lstp.report.explanation import explanation_picture

    times = found.candidate_times_s
    explanation_picture(
        path,
        question=found.question,
        prediction=found.prediction,
        title=Path(video).name,
        frames=picture_frames(video, len(times)),
        flow=found.flow,
        frame_times=times,
        span=found.span,
        frame_index=found.frame_index,
        start_logits=found.start_logits,
        end_logits=found.end_logits,
    )


def _take_example(args: argparse.Namespace) -> None:
    """Fill in the shipped checkpoint and clip; one word of the user's is another question about the clip."""
    if args.question is not None or args.checkpoint is not None:
        raise ConfigError("--example brings its own video and checkpoint; give it a question alone, or nothing")
    rows = json.loads((EXAMPLE / "questions.json").read_text(encoding="utf-8"))
    args.question = args.video or rows[1]["question"]
    args.video, args.checkpoint = str(EXAMPLE / "clip.mp4"), str(EXAMPLE)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lavis-lstp ask", description=__doc__.splitlines()[0])
    parser.add_argument("video", nargs="?", help="video or picture file")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--example", action="store_true", help="ask the shipped tiny model about the shipped clip")
    parser.add_argument("--checkpoint", help="a run's folder, one of its checkpoints, or a weights file")
    parser.add_argument("--model", default="lstp_tiny", help="without a run's folder (default: lstp_tiny)")
    parser.add_argument("--model-type", help="default: the model's default type")
    parser.add_argument("--num-frames", type=int, help="frames to read, evenly spaced (default: as the run; else 64)")
    parser.add_argument("--picture", type=Path, help="PNG to write (default: <video>_lstp.png in this folder)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--options", nargs="*", default=[], metavar="model.A=B", help="overrides of the model config")
    args = parser.parse_args(argv)
    if args.example:
        _take_example(args)
    elif args.question is None:
        parser.error("name a video and a question, or --example")
    if args.num_frames is not None and args.num_frames < 1:
        raise ConfigError(f"--num-frames must be at least 1, got {args.num_frames}")
    if not Path(args.video).is_file():  # before the seconds that a model takes
        raise LstpError(f"{args.video}: no such video file")
    from lavis_lstp.inference.predictor import Predictor

    predictor = Predictor.build(args.model, args.model_type, args.checkpoint, args.options, num_frames=args.num_frames)
    for note in predictor.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    found = predictor.answer(args.video, args.question)
    picture = args.picture or Path(f"{Path(args.video).stem}_lstp.png")
    try:
        explain(picture, args.video, found)
    except OSError as error:
        raise ConfigError(f"--picture {picture}: cannot be written ({error.strerror or error})") from error
    result = {
        "video": args.video,
        **{name: getattr(found, name) for name in ("question", "prediction", "span_s", "frame_times_s")},
        "milliseconds": {stage: round(1000 * seconds, 1) for stage, seconds in found.seconds.items()},
        "picture": str(picture),
    }
    print(printable(json.dumps(result, ensure_ascii=False) if args.json else as_text(result)))
    return 0
