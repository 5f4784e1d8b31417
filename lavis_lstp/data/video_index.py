"""Which frames a video holds, learnt without decoding them.

In: a path, bytes or a file object. Out: a `VideoIndex`, the table of all packets of the picture track in the
order they are stored, and from it the presentation order: frame i is the i-th frame a viewer sees.

Reading packets costs about a hundredth of decoding them, and gives what headers do not: true times of a variable
frame rate, frames hidden by an edit list, the place where a cut-off file ends. Where a container stores no
presentation times (AVI with B-frames, raw streams) or contradicts itself, the table is made by decoding once.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, BinaryIO

import av
import numpy as np
from av.stream import Discard

from lavis_lstp.errors import VideoError

Source = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO

# Containers a video file may be. Others of FFmpeg's are playlists and scripts, which name further files or
# addresses to open, or readers of plain text (`tty`), which would show a .txt as a film.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,wmv,gif,h264,hevc,m4v,"
    "ivf,rm,vob,wtv,nut,mxf,dv,swf,apng,av1,obu"
)
NO_PRESENTATION_TIMES = {"avi", "h264", "hevc", "m4v", "mpegvideo", "obu"}


@dataclass(frozen=True)
class VideoInfo:
    """What a video is. `width` and `height` are those of the frames handed out, after rotation."""

    num_frames: int
    fps: float
    duration_s: float
    width: int
    height: int
    rotation: int  # degrees counter-clockwise already applied to the frames handed out; flips not counted
    codec: str


@dataclass(frozen=True)
class VideoIndex:
    """Packets of the picture track. Arrays of length P follow the order of the file, those of length N of the eye.

    Attributes:
        packet_pts: int64 [P] presentation times in ticks; empty when `by_count`.
        packet_key: bool [P], decoding can start here.
        frame_packet: int64 [N], the packet that holds frame i; empty when `by_count`.
        times_s: float64 [N], seconds since the first frame.
        container: FFmpeg's name of the file format.
        by_count: frames can be told only by counting decoded ones from the start of the file.
        missing: one line about what the file should hold and does not, or None.
    """

    name: str
    packet_pts: np.ndarray
    packet_key: np.ndarray
    frame_packet: np.ndarray
    times_s: np.ndarray
    fps: float
    duration_s: float
    time_base: float
    by_count: bool
    missing: str | None
    codec: str
    container: str

    @property
    def num_frames(self) -> int:
        return len(self.times_s)


def source_name(source: Source, name: str | None = None) -> str:
    """How errors call this source."""
    if name is not None:
        return str(name)
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return str(getattr(source, "name", f"<{type(source).__name__}>"))


def check_source(source: Source, name: str) -> Source:
    """Refuses what is not a readable, non-empty regular file before FFmpeg sees it; bytes become a fresh stream.

    Raises:
        VideoError: naming the file and what is wrong with it.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise VideoError(f"{name}: empty (0 bytes), expected a video")
        return io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        if not hasattr(source, "read") or not hasattr(source, "seek"):
            raise TypeError(f"source must be a path, bytes or a seekable binary file, not {type(source).__name__}")
        source.seek(0)
        return source
    try:
        status = os.stat(source)
    except OSError as error:
        raise VideoError(f"{name}: no such video ({error.strerror or error})") from None
    except ValueError as error:  # a null byte in the path
        raise VideoError(f"{name!r}: no such video ({error})") from None
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(f"{name}: is a folder, expected a video file")
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(f"{name}: is not a regular file, expected a video file")
    if status.st_size == 0:
        raise VideoError(f"{name}: empty (0 bytes), expected a video")
    return os.fspath(source)


@contextmanager
def open_video(source: Source, name: str, threads: int = 1) -> Iterator[tuple[Any, Any]]:
    """Container and picture stream of a checked source; every FFmpeg error inside becomes a `VideoError`."""
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    try:
        with av.open(check_source(source, name), container_options=options, metadata_errors="replace") as container:
            picture = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
            if not picture:
                kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
                raise VideoError(f"{name}: no video stream, only {kinds}; expected a video")
            stream = picture[0]
            if stream.codec_context is None:
                raise VideoError(f"{name}: no decoder for its video stream in this build of PyAV")
            for other in container.streams:
                if other is not stream:
                    other.discard = Discard.all
            stream.codec_context.thread_count = threads
            stream.codec_context.thread_type = "SLICE" if threads == 1 else "AUTO"
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(f"{name}: cannot be read as a video ({error.strerror})") from None


def video_index(source: Source, name: str) -> VideoIndex:
    """The index of a source; for paths the last 64 are kept and read again when size or date change."""
    if isinstance(source, (str, os.PathLike)):
        check_source(source, name)
        status = os.stat(source)
        return _index_of_path(os.path.abspath(source), name, status.st_size, status.st_mtime_ns)
    return _read_index(source, name)


@lru_cache(maxsize=64)
def _index_of_path(path: str, name: str, size: int, mtime_ns: int) -> VideoIndex:
    return _read_index(path, name)


