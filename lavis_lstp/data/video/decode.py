"""Decodes chosen frames of a video and no others, where the codec allows it.

In: a source, its `VideoIndex` and the frames wanted. Out: (index, RGB picture) in ascending order, upright.

From the key frame before a wanted frame every reference picture has to be decoded; pictures nothing refers to
are skipped. A picture is handed out only under its own time stamp, so a damaged or cut-off file ends in a
`VideoError`, not in a neighbouring frame.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from lavis_lstp.data.video.index import REORDER, Source, VideoIndex, check_source, reopen
from lavis_lstp.errors import VideoError

# Codecs whose decoders honour `skip_frame` per packet and store one picture in each.
SKIPPABLE = {"h264", "hevc", "mpeg4", "mpeg2video"}
# Where decord 0.6.0 was found to seek to the right frame; in MPEG-TS it shows broken ones without a word.
DECORD_CONTAINERS = {"mov", "matroska"}

Visit = Callable[[Any, int, bool], None]  # picture, frame number, may others refer to it


class Around(Protocol):
    """Looks at the surroundings of wanted frames.

    waits: whether it needs further pictures behind the last frame handed out. restart: decoding goes on elsewhere.
    """

    waits: bool
    add: Visit

    def restart(self) -> None: ...


@dataclass
class DecodeCount:
    """What decoding cost; tests compare it with the number of frames wanted."""

    packets: int = 0
    pictures: int = 0
    seeks: int = 0


class IndexMismatch(Exception):
    """The decoder shows pictures at times the packet table does not know; they have to be counted instead."""


def decode_pyav(
    source: Source,
    index: VideoIndex,
    wanted: Sequence[int],
    *,
    threads: int = 1,
    visit: Visit | None = None,
    around: Around | None = None,
    count: DecodeCount | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (frame index, uint8 [H,W,3]) for each of `wanted`.

    Args:
        wanted: ascending, without repeats, all below `index.num_frames`.
        visit: called with each reference picture and wanted frame, in order, to the end of the last group, for
            motion vectors. Nothing is jumped over then.
        around: in place of `visit`: sees the pictures that are decoded on the way to a wanted frame, and those behind
            it until it has what it needs.

    Raises:
        VideoError: where a wanted frame cannot be decoded without damage.
        IndexMismatch: where the table of packets cannot be trusted.
    """
    count = count if count is not None else DecodeCount()
    with reopen(source, index, threads) as (container, stream):
        options = dict(stream.codec_context.options)
        options["err_detect"] = "explode"  # a damaged picture is an error, not a patched-up neighbour
        if visit or around:
            options["flags2"] = "+export_mvs"
        stream.codec_context.options = options
        walk = _by_count if index.by_count else _by_time
        for i, frame in walk(container, stream, index, wanted, visit, around, count):
            if frame.is_corrupt:
                raise VideoError(f"{index.name}: frame {i} is damaged")
            yield i, upright(picture(frame, "rgb24"), orientation(frame))


def _by_count(container, stream, index, wanted, visit, around, count) -> Iterator[tuple[int, Any]]:
    """From the start of the file to the last wanted frame."""
    left = set(wanted)
    visit = around.add if around else visit
    position = 0
    try:
        for position, frame in enumerate(container.decode(stream)):
            count.pictures += 1
            if visit:
                visit(frame, position, False)
            if position in left:
                left.discard(position)
                yield position, frame
            if not left and not (around.waits if around else visit and frame.pict_type == PictureType.B):
                return
    except av.FFmpegError as error:
        if left:
            raise VideoError(f"{index.name}: frame {min(left)} cannot be decoded ({error.strerror})") from None
    if not left:
        return
    raise VideoError(f"{index.name}: frame {min(left)} cannot be decoded, the video ends after {position + 1}")


def _by_time(container, stream, index, wanted, visit, around, count) -> Iterator[tuple[int, Any]]:
    """Seeks wherever a key frame lies between where decoding stands and the next wanted frame."""
    reader = _Reader(container, stream, index, wanted, around.add if around else visit, around, count)
    for i in wanted:
        packet = int(index.frame_packet[i])
        key = 0 if visit and reader.running else _start_for(index, packet)
        if not reader.running or key > reader.next_packet:
            reader.start_at(key)
        if index.packet_damaged[_start_for(index, packet) : packet + 1].any():
            raise VideoError(f"{index.name}: frame {i} cannot be decoded (damaged data before it)")
        frame = reader.find(packet)
        while frame is None and reader.started_at > 0:
            # A key frame that decoding could not start from after all: take the one before.
            reader.start_at(_start_for(index, packet, before=reader.started_at))
            frame = reader.find(packet)
        if frame is None:
            cause = reader.failure or "the data are damaged or cut off"
            raise VideoError(f"{index.name}: frame {i} cannot be decoded ({cause})")
        yield i, frame
        if around:
            reader.look_ahead()
    if visit:
        reader.finish_group()


