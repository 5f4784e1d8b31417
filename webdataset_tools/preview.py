"""`preview`: a contact sheet of some samples, as an HTML page or a PNG: frames, flow, spans, questions and answers.

Samples are taken evenly from the whole set. Flow that is in the shards, or in a parallel set named with --flow, is
drawn in the usual colour wheel, shown at the left, with one scale a clip. Under the frames are their times in seconds,
gold spans in yellow, and pseudo spans, which are in the shards or a set named with --spans, in blue.
"""

from __future__ import annotations

import argparse
import html
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from lavis_lstp.data.frame_numbers import uniform_centres
from lavis_lstp.data.pictures import open_picture
from lavis_lstp.data.shards.format import parse_flow, parse_json
from lavis_lstp.data.shards.questions import ShardQuestions
from lavis_lstp.data.shards.sets import ShardSet
from lavis_lstp.data.shards.storage import expand
from lavis_lstp.errors import ConfigError
from lavis_lstp.files import atomic_writer, whole_file
from lavis_lstp.report.explanation import GOLD, PREDICTED, flow_colours
from lavis_lstp.report.shell import page_of, picture_tag
from webdataset_tools.pack import positive

HELP = "a contact sheet of some samples, as HTML or PNG"
SHARD_BY_SHARD = False
MARGIN, BAR, LINE = 90, 12, 14  # px: left of the strips (wheel), height of a span's bar, of a line of text


def preview(
    shards: Sequence[str],
    out: str | os.PathLike,
    *,
    count: int = 12,
    frames: int = 8,
    size: int = 112,
    flow: Sequence[str] | None = None,
    spans: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Writes the sheet to `out`, which ends with .html or .png.

    Args:
        count: samples on it.
        frames, size: of each video, and their side in px.
        flow, spans: shards of parallel sets.
    """
    path = Path(out)
    if path.suffix not in (".html", ".png"):
        raise ConfigError(f"{out}: expected a name that ends with .html or .png")
    questions = ShardQuestions(shards, flow=flow)
    chosen = uniform_centres(count, len(questions))
    beside = None if spans is None else ShardSet(spans)
    sheets = []
    for number in tqdm(chosen, desc="preview", unit="sample", disable=None):
        place = questions[number]["place"]
        content = dict(questions.content(place))
        if beside is not None:
            content |= beside.read(*place, ("span.json",))
        sheets.append(_sheet(questions, number, content, frames, size))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        body = "".join(_section(image, text) for image, text in sheets)
        with atomic_writer(path) as file:
            what = f"{len(questions)} questions, {len(chosen)} shown"
            file.write(page_of(what, f"<h1>{what}</h1>{body}"))
    else:
        _write_png(path, [_with_text(image, text) for image, text in sheets])
    return {"out": str(path), "shown": [questions.question_id(number) for number in chosen]}


def _sheet(
    questions: ShardQuestions, number: int, content: Mapping[str, bytes], count: int, size: int
) -> tuple[Image.Image, str]:
    """Pictures of a sample, and what is asked about it."""
    row = questions[number]
    place = row["place"]
    value = parse_json(content["json"], questions.name(place))
    frames, times = _frames(questions, number, count, size)
    rows: list[tuple[np.ndarray, np.ndarray | None]] = [(frames, None)] if len(frames) else []
    if "flow" in content and len(frames) > 1:
        field = parse_flow(content["flow"], questions.name(place))[0]
        colours = flow_colours(field[((np.arange(len(frames)) + 0.5) * len(field) / len(frames)).astype(int)])[0]
        rows.append((_resized(colours, size), _wheel(MARGIN - 20)))
    duration_s = value.get("duration_s") or (times[-1] if len(times) else 0) or 1.0
    bars = _spans(row, content, duration_s)
    height = len(rows) * size + (LINE if value["kind"] == "video" else 0) + BAR * len(bars) + 4
    picture = Image.new("RGB", (MARGIN + max(1, len(frames)) * size, height), "white")
    for line, (images, wheel) in enumerate(rows):
        for column, image in enumerate(images):
            picture.paste(Image.fromarray(image.transpose(1, 2, 0)), (MARGIN + column * size, line * size))
        if wheel is not None:
            picture.paste(Image.fromarray(wheel), (10, line * size + 10))
    draw = ImageDraw.Draw(picture)
    width = picture.width - MARGIN
    for column, time_s in enumerate(times if value["kind"] == "video" else ()):
        draw.text((MARGIN + column * size + 2, len(rows) * size + 1), f"{time_s:.2f} s", fill="black")
    for line, (start, end, colour) in enumerate(bars):
        top = height - 4 - BAR * (len(bars) - line)
        edges = [MARGIN + width * min(1.0, share) for share in (start, end)]
        draw.rectangle([MARGIN, top + 3, picture.width, top + BAR - 2], fill="#eeeeee")
        draw.rectangle([edges[0], top + 3, max(edges[1], edges[0] + 1), top + BAR - 2], fill=colour)
    units = {"duration_s": "{:.2f} s", "fps": "{:g} frames a second", "num_frames": "{} frames"}
    facts = ", ".join(text.format(value[name]) for name, text in units.items() if name in value)
    options = ["Options: " + " | ".join(row["options"])] if row.get("options") else []
    lines = [f"{row['question_id']}   {value['kind']} {value.get('source', '')}   {facts}", f"Q: {row['question']}"]
    lines += [*options, f"A: {'(hidden)' if row['answer'] is None else row['answer']}"]
    return picture, "\n".join(lines)


def _frames(questions: ShardQuestions, number: int, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [T,3,size,size] and seconds."""
    stored = questions.frames(questions[number]["place"])
    if stored is None:
        from lavis_lstp.data.qa_dataset import VideoQADataset  # which needs torch

        sample = VideoQADataset(questions, num_frames=count, image_size=size)[number]
        return sample["frames"].numpy(), sample["frame_times"].numpy()
    chosen, name = uniform_centres(count, len(stored.pictures)), questions.name(questions[number]["place"])
    pictures = [open_picture(stored.pictures[n], f"{name}, frame {n}").resize((size, size)) for n in chosen]
    return np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures]), stored.times_s[chosen]


