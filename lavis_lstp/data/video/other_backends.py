"""The same chosen frames by decord and by TorchCodec, where these place them as the index does.

In: a source, its `VideoIndex` and the frames wanted. Out: (index, RGB picture) in ascending order, upright; or one
`VideoError` that says what the backend cannot do and that `pyav` can.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lavis_lstp.data.video.container import Source, check_source
from lavis_lstp.data.video.decode import decode_pyav
from lavis_lstp.data.video.index import VideoIndex
from lavis_lstp.errors import VideoError

# Where TorchCodec 0.17 was found to seek to the right frame; in MPEG it passes over pictures.
TORCHCODEC_CONTAINERS = {"mov", "matroska"}
# Where decord 0.6.0 was found to seek to the right frame; in MPEG-TS it shows broken ones without a word.
DECORD_CONTAINERS = {"mov", "matroska"}


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


def decode_torchcodec(
    source: Source, index: VideoIndex, wanted: Sequence[int], *, threads: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """The same frames by TorchCodec and the system's FFmpeg, each checked against the time the index gives it."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError):
        raise VideoError(
            "backend 'torchcodec' is not usable; `pip install torchcodec` and install FFmpeg's libraries, or use "
            "backend 'pyav'"
        ) from None
    if index.by_count:
        raise VideoError(f"{index.name}: stores no presentation times, which torchcodec needs; use backend 'pyav'")
    if not TORCHCODEC_CONTAINERS & set(index.container.split(",")):
        raise VideoError(f"{index.name}: torchcodec seeks wrongly in {index.container} files; use backend 'pyav'")
    try:
        given = check_source(source, index.name)
        reader = VideoDecoder(given, stream_index=index.track, dimension_order="NHWC", num_ffmpeg_threads=threads)
        if len(reader) != index.num_frames:
            line = f"torchcodec counts {len(reader)} frames, not {index.num_frames}"
            raise VideoError(f"{index.name}: {line}; use backend 'pyav'")
        first_s = reader.get_frame_at(0).pts_seconds
        for i in wanted:
            frame = reader.get_frame_at(i)
            off_s = (frame.pts_seconds - first_s) - (index.times_s[i] - index.times_s[0])
            if abs(off_s) > 0.5 / index.fps:
                raise VideoError(f"{index.name}: torchcodec places frames at other times; use backend 'pyav'")
            yield i, frame.data.numpy()
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, VideoError):
            raise
        line = str(error).strip().splitlines()[0][:120]
        raise VideoError(f"{index.name}: cannot be read by torchcodec ({line}); use backend 'pyav'") from None
