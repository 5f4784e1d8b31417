"""Where an answer came from, as HTML without scripts: the timeline of the video, the chosen frames, flow and stages.

In: a `Prediction` and pictures of its frames. Out: HTML whose only texts are numbers and words of ours, so that nothing
a user, a file or a model says is markup. Frames are buttons with `data-time`, to which a script moves the player.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from lavis_lstp.inference.prediction import Prediction

WIDTH, HEIGHT, BOTTOM = 600, 92, 66  # of the drawing; BOTTOM is where its time axis lies
TICKS = 6
FLOW_PX = 160  # side of a flow picture


def evidence_html(found: Prediction, pictures: Sequence[Image.Image]) -> str:
    """Timeline, frames with their flow, and seconds by stage.

    Args:
        pictures: of the frames at `found.frame_times_s`.
    """
    if found.span_s is None:
        drawing = "<p>There is no timeline: the question is about a picture, or about nothing.</p>"
    else:
        drawing = timeline_svg(found)
    flows = _flow_pictures(found)
    chosen = zip(found.frame_times_s, pictures, flows, strict=True)
    frames = "".join(_frame(time, picture, flow) for time, picture, flow in chosen)
    stages = ", ".join(f"{html.escape(stage)} {1000 * value:.0f} ms" for stage, value in found.seconds.items())
    return (
        f'<section class="evidence">{drawing}<div class="frames" role="group" aria-label="Chosen frames">{frames}'
        f'</div><p class="stages">Time: {stages}</p></section>'
    )


def timeline_svg(found: Prediction) -> str:
    """The candidates' scores as a curve, the span shaded, the chosen frames as ticks."""
    times = found.candidate_times_s
    end = max(times[-1], found.span_s[1], 1e-3)

    def x(time: float) -> str:
        return f"{WIDTH * time / end:.1f}"

    begin, stop = found.span_s
    chosen = ", ".join(f"{time:.2f}" for time in found.frame_times_s)
    label = f"Timeline of {end:.1f} s. Span from {begin:.2f} to {stop:.2f} s. Chosen frames at {chosen} s."
    parts = [f'<rect class="span" x="{x(begin)}" y="4" width="{x(stop - begin)}" height="{BOTTOM - 4}"/>']
    if found.scores is not None:
        scored = [(t, s) for t, s in zip(times, found.scores, strict=True) if s is not None]
        points = " ".join(f"{x(t)},{BOTTOM - (BOTTOM - 8) * s:.1f}" for t, s in scored)
        parts.append(f'<polyline class="scores" points="{points}"/>')
    parts.append(f'<line class="axis" x1="0" x2="{WIDTH}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    ticks = f'y1="{BOTTOM - 10}" y2="{BOTTOM + 4}"'
    parts += [f'<line class="tick" x1="{x(t)}" x2="{x(t)}" {ticks}/>' for t in found.frame_times_s]
    for number in range(TICKS):
        time = end * number / (TICKS - 1)
        anchor = "start" if not number else "end" if number == TICKS - 1 else "middle"
        parts.append(f'<text x="{x(time)}" y="{HEIGHT - 2}" text-anchor="{anchor}">{time:.1f} s</text>')
    note = "" if found.scores is not None else "<p>This selector asks no sampler, so there are no scores.</p>"
    return (
        f'<svg class="timeline" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'
        f'<p class="span_text">Span {begin:.2f} to {stop:.2f} s</p>{note}'
    )


def _frame(time: float, picture: Image.Image, flow: Image.Image | None) -> str:
    colours = "" if flow is None else f'<img src="{_uri(flow)}" alt="Motion at {time:.2f} s, direction as colour">'
    return (
        f'<button type="button" class="frame" data-time="{time:.3f}" aria-label="Show {time:.2f} s in the player">'
        f'<img src="{_uri(picture)}" alt="Frame at {time:.2f} s">{colours}<span>{time:.2f} s</span></button>'
    )


def _flow_pictures(found: Prediction) -> list[Image.Image | None]:
    from lavis_lstp.report.explanation import flow_colours

    if found.flow is None:
        return [None] * len(found.frame_index)
    colours, _ = flow_colours(found.flow)
    chosen = [Image.fromarray(np.ascontiguousarray(colours[i].transpose(1, 2, 0))) for i in found.frame_index]
    return [one.resize((FLOW_PX, FLOW_PX), Image.Resampling.BILINEAR) for one in chosen]


def _uri(picture: Image.Image) -> str:
    stored = io.BytesIO()
    picture.convert("RGB").save(stored, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stored.getvalue()).decode()}"