def _start_for(index: VideoIndex, packet: int, before: int | None = None) -> int:
    """Last key packet at or before a packet, in file order and in time; 0 where there is none.

    In time too: pictures stored after a key frame but shown before it may need the group before it.
    """
    stop = packet + 1 if before is None else before
    keys = np.flatnonzero(index.packet_key[:stop] & (index.packet_pts[:stop] <= index.packet_pts[packet]))
    return int(keys[-1]) if len(keys) else 0


class _Reader:
    """One pass of the decoder over the packets from `started_at` on."""

    def __init__(self, container, stream, index, wanted, visit, around, count):
        self.container, self.stream, self.index = container, stream, index
        self.visit, self.around, self.count = visit, around, count
        self.ahead: list[Any] = []  # pictures decoded behind the one asked for
        self.position_of = {int(pts): p for p, pts in enumerate(index.packet_pts)}
        self.wanted_pts = {int(index.packet_pts[index.frame_packet[i]]) for i in wanted}
        self.skip = stream.codec_context.name in SKIPPABLE
        self.frames: Iterator[Any] | None = None
        self.started_at = self.next_packet = 0
        self.fresh = True  # nothing was read from the container yet
        self.last_visited: int | None = None
        self.shown = {p: i for i, p in enumerate(index.frame_packet.tolist())}
        self.referred: dict[int, bool] = {}
        self.failure: str | None = None

    @property
    def running(self) -> bool:
        return self.frames is not None

    def start_at(self, packet: int) -> None:
        self.started_at, self.failure = packet, None
        self.frames, self.ahead = self._decode(packet), []
        if self.around:
            self.around.restart()
            self.last_visited = None

    def find(self, packet: int) -> Any | None:
        """The picture of this packet, or None where the decoder passes it by or fails."""
        pts = int(self.index.packet_pts[packet])
        later = 0
        while (frame := self._next()) is not None:
            if frame.pts is None or frame.pts not in self.position_of:
                raise IndexMismatch(f"a picture at {frame.pts}")
            self._visit(frame)
            if frame.pts == pts:
                return frame
            later += frame.pts > pts
            if later > REORDER:
                break
        return None

    def _visit(self, frame: Any) -> None:
        if self.visit and (self.last_visited is None or frame.pts > self.last_visited):
            self.last_visited = frame.pts
            referred = self.referred.pop(frame.pts, False)
            self.visit(frame, self.shown[self.position_of[frame.pts]], referred)

    def _next(self) -> Any | None:
        return self.ahead.pop(0) if self.ahead else next(self.frames or iter(()), None)

    def look_ahead(self) -> None:
        """Shows `around` what follows, until it has what it needs; the next search begins with these pictures."""
        seen = []
        while self.around.waits and (frame := self._next()) is not None:
            seen.append(frame)
            if frame.pts not in self.position_of:
                break
            self._visit(frame)
        self.ahead = seen + self.ahead

    def finish_group(self) -> None:
        """Visits what follows up to a picture that is not bidirectional: it tells how those before it move."""
        for frame in self.frames or ():
            if frame.pts not in self.position_of:
                break
            self._visit(frame)
            if frame.pict_type != PictureType.B:
                break

    def _decode(self, packet: int) -> Iterator[Any]:
        """Pictures from the packets from `packet` on; ends early, with `failure` set, where decoding fails."""
        context = self.stream.codec_context
        try:
            for item in self._packets_from(packet):
                if item.size:
                    self.count.packets += 1
                    if self.visit and context.name == "h264":
                        self.referred[item.pts] = h264_is_referred(bytes(item), context.extradata)
                    if self.skip:
                        context.skip_frame = "DEFAULT" if item.pts in self.wanted_pts else "NONREF"
                for frame in item.decode():
                    self.count.pictures += 1
                    yield frame
        except av.FFmpegError as error:
            self.failure = error.strerror

    def _packets_from(self, packet: int) -> Iterator[Any]:
        """Demuxed packets, the first of which is at or before `packet` in the file."""
        self.next_packet = packet
        if packet == 0 and self.fresh:
            self.fresh = False
            for item in self.container.demux(self.stream):
                self.next_packet = self.position_of.get(item.pts, self.next_packet) + 1
                yield item
            return
        self.fresh = False
        pts = int(self.index.packet_pts[packet])
        step = max(1, round(1 / self.index.time_base))  # a second, doubled at each attempt
        for attempt in range(12):
            self.count.seeks += 1
            back = 0 if attempt == 0 else step << (attempt - 1)
            self.container.seek(pts - back, stream=self.stream, backward=True)
            packets = self.container.demux(self.stream)
            first = next(packets, None)
            position = self.position_of.get(first.pts) if first is not None and first.size else None
            if position is not None and position <= packet:
                self.next_packet = position + 1
                yield first
                for item in packets:
                    self.next_packet = self.position_of.get(item.pts, self.next_packet) + 1
                    yield item
                return
        self.failure = "seeking in the file fails"


_REFORMATTER = threading.local()


def picture(frame: Any, pixel_format: str) -> np.ndarray:
    """Pixels of a frame. One thread: swscale's own take 16 ms to start for 0.3 ms of work on 640 x 360."""
    if not hasattr(_REFORMATTER, "value"):
        _REFORMATTER.value = VideoReformatter()
    return _REFORMATTER.value.reformat(frame, format=pixel_format, threads=1).to_ndarray()


