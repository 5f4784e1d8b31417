"""`lavis-lstp ask VIDEO "question"`: an answer, the frames it came from, the time it took, and a picture of all that.

In: any video file, and a run's folder or checkpoint (without one, the model's default weights). Out: text or JSON, and
a PNG. The model is the one that was trained: its config lies in the checkpoint's manifest.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_lstp.errors import ConfigError, LstpError

logger = logging.getLogger(__name__)


def build_model(name: str, model_type: str | None, checkpoint: str | None, options: Sequence[str]):
    """The model in eval mode, and whether any trained weights went into it.

    Args:
        checkpoint: a run's folder, one of its checkpoints, or a weights file. With a manifest beside the weights, the
            model is built as it was trained, the checkpoints that run began with included.
        options: `model.a.b=c` overrides.
    """
    from lavis.common.registry import registry
    from omegaconf import OmegaConf

    from lavis_lstp import register
    from lavis_lstp.errors import unknown_name
    from lavis_lstp.models.weights import weights_file
    from lavis_lstp.plugin import default_model_type

    register()
    config = None
    if checkpoint is not None:
        manifest = weights_file(checkpoint).parent / "manifest.json"
        if manifest.is_file():
            config = json.loads(manifest.read_text(encoding="utf-8"))["config"]["model"]
            name = config["arch"]
    model_class = registry.get_model_class(name)
    if model_class is None:
        raise ConfigError(unknown_name("model", name, registry.list_models()))
    default = OmegaConf.load(model_class.default_config_path(model_type or default_model_type(model_class)))
    model = OmegaConf.merge(default.model, config or {})
    if checkpoint is not None:
        earlier = model.checkpoint or []
        model.checkpoint = [*([earlier] if isinstance(earlier, str) else earlier), checkpoint]
    if model.flow.name == "precomputed":  # nobody has computed this video's flow before
        model.flow.name = "dis"
    merged = OmegaConf.merge({"model": model}, OmegaConf.from_dotlist(list(options)))
    if set(merged) != {"model"}:
        raise ConfigError(f"--options of `ask` begin with 'model.', got {', '.join(options)}")
    trained = bool(merged.model.checkpoint or merged.model.backbone.weights)
    return model_class.from_config(merged.model).eval(), trained


def ask(model: Any, video: str | Path, question: str, *, num_frames: int = 64) -> dict[str, Any]:
    """Answers one question about one video file.

    Args:
        model: an LSTP in eval mode.
        num_frames: T, evenly spaced frames read from the file.

    Returns:
        video, question, prediction, span_s [start, end] in seconds, frame_times_s of the K chosen frames,
        milliseconds by stage, and `evidence`, the arguments of `picture.explanation_picture` that are arrays.

    Raises:
        VideoError: the file is missing or not a readable video.
    """
    import torch

    from lavis_lstp.data.video import read_frames
    from lavis_lstp.schema import Span

    codec = model.flow.name == "motion_vectors"
    started = time.perf_counter()
    clip = read_frames(video, num=num_frames, size=model.backbone.image_size, motion_vectors=codec)
    decoding = time.perf_counter() - started
    samples = {
        "frames": torch.from_numpy(clip.frames)[None],
        "frame_mask": torch.ones(1, len(clip.frames), dtype=torch.long),
        "text_input": [question],
        "question_id": [Path(video).name],
    }
    if codec:
        samples["flow"] = torch.from_numpy(clip.flow)[None]
    answer = model.answer(samples)
    span = Span(*answer["span"][0].tolist())
    chosen = [int(i) for i in answer["frame_index"][0]]
    return {
        "video": str(video),
        "question": question,
        "prediction": answer["prediction"][0],
        "span_s": [round(edge, 3) for edge in span.to_seconds(clip.times_s, clip.info.duration_s)],
        "frame_times_s": [round(float(clip.times_s[i]), 3) for i in chosen],
        "milliseconds": {k: round(1000 * v, 1) for k, v in {"decode": decoding, **answer["seconds"]}.items()},
        "evidence": {
            "frames": clip.frames,
            "flow": answer["flow"][0].cpu().numpy() if "flow" in answer else None,
            "frame_times": clip.times_s,
            "span": list(span),
            "frame_index": chosen,
            **{key: answer[key][0].tolist() for key in ("start_logits", "end_logits") if key in answer},
        },
    }


def as_text(result: Mapping[str, Any]) -> str:
    start_s, end_s = result["span_s"]
    times = ", ".join(f"{t:.2f}" for t in result["frame_times_s"])
    stages = ", ".join(f"{stage} {value:.0f}" for stage, value in result["milliseconds"].items())
    total = sum(result["milliseconds"].values())
    return (
        f"question  {result['question']}\nanswer    {result['prediction']}\n"
        f"span      {start_s:.2f} to {end_s:.2f} s\nframes    {times} s\n"
        f"time      {total:.0f} ms ({stages})\npicture   {result['picture']}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lavis-lstp ask", description=__doc__.splitlines()[0])
    parser.add_argument("video", help="video file")
    parser.add_argument("question")
    parser.add_argument("--checkpoint", help="a run's folder, one of its checkpoints, or a weights file")
    parser.add_argument("--model", default="lstp_tiny", help="without a run's folder (default: lstp_tiny)")
    parser.add_argument("--model-type", help="default: the model's default type")
    parser.add_argument("--num-frames", type=int, default=64, help="evenly spaced frames to read (default: 64)")
    parser.add_argument("--picture", type=Path, help="PNG to write (default: <video>_lstp.png in this folder)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--options", nargs="*", default=[], metavar="model.A=B", help="overrides of the model config")
    args = parser.parse_args(argv)
    if args.num_frames < 1:
        raise ConfigError(f"--num-frames must be at least 1, got {args.num_frames}")
    if not Path(args.video).is_file():  # before the seconds that a model takes
        raise LstpError(f"{args.video}: no such video file")
    model, trained = build_model(args.model, args.model_type, args.checkpoint, args.options)
    if not trained:
        message = (
            "the model has random weights, so its answer means nothing; train one (make demo), then --checkpoint RUN"
        )
        print(f"note: {message}", file=sys.stderr)
    result = ask(model, args.video, args.question, num_frames=args.num_frames)

    from lavis_lstp.picture import explanation_picture

    evidence = result.pop("evidence")
    picture = args.picture or Path(f"{Path(args.video).stem}_lstp.png")
    title = Path(args.video).name
    explanation_picture(picture, question=args.question, prediction=result["prediction"], title=title, **evidence)
    result["picture"] = str(picture)
    print(json.dumps(result, ensure_ascii=False) if args.json else as_text(result))
    return 0
