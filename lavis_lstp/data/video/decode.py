"""Decodes chosen frames of a video and no others, where the codec allows it.

In: a source, its `VideoIndex` and the frames wanted. Out: (index, RGB picture) in ascending order, upright.

From the key frame before a wanted frame every reference picture has to be decoded; pictures nothing refers to
are skipped. A picture is handed out only under its own time stamp, so a damaged or cut-off file ends in a
`VideoError`, not in a neighbouring frame.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from lavis_lstp.data.video.container import Source
from lavis_lstp.data.video.index import REORDER, VideoIndex, reopen
from lavis_lstp.errors import VideoError

# Codecs whose decoders honour `skip_frame` per packet and store one picture in each.
SKIPPABLE = {"h264", "hevc", "mpeg4", "mpeg2video"}

Visit = Callable[[Any, int, bool], None]  # picture, frame number, may others refer to it
OPEN = 16
"""In H.264 so many packets behind the key frame of an open group may name pictures from before it (5 were seen)."""
STRICT = {"err_detect": "explode"}  # a damaged picture is an error, not a patched-up neighbour
FIELDS = STRICT | {"ec": "0"}  # without concealing errors
PATIENCE = 8  # key frames behind a frame that are passed over in search of a picture that tells its motion
LOWRES = {"mpeg1video", "mpeg2video", "mpeg4", "mjpeg"}  # decoders that give pictures of 1/2, 1/4 or 1/8 of the side


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
    decode_size: int | None = None,
    hardware: str | None = None,
    see: Callable[[Any], None] = lambda frame: None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (frame index, uint8 [H,W,3]) for each of `wanted`.

    Args:
        wanted: ascending, without repeats, all below `index.num_frames`.
        visit: called with each reference picture and wanted frame, in order, to the end of the last group, for
            motion vectors. Nothing is jumped over then.
        around: in place of `visit`: sees the pictures that are decoded on the way to a wanted frame, and the next
            predicted one behind it.
        decode_size: px, the shorter side that pictures are scaled down to by FFmpeg; None = as stored.
        hardware: device that decodes, such as "cuda"; see `open_video`.
        see: called with each wanted frame, as the decoder gives it.

    Raises:
        VideoError: where a wanted frame cannot be decoded without damage.
        IndexMismatch: where the table of packets cannot be trusted.
    """
    count = count if count is not None else DecodeCount()
    with ExitStack() as opened:

        def opening(**more: str) -> tuple[Any, Any]:
            container, stream = opened.enter_context(reopen(source, index, threads, hardware))
            options = dict(stream.codec_context.options) | more
            if decode_size and stream.codec_context.name in LOWRES:
                side = min(stream.codec_context.width, stream.codec_context.height)
                options["lowres"] = str(max(n for n in range(4) if n == 0 or side >> n >= decode_size))
            if visit or around:
                options["flags2"] = "+export_mvs"
            stream.codec_context.options = options
            return container, stream

        walk = _by_count if index.by_count else _by_time
        for i, frame in walk(opening, index, wanted, visit, around, count):
            if frame.is_corrupt:
                raise VideoError(f"{index.name}: frame {i} is damaged")
            see(frame)
            yield i, upright(picture(frame, "rgb24", decode_size), orientation(frame))


def scaled(height: int, width: int, decode_size: int | None) -> tuple[int, int]:
    """Height and width of a picture whose shorter side is brought down to `decode_size` px."""
    shrink = max(1.0, min(height, width) / decode_size) if decode_size else 1.0
    return max(1, round(height / shrink)), max(1, round(width / shrink))


