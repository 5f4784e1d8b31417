"""A picture file or its bytes in, an upright RGB picture out: the one place where this package opens pictures.

Every mode is scaled to its own range, so that black is 0 and white is 255 whatever the file stores, transparency is put
on white, and the orientation that a camera notes in EXIF is applied. What a picture cannot be read for is always a
`VideoError` of one line, which data sets count. Formats are listed: PIL would hand a `.jpg` that is PostScript to
Ghostscript. LAVIS sets PIL's LOAD_TRUNCATED_IMAGES when it is imported, which would fill the rest of a cut-off picture
with grey; it is set aside while a picture is decoded here.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from lavis_lstp.errors import VideoError

logger = logging.getLogger(__name__)

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
ENDINGS = tuple(".bmp .dib .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split())
"""Files with these endings are pictures by their names; a GIF is a video."""
DEFAULT_MAX_MEGAPIXELS = 64
"""Largest area of a picture or of a video's frame, in millions of pixels: 200 MB as RGB."""

LARGEST_NOTE = PngImagePlugin.MAX_TEXT_MEMORY
"""Bytes of a PNG's note or colour profile when unpacked: generators of pictures keep megabytes there."""

BROKEN = (OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError)
BROKEN += (EOFError, MemoryError, AssertionError, struct.error, zlib.error, Image.DecompressionBombError)
"""Errors that PIL's readers raise for damaged files; they document no common class."""
SMALLER = (
    "make it smaller, or raise the limit (max_megapixels in the data set's section, --max-megapixels of a command)"
)
"""A remedy for a picture of too large an area."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright."""
_ORIENTATION_IN_XMP = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\s*["'<]""")
_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO, _YCBCR = 0x0112, 258, 262, 0, 6
_NEW_SUBFILE_TYPE, _REDUCED, _SUBFILE_TYPE, _REDUCED_BEFORE = 254, 1, 255, 2
_COLOUR_TABLE = 320
_STATED = (340, 341)
"""TIFF's SMinSampleValue and SMaxSampleValue."""


def open_picture(
    source: str | Path | bytes, name: str, *, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS
) -> Image.Image:
    """The picture (of several in a file the first that is no preview of another), RGB, upright.

    Args:
        source: file or its bytes.
        name: what errors call it.
        max_megapixels: a picture of a larger area is refused before it is decoded.

    Raises:
        VideoError: there is no such file, it is no picture of `FORMATS`, damaged, cut off, or too large.
    """
    with _strict(max_megapixels), _one_line(name, source), _opened(source, name, max_megapixels) as picture:
        stored = str(picture.tile[0][3]) if picture.format == "PNG" and picture.tile else ""
        picture.load()
        _scale_colour_table(picture)
        _scale_transparency(picture, stored)
        orientation = _orientation(picture, name)
        upright = _to_rgb(picture)
        return upright.transpose(_TURNS[orientation]) if orientation in _TURNS else upright


def picture_size(
    source: str | Path | bytes, name: str, *, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS
) -> tuple[int, int]:
    """(width, height) in px of the upright picture, from its header.

    Nothing is decoded but a PNG that has notes behind its pixels, where its orientation may stand.

    Raises:
        VideoError: as `open_picture`, as far as the header shows it.
    """
    with _strict(max_megapixels), _one_line(name, source), _opened(source, name, max_megapixels) as picture:
        if picture.format == "PNG" and _has_notes_behind_pixels(picture.fp):
            picture.load()
        # PIL turns the size of a TIFF by its tag, and not by its XMP.
        tagged = picture.format == "TIFF" and _ORIENTATION in picture.tag_v2
        turned = not tagged and _orientation(picture, name) in (5, 6, 7, 8)
        return (picture.height, picture.width) if turned else (picture.width, picture.height)


def is_animated(source: str | os.PathLike | bytes | BinaryIO) -> bool:
    """Return whether a PNG or WebP picture has several frames; False for what is damaged, which its reader says."""
    source = io.BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source
    try:
        with _strict(DEFAULT_MAX_MEGAPIXELS), Image.open(source, formats=("PNG", "WEBP")) as picture:
            return picture.is_animated
    except BROKEN:
        return False


