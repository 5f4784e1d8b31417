"""Which frames a video holds, learnt without decoding them.

In: a path, bytes or a file object. Out: a `VideoIndex`, the table of all packets of the picture track in the
order they are stored, and from it the presentation order: frame i is the i-th frame a viewer sees.

Reading packets costs about a hundredth of decoding them, and gives what headers do not: true times of a variable
frame rate, frames hidden by an edit list, the place where a cut-off file ends. Where a container stores no
presentation times (AVI with B-frames, raw streams and MP4 copies of these) or contradicts itself, the table is made by
decoding once. A file whose clock begins anew, as in recordings joined with `cat`, contradicts itself, too: its frames
follow the order of decoding, and their times go on where the part before ends. Where parts that were cut without
encoding them again were joined, pictures at the joint are stamped before others that are shown earlier: only their
times are moved.

Seconds count from the start of the file, as players and `ffmpeg -ss` count them: FFmpeg's `start_time`, the earliest
of all its tracks. Pictures of a file whose sound begins earlier, or of one that was cut without encoding it again,
begin later than 0.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

import av
import numpy as np
from av.codec.context import Flags

from lavis_lstp.data.pictures import DEFAULT_MAX_MEGAPIXELS
from lavis_lstp.data.video.container import Source, check_source, open_video, picture_tracks
from lavis_lstp.errors import VideoError

logger = logging.getLogger(__name__)

REORDER = 16  # no codec here hands a picture out later than this many others
TS_PACKET = (188, 192, 204)  # bytes
# Streams without a container: FFmpeg takes 25 frames a second unless told otherwise, also where their headers state it.
RAW_STREAMS = {"h264", "hevc", "m4v", "mpegvideo", "obu"}
NO_PRESENTATION_TIMES = {"avi", *RAW_STREAMS}
DELAY = 2  # pictures by which XviD with B-frames begins late
# Where a clock may begin anew, a step of more than GAP_S is no pause but another clock: FFmpeg's dts_delta_threshold.
CLOCKS_BEGIN_ANEW = {"mpegts", "mpeg", "ogg"}
GAP_S = 10.0
# Readers of these formats stop in silence where another file begins, as in recordings joined with `cat`.
END_BEFORE_ANOTHER = {"flv", "mov", "asf"}


@dataclass(frozen=True)
class VideoInfo:
    """What a video is. `width` and `height` are those of the frames handed out: after rotation, with square pixels.

    `duration_s` is when its last picture ends, in seconds since the start of the file. `track` is FFmpeg's number of
    the track that is read where a file has several with pictures, else None.
    """

    num_frames: int
    fps: float
    duration_s: float
    width: int
    height: int
    rotation: int  # degrees counter-clockwise already applied to the frames handed out; flips not counted
    codec: str
    track: int | None = None


@dataclass(frozen=True)
class VideoIndex:
    """Packets of the picture track. Arrays of length P follow the order of the file, those of length N of the eye.

    Attributes:
        packet_pts: int64 [P] presentation times in ticks; empty when `by_count`.
        packet_key: bool [P], decoding can start here.
        packet_damaged: bool [P], known to be damaged.
        packet_bytes: int64 [P], how large each is.
        frame_packet: int64 [N], the packet that holds frame i; empty when `by_count`.
        times_s: float64 [N], seconds since the start of the file.
        frame_bytes: int64 [N], the size of the packet that holds frame i; empty for a folder of pictures.
        frame_key: bool [N], frame i is coded by itself and decoding can start there; empty for a folder of pictures.
        duration_s: when the last frame ends, in the same seconds.
        container: FFmpeg's name of the file format.
        by_count: frames can be told only by counting decoded ones from the start of the file.
        missing: one line about what the file should hold and does not, or None.
        track: FFmpeg's number of the track that is read.
        tracks: the numbers of all tracks of pictures.
        start: of the file, in seconds of its own clock; None where it has no clock.
        pixel_aspect: width of a stored pixel over its height; DVDs, DV and broadcasts have others than 1.
        max_megapixels: pictures of a larger area are refused.
    """

    name: str
    packet_pts: np.ndarray
    packet_key: np.ndarray
    packet_damaged: np.ndarray
    packet_bytes: np.ndarray
    frame_packet: np.ndarray
    times_s: np.ndarray
    frame_bytes: np.ndarray
    frame_key: np.ndarray
    fps: float
    duration_s: float
    time_base: float
    by_count: bool
    missing: str | None
    codec: str
    container: str
    track: int = 0
    tracks: tuple[int, ...] = (0,)
    start: Fraction | None = None
    pixel_aspect: float = 1.0
    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS

    @property
    def num_frames(self) -> int:
        return len(self.times_s)

    def position(self, pts: int | None) -> int | None:
        """The packet with this presentation time in ticks; None where there is none."""
        order, stamps = self._by_pts
        at = None if pts is None else int(stamps.searchsorted(pts))
        return int(order[at]) if at is not None and at < len(stamps) and stamps[at] == pts else None

    @cached_property
    def _by_pts(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.packet_pts)
        return order, self.packet_pts[order]

    @cached_property
    def packet_frame(self) -> np.ndarray:
        """int64 [P], the frame that each packet holds; -1 where an edit list hides it."""
        frames = np.full(len(self.packet_pts), -1)
        frames[self.frame_packet] = np.arange(len(self.frame_packet))
        return frames

    def facts(self) -> dict[str, Any]:
        """Facts that do not depend on how the frames were found; see `count_frames`."""
        kept = ("name", "codec", "container", "missing", "time_base", "track", "tracks", "start", "pixel_aspect")
        return {key: getattr(self, key) for key in (*kept, "max_megapixels")}

    def square(self, height: int, width: int, *, turned: bool) -> tuple[int, int]:
        """Return height and width of an upright picture whose pixels are square: one side grows, as in players.

        Args:
            turned: whether its rows and columns were swapped to make it upright.
        """
        aspect = 1 / self.pixel_aspect if turned else self.pixel_aspect
        return (height, round(width * aspect)) if aspect >= 1 else (round(height / aspect), width)


def reopen(source: Source, index: VideoIndex, threads: int = 1, hardware: str | None = None):
    """`open_video` for the track of an index, within its limit."""
    known = {"track": index.track, "max_megapixels": index.max_megapixels, "hardware": hardware}
    return open_video(source, index.name, threads, **known)


def video_index(source: Source, name: str, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS) -> VideoIndex:
    """The index of a source; for paths the last 64 are kept and read again when size or date change."""
    if isinstance(source, (str, os.PathLike)):
        check_source(source, name)
        status = os.stat(source)
        return _index_of_path(os.path.abspath(source), name, status.st_size, status.st_mtime_ns, max_megapixels)
    return _read_index(source, name, max_megapixels)


@lru_cache(maxsize=64)
def _index_of_path(path: str, name: str, size: int, mtime_ns: int, max_megapixels: float) -> VideoIndex:
    return _read_index(path, name, max_megapixels)


def _read_index(source: Source, name: str, max_megapixels: float) -> VideoIndex:
    """The index of the track that FFmpeg takes; of the next one where that holds a single picture (a thumbnail)."""
    index = _index_of_track(source, name, None, max_megapixels)
    for track in index.tracks if index.num_frames == 1 else ():
        if track != index.track:
            other = _index_of_track(source, name, track, max_megapixels)
            index = other if other.num_frames > index.num_frames else index
    if len(index.tracks) > 1:
        others = ", ".join(str(track) for track in index.tracks if track != index.track)
        logger.warning("%s: track %d (%s) is read, not %s", name, index.track, index.codec, others)
    return index


def _index_of_track(source: Source, name: str, track: int | None, max_megapixels: float) -> VideoIndex:
    with open_video(source, name, track=track, max_megapixels=max_megapixels) as (container, stream):
        start, tracks = _start(container), tuple(s.index for s in picture_tracks(container))
        packets, missing = _read_packets(container, stream)
        formats = set(container.format.name.split(","))
        # an MP4 that was copied from a raw stream presents pictures when they are decoded, which B-frames are not
        unordered = "mov" in formats and not packets["key"].all() and (packets["pts"] == packets["dts"]).all()
        untimed = (unordered or bool(formats & NO_PRESENTATION_TIMES)) and stream.codec_context.has_b_frames
        facts = {"name": name, "codec": stream.codec_context.name, "container": container.format.name}
        facts |= {"track": stream.index, "tracks": tracks, "start": start, "max_megapixels": max_megapixels}
        facts |= {"time_base": float(stream.time_base), "pixel_aspect": float(stream.sample_aspect_ratio or 1)}
        if formats & END_BEFORE_ANOTHER and len(packets) and _begins_again(source, int(packets["end"].max())):
            missing = f"another file begins behind frame {len(packets)}; join files with ffmpeg, not with cat"
        rate, tick = stream.average_rate or stream.guessed_rate, stream.time_base
        if formats & RAW_STREAMS:
            rate = stream.codec_context.framerate
            if not rate:
                logger.warning("%s: states no frame rate; its times are a guess, by 25 frames a second", name)
        if stream.metadata.get("alpha_mode", "0") != "0":  # VP8 and VP9 keep it beside the pictures
            logger.warning("%s: its transparency is ignored, as by every decoder of %s here", name, facts["codec"])
    if not len(packets):
        raise VideoError(f"{name}: its video stream holds no frame" + (f"; {missing}" if missing else ""))
    packet_pts = packets["pts"] if untimed else _with_times(packets["pts"], packets["key"])
    anew = _clocks_begin(packets["dts"], GAP_S / facts["time_base"] if formats & CLOCKS_BEGIN_ANEW else None)
    # FFmpeg takes what stands before a joint for damaged: the counters of MPEG-TS packets begin anew there, too.
    for n in {*anew, *(_goes_on_later(packets) if formats & CLOCKS_BEGIN_ANEW else ())}:
        packets["damaged"][max(0, n - 2) : n] = False
    told = not (packet_pts == NO_TIME).any() and np.diff(np.sort(packet_pts)).all()
    if untimed or anew or not told or _falls_at_a_key(packet_pts, packets["key"]):
        damaged = (f"packet {n} is damaged" for n in np.flatnonzero(packets["damaged"]).tolist())
        facts["missing"] = missing or next(damaged, None)
        first_dts = _known(packets["dts"][0]) if untimed else None
        return count_frames(source, rate, facts, first_dts=first_dts, joints=len(anew))
    shown = packets["shown"] & (packet_pts <= _closed_until(packet_pts)) if missing else packets["shown"]
    keys = packet_pts[packets["key"]]
    if len(keys) and packet_pts.min() < keys[0]:
        first_shown = _first_decodable(source, facts)
        shown &= packet_pts >= (packet_pts.min() if first_shown is None else first_shown)
    if not shown.any():
        raise VideoError(f"{name}: {missing or 'its edit list hides every frame'}")
    visible = np.flatnonzero(shown)
    frame_packet = visible[np.argsort(packet_pts[visible])]
    # Without B-frames the place in an AVI is the time; FFmpeg's stamps of H.264 there are later, by a picture.
    by_place = "avi" in formats and (packets["dts"] != NO_TIME).all()
    ticks = (packets["dts"] if by_place else packet_pts)[frame_packet]
    begins_s = _seconds_after(start, int(ticks[0]) * tick)
    times_s = (ticks - ticks[0]) * facts["time_base"] + begins_s
    fps = frame_rate(times_s, rate)
    stay = packets["ticks"][frame_packet]
    end = (
        end_in_mp4(ticks[-1], stay[-1], packet_pts.min() + packets["ticks"].sum())
        if "mov" in formats
        else (ticks + stay).max()
    )
    end_s = (end - ticks[0]) * facts["time_base"] + begins_s
    return VideoIndex(
        packet_pts=packet_pts,
        packet_key=packets["key"],
        packet_damaged=packets["damaged"],
        packet_bytes=packets["size"],
        frame_packet=frame_packet,
        times_s=times_s,
        frame_bytes=packets["size"][frame_packet],
        frame_key=packets["key"][frame_packet],
        fps=fps,
        duration_s=float(end_s if end_s > times_s[-1] else times_s[-1] + 1 / fps),
        by_count=False,
        missing=missing,
        **facts,
    )


def _with_times(pts: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return times with made-up ones for pictures right behind the first key frame that have none.

    Matroska stores no times before zero, which is where pictures are that refer to what a cut removed. They get times
    before all others, in the order of the file, and are hidden as such.
    """
    lost = np.flatnonzero(pts == NO_TIME)
    if not 0 < len(lost) <= REORDER or lost[0] == 0 or lost[-1] != len(lost) or not key[0]:
        return pts
    pts = pts.copy()
    pts[lost] = pts[pts != NO_TIME].min() - len(lost) + np.arange(len(lost))
    return pts


