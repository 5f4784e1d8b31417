"""Flow files of the published code -> the fields of a video: `<video_id>_raft.npy`, float32 [n,2,h,w].

How many fields there are is the file's own affair: it does not depend on the frames that a data set reads, so they come
with a mask of their own (`flow_mask`). Other people write these files: sizes are checked before anything is read, and
nothing in them is run.
"""

from __future__ import annotations

import math
import os
import tokenize
from pathlib import Path

import numpy as np

from lavis_lstp.data.frame_numbers import uniform_centres
from lavis_lstp.errors import VideoError

ENDING = "_raft.npy"
# What NumPy's parser of headers, Python's own for literals, raises for noise.
NOISE = (SyntaxError, TypeError, RecursionError, MemoryError, OverflowError, tokenize.TokenError)
LARGEST_BYTES = 2 << 30  # 5,350 fields of 224 px; the published files hold at most 64


def read_published_flow(path: str | os.PathLike, max_flows: int | None = None) -> np.ndarray:
    """float32 [L,2,h,w], (u, v) as stored.

    Args:
        max_flows: of more fields the centres of so many equal intervals; published training took 64.

    Raises:
        VideoError: not such a file, of a size that its header does not give, or with numbers that are not finite.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            shape, fortran, dtype, begin = _header(file)
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        line = str(error).splitlines()[0][:200]
        raise VideoError(f"{path}: cannot be read as flow of the published code ({line})") from None
    if dtype not in ("<f4", "<f2") or fortran or len(shape) != 4 or shape[1] != 2 or min(shape) < 1:
        raise VideoError(f"{path}: expected flow float32 [n,2,h,w], got {dtype} {list(shape)}")
    expected = math.prod(shape) * dtype.itemsize
    if expected != size - begin or expected > LARGEST_BYTES:
        raise VideoError(
            f"{path}: {list(shape)} of {dtype} takes {expected} bytes, at most {LARGEST_BYTES}; the file holds "
            f"{size - begin}; copy it again, or make it with `lavis-lstp flow`"
        )
    fields = np.memmap(path, dtype, "r", begin, shape)
    if max_flows is not None and len(fields) > max_flows:
        fields = fields[uniform_centres(max_flows, len(fields))]
    flow = np.array(fields, dtype=np.float32)
    if not np.isfinite(flow).all():
        raise VideoError(f"{path}: holds numbers that are not finite; make it again with `lavis-lstp flow`")
    return flow


def _header(file) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order, type and first byte of the numbers of a .npy file.

    Raises:
        ValueError: not such a file.
    """
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of .npy, expected {' or '.join(map(str, readers))}")
    try:
        shape, fortran, dtype = readers[version](file)
    except NOISE as error:
        raise ValueError(f"its header is damaged ({type(error).__name__})") from None
    return shape, fortran, dtype, file.tell()
