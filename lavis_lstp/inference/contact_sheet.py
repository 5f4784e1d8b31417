"""The frames that an answer came from, as people look at them: in the video's own proportions, side by side.

In: a medium and seconds. Out: pictures, one sheet of them with their times, or that sheet as text for a terminal.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lavis_lstp.data.pictures import open_picture
from lavis_lstp.data.video.container import source_name
from lavis_lstp.data.video.reading import probe, read_frames
from lavis_lstp.inference.candidates import Medium, is_picture

SIDE = 320  # px, longer side of a picture
HALF_A_STEP_S = 0.0005  # times of a prediction are rounded to a millisecond
LABEL_PX = 16
GAP_PX = 4
CURVE_PX = 80  # height of the scores under a sheet
CHOSEN, SCORES = (230, 0, 126), (42, 111, 219)


def pictures_at(source: Medium, times_s: Sequence[float], *, name: str | None = None) -> list[Image.Image]:
    """RGB pictures of the frames at these seconds, at most `SIDE` px on the longer side.

    Raises:
        VideoError: the medium cannot be read.
    """
    if not times_s:
        return []
    if is_picture(source):
        given = source if isinstance(source, bytes) else Path(source) if isinstance(source, str | os.PathLike) else None
        return [_small(open_picture(given or source.read(), source_name(source, name)))]
    if isinstance(source, list | tuple):  # pictures that stand for a video, a third of a second each
        return [_small(open_picture(source[round(time * 3)], name or "picture")) for time in times_s]
    info = probe(source, name=name)
    scale = min(1.0, SIDE / max(info.height, info.width))
    size = (max(1, round(info.height * scale)), max(1, round(info.width * scale)))
    times = [min(time + HALF_A_STEP_S, info.duration_s) for time in times_s]
    frames = read_frames(source, times_s=times, size=size, name=name).frames
    return [Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))) for frame in frames]


def _small(picture: Image.Image) -> Image.Image:
    picture.thumbnail((SIDE, SIDE))
    return picture


def contact_sheet(pictures: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """The pictures from left to right with a label below each, four in a row."""
    columns = min(4, len(pictures))
    width, height = (max(one.size[axis] for one in pictures) for axis in (0, 1))
    rows = -(-len(pictures) // columns)
    whole = ((width + GAP_PX) * columns - GAP_PX, (height + LABEL_PX + GAP_PX) * rows - GAP_PX)
    sheet = Image.new("RGB", whole, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left, top = (number % columns) * (width + GAP_PX), (number // columns) * (height + LABEL_PX + GAP_PX)
        sheet.paste(picture, (left, top))
        draw.text((left + 2, top + height + 2), label, fill="black")
    return sheet


def with_scores(
    sheet: Image.Image, times_s: Sequence[float], scores: Sequence[float], chosen_s: Sequence[float], duration_s: float
) -> Image.Image:
    """The sheet, and under it the scores over the time of the video, with a line at each chosen frame."""
    top, low, high = sheet.height + GAP_PX, min(scores), max(scores)
    whole = Image.new("RGB", (sheet.width, top + CURVE_PX + LABEL_PX), "white")
    whole.paste(sheet, (0, 0))
    draw = ImageDraw.Draw(whole)

    def x(seconds: float) -> float:
        return (sheet.width - 1) * min(1.0, seconds / max(duration_s, 1e-3))

    def y(score: float) -> float:
        return top + (CURVE_PX - 1) * (1 - (score - low) / max(high - low, 1e-12))

    for seconds in chosen_s:
        draw.line([(x(seconds), top), (x(seconds), top + CURVE_PX - 1)], fill=CHOSEN)
    draw.line([(x(t), y(s)) for t, s in zip(times_s, scores, strict=True)], fill=SCORES)
    draw.text((2, top + CURVE_PX + 2), f"scores, {low:.3g} to {high:.3g}, over {duration_s:.1f} s", fill="black")
    return whole


def as_blocks(picture: Image.Image, columns: int) -> str:
    """A picture as lines of half blocks in 24-bit colours, for a terminal that has them; two pixels a character."""
    columns = max(1, min(columns, picture.width))
    height = max(2, round(picture.height * columns / picture.width / 2) * 2)
    pixels = np.asarray(picture.resize((columns, height)))
    lines = []
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        cells = (
            f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{x};{y};{z}m▀" for (r, g, b), (x, y, z) in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def as_png(picture: Image.Image) -> bytes:
    stored = io.BytesIO()
    picture.save(stored, "PNG")
    return stored.getvalue()
