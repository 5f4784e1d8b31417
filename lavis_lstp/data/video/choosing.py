"""Which frames of a file are read: given by number, by time, or evenly spaced; of a clip; the key frames near them.

In: a file's table of frames (`index`) and what is asked for. Out: numbers of frames, nothing is decoded. Rules that
need numbers alone are those of `data.frame_numbers`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np

from lavis_lstp.data.frame_numbers import frames_at_rate, on_screen, rate_varies, sample_indices, uniform_centres
from lavis_lstp.data.video.index import VideoIndex
from lavis_lstp.errors import VideoError
from lavis_lstp.schema import Span

logger = logging.getLogger(__name__)

_TOLD: set[str] = set()
"""These messages have been told, each of the first file alone: of a varying rate, of exact frames for key frames."""


def chosen_frames(
    index: VideoIndex,
    indices: Sequence[int] | None,
    times_s: Sequence[float] | None,
    num: int | None,
    fps: float | None,
    short_videos: str,
    between_s: Sequence[float] | None,
) -> list[int]:
    """Return the numbers of the frames that `read_frames` is asked for by one of indices, times_s and num.

    Raises:
        VideoError: a frame or time lies outside of the video, or the file holds less than it promises.
    """
    if sum(x is not None for x in (indices, times_s, num)) != 1:
        raise TypeError("give exactly one of indices, times_s and num")
    if times_s is not None:
        return _at_times(index, list(times_s))
    if num is not None:
        return _spread(index, num, fps, short_videos, between_s)
    chosen = [int(i) for i in indices]
    for i in chosen:
        if not 0 <= i < index.num_frames:
            cause = f" ({index.missing})" if index.missing else ""
            raise VideoError(f"{index.name}: no frame {i}, it has {index.num_frames} frames{cause}")
    return chosen


def refuse_incomplete(index: VideoIndex) -> None:
    """Raise VideoError where the file holds less than it promises."""
    if index.missing:
        raise VideoError(f"{index.name}: {index.missing}")


def _at_times(index: VideoIndex, times_s: Sequence[float]) -> list[int]:
    """The frame on screen at each time; before the first one begins it, as `ffmpeg -ss` has it, at the end the last."""
    for t in times_s:
        if not 0 <= t <= index.duration_s + 1e-3:
            raise VideoError(f"{index.name}: no frame at {t:g} s; it lasts from 0 to {index.duration_s:.3f} s")
    # Some slack, so that the time a frame was given out with, even as float32, finds the same frame again.
    slack = min(1e-4, 0.25 / index.fps)
    at = np.searchsorted(index.times_s, np.asarray(times_s, dtype=np.float64) + slack, side="right")
    return [max(0, int(i) - 1) for i in at]


def _spread(
    index: VideoIndex, num: int, fps: float | None, short_videos: str, between_s: Sequence[float] | None
) -> list[int]:
    """At most `num` frames, or exactly that many where short videos are doubled; see `read_frames`."""
    refuse_incomplete(index)
    if between_s is not None:
        check_inside(between_s, "clip_s", index.duration_s, index.name)
    clock = index.times_s, index.duration_s
    chosen, at_fps = frames_between(index.times_s, between_s), []
    if fps is not None and _by_time(*clock, index.name):
        at_fps = on_screen(*clock, 0, 1 / fps)
    elif fps is not None and fps < index.fps:
        at_fps = frames_at_rate(index.num_frames, index.fps, fps)
    at_fps = sorted(set(at_fps) & set(chosen))
    chosen = at_fps if 0 < len(at_fps) <= num else spread_evenly(num, chosen, *clock, index.name, between_s)
    spread = sample_indices if short_videos == "double" else uniform_centres
    return [chosen[i] for i in spread(num, len(chosen))]


def spread_evenly(
    num: int,
    frames: Sequence[int],
    times_s: np.ndarray,
    end_s: float,
    name: str,
    between_s: Sequence[float] | None = None,
) -> list[int]:
    """Return at most `num` of a video's frames: uniform centres, or by time where `rate_varies`.

    By time they are those on screen at the centres of `num` equal parts of the video or clip, each once.

    Args:
        frames: numbers to choose among, ascending, such as those of a clip.
        times_s, end_s: of all frames of the video, and when the last one ends.
        name: what messages call the video.
        between_s: the clip, None = the whole video.
    """
    if len(frames) <= num or not _by_time(times_s, end_s, name):
        return [frames[i] for i in uniform_centres(num, len(frames))]
    start_s, end_s = max(0.0, times_s[0], (between_s or [0])[0]), min(end_s, (between_s or [end_s])[-1])
    step_s = (end_s - start_s) / num
    return [frames[i] for i in on_screen(times_s[list(frames)], end_s, start_s + step_s / 2, step_s)]


def _by_time(times_s: np.ndarray, end_s: float, name: str) -> bool:
    """Return `rate_varies`, and warn of the first such file."""
    varies = rate_varies(times_s, end_s)
    if varies and "rate" not in _TOLD:
        _TOLD.add("rate")
        logger.warning("%s: its rate varies, so frames are taken by time; further files like it are not named", name)
    return varies


def check_inside(span_s: Sequence[float], key: str, duration_s: float, name: str) -> None:
    """Raises VideoError for a span that begins behind the video's end, or ends far behind it.

    Annotators round, and videos are cut again: an end may lie a second, or a tenth of the video, behind the last frame.
    An infinite end means the end of the video.
    """
    start, end = span_s
    if start >= duration_s or (math.isfinite(end) and end > duration_s + max(1.0, 0.1 * duration_s)):
        raise VideoError(
            f"{name}: '{key}' [{start:g}, {end:g}] lies outside of the video, which lasts {duration_s:.3f} s; seconds "
            "are counted from its start"
        )


def frames_between(times_s: Sequence[float], between_s: Sequence[float] | None) -> list[int]:
    """Return the frames of the clip [start, end) seconds, in a row: those that begin in it, maybe one more; or all.

    The frame that is on screen when the clip starts is one of it where no other begins in it, or where it stays longer
    than frames usually do: for more than 1.5 times their median, or for more than a second. So a clip at a constant
    rate does not begin with the frame that is just going.

    Args:
        times_s: [N] seconds of all frames of the video.
    """
    if between_s is None:
        return list(range(len(times_s)))
    times_s = np.asarray(times_s).round(6)
    start, end = Span.from_seconds(*between_s, times_s.tolist())
    if start and times_s[start] - between_s[0] > min(1.0, 1.5 * float(np.median(np.diff(times_s)))):
        start -= 1
    return list(range(start, end))


def key_frames(index: VideoIndex, chosen: Sequence[int], between_s: Sequence[float] | None = None) -> list[int]:
    """Return the key frames nearest in time to chosen frames, of the clip that these are of; each once, ascending.

    Returns: the chosen frames themselves, with a warning, where the file does not tell which are key frames, or has too
    few to tell the chosen ones apart, such as a short clip that begins with its only one.
    """
    keys = np.flatnonzero(index.frame_key)
    if between_s is not None:
        inside = frames_between(index.times_s, between_s)
        keys = keys[(keys >= inside[0]) & (keys <= inside[-1])]
    found: list[int] = []
    if index.by_count:
        why = "stores no times to seek to"
    elif not len(keys):
        why = "has no key frame that is shown" + (" in a clip" if between_s else "")
    else:
        keys_s = index.times_s[keys]
        at = np.searchsorted((keys_s[1:] + keys_s[:-1]) / 2, index.times_s[list(chosen)])  # the earlier of two as near
        found = sorted(set(keys[at].tolist()))
        why = "all frames asked for lie nearest to one key frame"
    if len(found) > 1 or len(found) == len(set(chosen)):
        return found
    if why not in _TOLD:
        _TOLD.add(why)
        logger.warning("%s: %s, so exact frames are read; further files like it are not named", index.name, why)
    return list(chosen)
