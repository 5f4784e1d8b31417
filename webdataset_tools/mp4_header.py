"""What the header of an MP4 says about its video: length, rate and size, without opening it as FFmpeg does.

In: the file's bytes, or a map of them. Out: what `data.video.reading.probe` says, in a hundredth of the time; or None
where the header leaves a question open, which only opening the file answers: fragments, edits that cut frames, several
video tracks, pictures that may begin later than other tracks, a rotation, pixels that are not square, another codec
than H.264 and HEVC, a sample that is not in the file. A pixel's shape that the codec's header alone states is not seen.

Opening costs 2 to 12 ms a file, of which decoding the first picture is the greater part, and PyAV keeps the interpreter
to itself for most of the rest; copying and hashing 0.5 MB costs 0.8 ms. Nothing is decoded here, so that the pictures
can be decoded is for `verify` to say.
"""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np

from lavis_lstp.data.video.container import HEIF_BRANDS
from lavis_lstp.data.video.index import VideoInfo, end_in_mp4, frame_rate

CODECS = {b"avc1": "h264", b"avc3": "h264", b"hvc1": "hevc", b"hev1": "hevc"}
UPRIGHT = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)

Part = tuple[int, int]
"""First byte and end of a box's content."""


class Unclear(Exception):
    """The header does not say it all."""


def mp4_info(raw) -> VideoInfo | None:
    """The video of an MP4 or QuickTime file.

    Args:
        raw: the whole file: bytes, or an mmap, of which little is read.
    """
    try:
        top = _boxes(raw, (0, len(raw)))
        if top[0][0] != b"ftyp" or bytes(raw[8:12]) in HEIF_BRANDS or any(kind == b"moof" for kind, _ in top):
            return None
        moov = _only(top, b"moov")
        boxes = _boxes(raw, moov)
        if any(kind == b"mvex" for kind, _ in boxes) or not _upright(raw, _only(boxes, b"mvhd"), 36):
            return None
        tracks = [_inside(raw, part) for kind, part in boxes if kind == b"trak"]
        return _video(raw, tracks, _timescale(raw, _only(boxes, b"mvhd")))
    except (Unclear, struct.error, IndexError):  # a table that ends early
        return None


def _video(raw, tracks: list[dict[bytes, Part]], movie_timescale: int) -> VideoInfo:
    media = [(track, _inside(raw, _of(track, b"mdia"))) for track in tracks]
    videos = [(track, mdia) for track, mdia in media if _fourcc(raw, _of(mdia, b"hdlr")[0] + 8) == b"vide"]
    if len(videos) != 1:
        raise Unclear
    track, mdia = videos[0]
    if not _upright(raw, _of(track, b"tkhd"), 40):
        raise Unclear
    table = _inside(raw, _of(_inside(raw, _of(mdia, b"minf")), b"stbl"))
    codec, width, height = _description(raw, _of(table, b"stsd"))
    display = struct.unpack_from(">II", raw, _of(track, b"tkhd")[1] - 8)
    if display != (width << 16, height << 16):
        raise Unclear
    timescale, sizes = _timescale(raw, _of(mdia, b"mdhd")), _sizes(raw, _of(table, b"stsz"))
    _check_places(raw, table, sizes)
    pts, ticks = _times(raw, table, len(sizes))
    shown = np.sort(pts)
    if not timescale or not movie_timescale or not (shown[1:] > shown[:-1]).all():
        raise Unclear
    first, last = int(shown[0]), int(shown[-1])
    begins = _check_edit(raw, track, first, last, movie_timescale / timescale)
    if begins < first and len(tracks) > 1:
        raise Unclear  # seconds count from the earliest track
    tick_s, total = 1 / timescale, int(ticks.sum())
    fps = frame_rate((shown - first) * tick_s, Fraction(timescale * len(shown), total))
    duration_s = (end_in_mp4(last, int(ticks[pts.argmax()]), first + total) - first) * tick_s
    return VideoInfo(len(shown), fps, duration_s, width, height, 0, codec)


