"""Flow as `lavis-lstp flow` stores it: a safetensors file for each video, in a folder, under the video's id.

In: such a file. Out: flow as NumPy arrays, of the number of frames and the pairs that were asked for, or one line on
what is wrong. `commands/flow.py` writes them; the flow in shards is `data/shards/flow_code.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lavis_lstp.errors import AnnotationError, VideoError
from lavis_lstp.files import find_path
from lavis_lstp.untrusted import why_no_file_name

FLOW_FILE_VERSION = 1


def flow_file(root: str | os.PathLike, video_id: str) -> Path:
    """The file below `flow_root` that holds a video's flow.

    Raises:
        AnnotationError: the id is no file name, so `lavis-lstp flow` has written none, and reading may lead elsewhere.
    """
    if why := why_no_file_name(video_id):
        raise AnnotationError(f"flow_root {root}: video_id {video_id[:80]!r} cannot be a file name: it {why}")
    return find_path(Path(root), f"{video_id}.safetensors")


def is_finite(flow: np.ndarray) -> bool:
    """Return whether no number is infinite or NaN; NumPy itself takes thirty times as long for float16."""
    if flow.dtype != np.float16 or not flow.size:
        return bool(np.isfinite(flow).all())
    return int(flow.view(np.int16).max()) < 0x7C00 and int(flow.view(np.uint16).max()) < 0xFC00


def check_pairs(about: Mapping[str, str], pairs: str, name: str, command: str) -> None:
    """Raises VideoError for stored flow between other pictures; what does not say is "sampled"."""
    found = about.get("flow_pairs", "sampled")
    if found != pairs:
        raise VideoError(
            f"{name}: flow of pairs '{found}', expected '{pairs}'; set flow_pairs: {found}, or make it again with "
            f"`{command} --flow-pairs {pairs}`"
        )


def read_flow_file(
    path: str | os.PathLike, expect_num_frames: int | None = None, pairs: str | None = None
) -> np.ndarray:
    """Flow written by `lavis-lstp flow`: float16 [T,2,h,w], px per frame of its own grid, x right, y down.

    Args:
        pairs: one of `reading.FLOW_PAIRS` that it must have been made of; None takes any.

    Raises:
        VideoError: missing, not a flow file, of another version, for another number of frames, or of other pairs.
    """
    from safetensors import SafetensorError, safe_open

    path = os.fspath(path)
    if not os.path.isfile(path):
        raise VideoError(f"{path}: no such flow file; make it with `lavis-lstp flow`")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if "flow" not in file.keys():
                raise VideoError(f"{path}: expected a tensor 'flow', found {sorted(file.keys())}")
            flow = file.get_tensor("flow")
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # NumPy has 64 axes
        said = " ".join(str(error).split())
        raise VideoError(f"{path}: not a flow file ({said}); make it again with `lavis-lstp flow`") from None
    version = metadata.get("version")
    if version != str(FLOW_FILE_VERSION):
        raise VideoError(f"{path}: flow file of version {version}, expected {FLOW_FILE_VERSION}; make it again")
    if pairs is not None:
        check_pairs(metadata, pairs, path, "lavis-lstp flow")
    if flow.ndim != 4 or flow.shape[1] != 2:
        raise VideoError(f"{path}: expected flow of shape [T,2,h,w], got {list(flow.shape)}")
    if flow.dtype.kind != "f" or not is_finite(flow):
        raise VideoError(f"{path}: expected finite px per frame, got {flow.dtype} with others; make it again")
    if expect_num_frames is not None and len(flow) != expect_num_frames:
        raise VideoError(
            f"{path}: flow for {len(flow)} frames, expected {expect_num_frames}; "
            f"make it again with `lavis-lstp flow --num-frames {expect_num_frames}`"
        )
    return flow
