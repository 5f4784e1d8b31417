"""Figures that a video gives nearly for nothing: the bit cost of every picture, and how much moves when.

In: a video file. Out: NumPy arrays with one value for each picture in the order a viewer sees them; no torch is
imported. The bit cost is what the encoder spent on a picture, which is large at cuts and where much moves; reading it
takes one pass over the packets and decodes nothing. Motion energy compares the brightness of decoded pictures at a
small size. Of a short video all pictures that others refer to are decoded, of a film those behind some key frames; in
between, the bit cost tells how much moves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import av
import cv2
import numpy as np

from lavis_lstp.data.frame_numbers import uniform_centres
from lavis_lstp.data.pictures import DEFAULT_MAX_MEGAPIXELS
from lavis_lstp.data.video.container import Source, source_name
from lavis_lstp.data.video.decode import SKIPPABLE, decode_runs, picture, start_for
from lavis_lstp.data.video.index import VideoIndex, reopen, video_index
from lavis_lstp.errors import VideoError

LUMA_FIRST = ("yuv4", "yuvj4", "nv12", "nv21", "gray")  # pixel formats whose first plane is brightness
ENERGY_WIDTH = 80  # px; width at which pictures are compared
PLACES, RUN = 32, 16
"""Motion of a film is measured at so many places, in so many packets of each. Of 64 parts of Big Buck Bunny it then
correlates with that of all pictures by 0.78, of 512 by 0.68; bit cost alone by 0.66 and 0.60."""

logger = logging.getLogger(__name__)


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
    source: Source,
    *,
    name: str | None = None,
    threads: int = 1,
    places: int | None = PLACES,
    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS,
) -> np.ndarray:
    """float32 [N]: how much each picture differs from the one before, as mean levels of stored brightness (0 to 255).

    Pictures that no other refers to are not decoded: they share evenly in the difference between their neighbours.
    The first picture has the value of the second, and a video of one picture has 0.

    Of a video of more than 2 * RUN pictures a place, the first RUN packets from a key frame on are decoded at evenly
    spread places. The others have their bit cost times the motion per byte at the places around them, so that
    motion between the places is found by what it cost the encoder. A cut has no more than that. Where
    key frames are too few, or the file stores no times to seek to, all of it is decoded, which a warning tells.

    Args:
        source: path, bytes or seekable binary file.
        name: what errors call the source.
        threads: so many parts of a path or bytes are decoded at the same time; the result is the same.
        places: None = decode the whole video, however long.

    Raises:
        VideoError: not a video, a folder of pictures, or damaged.
    """
    index = _whole_index(source, name, max_megapixels)
    if places is None or index.num_frames <= 2 * places * RUN:
        return _energy_of_all(source, index, threads)
    runs = [] if index.by_count else _runs(index, places)
    if not isinstance(source, str | bytes) and not hasattr(source, "__fspath__"):
        threads = 1  # a file object has one position
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(partial(_measured, source, index), np.array_split(np.asarray(runs).reshape(-1, 2), threads))
        found = [one for part in parts for one in part if len(one) > 1]
    if 2 * len(found) < places:
        logger.warning(
            "%s: decoding can start at only %d of %d places, so all its pictures are decoded to see how they move",
            *(index.name, len(found), places),
        )
        return _energy_of_all(source, index, threads)
    return _between(index, found)


def _energy_of_all(source: Source, index: VideoIndex, threads: int) -> np.ndarray:
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


def _runs(index: VideoIndex, places: int) -> list[tuple[int, int]]:
    """Return the packets [start, stop) to decode at evenly spread places: the first ones of a key frame's group."""
    centres = index.frame_packet[uniform_centres(places, index.num_frames)]
    keys = np.flatnonzero(index.packet_key)
    runs = []
    for start in sorted({start_for(index, int(packet)) for packet in centres}):
        later = keys[keys > start + 1]  # where every picture is a key frame, two are compared
        runs.append((start, min(start + RUN, int(later[0]) if len(later) else len(index.packet_pts))))
    return runs


def _measured(source: Source, index: VideoIndex, runs: Sequence[tuple[int, int]]) -> list[list[tuple[int, float]]]:
    """Return the numbers of each run's decoded frames, ascending, with the motion since the frame before."""
    found = []
    for (start, _), pictures in zip(runs, decode_runs(source, index, runs), strict=True):
        first, before, one = int(index.packet_frame[start]), None, []
        for frame in pictures:
            i = _number(index, frame)
            if i < first or frame.is_corrupt or (one and i <= one[-1][0]):
                continue  # shown before the key frame, so that it may refer to what was not decoded; or hidden
            grey = _small(frame)
            one.append((i, 0.0 if before is None else float(cv2.absdiff(before, grey).mean()) / (i - one[-1][0])))
            before = grey
        found.append(one)
    return found


def _between(index: VideoIndex, found: Sequence[Sequence[tuple[int, float]]]) -> np.ndarray:
    """Return float32 [N]: measured energy, and elsewhere what the bit cost says by the motion per byte nearby."""
    every, keys = np.arange(index.num_frames), index.frame_key
    cost = np.ones(index.num_frames)
    if not keys.all():  # key frames cost much, whether anything moves or not
        cost = np.interp(every, every[~keys], index.frame_bytes[~keys])
        cost -= cost.min() - 1  # a picture equal to the one before costs some bytes, too
    measured = np.full(index.num_frames, np.nan)
    for one in found:
        for (before, _), (i, energy) in zip(one, one[1:], strict=False):
            measured[before + 1 : i + 1] = energy
    spans = [slice(one[0][0] + 1, one[-1][0] + 1) for one in found]
    moved, spent = (np.array([figure[span].sum() for span in spans]) for figure in (measured, cost))
    # A place of few bytes says little about motion per byte, so it is drawn towards that of all places.
    usual = max(moved.sum(), 1e-6) / spent.sum()
    per_byte = (moved + spent.mean() * usual) / (spent + spent.mean())
    energy = np.interp(every, [(span.start + span.stop - 1) / 2 for span in spans], per_byte) * cost
    return np.where(np.isnan(measured), energy, measured).astype(np.float32)


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


def _small(frame: Any) -> np.ndarray:
    """Return uint8 [h,w], the brightness at the size at which pictures are compared."""
    grey = _luma(frame)
    size = (ENERGY_WIDTH, max(1, round(ENERGY_WIDTH * grey.shape[0] / grey.shape[1])))
    return cv2.resize(grey, size, interpolation=cv2.INTER_AREA)


def _number(index: VideoIndex, frame: Any) -> int:
    """Return the number of a picture; -1 where an edit list hides it or its time is unknown."""
    packet = index.position(frame.pts)
    return -1 if packet is None else int(index.packet_frame[packet])


def _small_greys(source: Source, index: VideoIndex, threads: int):
    """Yields (frame number, uint8 [h,w]) of the decoded pictures, in the order they are shown."""
    with reopen(source, index, threads) as (container, stream):
        context = stream.codec_context
        context.options = dict(context.options) | {"skip_loop_filter": "all"}
        if not index.by_count and context.name in SKIPPABLE:
            context.skip_frame = "NONREF"
        try:
            for i, frame in enumerate(container.decode(stream)):
                i = i if index.by_count else _number(index, frame)
                if 0 <= i < index.num_frames:
                    yield i, _small(frame)
        except av.FFmpegError as error:
            raise VideoError(f"{index.name}: cannot be decoded ({error.strerror})") from None
