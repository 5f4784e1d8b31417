"""A folder of pictures in place of a video file, as TVQA's videos are published: sorted by name, three a second.

In: the folder, or its pictures as bytes, and which frames are wanted. Out: what `video.read_frames` gives of a file.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lavis_lstp.data.video.index import VideoIndex
from lavis_lstp.errors import ConfigError, VideoError

PICTURES_PER_SECOND = 3.0
ENDINGS = (".jpg", ".jpeg", ".png")


def pictures_in(folder: Path) -> list[Path]:
    """Its pictures in the order of their names.

    Raises:
        VideoError: it has none.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    if not found:
        raise VideoError(f"{folder}: a folder without pictures ({', '.join(ENDINGS)})")
    return found


def folder_index(name: str, count: int) -> VideoIndex:
    """The index of a video of `count` pictures, which has no packets."""
    nothing = np.empty(0, dtype=np.int64)
    return VideoIndex(
        name=name,
        packet_pts=nothing,
        packet_key=nothing.astype(bool),
        packet_damaged=nothing.astype(bool),
        frame_packet=nothing,
        times_s=np.arange(count) / PICTURES_PER_SECOND,
        fps=PICTURES_PER_SECOND,
        duration_s=count / PICTURES_PER_SECOND,
        time_base=1 / PICTURES_PER_SECOND,
        by_count=True,
        missing=None,
        codec="pictures",
        container="folder",
    )


def read_pictures(pictures: Sequence[tuple[str, Path | bytes]], size: tuple[int, int] | None, resize) -> np.ndarray:
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
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
                pixels = np.asarray(picture.convert("RGB"))
        except OSError as error:
            raise VideoError(f"{name}: cannot be read as a picture ({error})") from error
        frames.append(pixels if size is None else resize(pixels, *size))
        if frames[-1].shape != frames[0].shape:
            raise ConfigError(f"{name}: is of another size than the first one; give a size to bring them together")
    return np.stack(frames).transpose(0, 3, 1, 2)
