"""A medium on disk -> what a shard holds of it: its bytes or frames, its SHA-256, and what its header says.

In: units of `sources`. Out: a `Medium` each, in their order, read by threads ahead of the one that writes the shard:
reading and hashing leave the interpreter to the others, so that packing is no slower than copying and hashing. The
bytes are read once, hashed, looked into, and handed on; a great file is left to the writer, which copies it in pieces.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lavis_lstp.data.pictures import DEFAULT_MAX_MEGAPIXELS, check_area, picture_size
from lavis_lstp.data.shards.format import StoredFrames, dump_frames
from lavis_lstp.data.video.index import VideoInfo
from lavis_lstp.data.video.picture_folder import folder_index, pictures_in
from lavis_lstp.data.video.reading import probe, read_frames
from lavis_lstp.errors import VideoError
from lavis_lstp.files import find_path, sha256_file
from webdataset_tools.mp4_header import mp4_info
from webdataset_tools.sources import Unit, member_of

WHOLE = 32 << 20
"""Bytes. A greater file is not held in memory."""
READERS = 2
AHEAD = 4
GROUP = 32
GROUP_BYTES = 4 << 20
"""A reader takes so many files at a time, or so many bytes of them: handing over one of 20 kB takes as long as reading
it."""


@dataclass(frozen=True)
class Settings:
    """What decides a shard's bytes beside its input.

    Attributes:
        frames: so many of each video are stored as pictures, in place of the video; 0 = the video itself.
        fps, short_videos, size: as the data set's keys of those names choose and resize frames (size: image_size).
        encoding, quality: of those pictures.
        probe: look into every medium, so that what is none is noticed and the JSON says its length and size. Nothing is
            decoded where a header says that; `verify` decodes.
        max_megapixels: a picture, or a video whose frames have a larger area, in millions of pixels, is not packed.
    """

    frames: int = 0
    fps: float | None = None
    short_videos: str = "keep"
    size: int = 224
    encoding: str = "jpeg"
    quality: int = 95
    probe: bool = True
    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS


class Medium(NamedTuple):
    """What a shard holds of a video or picture.

    Attributes:
        content: the member's bytes, or the file that they are copied from.
        sha256: of the file, None where the writer is to hash it.
        facts: for the sample's json.
    """

    member: str
    content: bytes | Path
    sha256: bytes | None
    facts: dict[str, Any]


def load(unit: Unit, root: Path, settings: Settings) -> Medium | None:
    """None for a text.

    Raises:
        VideoError: the file is not what its ending says.
    """
    if unit.kind == "text":
        return None
    path = str(find_path(Path(root), unit.source))
    if os.path.isdir(path):
        return _load_folder(Path(path), settings)
    raw = None
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE:
            raw = file.readall()
    facts = {"bytes": size}
    if settings.probe:
        look = _video_facts if unit.kind == "video" else _image_facts
        facts |= look(raw, path, settings.max_megapixels)
    sha256 = hashlib.sha256(raw).digest() if raw is not None else None
    if unit.kind == "video" and settings.frames:
        sha256 = sha256 or bytes.fromhex(sha256_file(path))
        return Medium("frames", dump_frames(encode_frames(Path(path), settings)), sha256, facts)
    return Medium(member_of(unit.source), raw if raw is not None else Path(path), sha256, facts)


def _load_folder(path: Path, settings: Settings) -> Medium:
    """A folder of pictures as one member that holds all of them byte for byte, or frames chosen of them."""
    files = pictures_in(path)
    pictures = [file.read_bytes() for file in files]
    sha256 = hashlib.sha256(b"".join(pictures)).digest()
    facts = {"bytes": sum(map(len, pictures))}
    if settings.probe:
        facts |= _video_facts(None, str(path), settings.max_megapixels)
    if settings.frames:
        return Medium("frames", dump_frames(encode_frames(path, settings)), sha256, facts)
    times_s = folder_index(str(path), len(files)).times_s
    names = {"num_frames": "all", "names": "/".join(file.name for file in files)}
    return Medium("frames", dump_frames(StoredFrames(pictures, times_s, names)), sha256, facts)


def _video_facts(raw: bytes | None, path: str, max_megapixels: float) -> dict[str, Any]:
    info: VideoInfo = (raw and mp4_info(raw)) or probe(path, max_megapixels=max_megapixels)
    check_area(info.width, info.height, path, max_megapixels)
    facts = {name: getattr(info, name) for name in ("fps", "num_frames", "width", "height", "codec")}
    return facts | {"duration_s": round(info.duration_s, 6)}


def _image_facts(raw: bytes | None, path: str, max_megapixels: float) -> dict[str, int]:
    width, height = picture_size(path if raw is None else raw, path, max_megapixels=max_megapixels)
    return {"width": width, "height": height}


def encode_frames(path: Path, settings: Settings) -> StoredFrames:
    """The frames that a data set with these settings reads, as JPEG or WebP."""
    from PIL import Image

    chosen = {"fps": settings.fps, "short_videos": settings.short_videos}
    video = read_frames(path, num=settings.frames, size=settings.size, max_megapixels=settings.max_megapixels, **chosen)
    pictures = []
    for frame in video.frames:
        raw = io.BytesIO()
        Image.fromarray(frame.transpose(1, 2, 0)).save(raw, settings.encoding, quality=settings.quality)
        pictures.append(raw.getvalue())
    about = {"num_frames": settings.frames, **chosen, "size": settings.size}
    about |= {"encoding": settings.encoding, "quality": settings.quality}
    return StoredFrames(pictures, video.times_s, {name: str(value) for name, value in about.items()})


# ---------------------------------------------------------------- ahead of the writer


def read_ahead(
    units: Sequence[Unit], sizes: Sequence[int], root: Path, settings: Settings
) -> Iterator[tuple[Unit, Medium | VideoError | None]]:
    """Each unit with its medium, or with what is wrong with it.

    Args:
        sizes: about how many bytes each has.
    """
    groups = _groups(units, sizes, 1 if settings.frames else GROUP)
    with ThreadPoolExecutor(READERS, "pack") as pool:
        try:
            waiting: deque = deque()
            for group in islice(groups, AHEAD):
                waiting.append((group, pool.submit(_load_all, group, root, settings)))
            while waiting:
                group, loading = waiting.popleft()
                yield from zip(group, loading.result(), strict=True)
                for group in islice(groups, 1):
                    waiting.append((group, pool.submit(_load_all, group, root, settings)))
        finally:
            pool.shutdown(cancel_futures=True)


def _load_all(group: Sequence[Unit], root: Path, settings: Settings) -> list[Medium | VideoError | None]:
    found: list[Medium | VideoError | None] = []
    for unit in group:
        try:
            found.append(load(unit, root, settings))
        except VideoError as error:
            found.append(error)
    return found


def _groups(units: Sequence[Unit], sizes: Sequence[int], most: int) -> Iterator[list[Unit]]:
    group: list[Unit] = []
    total = 0
    for unit, size in zip(units, sizes, strict=True):
        group.append(unit)
        total += size
        if len(group) >= most or total >= GROUP_BYTES:
            yield group
            group, total = [], 0
    if group:
        yield group