def end_in_mp4(last: int, ticks: int, at_most: int) -> int:
    """Return when the last picture of an MP4 ends, in ticks.

    An MP4 stores the time to the next decoding, so a pause may be stored with another picture than the one that stays.

    Args:
        last: the time at which that picture is shown.
        ticks: the time that is stored with it.
        at_most: the time at which the first picture is shown, plus all times that are stored.
    """
    return min(last + ticks, at_most) if at_most > last else last + ticks


def _first_decodable(source: Source, facts: dict[str, Any]) -> int | None:
    """The stamp of the first picture that a decoder gives, in ticks; None where it gives none.

    A file that was cut out of a longer one may begin with pictures that refer to what was cut off: those behind an
    open group's key frame and shown before it, or all before the first key frame. No player shows them.
    """
    given = {"track": facts["track"], "max_megapixels": facts["max_megapixels"]}
    with open_video(source, facts["name"], **given) as (container, stream):
        return next((frame.pts for frame in container.decode(stream) if not frame.is_corrupt), None)


def _start(container: Any) -> Fraction | None:
    """The start of a file in seconds of its own clock: FFmpeg's, which is rounded to microseconds, made exact."""
    if container.start_time is None:
        return None
    stated = Fraction(container.start_time, av.time_base)
    tracks = [s.start_time * s.time_base for s in container.streams if s.start_time is not None and s.time_base]
    nearest = min(tracks, key=lambda start: abs(start - stated), default=stated)
    return nearest if abs(nearest - stated) < Fraction(2, av.time_base) else stated


