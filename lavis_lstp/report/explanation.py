"""One picture that explains one answer: what the video shows, what moves, which frames were taken, what was said.

In: the decoded frames of a video, their flow, the span and the frames that the model chose, and the texts. Out: a
PNG. From top to bottom: question and answer; a film strip with the chosen frames outlined; the flow under it, in the
usual colour wheel; a time line with the start and end probabilities, the predicted and the gold span; the chosen
frames, large. Strip, flow and time line share one horizontal axis, so that a thing stands under its moment.
"""

from __future__ import annotations

import functools
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lavis_lstp.files import whole_file
from lavis_lstp.schema import Span

CHOSEN = "#e6007e"  # outline of chosen frames: in neither the data set's colours nor a film's usual ones
PREDICTED = "#2a6fdb"
GOLD = "#d9a400"
START, END = "#0a8f6a", "#b3541e"
FAINT = "#666666"
BORDER = "#bbbbbb"

WIDTH_IN, DPI = 13.0, 100
LEFT_IN, RIGHT_IN = 1.4, 0.35
WHEEL_IN = 0.15  # left edge of the colour wheel
COLUMNS = 16  # of the film strip
LINE_IN = 0.27  # of text
TIMELINE_IN = 1.35
ROW_MAX_IN, CHOSEN_MAX_IN = 1.4, 2.2
MIN_FLOW_PX = 0.5  # the largest motion of a still video is drawn no stronger than this