def _by_count(opening, index, wanted, visit, around, count) -> Iterator[tuple[int, Any]]:
    """From the start of the file to the last wanted frame."""
    left = set(wanted)
    reader = _Reader(opening, index, [], visit, around, count)
    seen = 0
    for pictures in reader.attempts(0, sys.maxsize):
        for position, frame in enumerate(pictures):
            if position < seen:  # by the attempt before
                continue
            seen = position + 1
            if reader.visit:
                reader.visit(frame, position, False)
            if position in left:
                left.discard(position)
                yield position, frame
            if not left and not (around.waits if around else visit and frame.pict_type == PictureType.B):
                return
    if left:
        cause = f" ({reader.failure})" if reader.failure else f", the video ends after {seen}"
        raise VideoError(f"{index.name}: frame {min(left)} cannot be decoded{cause}")


def _by_time(opening, index, wanted, visit, around, count) -> Iterator[tuple[int, Any]]:
    """Stretch by stretch, each from a key frame to the last frame wanted before another key frame helps."""
    reader = _Reader(opening, index, wanted, visit, around, count)
    for stretch in stretches(index, wanted, jump=visit is None, anchor=around is not None):
        yield from reader.read(stretch)


@dataclass
class Stretch:
    """Packets decoded in a row, from a key frame on, and the frames wanted of them.

    Attributes:
        start: position of the first packet, a key frame or the beginning of the file.
        wanted: frame numbers, ascending.
        stop: position behind the last packet that these frames need.
    """

    start: int
    wanted: list[int]
    stop: int


def stretches(index: VideoIndex, wanted: Sequence[int], *, jump: bool = True, anchor: bool = False) -> list[Stretch]:
    """The way through a file that decodes least: wanted frames that no key frame parts share one stretch.

    Where frames are dense the stretches adjoin, and a file is read once from end to end; where they are sparse the
    reader moves from one to the next (`_Reader._packets_from`).

    Args:
        jump: False gives one stretch, which leaves nothing out, as motion vectors between distant frames need.
        anchor: also decode, of each frame, the first predicted picture that is shown after it.
    """
    found: list[Stretch] = []
    for i in wanted:
        packet = int(index.frame_packet[i])
        start = start_for(index, packet)
        stop = 1 + (max(packet, _anchor_after(index, start, packet)) if anchor else packet)
        if found and (start < found[-1].stop or not jump):
            found[-1].wanted.append(i)
            found[-1].stop = max(found[-1].stop, stop)
        else:
            found.append(Stretch(start, [i], stop))
    return found


def _anchor_after(index: VideoIndex, start: int, packet: int) -> int:
    """The first packet from `start` on that is shown after `packet` and after all packets stored before it.

    In H.264 and MPEG that is a picture predicted from earlier ones, unless it is a key frame, which is passed over.
    `packet` itself where none follows soon.
    """
    pts = index.packet_pts
    highest, keys = int(pts[start]), 0
    for p in range(start + 1, len(pts)):
        if pts[p] > highest:
            highest = int(pts[p])
            if highest > pts[packet] and not index.packet_key[p]:
                return p
            keys += highest > pts[packet]
            if keys > PATIENCE:
                break
    return packet


def decode_runs(
    source: Source, index: VideoIndex, runs: Sequence[tuple[int, int]], *, threads: int = 1
) -> Iterator[Iterator[Any]]:
    """Yields for each run the pictures of its packets [start, stop) as the decoder gives them, in the order of showing.

    Pictures that no other refers to are left out, and the filter that smooths blocks is not applied.

    Args:
        runs: ascending; each begins at a key frame.
    """
    with reopen(source, index, threads) as (container, stream):
        stream.codec_context.options = dict(stream.codec_context.options) | {"skip_loop_filter": "all"}
        reader = _Reader(lambda **_: (container, stream), index, [], None, None, DecodeCount())
        for start, stop in runs:
            yield reader._decode(start, stop)


def start_for(index: VideoIndex, packet: int, before: int | None = None) -> int:
    """Last key packet at or before a packet, in file order and in time; 0 where there is none.

    In time too: pictures stored after a key frame but shown before it may need the group before it.
    """
    stop = packet + 1 if before is None else before
    keys = np.flatnonzero(index.packet_key[:stop] & (index.packet_pts[:stop] <= index.packet_pts[packet]))
    return int(keys[-1]) if len(keys) else 0


