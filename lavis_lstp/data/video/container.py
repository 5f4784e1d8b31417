"""Opens what somebody calls a video, for all that reads one: a container of a known format, and one of its tracks.

In: a path, bytes or a file object. Out: PyAV's container and the stream of pictures that FFmpeg itself would show.
Whatever cannot be opened, decoded or trusted is a `VideoError` of one line: no other file and no address is opened.
"""

from __future__ import annotations

import io
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, BinaryIO

import av
from av.codec.hwaccel import HWAccel
from av.stream import Discard

from lavis_lstp.data.pictures import DEFAULT_MAX_MEGAPIXELS, ENDINGS, check_area, open_picture
from lavis_lstp.errors import VideoError

logger = logging.getLogger(__name__)

Source = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO

# Containers a video file may be. Others of FFmpeg's are playlists and scripts, which name further files or
# addresses to open, or readers of plain text (`tty`), which would show a .txt as a film.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,wmv,gif,h264,hevc,m4v,"
    "ivf,rm,vob,wtv,nut,mxf,dv,swf,apng,av1,obu"
)
# HEIF files are read by FFmpeg's `mov` as videos: of a photo of tiles one tile would be shown, without transparency.
HEIF_BRANDS = {b"avif", b"avis", b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevm", b"hevs", b"hevx"}
HEIF_BRANDS |= {b"mif1", b"mif2", b"msf1"}


def source_name(source: Source, name: str | None = None) -> str:
    """How errors call this source."""
    if name is not None:
        return str(name)
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, list | tuple):
        return "pictures"
    return str(getattr(source, "name", f"<{type(source).__name__}>"))


def check_source(source: Source, name: str) -> Source:
    """Refuses what is not a readable, non-empty regular file before FFmpeg sees it; bytes become a fresh stream.

    Raises:
        VideoError: naming the file and what is wrong with it.
    """
    kind = "picture" if os.path.splitext(name)[1].lower() in ENDINGS else "video"
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise VideoError(f"{name}: empty (0 bytes), expected a {kind}")
        return io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        if not hasattr(source, "read") or not hasattr(source, "seek"):
            raise TypeError(f"source must be a path, bytes or a seekable binary file, not {type(source).__name__}")
        source.seek(0)
        return source
    try:
        status = os.stat(source)
    except OSError as error:
        raise VideoError(f"{name}: no such {kind} ({error.strerror or error})") from None
    except ValueError as error:  # a null byte in the path
        raise VideoError(f"{name!r}: no such {kind} ({error})") from None
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(f"{name}: is a folder, expected a {kind} file")
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(f"{name}: is not a regular file, expected a {kind} file")
    if status.st_size == 0:
        raise VideoError(f"{name}: empty (0 bytes), expected a {kind}")
    return os.path.abspath(source)  # FFmpeg takes what stands before a colon of a relative name for a protocol


def _refuse_heif(source: Source, name: str) -> None:
    """Raises VideoError for a photo in HEIF's container, by the major brand in its first twelve bytes."""
    source = check_source(source, name)
    try:
        with open(source, "rb") if isinstance(source, str) else nullcontext(source) as file:
            first = file.read(12)
    except OSError:  # FFmpeg will say why
        return
    if first[4:8] == b"ftyp" and first[8:] in HEIF_BRANDS:
        raise VideoError(f"{name}: is a HEIC or AVIF picture, which is not read; convert it to JPEG or PNG")