def _times(raw, table: dict[bytes, Part], count: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N], [N]: when each sample is shown and how long, in ticks, in the order of decoding."""
    ticks = _repeated(raw, _of(table, b"stts"), count)
    if int(ticks.min()) <= 0:
        raise Unclear
    pts = np.cumsum(ticks) - ticks
    return pts + _repeated(raw, table[b"ctts"], count) if b"ctts" in table else pts, ticks


def _check_places(raw, table: dict[bytes, Part], sizes: np.ndarray) -> None:
    """The last chunk, behind all others, lies in the file: that of a file that was cut off does not."""
    kind, wide = (b"co64", ">u8") if b"co64" in table else (b"stco", ">u4")
    chunks, runs = _column(raw, _of(table, kind), wide), _column(raw, _of(table, b"stsc"), ">u4", 3)
    if not len(chunks) or not len(runs):
        raise Unclear
    last, inside = int(chunks[-1]), int(runs[-1, 1])
    if last < int(chunks.max()) or not 0 < inside <= len(sizes) or last + int(sizes[-inside:].sum()) > len(raw):
        raise Unclear


def _check_edit(raw, track: dict[bytes, Part], first: int, last: int, movie_ticks: float) -> int:
    """Where an edit list begins that shows every frame, as encoders write to hide the delay of reordering."""
    edits = _inside(raw, track[b"edts"]) if b"edts" in track else {}
    if b"elst" not in edits:
        return 0
    start = edits[b"elst"][0]
    version, count = raw[start], _u32(raw, start + 4)
    if not count:
        return 0
    lasts, begins, speed = struct.unpack_from(">qqi" if version else ">Iii", raw, start + 8)
    ends = begins + lasts / movie_ticks
    if count > 1 or speed != 1 << 16 or not 0 <= begins <= first or ends <= last + 1 / movie_ticks:
        raise Unclear
    return begins


def _description(raw, part: Part) -> tuple[str, int, int]:
    """Codec, width and height."""
    start = part[0]
    codec = CODECS.get(_fourcc(raw, start + 12))
    width, height = struct.unpack_from(">HH", raw, start + 40)
    aspect = bytes(raw[start : part[1]]).partition(b"pasp")[2][:8]
    if _u32(raw, start + 4) != 1 or codec is None or not width or not height or aspect[:4] != aspect[4:]:
        raise Unclear
    return codec, width, height


def _sizes(raw, part: Part) -> np.ndarray:
    """int64 [N] bytes."""
    same, count = struct.unpack_from(">II", raw, part[0] + 4)
    if not 0 < count <= len(raw):
        raise Unclear
    sizes = np.full(count, same, np.int64) if same else _column(raw, (part[0] + 4, part[1]), ">u4").astype(np.int64)
    if not sizes.all():
        raise Unclear
    return sizes


def _repeated(raw, part: Part, count: int) -> np.ndarray:
    """int64 [count] of a table of (times, value)."""
    if _u32(raw, part[0] + 4) == 1:
        times, value = struct.unpack_from(">Ii", raw, part[0] + 8)
        if times != count:
            raise Unclear
        return np.full(count, value, np.int64)
    table = _column(raw, part, ">u4", 2)
    if int(table[:, 0].sum(dtype=np.int64)) != count:
        raise Unclear
    return np.repeat(table[:, 1].astype(np.int32), table[:, 0]).astype(np.int64)


def _column(raw, part: Part, kind: str, width: int = 1) -> np.ndarray:
    """The numbers of a table that is preceded by version, flags and its number of rows."""
    rows, start = _u32(raw, part[0] + 4), part[0] + 8
    if start + rows * width * np.dtype(kind).itemsize > part[1]:
        raise Unclear
    found = np.frombuffer(raw, kind, rows * width, start)
    return found.reshape(rows, width) if width > 1 else found


# ---------------------------------------------------------------- boxes


def _boxes(raw, part: Part) -> list[tuple[bytes, Part]]:
    """(kind, content) of the boxes in a box."""
    found, (at, end) = [], part
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", raw, at)
        begin = at + 8
        if size == 1:
            size, begin = struct.unpack_from(">Q", raw, begin)[0], at + 16
        size = size or end - at
        if at + size > end or size < begin - at:
            raise Unclear
        found.append((kind, (begin, at + size)))
        at += size
    if not found:
        raise Unclear
    return found


def _inside(raw, part: Part) -> dict[bytes, Part]:
    return dict(_boxes(raw, part))


def _of(boxes: dict[bytes, Part], kind: bytes) -> Part:
    if kind not in boxes:
        raise Unclear
    return boxes[kind]


def _only(boxes: list[tuple[bytes, Part]], kind: bytes) -> Part:
    found = [part for name, part in boxes if name == kind]
    if len(found) != 1:
        raise Unclear
    return found[0]


def _u32(raw, at: int) -> int:
    return struct.unpack_from(">I", raw, at)[0]


def _fourcc(raw, at: int) -> bytes:
    return struct.unpack_from("4s", raw, at)[0]


def _timescale(raw, part: Part) -> int:
    """Of mvhd and mdhd: ticks a second."""
    return _u32(raw, part[0] + (20 if raw[part[0]] else 12))


def _upright(raw, part: Part, at: int) -> bool:
    """Of mvhd and tkhd: neither turned nor mirrored."""
    return struct.unpack_from(">9i", raw, part[0] + at + (12 if raw[part[0]] else 0)) == UPRIGHT