def _begins_again(source: Source, end: int, most: int = 1 << 24) -> bool:
    """Return whether a file's first bytes stand again in the `most` bytes from `end`, where its last picture ends."""
    source = check_source(source, "")
    with open(source, "rb") if isinstance(source, str) else nullcontext(source) as file:
        first = file.read(len(b"\0\0\0\x20ftyp"))
        file.seek(end)
        return first in file.read(most)


def _seconds_after(start: Fraction | None, first: Fraction | None) -> float:
    """When the first picture is shown, counted from the start of the file; never before it."""
    return 0.0 if start is None or first is None else max(0.0, float(first - start))


def _known(ticks: np.int64) -> int | None:
    return None if ticks == NO_TIME else int(ticks)


def _falls_at_a_key(pts: np.ndarray, key: np.ndarray) -> bool:
    """Return True where a key frame is stamped before a picture that is decoded before it, as behind a bad joint."""
    keys = np.flatnonzero(key)[1:]
    return bool((pts[keys] < np.maximum.accumulate(pts)[keys - 1]).any())


def _clocks_begin(dts: np.ndarray, gap: float | None) -> list[int]:
    """The packets at which another clock begins: the stamp of decoding falls, or leaps by more than `gap` ticks."""
    known = np.flatnonzero(dts != NO_TIME)
    steps = np.diff(dts[known])
    anew = (steps < 0) | (steps > gap) if gap is not None else steps < 0
    return known[1:][anew].tolist()