@contextlib.contextmanager
def _opened(source: str | Path | bytes, name: str, max_megapixels: float) -> Iterator[Image.Image]:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as picture:
        _skip_previews(picture, name)
        check_area(picture.width, picture.height, name, max_megapixels)
        if picture.format == "TIFF" and picture.tag_v2.get(_PHOTOMETRIC) == _YCBCR and picture.tile[0][0] == "raw":
            # PIL takes four bytes a pixel for three, and reads on behind the picture (Pillow 12.3)
            raise VideoError(
                f"{name}: is a TIFF of uncompressed YCbCr, which is not read; save it as RGB, or compressed"
            )
        yield picture


def _skip_previews(picture: Image.Image, name: str) -> None:
    """Go on to the first page of a TIFF that is no smaller copy of another: camera raws begin with one."""
    while picture.format == "TIFF" and (
        picture.tag_v2.get(_NEW_SUBFILE_TYPE, 0) & _REDUCED or picture.tag_v2.get(_SUBFILE_TYPE) == _REDUCED_BEFORE
    ):
        try:
            picture.seek(picture.tell() + 1)
        except EOFError:
            raise VideoError(
                f"{name}: only a preview of the picture can be read (a camera raw?); export it as JPEG or PNG"
            ) from None


def check_area(width: int, height: int, name: str, max_megapixels: float) -> None:
    """Raises VideoError where a picture has more than `max_megapixels` millions of pixels."""
    if width * height > max_megapixels * 1e6:
        raise VideoError(
            f"{name}: is {width} x {height} px, more than max_megapixels: {max_megapixels:g} allows; {SMALLER}"
        )


@contextlib.contextmanager
def _one_line(name: str, source: str | Path | bytes) -> Iterator[None]:
    """PIL's errors as one line, in which the file has the name that the caller gave it."""
    try:
        yield
    except VideoError:
        raise
    except UnidentifiedImageError:
        raise VideoError(f"{name}: {_why_unknown(source)}") from None
    except Image.DecompressionBombError:  # PIL's own limit, of twice as much
        raise VideoError(f"{name}: is of far more pixels than max_megapixels allows; {SMALLER}") from None
    except BROKEN as error:
        text = " ".join(str(error).split()) or type(error).__name__
        text = text if isinstance(source, bytes) else text.replace(str(source), name)
        if "MAX_TEXT" in text:
            text = f"its notes or its colour profile are of more than {LARGEST_NOTE >> 20} MB; save it without them"
        raise VideoError(f"{name}: cannot be read as a picture ({text})") from error


def _why_unknown(source: str | Path | bytes) -> str:
    """Return why PIL takes a file for no picture; PIL says the same of other formats and of kinds it cannot decode."""
    if isinstance(source, bytes):
        first = source[:16]
    else:
        with open(source, "rb") as file:
            first = file.read(16)
    if not first:
        return "empty (0 bytes), expected a picture"
    kind = next((known for known in FORMATS if (takes := Image.OPEN[known][1]) and takes(first) is True), None)
    if kind:
        why = f"it begins as {kind}, and is damaged or of a kind that is not read"
        return f"cannot be read as a picture ({why}); save it again as JPEG or PNG"
    return f"cannot be read as a picture (it is none of {', '.join(FORMATS)}); convert it to one"


_inside = 0
_before: tuple[bool, int | None, int] = (False, None, 0)
_counting = threading.Lock()


@contextlib.contextmanager
def _strict(max_megapixels: float) -> Iterator[None]:
    """Sets PIL's global switches aside; threads that decode at the same time share one setting."""
    global _inside, _before
    with _counting:
        if not _inside:
            _before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
        _inside += 1
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        PngImagePlugin.MAX_TEXT_CHUNK = max(_before[2], LARGEST_NOTE)
        # PIL's own limit, which also guards a file's inner tiles, must not be below the user's.
        Image.MAX_IMAGE_PIXELS = max(_before[1] or 0, Image.MAX_IMAGE_PIXELS or 0, int(max_megapixels * 1e6))
    try:
        yield
    finally:
        with _counting:
            _inside -= 1
            if not _inside:
                ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = _before


def _orientation(picture: Image.Image, name: str) -> int:
    """The EXIF orientation, 1 where there is none. A damaged EXIF block leaves the picture as it is, as viewers do."""
    try:
        # The method of the base class: PNG's own one would decode the picture to look behind it.
        found = Image.Image.getexif(picture).get(_ORIENTATION)
        if found is None:  # PIL reads XMP without blanks and with double quotes alone
            xmp = picture.info.get("XML:com.adobe.xmp") or picture.info.get("xmp") or b""
            match = _ORIENTATION_IN_XMP.search(xmp.encode() if isinstance(xmp, str) else xmp)
            found = int(match[1]) if match else 1
        if isinstance(found, bytes) and len(found) == 1:  # stored as BYTE in place of SHORT, which other readers take
            found = found[0]
    except BROKEN as error:
        logger.warning("%s: its EXIF block cannot be read (%s); the picture is shown as stored", name, error)
        return 1
    return found if isinstance(found, int) else 1


