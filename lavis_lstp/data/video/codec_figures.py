"""Figures that a video gives nearly for nothing: the bit cost of every picture, and how much moves when.

In: a video file. Out: NumPy arrays with one value for each picture in the order a viewer sees them; no torch is
imported. The bit cost is what the encoder spent on a picture, which is large at cuts and where much moves; reading it
takes one pass over the packets and decodes nothing. Motion energy decodes the pictures that others refer to, about
half of them in H.264, without the filter that smooths them, and compares their brightness at a small size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import av
import cv2
import numpy as np

from lavis_lstp.data.pictures import DEFAULT_MAX_MEGAPIXELS
from lavis_lstp.data.video.decode import SKIPPABLE, picture
from lavis_lstp.data.video.index import Source, VideoIndex, reopen, source_name, video_index
from lavis_lstp.errors import VideoError

LUMA_FIRST = ("yuv4", "yuvj4", "nv12", "nv21", "gray")  # pixel formats whose first plane is brightness
ENERGY_WIDTH = 80  # px; width at which pictures are compared


@dataclass(frozen=True)
class PacketCosts:
    """The N pictures of a video in presentation order.

    Attributes:
        times_s: float64 [N], seconds since the start of the file.
        num_bytes: int64 [N], the size of the packet that holds each picture.
        is_key: bool [N], decoding can start at this picture.
    """

    times_s: np.ndarray
    num_bytes: np.ndarray
    is_key: np.ndarray


def packet_costs(
    source: Source, *, name: str | None = None, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS
) -> PacketCosts:
    """Times, bit costs and key frames of all pictures, from the same single pass over the packets as `probe`.

    A file that stores no presentation times (AVI with B-frames, raw streams) is decoded once instead.

    Args:
        source: path, bytes or seekable binary file.
        name: what errors call the source.

    Raises:
        VideoError: not a video, less of it than the file promises, or a folder of pictures.
    """
    index = _whole_index(source, name, max_megapixels)
    return PacketCosts(index.times_s, index.frame_bytes, index.frame_key)


def motion_energy(
    source: Source, *, name: str | None = None, threads: int = 1, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS
) -> np.ndarray:
    """float32 [N]: how much each picture differs from the one before, as mean levels of stored brightness (0 to 255).

    Pictures that no other refers to are not decoded: they share evenly in the difference between their neighbours.
    The first picture has the value of the second, and a video of one picture has 0.

    Args:
        source: path, bytes or seekable binary file.
        name: what errors call the source.
        threads: decoder threads.

    Raises:
        VideoError: not a video, a folder of pictures, or damaged.
    """
    index = _whole_index(source, name, max_megapixels)
    energy = np.zeros(index.num_frames, dtype=np.float32)
    before, last = None, -1
    for i, grey in _small_greys(source, index, threads):
        if before is not None and i > last:
            energy[last + 1 : i + 1] = cv2.absdiff(before, grey).mean() / (i - last)
        before, last = grey, i
    if last < 0:
        raise VideoError(f"{index.name}: none of its frames can be decoded")
    energy[last + 1 :] = energy[last]
    energy[0] = energy[min(1, len(energy) - 1)]
    return energy


def of_candidates(figure: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """float64 [T]: the mean of a figure of N pictures over those that are nearer to each candidate than to others.

    Args:
        figure: [N]; candidates: int [T], ascending picture numbers.
    """
    part = np.searchsorted((candidates[1:] + candidates[:-1]) / 2, np.arange(len(figure)))
    return np.bincount(part, figure, len(candidates)) / np.maximum(1, np.bincount(part, minlength=len(candidates)))


def _whole_index(source: Source, name: str | None, max_megapixels: float) -> VideoIndex:
    name = source_name(source, name)
    index = video_index(source, name, max_megapixels)
    if index.missing:
        raise VideoError(f"{name}: {index.missing}")
    return index


def _luma(frame: Any) -> np.ndarray:
    """uint8 [H,W], brightness as it is stored (usually 16 to 235). A view where the decoder gives it so: converting
    720p costs 1.5 ms, which is more than decoding it."""
    if not frame.format.name.startswith(LUMA_FIRST) or frame.format.components[0].bits != 8:
        return picture(frame, "gray")
    plane = frame.planes[0]
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


def _small_greys(source: Source, index: VideoIndex, threads: int):
    """Yields (frame number, uint8 [h,w]) of the decoded pictures, in the order they are shown."""
    with reopen(source, index, threads) as (container, stream):
        context = stream.codec_context
        if not index.by_count and context.name in SKIPPABLE:
            context.skip_frame = "NONREF"
            context.options = dict(context.options) | {"skip_loop_filter": "all"}
        try:
            for i, frame in enumerate(container.decode(stream)):
                if not index.by_count:
                    packet = index.position(frame.pts)
                    i = -1 if packet is None else int(index.packet_frame[packet])
                if not 0 <= i < index.num_frames:
                    continue  # hidden by an edit list
                grey = _luma(frame)
                size = (ENERGY_WIDTH, max(1, round(ENERGY_WIDTH * grey.shape[0] / grey.shape[1])))
                yield i, cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
        except av.FFmpegError as error:
            raise VideoError(f"{index.name}: cannot be decoded ({error.strerror})") from None