def _goes_on_later(packets: np.ndarray) -> list[int]:
    """The key frames behind a part of a recording that is missing, such as a segment of HLS: time passes, unseen."""
    known = np.flatnonzero(packets["dts"] != NO_TIME)
    steps = np.diff(packets["dts"][known])
    usual = np.median(steps) if len(steps) else 0
    later = known[1:][steps > 1.5 * usual]
    return later[packets["key"][later]].tolist()


NO_TIME = np.iinfo(np.int64).min  # FFmpeg's AV_NOPTS_VALUE
PACKET = np.dtype(
    [(name, "i8") for name in ("pts", "dts", "ticks", "size", "end")]
    + [(name, "?") for name in ("key", "shown", "damaged")]
)
"""A packet: when it is shown and decoded, how long it is shown (0 = unknown), its bytes, where they end in the file
(0 = unknown), and what is known of it."""


def _read_packets(container: Any, stream: Any) -> tuple[np.ndarray, str | None]:
    """Whole packets in the order of the file, [P] of `PACKET`, and what is missing behind them."""
    numbers, flags = array("q"), bytearray()  # 43 bytes a packet; two hours have 172,800
    missing = None
    indexed = len(stream.index_entries)  # FFmpeg adds to them while it reads
    is_vp8 = stream.codec_context.name == "vp8"
    try:
        for packet in container.demux(stream):
            if packet.size:
                # VP8 stores pictures that are only referred to as packets of their own; a header bit tells.
                shown = not packet.is_discard and not (is_vp8 and not bytes(packet)[0] & 0x10)
                pts, dts = packet.pts, packet.dts
                numbers.append(NO_TIME if pts is None else pts)
                numbers.append(NO_TIME if dts is None else dts)
                numbers.append(packet.duration or 0)
                numbers.append(packet.size)
                numbers.append(0 if packet.pos is None else packet.pos + packet.size)
                flags.append(packet.is_keyframe | shown << 1 | packet.is_corrupt << 2)
    except av.FFmpegError as error:
        missing = f"truncated: reading stops after {len(flags)} frames ({error.strerror})"
    packets = np.zeros(len(flags), dtype=PACKET)
    for column, name in enumerate(("pts", "dts", "ticks", "size", "end")):
        packets[name] = np.frombuffer(numbers, dtype=np.int64)[column::5]
    for bit, name in enumerate(("key", "shown", "damaged")):
        packets[name] = np.frombuffer(flags, dtype=np.uint8) >> bit & 1
    if container.format.name == "mpegts" and len(packets) and not _ends_with_a_packet(container.size, packets):
        packets = packets[:-1]  # whose end the cut took; nothing in the file says how long it was
        missing = f"truncated: it ends inside a transport packet, after {len(packets)} whole frames"
    while len(packets) and packets["damaged"][-1]:
        packets = packets[:-1]
        missing = f"truncated: frame {len(packets)} is cut off"
    declared = _declared_frames(container, stream)
    held = 0
    if container.format.name == "avi" and len(packets):
        # AVI counts pictures that were dropped, too: empty chunks, which nothing but the stamps behind them tell; and
        # where its clock is finer than its pictures the last one is followed by some.
        step = _common_step(packets["dts"])
        held = int(packets["dts"].max()) + step
        packets["ticks"] = np.maximum(packets["ticks"], step)
        if indexed == len(packets) > 1:  # the index, at the end of the file, has none of the pictures dropped there
            held = max(held, declared)
    if declared > max(held, len(packets)):
        missing = f"truncated: {len(packets)} of {declared} frames are in the file"
    elif (short_s := _missing_seconds(stream, packets)) > 0:
        missing = f"truncated: the last {short_s:.1f} s are not in the file"
    return packets, missing