def explanation_picture(
    path: str | os.PathLike,
    *,
    frames: np.ndarray,
    flow: np.ndarray | None,
    frame_times: Sequence[float],
    span: Sequence[int] | None,
    frame_index: Sequence[int],
    question: str,
    prediction: str,
    answer: str | None = None,
    gold_span: Sequence[int] | None = None,
    start_logits: Sequence[float] | None = None,
    end_logits: Sequence[float] | None = None,
    title: str | None = None,
) -> Path:
    """Writes the PNG, complete or not at all; returns its path. Arrays may also be torch tensors on the CPU.

    Args:
        frames: uint8 [T,3,H,W].
        flow: [T,2,h,w], px per frame; None leaves the row out.
        frame_times: T seconds.
        span, gold_span: half-open range of the T frames; None or (-1, -1) where there is none.
        frame_index: the chosen frames; -1 stands for none.
        start_logits, end_logits: [T], shown as probabilities over the T frames.
        answer: the right one, where it is known.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    frames = np.asarray(frames)
    times = np.asarray(frame_times, dtype=np.float64)
    if frames.ndim != 4 or frames.shape[1] != 3 or not len(frames) or len(times) != len(frames):
        raise ValueError(f"expected frames [T,3,H,W] and T times, got {frames.shape} and {len(times)} times")
    chosen = sorted({int(i) for i in frame_index if i >= 0})
    lines = _text_lines(question, prediction, answer)
    page = _Page(Figure(figsize=(WIDTH_IN, 1.0), dpi=DPI, facecolor="white"), len(frames))
    aspect = frames.shape[2] / frames.shape[3]
    row = min(page.column_in * aspect, ROW_MAX_IN)
    large = min((page.strip_in - 0.15 * (len(chosen) - 1)) / max(len(chosen), 1) * aspect, CHOSEN_MAX_IN)

    heights = {"title": 0.42, "text": LINE_IN * len(lines) + 0.1, "film": row + 0.05}
    if flow is not None:
        heights["flow"] = row + 0.05
    heights["timeline"] = TIMELINE_IN + 0.75
    if chosen:
        heights["chosen"] = large + 0.5
    page.stack(heights)

    _draw_texts(page, title or "LSTP: the frames a question asks for", lines)
    shown = _shown_frames(len(frames), chosen)
    _draw_strip(page, "film", "video", frames, shown, chosen, row, aspect)
    if flow is not None:
        colours, largest = flow_colours(flow)
        _draw_strip(page, "flow", "motion", colours, shown, chosen, row, aspect)
        _draw_wheel(page, row, largest)
    spans = (_span(span), _span(gold_span))
    _draw_timeline(page, times, *spans, chosen, _probabilities(start_logits), _probabilities(end_logits))
    if chosen:
        _draw_chosen(page, frames, times, chosen, large, aspect)

    path = Path(path)
    with whole_file(path) as partial:
        FigureCanvasAgg(page.figure).print_png(str(partial))
    return path


def flow_colours(flow: np.ndarray) -> tuple[np.ndarray, float]:
    """uint8 [T,3,h,w] in the colour wheel of optical flow, and the motion in px per frame that its rim stands for.

    One scale for the whole clip, that of its 99.5th percentile, so that a wild pixel does not make the rest pale.
    """
    import torch
    from torchvision.utils import flow_to_image

    flow = torch.as_tensor(np.asarray(flow), dtype=torch.float32)
    length = flow.norm(dim=1, keepdim=True)
    largest = max(float(np.quantile(length.numpy(), 0.995)), MIN_FLOW_PX)
    unit = flow / torch.maximum(length, torch.tensor(largest))
    # flow_to_image divides by the largest length it finds: an extra field of length 1 makes that 1.
    rim = torch.zeros_like(unit[:1])
    rim[:, 0] = 1.0
    return flow_to_image(torch.cat([unit, rim]))[:-1].numpy(), largest


def _span(span: Sequence[int] | None) -> Span | None:
    if span is None:
        return None
    start, end = (int(x) for x in span)
    return Span(start, end) if 0 <= start < end else None


def _probabilities(logits: Sequence[float] | None) -> np.ndarray | None:
    """Softmax of [T] logits."""
    if logits is None:
        return None
    logits = np.asarray(logits, dtype=np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _text_lines(question: str, prediction: str, answer: str | None) -> list[tuple[str, str, str]]:
    """(label, line, colour), wrapped."""
    verdict = PREDICTED
    if answer is not None:
        verdict = "#178a3a" if prediction.strip().lower() == answer.strip().lower() else "#c62828"
    lines = []
    texts = [("question", question, "black"), ("prediction", prediction or "(nothing)", verdict)]
    for label, text, colour in texts + ([("answer", answer, "black")] if answer is not None else []):
        for part in textwrap.wrap(text, 120, max_lines=4, placeholder=" ...") or [""]:
            lines.append((label, part, colour))
            label = ""
    return lines


def _shown_frames(total: int, chosen: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first, end, shown) of each column of the strip: the middle frame, or the first chosen one in it."""
    columns = min(COLUMNS, total)
    edges = [round(c * total / columns) for c in range(columns + 1)]
    shown = []
    for first, end in zip(edges[:-1], edges[1:], strict=True):
        inside = [i for i in chosen if first <= i < end]
        shown.append((first, end, inside[0] if inside else (first + end - 1) // 2))
    return shown


class _Page:
    """A figure whose rows are stacked from the top, addressed in inches."""

    def __init__(self, figure, total: int):
        self.figure = figure
        self.total = total  # frames on the horizontal axis
        self.strip_in = WIDTH_IN - LEFT_IN - RIGHT_IN
        self.column_in = self.strip_in / min(COLUMNS, total)
        self.height_in = 1.0
        self.top_in: dict[str, float] = {}

    def stack(self, heights: dict[str, float]) -> None:
        used = 0.12
        for name, height in heights.items():
            self.top_in[name] = used
            used += height
        self.height_in = used + 0.08
        self.figure.set_size_inches(WIDTH_IN, self.height_in)

    def axes(self, row: str, left: float, width: float, height: float, down: float = 0.0):
        """Axes `down` inches below the top of a row."""
        bottom = self.height_in - self.top_in[row] - down - height
        box = (left / WIDTH_IN, bottom / self.height_in, width / WIDTH_IN, height / self.height_in)
        return self.figure.add_axes(box)

    def text(self, row: str, left: float, down: float, text: str, **style) -> None:
        y = 1 - (self.top_in[row] + down) / self.height_in
        given = {"va": "top", "parse_math": False, "family": _families()}
        self.figure.text(left / WIDTH_IN, y, text, **{**given, **style})


def _draw_texts(page: _Page, title: str, lines: Sequence[tuple[str, str, str]]) -> None:
    title = textwrap.shorten(title, 110, placeholder=" ...")
    page.text("title", 0.15, 0.05, title, fontsize=14, fontweight="bold")
    for n, (label, line, colour) in enumerate(lines):
        down = LINE_IN * n
        page.text("text", LEFT_IN - 0.12, down, label, fontsize=11, color=FAINT, ha="right")
        weight = "bold" if colour != "black" else "normal"
        page.text("text", LEFT_IN, down, line, fontsize=11, color=colour, fontweight=weight)


def _draw_picture(axes, picture: np.ndarray, outlined: bool, ratio: float) -> None:
    """picture uint8 [3,h,w], drawn `ratio` as high as wide: flow of a square grid lies on frames that are not."""
    axes.imshow(picture.transpose(1, 2, 0), interpolation="nearest", aspect=ratio * picture.shape[2] / picture.shape[1])
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=CHOSEN if outlined else BORDER, linewidth=3.0 if outlined else 0.6)


def _draw_strip(page: _Page, row: str, label: str, pictures, shown, chosen, height: float, ratio: float) -> None:
    page.text(row, LEFT_IN - 0.12, height / 2, label, fontsize=11, color=FAINT, ha="right", va="center")
    per_frame = page.strip_in / page.total
    for first, end, index in shown:
        axes = page.axes(row, LEFT_IN + first * per_frame + 0.02, (end - first) * per_frame - 0.04, height)
        _draw_picture(axes, pictures[index], index in chosen, ratio)


def _draw_wheel(page: _Page, height: float, largest: float) -> None:
    """The legend of the flow's colours: the colour at a place is that of motion towards it from the centre."""
    side = min(0.42, height)
    axis = np.linspace(-1, 1, 61, dtype=np.float32)
    field = np.stack(np.meshgrid(axis, axis))[None]
    outside = np.hypot(*field[0]) > 1
    field[:, :, outside] = 0
    colours, _ = flow_colours(field)  # its longest vector has length 1
    axes = page.axes("flow", WHEEL_IN, side, side, (height - side) / 2 - 0.08)
    axes.imshow(np.where(outside[..., None], 255, colours[0].transpose(1, 2, 0)), interpolation="bilinear")
    axes.axis("off")
    page.text(
        "flow",
        WHEEL_IN + side / 2,
        (height + side) / 2 - 0.04,
        f"rim {largest:.1f} px",
        fontsize=7,
        color=FAINT,
        ha="center",
    )


def _draw_timeline(page: _Page, times, span, gold_span, chosen, start, end) -> None:
    total = page.total
    axes = page.axes("timeline", LEFT_IN, page.strip_in, TIMELINE_IN, 0.1)
    axes.set_xlim(0, total)
    centres = np.arange(total) + 0.5
    curves = [c for c in (start, end) if c is not None]
    top = max([float(c.max()) for c in curves], default=1.0) * 1.12
    bar = 0.17 * top  # height of a span's bar, below the curves
    for curve, colour, style, label in ((start, START, "-", "start"), (end, END, "--", "end")):
        if curve is not None:
            axes.plot(centres, curve, style, color=colour, linewidth=1.6, marker="." if total < 3 else None,
                      label=f"probability that the moment {label}s here")  # fmt: skip
    rows = [("predicted moment", span, PREDICTED), ("gold moment", gold_span, GOLD)]
    rows = [row for row in rows if row[1] is not None]
    for n, (label, found, colour) in enumerate(rows):
        left, right = found
        axes.broken_barh([(left, right - left)], (-(n + 1) * 1.2 * bar, bar), facecolor=colour, label=label)
    bottom = -1.2 * bar * len(rows) - 0.1 * bar if rows else -0.05 * top
    if span is not None:
        axes.axvspan(*span, facecolor=PREDICTED, alpha=0.12, linewidth=0, zorder=0)
    for n, index in enumerate(chosen):
        axes.axvline(index + 0.5, color=CHOSEN, linewidth=1.5, label="chosen frame" if n == 0 else None)
    axes.set_ylim(bottom, top)
    ticks = np.unique(np.linspace(0, total - 1, min(9, total)).round().astype(int))
    axes.set_xticks(ticks + 0.5, [f"{times[i]:.1f} s" for i in ticks], fontsize=9)
    axes.set_yticks([0, top / 1.12] if curves else [], [f"{v:.2g}" for v in (0, top / 1.12)] if curves else [])
    axes.tick_params(axis="y", labelsize=8, colors=FAINT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    page.text(
        "timeline", LEFT_IN - 0.45, 0.1 + TIMELINE_IN / 2, "time", fontsize=11, color=FAINT, ha="right", va="center"
    )
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=5, fontsize=9, frameon=False)


def _draw_chosen(page: _Page, frames, times, chosen, height: float, ratio: float) -> None:
    style = {"fontsize": 11, "color": FAINT, "ha": "right", "va": "center"}
    page.text("chosen", LEFT_IN - 0.12, height / 2, "the model\nsaw only", **style)
    width = (page.strip_in - 0.15 * (len(chosen) - 1)) / len(chosen)
    for n, index in enumerate(chosen):
        left = LEFT_IN + n * (width + 0.15)
        _draw_picture(page.axes("chosen", left, width, height, 0.02), frames[index], True, ratio)
        caption = (
            f"{times[index]:.2f} s (frame {index} of {len(frames)})" if len(chosen) <= 8 else f"{times[index]:.1f} s"
        )
        page.text("chosen", left + width / 2, height + 0.08, caption, fontsize=9, ha="center")


WIDE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Zen Hei")
WIDE_FONTS += ("WenQuanYi Micro Hei", "IPAexGothic", "IPAGothic", "TakaoGothic", "Droid Sans Fallback", "PingFang SC")
WIDE_FONTS += ("Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "SimHei", "MS Gothic", "Arial Unicode MS")
"""Fonts with Chinese, Japanese or Korean letters, which matplotlib's own has not; those that are installed are used."""


@functools.lru_cache(maxsize=1)
def _families() -> list[str]:
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in WIDE_FONTS if name in installed)]
