"""Video file or bytes in, the frames asked for out: by number, by time, or evenly spaced; nothing else is decoded.

    info = probe("film.mp4")
    video = read_frames("film.mp4", num=32, size=224)       # or indices=[0, 50], or times_s=[0.5, 2.0]
    video.frames    uint8 [T,3,H,W] RGB      video.times_s   seconds since the start of the file

Everything here is NumPy: importing torch would cost more memory (0.5 GB) than reading 32 frames does (0.1 GB).
Frame i is the i-th picture a viewer sees, whatever the order, times and hidden parts of the file. Every failure
is a `VideoError` that begins with the name of the file. Not noticed: flipped bits that still decode, because video
formats carry no checksums, and where a raw stream (.h264), which carries no lengths, was cut off.

Backends: `pyav` (default), `decord` and `torchcodec` give the same frames; pixels of the last may differ by the
rounding of the colour conversion, because it uses the FFmpeg of the system, which the other two bring along.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lavis_lstp.data.pictures import DEFAULT_MAX_MEGAPIXELS, check_area
from lavis_lstp.data.video.choosing import chosen_frames, key_frames, refuse_incomplete
from lavis_lstp.data.video.container import Source, source_name
from lavis_lstp.data.video.decode import (
    LOWRES,
    DecodeCount,
    IndexMismatch,
    Orientation,
    decode_pyav,
    has_alpha,
    orientation,
    stretches,
)
from lavis_lstp.data.video.index import VideoIndex, VideoInfo, count_frames, reopen, video_index
from lavis_lstp.data.video.other_backends import decode_decord, decode_torchcodec
from lavis_lstp.data.video.picture_folder import folder_index, pictures_in, read_pictures
from lavis_lstp.errors import ConfigError, VideoError, unknown_name

logger = logging.getLogger(__name__)

__all__ = ["VideoFrames", "VideoInfo", "probe", "read_frames", "read_pairs"]
__all__ += ["resize_frames", "BACKENDS", "SHORT_VIDEOS", "VIDEO_ENDINGS"]

BACKENDS = ("pyav", "decord", "torchcodec")
FLOW_PAIRS = ("sampled", "local")
HARDWARE = ("cuda", "vaapi", "videotoolbox", "qsv", "d3d11va")  # FFmpeg's names of decoding devices
MANY_PICTURES = 2000
"""Motion vectors through more pictures than these are announced: they take 10 ms or more each."""
SHORT_VIDEOS = ("keep", "double")
VIDEO_ENDINGS = (
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".gif", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv"),
    *(".3gp", ".ogv", ".vob", ".3g2", ".asf", ".divx", ".dv", ".f4v", ".m2v", ".mod", ".mpe", ".mxf", ".rmvb", ".tod"),
)
ENDINGS_IN_ANY_CASE = (*VIDEO_ENDINGS, *(ending.upper() for ending in VIDEO_ENDINGS))
"""Cameras write .MP4 and .MOV."""
READING_VERSION = 11
"""A change of pixels, times or numbers by this module raises it: frames that stores keep are of one version."""


@dataclass
class VideoFrames:
    """Frames read from one video, in the order they were asked for.

    Attributes:
        frames: uint8 [T,3,H,W], RGB, upright, with square pixels where no size was asked for.
        times_s: float64 [T], seconds since the start of the file, as players count them.
        indices: T frame numbers.
        flow: None or float32 [T,2,h,w], (u, v) in px of its own h x w grid from each frame to the next one here,
            x right, y down; the last repeats the one before, a single frame has zeros.
        count: what decoding cost (PyAV).
    """

    frames: np.ndarray
    times_s: np.ndarray
    indices: list[int]
    info: VideoInfo
    flow: np.ndarray | None = None
    count: DecodeCount | None = None


@lru_cache(maxsize=32)
def _taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Neighbours and weights (float32, held as float64) of bilinear resampling along one axis, half-pixel centres."""
    scale, half = np.float32(source) / np.float32(target), np.float32(0.5)
    centre = (scale * (np.arange(target, dtype=np.float32) + half) - half).clip(0)
    low = np.minimum(centre.astype(np.int64), source - 1)
    high = np.minimum(low + 1, source - 1)
    weight = (centre - low.astype(np.float32)).clip(0, 1)
    return low, high, (np.float32(1) - weight).astype(np.float64), weight.astype(np.float64)