def _ends_with_a_packet(size: int, packets: np.ndarray) -> bool:
    """Return whether the last transport packet of an MPEG-TS is whole; its first need not be."""
    begins = int(packets["end"][-1] - packets["size"][-1]) if packets["end"][-1] else 0
    return any((size - begins) % n == 0 for n in TS_PACKET)


def _closed_until(stamps: np.ndarray) -> int:
    """The time up to which a file that was cut off has every frame.

    Frames shown before the last anchor may have been stored behind it, so behind the cut. An anchor is a packet later
    than all before it; up to the last but one nothing can be missing.
    """
    highest = np.maximum.accumulate(stamps)
    before = highest[highest < highest[-1]]
    return int(before[-1]) if len(before) else int(highest[0]) - 1


def _declared_frames(container: Any, stream: Any) -> int:
    formats = set(container.format.name.split(","))
    if "mov" in formats:
        return len(stream.index_entries)  # after edit lists, unlike the header's count
    return stream.frames if "avi" in formats else 0


def _missing_seconds(stream: Any, packets: np.ndarray) -> float:
    """How far the last packet ends before the length Matroska states for this track; 0 where it does not."""
    stated = stream.metadata.get("DURATION")
    timed = packets[packets["pts"] != NO_TIME]
    if not stated or not len(timed):
        return 0.0
    try:
        hours, minutes, seconds = stated.split(":")
        stated_s = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0
    short_s = stated_s - float(int((timed["pts"] + timed["ticks"]).max()) * stream.time_base)
    return short_s if short_s > max(0.05, 1.5 / float(stream.average_rate or 25)) else 0.0