def _spans(row: Mapping[str, Any], content: Mapping[str, bytes], duration_s: float) -> list[tuple[float, float, str]]:
    """Start and end, as shares of the video, and colour of each span."""
    bars = []
    if row.get("span_s"):
        bars.append((row["span_s"][0] / duration_s, row["span_s"][1] / duration_s, GOLD))
    if "span.json" in content:
        spans = parse_json(content["span.json"], "span.json")
        span = (spans["spans"].get(row["question_id"]) or {}).get("span")
        if span:
            bars.append((span[0] / spans["num_frames"], span[1] / spans["num_frames"], PREDICTED))
    return bars


def _resized(pictures: np.ndarray, size: int) -> np.ndarray:
    return np.stack(
        [np.asarray(Image.fromarray(p.transpose(1, 2, 0)).resize((size, size))).transpose(2, 0, 1) for p in pictures]
    )


def _wheel(size: int) -> np.ndarray:
    """uint8 [size,size,3]: what each direction looks like."""
    v, u = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    inside = np.hypot(u, v) <= 1
    colours = flow_colours(np.stack([u * inside, v * inside])[None].astype(np.float32) * 10)[0][0]
    return np.where(inside[..., None], colours.transpose(1, 2, 0), 255).astype(np.uint8)


def _with_text(picture: Image.Image, text: str) -> Image.Image:
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, 150) or [""]]
    whole = Image.new("RGB", (max(picture.width, 900), picture.height + LINE * len(lines) + 12), "white")
    draw = ImageDraw.Draw(whole)
    for number, line in enumerate(lines):
        draw.text((4, 4 + LINE * number), line.encode("latin-1", "replace").decode("latin-1"), fill="black")
    whole.paste(picture, (0, LINE * len(lines) + 8))
    return whole


def _section(picture: Image.Image, text: str) -> str:
    """A sample on the page; a wide strip is scrolled, not shrunk."""
    head, *lines = text.split("\n")
    words = "<br>".join(html.escape(line) for line in lines)
    tag = picture_tag(picture, f"frames of {head}")
    return f'<h2>{html.escape(head)}</h2><p>{words}</p><div class="scroll strip">{tag}</div>'


def _write_png(path: Path, parts: Sequence[Image.Image]) -> None:
    whole = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    with whole_file(path) as partial:
        whole.save(partial, "PNG")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "example: python -m webdataset_tools preview 'train-{000000..000123}.tar' --flow 'flow-{000000..000123}.tar' "
        "--out sheet.html"
    )
    parser.add_argument("shards", nargs="+", help="paths or addresses of shards, braces allowed")
    parser.add_argument("--out", required=True, metavar="FILE", help="sheet.html or sheet.png")
    parser.add_argument("--count", type=positive, default=12, help="samples shown; default: 12")
    parser.add_argument("--frames", type=positive, default=8, help="of each video; default: 8")
    parser.add_argument("--size", type=positive, default=112, help="px, side of a frame; default: 112")
    parser.add_argument("--flow", nargs="+", help="shards of a parallel set with flow")
    parser.add_argument("--spans", nargs="+", help="shards of a parallel set with spans")


def run(args: argparse.Namespace) -> dict[str, Any]:
    beside = {name: expand(getattr(args, name)) for name in ("flow", "spans") if getattr(args, name)}
    sizes = {"count": args.count, "frames": args.frames, "size": args.size}
    return preview(expand(args.shards), args.out, **sizes, **beside)


def show(report: dict[str, Any], args: argparse.Namespace) -> str:
    return f"{report['out']}: {len(report['shown'])} samples"
