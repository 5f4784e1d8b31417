"""Flow from the motion vectors a video codec stored: practically free where everything is decoded anyway.

In: the pictures of a stretch of video in the order they are shown, with a mark at each chosen one. Out: float32
[T,2,h,w], the displacement in px from each chosen frame to the next, x right, y down.

A vector says where in a *reference* picture a block was copied from, not how far away in time that picture is.
The nearest reference decoded before is assumed, which encoders use for most blocks, and each vector is divided
by that distance; a 3 x 3 median drops the others. Intra blocks take their neighbours' motion, intra pictures the
next picture's. Between chosen frames that are several pictures apart, each cell is followed along the motion.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from av.video.frame import PictureType

from lavis_lstp.data.video_decode import Orientation, orientation
from lavis_lstp.errors import VideoError

CELL = 8  # px; the smallest block these decoders report


@dataclass
class _Picture:
    shown: int  # position in the order of showing
    decoded: int  # and of decoding
    anchor: bool  # I or P: nothing behind it is needed to know its distances
    reference: bool
    past: tuple[np.ndarray, np.ndarray]  # px towards the past reference, [gh,gw,2]; bool [gh,gw] where known
    future: tuple[np.ndarray, np.ndarray]
    marked: bool = field(default=False)


class CodecMotion:
    """Collects pictures by `add` and `mark`; `flow` gives the fields between the marked ones."""

    def __init__(self, name: str):
        self.name = name
        self.size: tuple[int, int] | None = None  # stored width, height
        self.turn = Orientation()
        self._shown = 0
        self._group: list[_Picture] = []  # since the last resolved anchor
        self._anchor: _Picture | None = None
        self._velocity: np.ndarray | None = None  # [gh,gw,2] px per picture, the last one known
        self._waiting: list[bool] = []  # marks of pictures without vectors, to be moved by the next ones'
        self._travel: np.ndarray | None = None  # px since the last mark; None before the first
        self._fields: list[np.ndarray] = []
        self._marks = 0
        self._found = False

    def add(self, frame: Any, decoded: int, reference: bool) -> None:
        """A picture, in the order of showing, with its place in the order of decoding."""
        if self.size is None:
            self.size, self.turn = (frame.width, frame.height), orientation(frame)
        if self._group and self._group[-1].anchor:
            self._resolve()
        side_data = frame.side_data.get("MOTION_VECTORS")
        vectors = side_data.to_ndarray() if side_data is not None else None
        anchor = frame.pict_type != PictureType.B
        self._group.append(
            _Picture(
                shown=self._shown,
                decoded=decoded,
                anchor=anchor,
                reference=reference or anchor,
                past=self._grid(vectors, past=True),
                future=self._grid(vectors, past=False),
            )
        )
        self._shown += 1

    def mark(self) -> None:
        """The picture added last is a chosen one."""
        self._group[-1].marked = True
        self._marks += 1

    def _grid(self, vectors: np.ndarray | None, past: bool) -> tuple[np.ndarray, np.ndarray]:
        """Vectors spread over cells: mean px [gh,gw,2] from the block here to the block it was copied from."""
        width, height = self.size
        gw, gh = -(-width // CELL), -(-height // CELL)
        total, hits = np.zeros((2, gh * gw)), np.zeros(gh * gw)
        if vectors is not None:
            vectors = vectors[(vectors["source"] < 0) == past]
            for w, h in {(int(v["w"]), int(v["h"])) for v in _unique_sizes(vectors)}:
                part = vectors[(vectors["w"] == w) & (vectors["h"] == h)]
                scale = np.maximum(part["motion_scale"], 1).astype(np.float64)
                motion = (part["motion_x"] / scale, part["motion_y"] / scale)
                left, top = part["dst_x"] - w // 2, part["dst_y"] - h // 2
                for dx in range(0, w, CELL):
                    for dy in range(0, h, CELL):
                        x, y = (left + dx) // CELL, (top + dy) // CELL
                        inside = (x >= 0) & (x < gw) & (y >= 0) & (y < gh)
                        cell = (y * gw + x)[inside]
                        hits += np.bincount(cell, minlength=gh * gw)
                        for axis in (0, 1):
                            total[axis] += np.bincount(cell, motion[axis][inside], minlength=gh * gw)
        known = hits > 0
        mean = (total / np.maximum(hits, 1)).T.reshape(gh, gw, 2)
        return mean.astype(np.float32), known.reshape(gh, gw)

    def _resolve(self) -> None:
        """Turns the group's vectors into velocities, now that all reachable references are known."""
        references = [p for p in [self._anchor, *self._group] if p is not None and p.reference]
        for picture in self._group:
            self._step(self._velocity_of(picture, references), picture.marked)
        if self._group[-1].anchor:
            self._anchor = self._group[-1]
        self._group = []

    def _velocity_of(self, picture: _Picture, references: list[_Picture]) -> np.ndarray | None:
        before = [r.shown for r in references if r.shown < picture.shown and r.decoded < picture.decoded]
        after = [r.shown for r in references if r.shown > picture.shown and r.decoded < picture.decoded]
        total = np.zeros_like(picture.past[0])
        hits = np.zeros(total.shape[:2], dtype=np.float32)
        if before:
            total -= picture.past[0] / (picture.shown - max(before)) * picture.past[1][..., None]
            hits += picture.past[1]
        if after:
            total += picture.future[0] / (min(after) - picture.shown) * picture.future[1][..., None]
            hits += picture.future[1]
        return _smooth(total, hits) if hits.any() else None

    def _step(self, velocity: np.ndarray | None, marked: bool) -> None:
        """One picture on. Those without vectors wait for the next that has some."""
        if velocity is None:
            self._waiting.append(marked)
            return
        self._found, self._velocity = True, velocity
        waiting, self._waiting = self._waiting, []
        for is_marked in [*waiting, marked]:
            self._advance(velocity, is_marked)

    def _advance(self, velocity: np.ndarray, marked: bool) -> None:
        import cv2

        if self._travel is not None:
            gh, gw = velocity.shape[:2]
            y, x = np.mgrid[:gh, :gw].astype(np.float32)
            x, y = x + self._travel[..., 0] / CELL, y + self._travel[..., 1] / CELL
            self._travel = self._travel + cv2.remap(velocity, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        if marked:
            if self._travel is not None:
                self._fields.append(self._travel)
            self._travel = np.zeros_like(velocity)

    def flow(self, size: tuple[int, int]) -> np.ndarray:
        """float32 [T,2,height,width] in px of that grid, upright.

        Raises:
            VideoError: the codec stores no motion vectors, or the decoder does not give them.
        """
        height, width = size
        if self._marks == 1:
            return np.zeros((1, 2, height, width), dtype=np.float32)
        if self._group:
            self._resolve()
        if not self._found:
            raise VideoError(
                f"{self.name}: no motion vectors between the chosen frames (every picture is coded by itself, or "
                "its codec gives none; H.264 and MPEG-1/2/4 do); choose flow 'dis' or 'raft_small'"
            )
        for marked in self._waiting:
            self._advance(self._velocity, marked)
        self._waiting = []
        out = np.empty((self._marks, 2, height, width), dtype=np.float32)
        for t, travel in enumerate(self._fields):
            out[t] = self._at_size(travel, height, width)
        out[-1] = out[-2]
        return out

    def _at_size(self, travel: np.ndarray, height: int, width: int) -> np.ndarray:
        """[gh,gw,2] in stored px to upright [2,height,width] in px of that size."""
        import cv2

        turn = self.turn
        stored_w, stored_h = self.size
        w, h = (height, width) if turn.transpose else (width, height)
        x = ((np.arange(w) + 0.5) * stored_w / w / CELL - 0.5).astype(np.float32)
        y = ((np.arange(h) + 0.5) * stored_h / h / CELL - 0.5).astype(np.float32)
        x, y = np.meshgrid(x, y)
        uv = cv2.remap(travel, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        uv = uv * np.float32([w / stored_w, h / stored_h])
        if turn.transpose:
            uv = uv.swapaxes(0, 1)[..., ::-1]
        uv = uv[:: -1 if turn.mirror_y else 1, :: -1 if turn.mirror_x else 1]
        uv = uv * np.float32([-1 if turn.mirror_x else 1, -1 if turn.mirror_y else 1])
        return uv.transpose(2, 0, 1)


def _unique_sizes(vectors: np.ndarray) -> np.ndarray:
    return np.unique(vectors[["w", "h"]]) if len(vectors) else vectors


def _smooth(total: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Mean of the known directions, neighbours' mean where none is known, then a 3 x 3 median."""
    import cv2

    known = hits > 0
    mean = total / np.maximum(hits, 1)[..., None]
    if not known.all():
        weight = known.astype(np.float32)
        around = cv2.boxFilter(weight, -1, (5, 5), normalize=False)
        near = cv2.boxFilter(mean * weight[..., None], -1, (5, 5), normalize=False)
        near = near / np.maximum(around, 1)[..., None]
        near[around < 0.5] = np.median(mean[known], axis=0)
        mean = np.where(known[..., None], mean, near)
    planes = [cv2.medianBlur(np.ascontiguousarray(mean[..., axis], dtype=np.float32), 3) for axis in (0, 1)]
    return np.stack(planes, axis=-1)