# Costs of moving through a file, in microseconds. A container with a table of its packets (`_has_table`) finds any of
# them at once; FFmpeg looks for a time in the others by reading here and there.
PASS_PACKET_US, PASS_BYTE_US = 8, 0.002
SEEK_US = {True: 300, False: 8000}


class _Reader:
    """Decodes stretches of packets, in the order of the file, by one decoder; by a second one where `attempts` may.

    Args:
        opening: a container and its stream, anew, with the decoder's options.
    """

    def __init__(self, opening, index, wanted, visit, around, count, *, options=STRICT):
        self.opening, self.index = opening, index
        self.container, self.stream = container, stream = opening(**options)
        self.visit, self.around, self.count = around.add if around else visit, around, count
        self.wanted_pts = {int(index.packet_pts[index.frame_packet[i]]) for i in wanted}
        self.skip = stream.codec_context.name in SKIPPABLE and not index.by_count
        self.packets: Iterator[Any] = container.demux(stream)
        self.next_packet = 0  # position of what `packets` gives next
        self.last_visited: int | None = None
        self.referred: dict[int, bool] = {}
        self.failure: str | None = None
        self.starts_open = False  # the last stretch begins at a key frame that refers to nothing, but forgets nothing
        self.by_fields = False  # the last stretch has a picture that MPEG-2 stores as two fields
        self.given, self.second = (index, wanted, visit, around, count), None

    def read(self, stretch: Stretch) -> Iterator[tuple[int, Any]]:
        """(frame number, picture) of each frame wanted of a stretch.

        Raises:
            VideoError: one of them cannot be decoded.
        """
        left = list(stretch.wanted)
        start: int = stretch.start
        while left:
            packets = [int(self.index.frame_packet[i]) for i in left]
            stop = max(stretch.stop, start + 1)
            if self.around:
                self.around.restart()
                self.last_visited = None
            damaged = np.flatnonzero(self.index.packet_damaged[start:stop]) + start
            pictures = chain.from_iterable(self.attempts(start, stop))
            for frame in pictures:
                if self.index.position(frame.pts) is None:
                    raise IndexMismatch(f"a picture at {frame.pts}")
                self._visit(frame)
                if frame.pts == int(self.index.packet_pts[packets[0]]):
                    if len(damaged) and damaged[0] <= packets[0]:
                        self._refuse(left[0], "damaged data before it")
                    yield left.pop(0), frame
                    packets.pop(0)
                    if not left:
                        break
            if left and len(damaged) and damaged[0] <= packets[0]:
                self._refuse(left[0], "damaged data before it")
            if left and start == 0:
                self._refuse(left[0], self.failure or "the data are damaged, cut off or stamped with other times")
            if left:  # a key frame that decoding could not start from after all: take the one before
                start = start_for(self.index, packets[0], before=start)
        if self.visit:
            self._visit_rest(pictures)

    def _refuse(self, i: int, cause: str) -> None:
        raise VideoError(f"{self.index.name}: frame {i} cannot be decoded ({cause})")

    def _visit(self, frame: Any) -> None:
        if self.visit and (self.last_visited is None or frame.pts > self.last_visited):
            self.last_visited = frame.pts
            referred = self.referred.pop(frame.pts, False)
            i = int(self.index.packet_frame[self.index.position(frame.pts)])
            if i >= 0:  # an edit list hides the others
                self.visit(frame, i, referred)

    def _visit_rest(self, pictures: Iterator[Any]) -> None:
        """Visits what follows: it tells how the pictures before it move. Chains need what is not bidirectional."""
        for frame in pictures if not self.around or self.around.waits else ():
            if self.index.position(frame.pts) is None:
                break
            self._visit(frame)
            if not self.around.waits if self.around else frame.pict_type != PictureType.B:
                break

    def attempts(self, start: int, stop: int) -> Iterator[Iterator[Any]]:
        """Yield the pictures of the packets [start, stop); once more by another decoder, where the first refuses fields
        of MPEG-2, or an open group of H.264, for nothing.

        Where it conceals errors, the decoder of MPEG-2 takes the other field for one. In H.264 the first pictures
        behind a key frame say what becomes of pictures before it, which nobody has. The decoder calls that an error and
        keeps a picture back. It is none where all other packets decode without one.
        """
        yield self._decode(start, stop)
        if self.failure and self.by_fields:
            yield self._otherwise(FIELDS)._decode(start, stop)
            self.failure = self.second.failure
        elif self.failure and self.starts_open:
            strict = _Reader(self.opening, *self.given) if self.index.by_count else self  # no times to seek by
            refused = self.failure
            for _ in strict._decode(start, stop, passed_over=OPEN):
                pass
            if strict.failure is None:
                yield _whole(self._otherwise({})._decode(start, stop))
            self.failure = refused

    def _otherwise(self, options: Mapping[str, str]) -> _Reader:
        """A second reader of this stream, with other options of its decoder."""
        if self.second is None:
            self.second = _Reader(self.opening, *self.given, options=options)
        return self.second

    def _decode(self, start: int, stop: int, passed_over: int = 0) -> Iterator[Any]:
        """Pictures of the packets [start, stop) in the order they are shown; ends early, with `failure` set, where
        decoding fails behind the first `passed_over` of them.

        Behind `stop` the decoder is emptied: waiting for it to hand out what it holds back would decode further
        pictures, eight of these for each frame wanted in H.264 with two B-frames. A chain of motion vectors
        goes on instead, and so do decoders that give no vectors of a picture that they are
        emptied of.
        """
        context = self.stream.codec_context
        empties = not self.visit or (self.around is not None and context.name == "h264")
        self.failure = None
        try:
            for item in self._packets_from(start):
                if item.size and self.next_packet <= start:
                    continue
                if item.size:
                    self.count.packets += 1
                    if self.next_packet == start + 1:
                        self.starts_open = context.name == "h264" and not h264_forgets(bytes(item), context.extradata)
                        self.by_fields = False
                    if context.name == "mpeg2video" and not self.by_fields:
                        self.by_fields = mpeg2_is_field(bytes(item))
                    if self.visit and context.name == "h264":
                        self.referred[item.pts] = h264_is_referred(bytes(item), context.extradata)
                    if self.skip:
                        context.skip_frame = "DEFAULT" if item.pts in self.wanted_pts else "NONREF"
                try:
                    frames = item.decode()
                except av.InvalidDataError:
                    if self.next_packet > start + passed_over:
                        raise
                    continue
                for frame in frames:
                    self.count.pictures += 1
                    yield frame
                if self.next_packet >= stop and empties:
                    for frame in context.decode(None):
                        self.count.pictures += 1
                        yield frame
                    return
        except av.FFmpegError as error:
            if isinstance(error, av.ArgumentError) and not self.count.pictures:
                raise  # larger than max_megapixels: `open_video` says so
            self.failure = error.strerror

    def _packets_from(self, start: int) -> Iterator[Any]:
        """Demuxed packets, the first of which is at or before `start` in the file; the decoder begins anew."""
        if not self.next_packet <= start or self._passing_us(start) > SEEK_US[self._has_table]:
            yield from self._seek(start)
            return
        if self.next_packet:
            self.stream.codec_context.flush_buffers()
        yield from self._counted(self.packets)

    def _counted(self, packets: Iterator[Any]) -> Iterator[Any]:
        for item in packets:
            position = self.index.position(item.pts)
            self.next_packet = (self.next_packet if position is None else position) + 1
            yield item

    @property
    def _has_table(self) -> bool:
        return not {"mov", "matroska", "avi"}.isdisjoint(self.index.container.split(","))

    def _passing_us(self, start: int) -> float:
        between = slice(self.next_packet, start)
        num_bytes = float(self.index.packet_bytes[between].sum())
        return PASS_PACKET_US * (start - self.next_packet) + PASS_BYTE_US * num_bytes

    def _seek(self, start: int) -> Iterator[Any]:
        pts = int(self.index.packet_pts[start])
        step = max(1, round(1 / self.index.time_base))  # a second, doubled at each attempt
        for attempt in range(12):
            self.count.seeks += 1
            back = 0 if attempt == 0 else step << (attempt - 1)
            self.container.seek(pts - back, stream=self.stream, backward=True)
            self.packets = self.container.demux(self.stream)
            first = next(self.packets, None)
            position = self.index.position(first.pts) if first is not None and first.size else None
            if position is not None and position <= start:
                self.next_packet = position + 1
                yield first
                yield from self._counted(self.packets)
                return
        self.failure = "seeking in the file fails"