def _has_notes_behind_pixels(file: BinaryIO) -> bool:
    """Return whether a PNG has text or EXIF behind its pixels; the place in the file stays."""
    place, behind = file.tell(), False
    file.seek(len(b"\x89PNG\r\n\x1a\n"))
    try:
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            behind |= kind == b"IDAT"
            if behind and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            file.seek(length + 4, os.SEEK_CUR)
        return False
    finally:
        file.seek(place)


def _scale_colour_table(picture: Image.Image) -> None:
    """Take a TIFF's table of colours for 8 bits where no value needs more, as libtiff does: PIL would see black."""
    table = picture.tag_v2.get(_COLOUR_TABLE, ()) if picture.format == "TIFF" and picture.mode == "P" else ()
    if table and max(table) <= 255:
        picture.putpalette(np.asarray(table, np.uint8).reshape(3, -1).T.tobytes())


_TRANSPARENCY = {"L;2": 85, "L;4": 17}
"""PIL scales a PNG's pixels by these factors, by how it stores them, and not the colour that is transparent."""


def _scale_transparency(picture: Image.Image, stored: str) -> None:
    clear, factor = picture.info.get("transparency"), _TRANSPARENCY.get(stored)
    if stored == "RGB;16B" and clear is not None:  # PIL has kept the upper half of each value
        raise ValueError("a colour of 16 bits is transparent in it; store it with 8 bits, or with an alpha channel")
    if factor is not None and isinstance(clear, int):
        picture.info["transparency"] = clear * factor


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        return _grey(picture)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        if picture.format == "BMP" and picture.mode == "RGBA" and not picture.getchannel("A").getextrema()[1]:
            return picture.convert("RGB")  # many programs leave the fourth byte at 0, and viewers ignore it then
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _grey(picture: Image.Image) -> Image.Image:
    """RGB of a picture of one channel of more than 8 bits."""
    values = np.asarray(picture).astype(np.float64)
    least, most = float(values.min()), float(values.max())
    if not (np.isfinite(least) and np.isfinite(most)):
        raise ValueError("it holds values that are not finite")
    black, white = _range(picture, least, most)
    grey = ((values - black) / (white - black) * 255 + 0.5).clip(0, 255).astype(np.uint8)
    if getattr(picture, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")


def _range(picture: Image.Image, least: float, most: float) -> tuple[float, float]:
    """(black, white): the values between which a picture of one channel lies.

    A TIFF may state them (SMinSampleValue, SMaxSampleValue). Up to 16 bits they are those of the type. Floats and 32
    bits have no range of their own: white is 1 for floats, else 255 or 65535, the first that no value is above; a
    picture with other values is refused, because stretching each by its own values would make frames of one video
    flicker.

    Raises:
        ValueError: nothing says which value is white.
    """
    tags = getattr(picture, "tag_v2", {})
    stated = [tags[tag][0] if isinstance(tags[tag], tuple) else tags[tag] for tag in _STATED if tag in tags]
    if len(stated) == 2 and np.isfinite(stated).all() and stated[0] < stated[1]:
        return float(stated[0]), float(stated[1])
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    if picture.mode.startswith("I;16"):
        return 0.0, (1 << min(16, max(1, bits))) - 1.0
    if picture.mode == "I" and picture.format in ("PNG", "PPM"):
        return 0.0, 65535.0
    if picture.mode == "I" and bits == 16 and least >= 0:  # signed
        return 0.0, 32767.0
    known = (1.0, 255.0, 65535.0) if picture.mode == "F" else (255.0, 65535.0)
    white = next((value for value in known if most <= value), None) if least >= 0 else None
    if white is None:
        raise ValueError(
            f"its values are {least:g} to {most:g}, and nothing says which is black and which is white; store it with 8"
            " or 16 bits, or with the TIFF tags SMinSampleValue and SMaxSampleValue"
        )
    if white > 1:
        _say_once(picture.mode, white)
    return 0.0, white


@functools.lru_cache
def _say_once(mode: str, white: float) -> None:
    kind = "floats" if mode == "F" else "32 bits"
    logger.warning("pictures of %s whose files state no range are read with %g as white", kind, white)