def h264_is_referred(data: bytes, extradata: bytes | None) -> bool:
    """Whether other pictures may refer to the one in this packet: nal_ref_idc of its first slice (H.264 7.4.1)."""
    if extradata and extradata[0] == 1:  # MP4 and Matroska: each unit after its length
        width, at = (extradata[4] & 3) + 1, 0
        starts = []
        while at + width < len(data):
            starts.append(at + width)
            at += width + int.from_bytes(data[at : at + width], "big")
    else:  # each unit after 00 00 01
        starts, at = [], data.find(b"\0\0\1")
        while 0 <= at < len(data) - 3:
            starts.append(at + 3)
            at = data.find(b"\0\0\1", at + 3)
    for start in starts:
        if 1 <= data[start] & 31 <= 5:
            return bool(data[start] >> 5 & 3)
    return False


@dataclass(frozen=True)
class Orientation:
    """How a stored picture is turned to stand upright: rows and columns swapped first, then mirrored."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @property
    def mirrored(self) -> bool:
        """Whether no rotation does the same."""
        return self.transpose == (self.mirror_x == self.mirror_y)


def orientation(frame: Any) -> Orientation:
    """From the display matrix; angles that are not multiples of 90 degrees are left alone."""
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return Orientation()
    # x' = a x + c y, y' = b x + d y with y downwards
    a, b, _, c, d = np.frombuffer(bytes(side_data), dtype=np.int32)[:5].tolist()
    if a == d == 0 and b and c:
        return Orientation(True, c < 0, b < 0)
    if b == c == 0 and a and d:
        return Orientation(False, a < 0, d < 0)
    return Orientation()


def upright(pixels: np.ndarray, turn: Orientation) -> np.ndarray:
    """[H,W,...] turned; a view."""
    if turn.transpose:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if turn.mirror_y else 1, :: -1 if turn.mirror_x else 1]


def decode_decord(
    source: Source, index: VideoIndex, wanted: Sequence[int], *, threads: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """The same frames by decord, each checked against the time the index gives it.

    The reader is made here, in the calling process: readers made before a fork deadlock. decord's bridge, a global
    setting which LAVIS turns to torch, is left as it is. Unlike PyAV here, decord patches up damaged pictures
    without a word (0.6.0, whatever its `fault_tol`), so data that may be damaged are better read by PyAV.
    """
    try:
        import decord
    except ImportError:
        raise VideoError("backend 'decord' is not installed; `pip install decord` or use backend 'pyav'") from None
    if index.by_count:
        raise VideoError(f"{index.name}: stores no presentation times, which decord needs; use backend 'pyav'")
    if index.num_frames != len(index.packet_pts):
        raise VideoError(f"{index.name}: has frames hidden by an edit list, which decord shows; use backend 'pyav'")
    if not DECORD_CONTAINERS & set(index.container.split(",")):
        raise VideoError(f"{index.name}: decord seeks wrongly in {index.container} files; use backend 'pyav'")
    try:
        reader = decord.VideoReader(check_source(source, index.name), num_threads=threads)
        if len(reader) != index.num_frames:
            line = f"decord counts {len(reader)} frames, not {index.num_frames}"
            raise VideoError(f"{index.name}: {line}; use backend 'pyav'")
        stamps = reader.get_frame_timestamp([0, *wanted])[:, 0].astype(np.float64)
        off_s = np.abs((stamps[1:] - stamps[0]) - (index.times_s[list(wanted)] - index.times_s[0]))
        if off_s.size and off_s.max() > 0.5 / index.fps:
            raise VideoError(f"{index.name}: decord places frames at other times; use backend 'pyav'")
        if len(index.tracks) > 1:
            _check_track(source, index, reader, sorted({wanted[0], wanted[-1]}))
        for i in wanted:
            yield i, _decord_picture(reader, i)
    except (decord.DECORDError, RuntimeError) as error:
        if isinstance(error, VideoError):
            raise
        line = re.sub(r"\[\d+:\d+:\d+\] \S+: ?", "", str(error).strip().splitlines()[0]).strip()[:120]
        raise VideoError(f"{index.name}: cannot be read by decord ({line}); use backend 'pyav'") from None


def _decord_picture(reader: Any, i: int) -> np.ndarray:
    batch = reader.get_batch([i])  # one at a time: a batch holds all in full size
    return (batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch))[0]


def _check_track(source: Source, index: VideoIndex, reader: Any, some: Sequence[int]) -> None:
    """Refuses a file of which decord takes another track: it cannot be told which, and its FFmpeg is an older one."""
    for i, ours in decode_pyav(source, index, some):
        theirs = _decord_picture(reader, i)
        if theirs.shape != ours.shape or np.abs(theirs.astype(np.int16) - ours).mean() > 1:
            raise VideoError(f"{index.name}: decord does not read track {index.track} of it; use backend 'pyav'")