def side_data_of(frame: Any, kind: str) -> Any | None:
    """Side data that the decoder gave with a picture, or None.

    `frame.side_data` would tie both into a cycle: pictures of 1.4 MB then pile up until Python collects garbage, 300 MB
    of them in 64 frames of 1280 x 720.
    """
    return SideDataContainer(frame).get(kind)


_REFORMATTER = threading.local()


def picture(frame: Any, pixel_format: str, decode_size: int | None = None) -> np.ndarray:
    """Pixels of a frame. One thread: swscale's own take 16 ms to start for 0.3 ms of work on 640 x 360."""
    if not hasattr(_REFORMATTER, "value"):
        _REFORMATTER.value = VideoReformatter()
    height, width = scaled(frame.height, frame.width, decode_size)
    smaller = {} if decode_size is None else {"width": width, "height": height, "interpolation": "AREA"}
    pixels = _REFORMATTER.value.reformat(frame, format=pixel_format, threads=1, **smaller).to_ndarray()
    if pixel_format != "rgb24" or not has_alpha(frame):
        return pixels
    alpha = _REFORMATTER.value.reformat(frame, format="rgba", threads=1, **smaller).to_ndarray()[..., 3:]
    return pixels if alpha.min() == 255 else _on_white(pixels, alpha)