def count_frames(
    source: Source,
    rate: Fraction | None,
    facts: dict[str, Any],
    *,
    first_dts: int | None = None,
    joints: int = 0,
) -> VideoIndex:
    """The index of a video without usable presentation times: decode it all once and count.

    Args:
        facts: see `VideoIndex.facts`.
        first_dts: when decoding begins, in ticks, for files that store no other times.
        joints: how often the file's clock begins anew.
    """
    ticks: list[int | None] = []
    sizes: list[int] = []
    keys: list[bool] = []
    decoded: list[int | None] = []
    dts: list[int | None] = []
    name, track, most = facts["name"], facts["track"], facts["max_megapixels"]
    with open_video(source, name, track=track, max_megapixels=most) as (container, stream):
        tick = stream.time_base
        stream.codec_context.flags |= Flags.copy_opaque  # a frame comes with what its packet was given
        # nobody sees these pictures; without the filter that smooths blocks H.264 takes three quarters of the time
        stream.codec_context.options = dict(stream.codec_context.options) | {"skip_loop_filter": "all"}
        try:
            for packet in container.demux(stream):
                packet.opaque = [packet.size]  # PyAV keeps it by identity, and small numbers are all the same object
                if packet.size:
                    dts.append(packet.dts)
                for frame in packet.decode():
                    ticks.append(frame.pts)
                    decoded.append(frame.dts)
                    sizes.append(frame.opaque[0] if frame.opaque else 0)
                    keys.append(bool(frame.key_frame))
        except av.FFmpegError as error:
            facts = facts | {"missing": f"decoding stops after {len(ticks)} frames ({error.strerror})"}
    avi = facts["container"] == "avi" and facts["codec"] == "h264"  # FFmpeg stamps these in the order of decoding
    if avi or (first_dts is not None and "mov" in facts["container"]):
        ticks = _shown_when_decoded(decoded) or ticks
    if facts["missing"]:
        ticks = ticks[:-REORDER]  # a frame shown earlier may lie behind the cut, and shift the count
    if not ticks:
        raise VideoError(f"{name}: {facts['missing'] or 'no frame of it can be decoded'}")
    step_s = 1 / (rate or Fraction(25))
    known = next((n for n, pts in enumerate(ticks) if pts is not None), None)
    first = None if known is None else ticks[known] * tick - known * step_s
    first = first if first_dts is None else first_dts * tick
    times_s = _joined_times(ticks, facts["time_base"], float(step_s), joints)
    if times_s is None and first_dts is None:
        times_s = _rising_times(ticks, facts["time_base"], float(step_s))
    if times_s is None and facts["container"] == "avi" and len(dts) == len(ticks) and None not in dts:
        times_s = _places_s(dts, facts["time_base"], name)
    times_s = np.arange(len(ticks)) * float(step_s) if times_s is None else times_s
    times_s = times_s + _seconds_after(facts["start"], first)
    fps = frame_rate(times_s, rate)
    none = np.zeros(0, dtype=np.int64)
    return VideoIndex(
        packet_pts=none,
        packet_key=none.astype(bool),
        packet_damaged=none.astype(bool),
        packet_bytes=none,
        frame_packet=none,
        times_s=times_s,
        frame_bytes=np.asarray(sizes[: len(ticks)], dtype=np.int64),
        frame_key=np.asarray(keys[: len(ticks)], dtype=bool),
        fps=fps,
        duration_s=float(times_s[-1] + 1 / fps),
        by_count=True,
        **facts,
    )