@lru_cache(maxsize=32)
def _used(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows that are neighbours of any, and both neighbours' places among them. No np.unique: it imports np.ma."""
    low, high, _, _ = _taps(source, target)
    used = np.zeros(source, dtype=bool)
    used[low] = used[high] = True
    place = np.cumsum(used) - 1
    return np.flatnonzero(used), place[low], place[high]


def _resize_picture(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H,W,3] to [height,width,3], truncated.

    This is the package's own definition: columns first, then rows, each a float64 sum of two products rounded to
    float32. NumPy rounds every one of these steps exactly, so the result is the same on every machine. It follows the
    published call, torch's `interpolate(float, mode="bilinear", align_corners=False)`, whose own rounding depends on
    its version and on the processor; the two differ by at most one level, in about 0.1 % of the values.
    """
    if picture.shape[:2] == (height, width):
        return picture
    top, bottom, w_top, w_bottom = _taps(picture.shape[0], height)
    left, right, w_left, w_right = _taps(picture.shape[1], width)
    if 2 * height < picture.shape[0]:  # of a large picture most rows are no row's neighbour
        used, top, bottom = _used(picture.shape[0], height)
        picture = picture[used]
    far = (picture.take(right, axis=1) * w_right[:, None]).astype(np.float32)
    rows = (picture.take(left, axis=1) * w_left[:, None] + far).astype(np.float32).astype(np.float64)
    far = (rows.take(bottom, axis=0) * w_bottom[:, None, None]).astype(np.float32)
    return (rows.take(top, axis=0) * w_top[:, None, None] + far).astype(np.float32).astype(np.uint8)


def _height_width(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, (int, np.integer)) else size
    if height < 1 or width < 1:
        raise ConfigError(f"expected a frame size of at least 1 x 1, got {height} x {width}")
    return int(height), int(width)


def resize_frames(frames: np.ndarray, size: int | Sequence[int]) -> np.ndarray:
    """Bilinear without antialias, aspect not kept, on 0..255, truncated: the published preprocessing (SPEC 5).

    Args:
        frames: uint8 [T,3,H,W].
        size: S for S x S, or (height, width).

    Returns: uint8 [T,3,height,width].
    """
    height, width = _height_width(size)
    out = np.empty((len(frames), 3, height, width), dtype=np.uint8)
    for t, frame in enumerate(np.asarray(frames)):
        out[t] = _resize_picture(frame.transpose(1, 2, 0), height, width).transpose(2, 0, 1)
    return out


def probe(source: Source, *, name: str | None = None, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS) -> VideoInfo:
    """What a video holds. Reads all its packets and decodes its first frame, so what it says can be decoded.

    Raises:
        VideoError: not a video, no picture track, pictures too large, or less of it than the file promises.
    """
    if _is_pictures(source):
        return _read_folder(source, name, (None, None, 1, None, "keep", None)).info
    name = source_name(source, name)
    index = video_index(source, name, max_megapixels)
    refuse_incomplete(index)
    return _info(source, index)[0]


def _info(source: Source, index: VideoIndex, backend: str = "pyav") -> tuple[VideoInfo, Orientation]:
    """Size and rotation come from the first picture: headers of the container may be wrong about both.

    Raises:
        VideoError: there is none, or it is stored in a way that the backend ignores.
    """
    with reopen(source, index) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise VideoError(f"{index.name}: its first frame cannot be decoded")
        turn = orientation(first)
        if backend == "decord" and turn.mirrored:
            raise VideoError(f"{index.name}: is stored mirrored, which decord ignores; use backend 'pyav'")
        if backend != "pyav" and has_alpha(first):
            raise VideoError(f"{index.name}: stores transparency, which {backend} ignores; use backend 'pyav'")
        return _info_of(index, first), turn


_TOLD: set[str] = set()
"""These kinds of HDR have been warned of, each with the first file."""
HDR = {16: "PQ", 18: "HLG"}
"""Transfer characteristics (H.273) of pictures that a player maps to what a screen can show."""


def _info_of(index: VideoIndex, frame: Any) -> VideoInfo:
    if (hdr := HDR.get(int(frame.color_trc))) and hdr not in _TOLD:
        _TOLD.add(hdr)
        line = "its colours are paler here than in a player, which maps them (FFmpeg: filters zscale and tonemap)"
        logger.warning("%s: is HDR (%s): %s; further files like it are not named", index.name, hdr, line)
    turned = orientation(frame).transpose
    height, width = (frame.width, frame.height) if turned else (frame.height, frame.width)
    height, width = index.square(height, width, turned=turned)
    check_area(width, height, index.name, index.max_megapixels)
    rotation = int(frame.rotation) % 360
    track = index.track if len(index.tracks) > 1 else None
    return VideoInfo(index.num_frames, index.fps, index.duration_s, width, height, rotation, index.codec, track)


def read_frames(
    source: Source,
    *,
    indices: Sequence[int] | None = None,
    times_s: Sequence[float] | None = None,
    num: int | None = None,
    fps: float | None = None,
    short_videos: str = "keep",
    between_s: Sequence[float] | None = None,
    size: int | Sequence[int] | None = None,
    backend: str = "pyav",
    exact: bool = True,
    with_next: bool = False,
    motion_vectors: bool = False,
    flow_pairs: str = "sampled",
    flow_size: int | Sequence[int] | None = None,
    threads: int = 1,
    decode_size: int | None = None,
    hardware: str | None = None,
    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS,
    name: str | None = None,
) -> VideoFrames:
    """Reads frames given by number, by time, or `num` evenly spaced ones (fewer in a shorter video).

    One picture is held in full size at a time; with `size` each is resized as it is decoded (SPEC 5).

    Args:
        source: path, bytes, or seekable binary file; or a folder of pictures (`picture_folder`), or a list of its
            pictures' bytes.
        indices: frame numbers from 0, in any order, repeats allowed.
        times_s: seconds since the start of the file; the frame on screen then.
        fps: with `num`: so many frames a second (`frames_at_rate`; where the rate varies those on screen at 0, 1/fps,
            2/fps, ...) where these are at most `num`; otherwise, and where the video has no more frames a second than
            that, `num` uniform centres of all frames (`spread_evenly`).
        short_videos: with `num`: "keep" gives fewer frames where there are fewer; "double" repeats them in order to
            exactly `num`, as published training did (`sample_indices`).
        between_s: with `num`: choose among the frames of [start, end) seconds (`frames_between`), not of all.
        size: S, or (height, width); None keeps the video's own, stretched where its pixels are not square.
        exact: False takes, in place of each frame, the nearest one at which decoding can begin (a key frame), each
            once: fewer frames, at the times and under the numbers that are theirs. Exact frames are read, with a
            warning, where these would be one (`key_frames`).
        with_next: each frame is followed by the next picture of the file, the last picture of a file by itself.
        motion_vectors: also give `flow` from the codec's motion vectors.
        flow_pairs: sampled: from each chosen frame to the next chosen one (published); everything between the first
            and the last is decoded for it. local: to the next picture of the file; a few pictures are.
        flow_size: grid of that flow, its values scaled along; None is the size of the frames.
        threads: so many parts of a file are decoded at the same time, with equal results. Frames of their own size, of
            one part or of a file object are decoded by so many threads of FFmpeg's; chained motion vectors by one.
            1 suits loaders with several workers.
        decode_size: px; FFmpeg scales pictures down to this shorter side (area average) as they are decoded, and the
            decoders of MPEG-1, -2, -4 and Motion JPEG decode fewer pixels. `size` applies after it. Pixels differ from
            the published preprocessing.
        hardware: one of HARDWARE that decodes; where it cannot, the processor does, with a warning.
        name: what errors call the source, for bytes.
        max_megapixels: a picture of a larger area is refused, that of a video before it is decoded.

    Raises:
        VideoError: nothing there, not a video, no such frame, or one that is damaged.
        ConfigError: an unknown name, a number out of range, or what a backend cannot do.
    """
    if _is_pictures(source):
        if with_next:
            name = name if isinstance(source, list) else source_name(source, name)
            raise ConfigError(f"{name}: flow_pairs local needs a video, and these are pictures")
        chosen = (indices, times_s, num, fps, short_videos, between_s)
        return _read_folder(source, name, chosen, size=size, motion_vectors=motion_vectors, limit=max_megapixels)
    if backend not in BACKENDS:
        raise ConfigError(unknown_name("video backend", backend, BACKENDS))
    if short_videos not in SHORT_VIDEOS:
        raise ConfigError(unknown_name("short_videos", short_videos, SHORT_VIDEOS))
    if fps is not None and not fps > 0:
        raise ConfigError(f"fps must be greater than 0, got {fps!r}")
    _check_decoding(backend, motion_vectors, flow_pairs, decode_size, hardware)
    name = source_name(source, name)
    index = video_index(source, name, max_megapixels)
    asked = (indices, times_s, num, fps, short_videos, between_s)
    pairs = flow_pairs if motion_vectors else None
    how = _How(exact, with_next, size, backend, pairs, flow_size, threads, decode_size, hardware)
    try:
        return _read(source, index, asked, how)
    except IndexMismatch:
        index = count_frames(source, None, index.facts())
        return _read(source, index, asked, how)


class _How(NamedTuple):
    """Arguments of `read_frames` that say how, not which, frames are read; `pairs` is None without motion vectors."""

    exact: bool
    with_next: bool
    size: int | Sequence[int] | None
    backend: str
    pairs: str | None
    flow_size: int | Sequence[int] | None
    threads: int
    decode_size: int | None
    hardware: str | None


def _check_decoding(backend, motion_vectors, flow_pairs, decode_size, hardware) -> None:
    if flow_pairs not in FLOW_PAIRS:
        raise ConfigError(unknown_name("flow_pairs", flow_pairs, FLOW_PAIRS))
    if hardware is not None and hardware not in HARDWARE:
        raise ConfigError(unknown_name("hardware", hardware, HARDWARE))
    if decode_size is not None and decode_size < 1:
        raise ConfigError(f"decode_size must be at least 1 px, got {decode_size!r}")
    for what, used in (("motion vectors", motion_vectors), ("decode_size", decode_size), ("hardware", hardware)):
        if used and backend != "pyav":
            raise ConfigError(f"{what} need backend 'pyav', got '{backend}'")
    if motion_vectors and hardware:
        raise ConfigError(f"motion vectors come from the processor's decoder alone; leave out hardware '{hardware}'")


def read_pairs(source: Source, **how: Any) -> np.ndarray:
    """uint8 [T,2,3,H,W]: the frames that `read_frames` gives, each with the next picture of the file.

    The last picture of a file stands beside itself: nothing moves after it.

    Args:
        how: arguments of `read_frames`.

    Raises:
        ConfigError: a folder of pictures, whose pictures are too far apart.
        VideoError: as `read_frames`.
    """
    frames = read_frames(source, with_next=True, **how).frames
    return frames.reshape(-1, 2, *frames.shape[1:])


def _is_pictures(source: Source | Sequence[bytes]) -> bool:
    return isinstance(source, list) or (isinstance(source, (str, os.PathLike)) and os.path.isdir(source))


def _read_folder(
    source,
    name,
    asked,
    *,
    size=None,
    motion_vectors=False,
    limit=DEFAULT_MAX_MEGAPIXELS,
) -> VideoFrames:
    """Frames of a folder of pictures, or of a list of them as bytes; `asked` as of `chosen_frames`."""
    name = source_name(source, name)
    if isinstance(source, list):
        pictures = [(f"{name}, picture {number}", raw) for number, raw in enumerate(source)]
    else:
        pictures = [(str(path), path) for path in pictures_in(Path(source))]
    if motion_vectors:
        raise ConfigError(f"{name}: pictures have no motion vectors; use flow none and let the model compute it")
    index = folder_index(name, len(pictures))
    chosen = chosen_frames(index, *asked)
    wanted = [pictures[i] for i in chosen]
    frames = read_pictures(wanted, None if size is None else _height_width(size), _resize_picture, limit)
    info = VideoInfo(len(pictures), index.fps, index.duration_s, frames.shape[3], frames.shape[2], 0, index.codec)
    return VideoFrames(frames, index.times_s[chosen], chosen, info)


def _read(source, index, asked, how: _How) -> VideoFrames:
    chosen = chosen_frames(index, *asked)
    if not chosen:
        raise VideoError(f"{index.name}: no frames were asked for")
    if not how.exact:
        chosen = key_frames(index, chosen, asked[-1])
    if how.with_next:
        chosen = [number for i in chosen for number in (i, min(i + 1, index.num_frames - 1))]
    wanted = sorted(set(chosen))
    parts = _parts(source, index, wanted, how)
    given = how._replace(threads=1) if how.pairs or len(parts) > 1 else how
    if len(parts) > 1:
        out = np.empty((len(wanted), 3, *_height_width(how.size)), dtype=np.uint8)
        with ThreadPoolExecutor(len(parts)) as pool:
            found = [pool.submit(_decode, source, index, wanted[part], given, out[part]) for part in parts]
            decoded = _joined([future.result() for future in found], out)
    else:
        decoded = _decode(source, index, wanted, given)
    frames, motion, flow = decoded.frames, decoded.motion, None
    if motion:
        if chosen != wanted:
            raise VideoError(f"{index.name}: motion vectors need ascending frames without repeats")
        flow = motion.flow(_height_width(how.flow_size) if how.flow_size is not None else frames.shape[2:])
    if chosen != wanted:
        frames = frames[np.searchsorted(wanted, chosen)]
    return VideoFrames(frames, index.times_s[chosen], chosen, decoded.info, flow, decoded.count)


class _Decoded(NamedTuple):
    frames: np.ndarray
    info: VideoInfo
    motion: Any
    count: DecodeCount


def _parts(source: Source, index: VideoIndex, wanted: Sequence[int], how: _How) -> list[slice]:
    """Wanted frames in at most `threads` parts that decoders of their own can read at the same time.

    Each part begins at a key frame, where a single decoder would begin anew, too, so pictures are the same for any
    number of threads. FFmpeg's own threads gain little here, because a decoder is emptied behind each wanted frame.
    """
    alone = how.threads == 1 or how.backend != "pyav" or how.hardware or how.size is None or how.pairs == "sampled"
    if alone or index.by_count or not isinstance(source, (str, os.PathLike, bytes)):  # a file object has one position
        return [slice(0, len(wanted))]
    way = stretches(index, wanted, anchor=how.pairs == "local")
    of_each = [(s.stop - s.start, index.packet_bytes[s.start : s.stop].sum()) for s in way]
    work = (np.array(of_each, dtype=np.float64) / np.sum(of_each, axis=0)).mean(axis=1)  # decoding costs by both alike
    part = (how.threads * (work.cumsum() - work / 2)).astype(int)
    ends = np.cumsum([len(s.wanted) for s in way])
    edges = [0, *(int(ends[k - 1]) for k in range(1, len(way)) if part[k] != part[k - 1]), len(wanted)]
    return [slice(*edge) for edge in pairwise(edges)]


def _joined(parts: list[_Decoded], frames: np.ndarray) -> _Decoded:
    first, *others = parts
    for other in others:
        for name, value in vars(other.count).items():
            setattr(first.count, name, getattr(first.count, name) + value)
        if first.motion:
            first.motion.extend(other.motion)
    return first._replace(frames=frames)


def _decode(source, index, wanted: Sequence[int], how: _How, frames: np.ndarray | None = None) -> _Decoded:
    """Frames in the order of decoding, which is ascending.

    Args:
        frames: where to put them; None = an array of their size.
    """
    count, infos = DecodeCount(), []
    motion = _motion(index, wanted, how.pairs)
    if how.backend == "pyav":
        seen = {"around": motion} if how.pairs == "local" else {"visit": motion.add if motion else None}
        given = {"threads": how.threads, "decode_size": how.decode_size, "hardware": how.hardware}
        if how.decode_size is None or index.codec not in LOWRES:  # others may be decoded smaller than they are
            seen["see"] = lambda frame: infos or infos.append(_info_of(index, frame))
        else:
            infos.append(_info(source, index)[0])
        pictures = decode_pyav(source, index, wanted, count=count, **given, **seen)
    else:
        infos.append(_info(source, index, how.backend)[0])
        decode = decode_decord if how.backend == "decord" else decode_torchcodec
        pictures = decode(source, index, wanted, threads=how.threads)
    height, width = (None, None) if frames is None else frames.shape[2:]
    for t, (i, picture) in enumerate(pictures):
        assert wanted[t] == i
        if frames is None:
            stored, turned = picture.shape[:2], infos[0].rotation % 180 == 90
            square = index.square(*stored, turned=turned)
            height, width = _height_width(how.size) if how.size is not None else square
            frames = np.empty((len(wanted), 3, height, width), dtype=np.uint8)
        if how.size is None and picture.shape[:2] != stored:
            raise VideoError(
                f"{index.name}: frame {i} is {picture.shape[1]} x {picture.shape[0]}, the first is "
                f"{stored[1]} x {stored[0]}; give a size to bring them together"
            )
        frames[t] = _resize_picture(picture, height, width).transpose(2, 0, 1)
        if motion:
            motion.mark()
    (info,) = infos
    return _Decoded(frames, info, motion, count)


def _motion(index: VideoIndex, wanted: Sequence[int], pairs: str | None) -> Any:
    """The collector of motion vectors, None where none are wanted; warns where a long chain of them is slow."""
    if pairs is None:
        return None
    from lavis_lstp.data.video.codec_motion import CodecMotion, LocalMotion

    between = wanted[-1] - wanted[0]
    if pairs == "sampled" and between > MANY_PICTURES:
        logger.warning(
            "%s: motion vectors between %d frames are followed through %d pictures, at 10 ms or more each; "
            "flow_pairs: local looks at a few a frame",
            *(index.name, len(wanted), between),
        )
    return (LocalMotion if pairs == "local" else CodecMotion)(index.name)
