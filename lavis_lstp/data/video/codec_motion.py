"""Flow from the motion vectors a video codec stored: nearly free where everything is decoded anyway.

In: the pictures of a stretch of video in the order they are shown, with a mark at each chosen one. Out: float32
[T,2,h,w], the displacement in px from each chosen frame to the next, x right, y down.

Only the vectors of predicted (P) pictures are used, spread over the time since the intra or predicted picture before:
decoders report zeros for most blocks of bidirectional ones, whose motion is derived and not stored. A vector says
where in a *reference* picture a block was copied from, not which one. The pictures tell: of the candidate distances
each block takes the one under which the picture before, moved accordingly, looks most like this one. Without that
test, x264's usual three references gave twice the true motion for most blocks of a plainly moving texture.

Intra blocks take their neighbours' motion, intra pictures the next picture's. Where chosen frames are several
pictures apart, each cell is followed along the motion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from av.video.frame import PictureType

from lavis_lstp.data.video.decode import Orientation, orientation, picture, side_data_of
from lavis_lstp.errors import VideoError

CELL = 8  # px; the smallest block these decoders report
REFERENCES = 4  # nearest references tried
LOOK_SIDE = 320  # px; width at which pictures are compared
FARTHER_MUST_FIT = 0.8  # times the difference under the nearest reference; fewer changes in flat areas


@dataclass
class _Picture:
    shown: int  # frame number in the video
    velocity: np.ndarray | None  # [gh,gw,2] px per frame, of this frame and those since the anchor before
    marked: bool = False


class CodecMotion:
    """Collects pictures by `add` and `mark`; `flow` gives the fields between the marked ones."""

    def __init__(self, name: str):
        self.name = name
        self.size: tuple[int, int] | None = None  # stored width, height
        self.turn = Orientation()
        self._open: list[_Picture] = []  # not moved through yet
        self._references: list[int] = []  # frame numbers, ascending
        self._anchor: tuple[int, np.ndarray] | None = None  # frame number and grey picture
        self._velocity: np.ndarray | None = None  # the last one known
        self._at: int | None = None  # frame number up to which `_travel` goes
        self._travel: np.ndarray | None = None  # [gh,gw,2] px since the last mark; None before the first
        self._fields: list[np.ndarray] = []
        self._marks = 0

    def add(self, frame: Any, shown: int, reference: bool) -> None:
        """A picture, in the order of showing; bidirectional ones may be left out.

        Args:
            shown: its frame number in the video.
            reference: whether others may refer to it; known of anchors anyway.
        """
        if self.size is None:
            self.size, self.turn = (frame.width, frame.height), orientation(frame)
        if self._open and self._open[-1].velocity is not None:
            self._move()
        velocity = None
        if frame.pict_type != PictureType.B:
            look = self._look(frame)
            if frame.pict_type != PictureType.I and self._anchor is not None:
                velocity = self._velocity_of(frame, shown, look)
            self._anchor = (shown, look)
        if frame.pict_type != PictureType.B or reference:
            self._references = sorted([*self._references, shown])[-2 * REFERENCES :]
        self._open.append(_Picture(shown, velocity))

    def mark(self) -> None:
        """The picture added last is a chosen one."""
        self._open[-1].marked = True
        self._marks += 1

    def _look(self, frame: Any) -> np.ndarray:
        """Grey picture, at most LOOK_SIDE px wide."""
        grey = picture(frame, "gray")
        shrink = max(1.0, grey.shape[1] / LOOK_SIDE)
        if shrink == 1:
            return grey
        size = (round(grey.shape[1] / shrink), round(grey.shape[0] / shrink))
        return cv2.resize(grey, size, interpolation=cv2.INTER_AREA)

    def _velocity_of(self, frame: Any, shown: int, look: np.ndarray) -> np.ndarray | None:
        side_data = side_data_of(frame, "MOTION_VECTORS")
        if side_data is None:
            return None
        vectors, known = _on_cells(side_data.to_ndarray(), self.size)
        if not known.any():
            return None
        before, earlier = self._anchor
        earlier = earlier if isinstance(earlier, np.ndarray) else self._look(earlier)
        away = [shown - r for r in reversed(self._references) if r <= before][:REFERENCES] or [shown - before]
        best = -vectors / away[0]
        if len(away) > 1:
            least = FARTHER_MUST_FIT * self._difference(best * (shown - before), look, earlier)
            for distance in away[1:]:
                velocity = -vectors / distance
                difference = self._difference(velocity * (shown - before), look, earlier)
                better = difference < least
                best[better], least = velocity[better], np.minimum(least, difference)
        return _filled(best, known)

    def _difference(self, moved: np.ndarray, look: np.ndarray, earlier: np.ndarray) -> np.ndarray:
        """Mean difference per cell [gh,gw] of `look` and the picture before, moved by `moved` px (stored size)."""
        height, width = look.shape
        moved = _resampled(moved, self.size, width, height)
        x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
        guess = cv2.remap(
            earlier, x - moved[..., 0], y - moved[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        off = cv2.blur(cv2.absdiff(guess, look).astype(np.float32), (9, 9))
        gh, gw = _grid(self.size)
        return cv2.resize(off, (gw, gh), interpolation=cv2.INTER_AREA)

    def _move(self) -> None:
        """Moves through the open pictures, at the velocity of the last of them or else the last one known."""
        if self._open[-1].velocity is not None:
            self._velocity = self._open[-1].velocity
        for entry in self._open:
            if self._travel is not None:
                for _ in range(entry.shown - self._at):
                    self._travel = _followed(self._travel, self._velocity)
            self._at = entry.shown
            if entry.marked:
                if self._travel is not None:
                    self._fields.append(self._travel)
                self._travel = np.zeros((*_grid(self.size), 2), dtype=np.float32)
        self._open = []

    def flow(self, size: tuple[int, int]) -> np.ndarray:
        """float32 [T,2,height,width] in px of that grid, upright; the last field repeats the one before.

        Raises:
            VideoError: the codec stores no motion vectors, or the decoder does not give them.
        """
        height, width = size
        out = np.zeros((self._marks, 2, height, width), dtype=np.float32)
        if self._marks < 2:
            return out
        if self._velocity is None and all(p.velocity is None for p in self._open):
            raise VideoError(
                f"{self.name}: no motion vectors between the chosen frames (every picture is coded by itself, or "
                "its codec gives none; H.264 and MPEG-1/2/4 do); choose flow 'dis' or 'raft_small'"
            )
        if self._open:
            self._move()
        for t, travel in enumerate(self._fields):
            out[t] = self._upright(travel, height, width)
        out[-1] = out[-2]
        return out

    def _upright(self, travel: np.ndarray, height: int, width: int) -> np.ndarray:
        """[gh,gw,2] in stored px to [2,height,width] in px of that size, turned as the frames are."""
        turn = self.turn
        w, h = (height, width) if turn.transpose else (width, height)
        uv = _resampled(travel, self.size, w, h) * np.float32([w / self.size[0], h / self.size[1]])
        if turn.transpose:
            uv = uv.swapaxes(0, 1)[..., ::-1]
        uv = uv[:: -1 if turn.mirror_y else 1, :: -1 if turn.mirror_x else 1]
        uv = uv * np.float32([-1 if turn.mirror_x else 1, -1 if turn.mirror_y else 1])
        return uv.transpose(2, 0, 1)


class LocalMotion(CodecMotion):
    """Flow from each marked picture to the next picture of the file: the velocity there of the next predicted picture.

    Only pictures around the marked ones are seen, so that candidates may lie minutes apart.
    """

    PATIENCE = 8  # anchors behind a marked picture, such as those of a flash, after which it has no field

    def __init__(self, name: str):
        super().__init__(name)
        self._found: list[np.ndarray | None] = []
        self._waiting: list[int] = []  # which of them
        self._anchors_since = 0

    @property
    def waits(self) -> bool:
        """True while a marked picture has no field yet and may get one."""
        return bool(self._waiting)

    def extend(self, later: LocalMotion) -> None:
        """Appends what another decoder found behind the pictures of this one."""
        self._found += later._found

    def restart(self) -> None:
        """Decoding goes on at another place."""
        self._references, self._anchor, self._waiting = [], None, []

    def add(self, frame: Any, shown: int, reference: bool) -> None:
        if self.size is None:
            self.size, self.turn = (frame.width, frame.height), orientation(frame)
        if frame.pict_type != PictureType.B:
            self._anchors_since += 1
            if self.waits and frame.pict_type != PictureType.I and self._anchor is not None:
                velocity = self._velocity_of(frame, shown, self._look(frame))
                for t in self._waiting:
                    self._found[t] = velocity
                self._waiting = self._waiting if velocity is None else []
            if self._anchors_since >= self.PATIENCE:
                self._waiting = []
            self._anchor = (shown, frame)  # turned into a grey picture where a velocity asks for it
        if frame.pict_type != PictureType.B or reference:
            self._references = sorted([*self._references, shown])[-2 * REFERENCES :]

    def mark(self) -> None:
        self._waiting.append(len(self._found))
        self._found.append(None)
        self._anchors_since = 0

    def flow(self, size: tuple[int, int]) -> np.ndarray:
        """float32 [T,2,height,width] in px of that grid per picture of the file, upright.

        The last picture of a file, and one with nothing but intra pictures behind it, repeats the field of the
        candidate before.

        Raises:
            VideoError: the codec stores no motion vectors, or the decoder does not give them.
        """
        height, width = size
        out = np.zeros((len(self._found), 2, height, width), dtype=np.float32)
        if len(self._found) > 1 and all(velocity is None for velocity in self._found):
            raise VideoError(
                f"{self.name}: no motion vectors near the chosen frames (every picture is coded by itself, or "
                "its codec gives none; H.264 and MPEG-1/2/4 do); choose flow 'dis' or 'raft_small'"
            )
        last = next((velocity for velocity in self._found if velocity is not None), None)
        for t, velocity in enumerate(self._found):
            last = last if velocity is None else velocity
            self._found[t] = None  # freed as it is used
            if len(self._found) > 1:
                out[t] = self._upright(last, height, width)
        return out


def _grid(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of cells that cover a width and height."""
    return -(-size[1] // CELL), -(-size[0] // CELL)


def _on_cells(vectors: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean px [gh,gw,2] from the block here to the block it was copied from, and bool [gh,gw] where known."""
    gh, gw = _grid(size)
    total, hits = np.zeros((2, gh * gw)), np.zeros(gh * gw)
    vectors = vectors[vectors["source"] < 0]
    scale = np.maximum(vectors["motion_scale"], 1).astype(np.float64)
    motion = (vectors["motion_x"] / scale, vectors["motion_y"] / scale)
    w, h = vectors["w"].astype(int), vectors["h"].astype(int)
    left, top = vectors["dst_x"] - w // 2, vectors["dst_y"] - h // 2
    for dx in range(0, int(w.max(initial=0)), CELL):
        for dy in range(0, int(h.max(initial=0)), CELL):
            x, y = (left + dx) // CELL, (top + dy) // CELL
            inside = (x >= 0) & (x < gw) & (y >= 0) & (y < gh) & (dx < w) & (dy < h)
            cell = (y * gw + x)[inside]
            hits += np.bincount(cell, minlength=gh * gw)
            for axis in (0, 1):
                total[axis] += np.bincount(cell, motion[axis][inside], minlength=gh * gw)
    mean = (total / np.maximum(hits, 1)).T.reshape(gh, gw, 2)
    return mean.astype(np.float32), (hits > 0).reshape(gh, gw)


def _filled(velocity: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Neighbours' mean where nothing is known, the median of all where no neighbour is, then a 3 x 3 median."""
    if not known.all():
        weight = known.astype(np.float32)
        around = cv2.boxFilter(weight, -1, (5, 5), normalize=False)
        near = cv2.boxFilter(velocity * weight[..., None], -1, (5, 5), normalize=False)
        near = near / np.maximum(around, 1)[..., None]
        near[around < 0.5] = np.median(velocity[known], axis=0)
        velocity = np.where(known[..., None], velocity, near)
    planes = [cv2.medianBlur(np.ascontiguousarray(velocity[..., axis], dtype=np.float32), 3) for axis in (0, 1)]
    return np.stack(planes, axis=-1)


def _followed(travel: np.ndarray, velocity: np.ndarray) -> np.ndarray:
    """`travel` and one more frame's motion, read where each cell has got to."""
    gh, gw = velocity.shape[:2]
    y, x = np.mgrid[:gh, :gw].astype(np.float32)
    x, y = x + travel[..., 0] / CELL, y + travel[..., 1] / CELL
    return travel + cv2.remap(velocity, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _resampled(field: np.ndarray, size: tuple[int, int], width: int, height: int) -> np.ndarray:
    """[gh,gw,2] of cells over `size` (width, height) to [height,width,2] over the same area, values as they are."""
    x = ((np.arange(width) + 0.5) * size[0] / width / CELL - 0.5).astype(np.float32)
    y = ((np.arange(height) + 0.5) * size[1] / height / CELL - 0.5).astype(np.float32)
    return cv2.remap(field, *np.meshgrid(x, y), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