def _shown_when_decoded(decoded: Sequence[int | None]) -> list[int] | None:
    """Return times of pictures from those of the packets that made the decoder hand them out; None where these fall.

    A decoder that puts pictures in order hands each out a fixed number of packets later, and encoders stamp packets
    so: gaps of dropped pictures stand where they were. The last pictures, behind the last packet, follow evenly.
    """
    known = np.asarray([dts for dts in decoded if dts is not None], dtype=np.int64)
    tail = len(decoded) - len(known)
    if len(known) < 2 or None in decoded[: len(known)] or (np.diff(known) <= 0).any():
        return None
    step = round(float(np.median(np.diff(known))))
    return [*known.tolist(), *(int(known[-1]) + n * step for n in range(1, tail + 1))]


def _places_s(dts: Sequence[int], tick_s: float, name: str) -> np.ndarray | None:
    """Return float64 [N], seconds since the first frame at which an AVI of XviD's packed B-frames stores frames.

    None where no more than DELAY are missing: then frames are evenly spaced, and the encoder began late.
    """
    stored = np.sort(np.asarray(dts, dtype=np.int64))
    if stored[-1] - stored[0] <= (len(stored) - 1 + DELAY) * _common_step(stored):
        return None
    logger.warning("%s: pictures were dropped, and its B-frames have no times; two beside a gap may be behind it", name)
    return (stored - stored[0]) * tick_s


def _common_step(ticks: np.ndarray) -> int:
    """Return the largest step that divides all distances of stamps: 2 where a clock runs at twice the rate."""
    return int(np.gcd.reduce(np.diff(ticks))) or 1  # of no distances 0


def _joined_times(ticks: Sequence[int | None], tick_s: float, step_s: float, joints: int) -> np.ndarray | None:
    """Return float64 [N], seconds since the first frame: as stamped, going on by one step where another clock begins;
    None where the stamps cannot be told from accidents.
    """
    if None in ticks:
        return None
    steps_s = np.diff(np.asarray(ticks, dtype=np.int64)) * tick_s
    anew = (steps_s <= 0) | (steps_s > GAP_S) if joints else steps_s <= 0
    if anew.sum() > joints:
        return None
    return np.concatenate([[0.0], np.cumsum(np.where(anew, step_s, steps_s))])


def _rising_times(ticks: Sequence[int | None], tick_s: float, step_s: float) -> np.ndarray | None:
    """Return float64 [N], seconds since the first frame: as stamped, but for those that are not behind the one before.

    Where parts were joined that had been cut without encoding them again, FFmpeg squeezes the pictures in front of a
    cut into ticks, behind pictures that are shown later. None where most frames are so, or one by more than REORDER
    steps: such stamps say nothing.
    """
    if None in ticks:
        return None
    stamped = np.asarray(ticks, dtype=np.int64)
    place = np.arange(len(stamped))
    rising = np.maximum.accumulate(stamped - place) + place  # at least one tick behind the frame before
    moved = rising - stamped
    if np.count_nonzero(moved) > len(moved) / 2 or moved.max() * tick_s > REORDER * step_s:
        return None
    return (rising - rising[0]) * tick_s


def frame_rate(times_s: np.ndarray, stated: Fraction | None) -> float:
    """Frames per second: the stated rate where the frames agree with it to 1 %, else what they show.

    The stated one is exact (24000/1001); the measured one carries the rounding of the time base.
    """
    lasts_s = times_s[-1] - times_s[0] if len(times_s) > 1 else 0.0
    measured = (len(times_s) - 1) / lasts_s if lasts_s > 0 else 0.0
    if stated and (not measured or abs(float(stated) / measured - 1) < 0.01):
        return float(stated)
    return float(measured or 25.0)