def _read_index(source: Source, name: str) -> VideoIndex:
    with open_video(source, name) as (container, stream):
        pts, key, shown, end, missing = _read_packets(container, stream)
        usable = not any(p is None for p in pts) and len(set(pts)) == len(pts)
        formats = set(container.format.name.split(","))
        if formats & NO_PRESENTATION_TIMES and stream.codec_context.has_b_frames:
            usable = False
        facts = {"name": name, "codec": stream.codec_context.name, "missing": missing}
        facts["container"] = container.format.name
        facts["time_base"] = float(stream.time_base)
        rate = stream.average_rate or stream.guessed_rate
    if not pts:
        raise VideoError(f"{name}: its video stream holds no frame" + (f"; {missing}" if missing else ""))
    if not usable:
        return count_frames(source, name, rate, facts)
    packet_pts = np.asarray(pts, dtype=np.int64)
    visible = np.flatnonzero(np.asarray(shown))
    if not len(visible):
        raise VideoError(f"{name}: its edit list hides every frame")
    frame_packet = visible[np.argsort(packet_pts[visible], kind="stable")]
    ticks = packet_pts[frame_packet]
    times_s = (ticks - ticks[0]) * facts["time_base"]
    fps = frame_rate(times_s, rate)
    last_s = (end - ticks[0]) * facts["time_base"] if end is not None else 0.0
    return VideoIndex(
        packet_pts=packet_pts,
        packet_key=np.asarray(key),
        frame_packet=frame_packet,
        times_s=times_s,
        fps=fps,
        duration_s=float(last_s if last_s > times_s[-1] else times_s[-1] + 1 / fps),
        by_count=False,
        **facts,
    )


def _read_packets(container: Any, stream: Any) -> tuple[list, list, list, int | None, str | None]:
    """Presentation time, key flag and visibility of each whole packet, where the last frame ends, what is missing."""
    pts: list[int | None] = []
    key: list[bool] = []
    shown: list[bool] = []
    end: int | None = None
    damaged = None
    is_vp8 = stream.codec_context.name == "vp8"
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.is_corrupt:
                damaged = f"packet {len(pts)} is cut off"
                continue
            pts.append(packet.pts)
            key.append(packet.is_keyframe)
            # VP8 stores pictures that are only referred to as packets of their own; a header bit tells.
            shown.append(not packet.is_discard and not (is_vp8 and not bytes(packet)[0] & 0x10))
            if shown[-1] and packet.pts is not None:
                end = max(end or packet.pts, packet.pts + (packet.duration or 0))
    except av.FFmpegError as error:
        damaged = f"reading stops after {len(pts)} frames ({error.strerror})"
    declared = _declared_frames(container, stream)
    if declared > len(pts):
        damaged = f"truncated: {len(pts)} of {declared} frames are in the file"
    elif (short_s := _missing_seconds(stream, end)) > 0:
        damaged = f"truncated: the last {short_s:.1f} s are not in the file"
    return pts, key, shown, end, damaged


def _declared_frames(container: Any, stream: Any) -> int:
    formats = set(container.format.name.split(","))
    if "mov" in formats:
        return len(stream.index_entries)  # after edit lists, unlike the header's count
    return stream.frames if "avi" in formats else 0


def _missing_seconds(stream: Any, end: int | None) -> float:
    """How far the last packet ends before the length Matroska states for this track; 0 where it does not."""
    stated = stream.metadata.get("DURATION")
    if not stated or end is None:
        return 0.0
    try:
        hours, minutes, seconds = stated.split(":")
        stated_s = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0
    short_s = stated_s - float(end * stream.time_base)
    rate = float(stream.average_rate or 25)
    return short_s if short_s > max(0.25, 3 / rate) else 0.0


def count_frames(source: Source, name: str, rate: Fraction | None, facts: dict[str, Any]) -> VideoIndex:
    """The index of a video without usable presentation times: decode it all once and count."""
    ticks: list[int | None] = []
    with open_video(source, name) as (container, stream):
        try:
            ticks.extend(frame.pts for frame in container.decode(stream))
        except av.FFmpegError as error:
            facts = facts | {"missing": f"decoding stops after {len(ticks)} frames ({error.strerror})"}
    if not ticks:
        raise VideoError(f"{name}: no frame of it can be decoded")
    times_s = np.arange(len(ticks)) / float(rate or 25)
    if None not in ticks and all(a < b for a, b in zip(ticks, ticks[1:], strict=False)):
        times_s = (np.asarray(ticks, dtype=np.int64) - ticks[0]) * facts["time_base"]
    fps = frame_rate(times_s, rate)
    none = np.zeros(0, dtype=np.int64)
    return VideoIndex(
        packet_pts=none,
        packet_key=none.astype(bool),
        frame_packet=none,
        times_s=times_s,
        fps=fps,
        duration_s=float(times_s[-1] + 1 / fps),
        by_count=True,
        **facts,
    )


def frame_rate(times_s: np.ndarray, stated: Fraction | None) -> float:
    """Frames per second: the stated rate where the frames agree with it to 1 %, else what they show.

    The stated one is exact (24000/1001); the measured one carries the rounding of the time base.
    """
    measured = (len(times_s) - 1) / times_s[-1] if len(times_s) > 1 and times_s[-1] > 0 else 0.0
    if stated and (not measured or abs(float(stated) / measured - 1) < 0.01):
        return float(stated)
    return float(measured or 25.0)