def has_alpha(frame: Any) -> bool:
    """Return whether a frame stores how transparent it is."""
    return any(part.is_alpha for part in frame.format.components)


def _on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """uint8 [H,W,3]: what is transparent is white, as in `data.pictures`."""
    share = alpha.astype(np.uint32)
    return ((pixels * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)


def _whole(pictures: Iterable[Any]) -> Iterator[Any]:
    """Yield pictures before the first that is marked as damaged, each once all that it may refer to have come out."""
    held: deque[Any] = deque()
    for frame in pictures:
        if frame.is_corrupt:
            return
        held.append(frame)
        if len(held) > REORDER:
            yield held.popleft()
    yield from held


def h264_is_referred(data: bytes, extradata: bytes | None) -> bool:
    """Whether other pictures may refer to the one in this packet: nal_ref_idc of its first slice (H.264 7.4.1)."""
    return any(unit >> 5 & 3 for unit in _h264_slices(data, extradata)[:1])


def h264_forgets(data: bytes, extradata: bytes | None) -> bool:
    """Return True for a key frame behind which nothing refers to what is before it: an IDR picture (H.264 7.4.1)."""
    return any(unit & 31 == 5 for unit in _h264_slices(data, extradata))


def mpeg2_is_field(data: bytes) -> bool:
    """Return whether a packet begins with one field of a picture: picture_structure is 1 or 2 (H.262 6.3.10)."""
    at = data.find(b"\0\0\1\xb5")
    while 0 <= at < len(data) - 6:
        if data[at + 4] >> 4 == 8:  # the extension of a picture
            return data[at + 6] & 3 != 3
        at = data.find(b"\0\0\1\xb5", at + 4)
    return False


def _h264_slices(data: bytes, extradata: bytes | None) -> list[int]:
    """Return the first byte of each unit of a packet that holds a part of a picture."""
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
    return [data[start] for start in starts if 1 <= data[start] & 31 <= 5]


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
    side_data = side_data_of(frame, "DISPLAYMATRIX")
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
