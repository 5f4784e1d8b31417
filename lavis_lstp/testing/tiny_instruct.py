"""`python -m lavis_lstp.testing.tiny_instruct OUT`: instruction data in Video-LLaVA's layout, a few kilobytes of it.

In: a folder. Out, in it, the same bytes each time:

    llava_image_tune/*.png, videochatgpt_tune/*.mp4      pictures, and videos of 1 to 2 s, of one coloured shape
    train.json, val.json            conversations about both, of one and several turns, [{id, image | video, ...}]
    nlp_tune.json                   conversations without a picture, [{id, model, conversations}]
    videoinstruct.json              the video-only form, {id: {q, a, video_id}}, of the folder videochatgpt_tune
    eval.json                       questions, answers and gold spans in this package's form (`lstp_video_qa`)
    spans.json                      pseudo spans of the videos of train.json and videoinstruct.json
    pseudo_label_indices.json, pseudo_label_fractions.json       the same in the published forms

With `--recipes` the same media where the recipes of projects/lstp look for them from the folder above, split in three:

    ivinstruct/{train,val,test}.json, nlp_tune.json     conversations, beside their media
    videoinstruct/{train,val,test}.json, video/         the video-only form
    own/{train,val,test}.json, videos/                  this package's form
    qvhighlights/, charades_sta/, nextgqa/              benchmarks whose moments are learned (`tiny_benchmarks`)

Enough to run every recipe in seconds, and to debug one's own data against.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lavis_lstp.data.frame_numbers import sample_indices, uniform_centres
from lavis_lstp.data.shapes import scene as world
from lavis_lstp.data.shapes.shapes_qa import draw_background, draw_shape, write_video
from lavis_lstp.data.spans import LAST_INDEX, SPANS_FORMAT, SPANS_VERSION
from lavis_lstp.data.video.reading import SHORT_VIDEOS
from lavis_lstp.files import write_json
from lavis_lstp.schema import Span

SIDE = 64  # px
COUNT = 6  # pictures, and videos


@dataclass(frozen=True)
class Clip:
    """One shape that appears in a part of a video."""

    number: int
    colour: str
    kind: str
    length: int
    shown: Span

    @property
    def name(self) -> str:
        return f"clip-{self.number}"

    @property
    def file(self) -> str:
        return f"videochatgpt_tune/{self.name}.mp4"

    def frames(self) -> np.ndarray:
        """uint8 [T,SIDE,SIDE,3]"""
        frames = np.repeat(draw_background(self.number, (), SIDE)[None], self.length, axis=0)
        for t in range(self.shown.start, self.shown.end):
            x = 0.25 + 0.5 * t / self.length
            draw_shape(frames[t], world.Shape(self.kind, world.COLOURS[self.colour], x, 0.5, 0.17, angle_deg=0.0))
        return frames

    def span(self, read: Sequence[int]) -> Span:
        """Where the shape is among the frames that are read; the whole of them where it is in none."""
        seen = [i for i, t in enumerate(read) if self.shown.start <= t < self.shown.end]
        return Span(seen[0], seen[-1] + 1) if seen else Span(0, len(read))


def write_instruct(out: str | Path, num_frames: int = 8, short_videos: str = "keep") -> dict[str, Path]:
    """Writes everything into the folder `out`; returns its files by name without ending, and "root".

    Args:
        num_frames, short_videos: of the data sets that will read spans.json.
    """
    out = Path(out)
    spread = sample_indices if short_videos == "double" else uniform_centres
    clips = _write_media(out)
    rows = [row for clip in clips for row in (_image_row(clip), _video_row(clip))]
    spans, fractions = {}, {}
    for clip in clips:
        read = spread(num_frames, clip.length)
        for name in (clip.name, f"{clip.name}_q"):  # of train.json, of videoinstruct.json
            spans[name] = clip.span(read)
            fractions[name] = spans[name].to_fractions(len(read))
    header = {"format": SPANS_FORMAT, "version": SPANS_VERSION, "unit": "frames", "num_frames": num_frames}
    header |= {"fps": None, "short_videos": short_videos, "made_by": {}}
    contents: dict[str, Any] = {
        "train": rows[:-2],
        "val": rows[-2:],
        "nlp_tune": [_text_row(number) for number in range(COUNT)],
        "videoinstruct": {f"{clip.name}_q": _question(clip) for clip in clips},
        "eval": [_eval_row(clip) for clip in clips[-2:]],
        "spans": {**header, "spans": {name: {"span": list(span)} for name, span in spans.items()}},
        "pseudo_label_fractions": fractions,
        "pseudo_label_indices": {name: [_index(x) for x in pair] for name, pair in fractions.items()},
    }
    for name, content in contents.items():
        write_json(out / f"{name}.json", content, indent=1)
    return {"root": out, **{name: out / f"{name}.json" for name in contents}}


def write_recipe_inputs(out: str | Path) -> Path:
    """Writes what `inputs` is to the recipes into the folder `out`, and returns it."""
    from lavis_lstp.testing.tiny_benchmarks import WRITERS  # which draws the clips of this module

    out = Path(out)
    for name in ("qvhighlights", "charades_sta", "nextgqa"):
        (out / name).mkdir(parents=True, exist_ok=True)
        WRITERS[name](out / name)
    clips = _write_media(out / "ivinstruct")
    for folder in ("videoinstruct/video", "own/videos"):
        shutil.copytree(out / "ivinstruct" / "videochatgpt_tune", out / folder, dirs_exist_ok=True)
    for split, own in {"train": clips[:-2], "val": clips[-2:-1], "test": clips[-1:]}.items():
        contents = {
            "ivinstruct": [row for clip in own for row in (_image_row(clip), _video_row(clip))],
            "videoinstruct": {f"{clip.name}_q": _question(clip) for clip in own},
            "own": [{**_eval_row(clip), "video": Path(clip.file).name} for clip in own],
        }
        for folder, content in contents.items():
            write_json(out / folder / f"{split}.json", content, indent=1)
    write_json(out / "ivinstruct" / "nlp_tune.json", [_text_row(number) for number in range(COUNT)], indent=1)
    return out


def _write_media(out: Path) -> list[Clip]:
    """A video and a picture of each clip, in the folders of Video-LLaVA's layout."""
    for folder in ("llava_image_tune", "videochatgpt_tune"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    clips = [make_clip(number) for number in range(COUNT)]
    for clip in clips:
        write_video(out / clip.file, clip.frames())
        Image.fromarray(clip.frames()[clip.shown.start]).save(out / "llava_image_tune" / f"picture-{clip.number}.png")
    return clips


def _index(fraction: float) -> int:
    """The first of the 32 published positions that is not before `fraction`: read again, it gives the frame back."""
    return math.ceil(LAST_INDEX * fraction - 1e-9)


def make_clip(number: int) -> Clip:
    """The clip of a number: 1 to 2 s, colour and kind in turn."""
    colours, kinds = list(world.COLOURS), list(world.KINDS)
    length = 10 + 2 * number  # 1 to 2 s
    start = 1 + number
    return Clip(number, colours[number % len(colours)], kinds[number % len(kinds)], length, Span(start, start + 5))


def _talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def _image_row(clip: Clip) -> dict[str, Any]:
    talk = _talk("What is this?\n<image>", f"A {clip.colour} {clip.kind}.")
    if clip.number % 2:
        talk += _talk("Which colour?", clip.colour)
    return {"id": "0000", "image": f"llava_image_tune/picture-{clip.number}.png", "conversations": talk}


def _video_row(clip: Clip) -> dict[str, Any]:
    talk = _talk("<video>\nWhat appears in the video?", f"A {clip.kind} appears.")
    if clip.number % 2 == 0:
        talk += _talk("Which colour has it?", f"It is {clip.colour}.")
    return {"id": clip.name, "video": clip.file, "conversations": talk}


def _text_row(number: int) -> dict[str, Any]:
    talk = _talk(f"What is {number} plus 1?", f"{number + 1}")
    if number % 2:
        talk = [{"from": "gpt", "value": "Hello."}, *talk, *_talk("Thank you.", "")]
    return {"id": number, "model": "", "conversations": talk}


def _question(clip: Clip) -> dict[str, str]:
    return {"q": "Which colour has the shape?", "a": clip.colour, "video_id": clip.name}


def _eval_row(clip: Clip) -> dict[str, Any]:
    span_s = [clip.shown.start / world.FPS, clip.shown.end / world.FPS]
    question = {"question": "Which colour has the shape?", "answer": clip.colour, "span_s": span_s}
    return {"question_id": f"{clip.name}-colour", "video_id": clip.name, "video": clip.file, **question}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lavis_lstp.testing.tiny_instruct", description=__doc__.splitlines()[0]
    )
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--recipes", action="store_true", help="lay out what `inputs` is to the recipes")
    parser.add_argument("--num-frames", type=int, default=8, help="that spans.json counts (default: 8)")
    parser.add_argument("--short-videos", choices=SHORT_VIDEOS, default="keep", help="default: keep")
    args = parser.parse_args(argv)
    if args.num_frames < 1:
        parser.error(f"--num-frames must be at least 1, got {args.num_frames}")
    if args.recipes:
        print(f"inputs of the recipes in {write_recipe_inputs(args.out)}; run them from {Path(args.out).parent}")
        return 0
    paths = write_instruct(args.out, args.num_frames, args.short_videos)
    print(f"instruction data in {paths['root']}: {', '.join(path.name for path in paths.values() if path.suffix)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
