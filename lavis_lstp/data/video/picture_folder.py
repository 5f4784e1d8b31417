"""A folder of pictures in place of a video file, as TVQA's videos are published: by name, three a second.

Names are in natural order: frame_2 comes before frame_10.

In: the folder, or its pictures as bytes, and which frames are wanted. Out: what `video.read_frames` gives of a file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np

from lavis_lstp.data.pictures import DEFAULT_MAX_MEGAPIXELS, ENDINGS, open_picture
from lavis_lstp.data.video.index import VideoIndex
from lavis_lstp.errors import ConfigError, VideoError

PICTURES_PER_SECOND = 3.0
NOT_READ = tuple(
    ".apng .avif .dds .exr .gif .hdr .heic .heif .hif .ico .j2k .jp2 .jpf .jpx .jxl .jxr .pam .pcx .pfm .psd .qoi .svg"
    " .tga .arw .cr2 .cr3 .dng .nef .orf .raf .raw .rw2".split()
)
"""Endings of pictures, raw files of cameras among them, that would be missing among a folder's frames."""


def pictures_in(folder: Path) -> list[Path]:
    """Its pictures in the natural order of their names. Hidden files, such as macOS's `._1.jpg`, are none.

    Raises:
        VideoError: it has none, or one of a kind that is not read, unless it stands beside one of the same name that is
            (cameras store raw files and JPEG side by side).
    """
    seen = [path for path in folder.iterdir() if not path.name.startswith(".")]
    found = [path for path in seen if path.suffix.lower() in ENDINGS]
    stems = {path.stem for path in found}
    if odd := sorted(path for path in seen if path.suffix.lower() in NOT_READ and path.stem not in stems):
        raise VideoError(f"{odd[0]}: is not read in a folder of pictures; take it away, or convert it to JPEG or PNG")
    if not found:
        raise VideoError(f"{folder}: a folder without pictures ({', '.join(ENDINGS)})")
    return in_order(found)


def in_order(pictures: Sequence[Path]) -> list[Path]:
    """Return pictures in the natural order of their names, or by the decimal numbers that these are."""
    numbers = _decimals([path.stem for path in pictures])
    if numbers is None:
        return sorted(pictures, key=lambda path: natural(path.name))
    return [path for _, path in sorted(zip(numbers, pictures, strict=True))]


_DECIMAL = re.compile(r"(\D*?)(\d{1,30}(?:\.(\d{1,30}))?)(\D*)")
"""The groups are what stands in front of a name's one number, the number, the digits behind its point, the rest."""


def _decimals(names: Sequence[str]) -> list[Decimal] | None:
    """Return the number of each name, where names differ in one decimal number alone, and each in another; else None.

    These are seconds or places ("0.05", "0.1", "t1.25s"), and a minus in front of some of them is one. In "1.9", "1.10"
    the second number counts by itself: decimals have as many digits each, zeros behind their points ("1.05"), or none
    at their ends.
    """
    found = [_DECIMAL.fullmatch(name) for name in names]
    if None in found or len({match[4] for match in found}) > 1:
        return None
    signs = {match[1] for match in found}
    if len(signs) > 1 and signs != {"", "-"}:
        return None
    fractions = {match[3] or "" for match in found}
    long = [fraction for fraction in fractions if len(fraction) > 1]
    padded = len({len(fraction) for fraction in fractions}) == 1 or any(fraction[0] == "0" for fraction in long)
    if not padded and any(fraction[-1] == "0" for fraction in long):
        return None
    numbers = [Decimal(f"{match[1] if len(signs) > 1 else ''}{match[2]}") for match in found]
    return numbers if len(set(numbers)) == len(numbers) else None


def natural(name: str) -> tuple[list[tuple[str, int]], str]:
    """A key that orders names of files by the numbers in them; names that differ in zeros alone by their text.

    >>> sorted(["f10", "f9", "f1"], key=natural)
    ['f1', 'f9', 'f10']
    """
    parts = re.findall(r"([^0-9]*)([0-9]*)", os.path.splitext(name)[0])  # "1" comes before "1.5" and "1 (2)"
    return [(text, int(number or -1)) for text, number in parts], name


def sha256_of_pictures(folder: Path) -> str:
    """SHA-256 of a folder's pictures, one after the other."""
    digest = hashlib.sha256()
    for picture in pictures_in(folder):
        digest.update(picture.read_bytes())
    return digest.hexdigest()


def folder_index(name: str, count: int) -> VideoIndex:
    """The index of a video of `count` pictures, which has no packets."""
    nothing = np.empty(0, dtype=np.int64)
    return VideoIndex(
        name=name,
        packet_pts=nothing,
        packet_key=nothing.astype(bool),
        packet_damaged=nothing.astype(bool),
        packet_bytes=nothing,
        frame_packet=nothing,
        times_s=np.arange(count) / PICTURES_PER_SECOND,
        frame_bytes=nothing,
        frame_key=nothing.astype(bool),
        fps=PICTURES_PER_SECOND,
        duration_s=count / PICTURES_PER_SECOND,
        time_base=1 / PICTURES_PER_SECOND,
        by_count=True,
        missing=None,
        codec="pictures",
        container="folder",
    )


def read_pictures(
    pictures: Sequence[tuple[str, Path | bytes]],
    size: tuple[int, int] | None,
    resize,
    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS,
) -> np.ndarray:
    """uint8 [T,3,H,W].

    Args:
        pictures: files or their bytes, and what messages call them.
        size: (height, width); None = as stored, which must then be one size.
        resize: from uint8 [H,W,3], height and width to [height,width,3].

    Raises:
        VideoError: a picture cannot be read.
        ConfigError: pictures of different sizes, and no size to bring them together.
    """
    frames = []
    for name, source in pictures:
        pixels = np.asarray(open_picture(source, name, max_megapixels=max_megapixels))
        frames.append(pixels if size is None else resize(pixels, *size))
        if frames[-1].shape != frames[0].shape:
            raise ConfigError(f"{name}: is of another size than the first one; give a size to bring them together")
    return np.stack(frames).transpose(0, 3, 1, 2)