@contextmanager
def open_video(
    source: Source,
    name: str,
    threads: int = 1,
    *,
    track: int | None = None,
    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS,
    hardware: str | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Container and picture stream of a checked source; every FFmpeg error inside becomes a `VideoError`.

    Args:
        track: FFmpeg's number of the stream; None takes the one that FFmpeg would (`_best_track`).
        max_megapixels: a picture of a larger area is refused before it is decoded.
        hardware: FFmpeg's name of the device that decodes, such as "cuda" or "vaapi". Where it cannot, the processor
            does, and a warning says so once for each device.
    """
    _refuse_heif(source, name)
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    is_open = False
    if threads > 1:
        # With a level, which older torchvisions set, each of FFmpeg's threads waits for Python's lock to report an
        # error; whoever frees the decoder waits for those threads and has that lock. PyAV begins without one.
        av.logging.set_level(None)
    most = {"max_pixels": str(round(max_megapixels * 1e6))}  # the decoder's own limit: a header may lie about the size
    try:
        known = {"options": most, "container_options": options, "metadata_errors": "replace"}
        if hardware and not _works(hardware, source, name, track, known):
            hardware = None
        if hardware:
            known["hwaccel"] = HWAccel(device_type=hardware, allow_software_fallback=False)
        with av.open(check_source(source, name), **known) as container:
            is_open = True
            if track is not None and track >= len(container.streams):
                raise VideoError(f"{name}: has no track {track} any more; it was changed while it was read")
            stream = _best_track(container, name) if track is None else container.streams[track]
            if stream.codec_context is None:
                raise VideoError(f"{name}: no decoder for its video stream in this build of PyAV")
            check_area(stream.codec_context.width, stream.codec_context.height, name, max_megapixels)
            for other in container.streams:
                if other is not stream:
                    other.discard = Discard.all
            stream.codec_context.options = most
            stream.codec_context.thread_count = threads
            stream.codec_context.thread_type = "SLICE" if threads == 1 else "AUTO"
            yield container, stream
    except av.FFmpegError as error:
        refused, why = isinstance(error, av.ArgumentError), ""
        if not is_open:
            _refuse_picture(source, name, max_megapixels)
            if refused:
                formats = f"expected one of {FORMATS}"
                raise VideoError(f"{name}: is of a format that is not read as a video; {formats}") from None
        if refused and (container.format.name, stream.codec_context.name) == ("avi", "rawvideo"):
            why = "; its header names no codec, as FFmpeg writes HEVC into AVI: make an MP4 from its source"
        elif refused:  # among other causes, the decoder found larger pictures than the container had stated
            why = f", or its pictures are larger than {max_megapixels:g} megapixels (max_megapixels)"
        elif isinstance(error, av.InvalidDataError):
            why = "; it looks truncated, or is no video"
        raise VideoError(f"{name}: cannot be read as a video ({error.strerror}){why}") from None


def _refuse_picture(source: Source, name: str, max_megapixels: float) -> None:
    """Refuses as a picture what is no video and is called a picture."""
    if os.path.splitext(name)[1].lower() in ENDINGS:
        given = check_source(source, name)
        open_picture(given if isinstance(given, str) else given.read(), name, max_megapixels=max_megapixels)


_NO_HARDWARE: set[tuple[str, str]] = set()


def _works(hardware: str, source: Source, name: str, track: int | None, known: dict[str, Any]) -> bool:
    """Whether a device decodes the first picture of a track; warns once for each device and cause."""
    try:
        accelerator = HWAccel(device_type=hardware, allow_software_fallback=False)
        with av.open(check_source(source, name), hwaccel=accelerator, **known) as container:
            next(container.decode(video=0) if track is None else container.decode(container.streams[track]), None)
        return True
    except (av.FFmpegError, RuntimeError, ValueError, NotImplementedError) as error:
        cause = " ".join(str(getattr(error, "strerror", None) or error).split())[:120]
        if (hardware, cause) not in _NO_HARDWARE:
            _NO_HARDWARE.add((hardware, cause))
            logger.warning("%s: '%s' does not decode it (%s); the processor does", name, hardware, cause)
        return False


def picture_tracks(container: Any) -> list[Any]:
    """Video streams that are no pictures attached to a file, such as a cover."""
    return [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]


def _best_track(container: Any, name: str) -> Any:
    """The stream that FFmpeg takes by itself: by its disposition, its number of frames, its bit rate, its place."""
    tracks = picture_tracks(container)
    if not tracks:
        kinds = ", ".join(sorted({"a cover picture" if s.type == "video" else s.type for s in container.streams}))
        kinds = kinds or "nothing"
        raise VideoError(f"{name}: no video stream, only {kinds}; expected a video")
    best = container.streams.best("video")
    if best is not None and best.index in {s.index for s in tracks}:
        return best
    return max(tracks, key=lambda s: (bool(s.disposition & s.disposition.default), s.width * s.height, -s.index))
