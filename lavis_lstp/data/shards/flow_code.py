"""A clip's flow at the size of its frames <-> at most 1/50 of the bytes of the published files.

In: float [T,2,H,W] in px per frame, of any extractor. Out: a deflate stream, a step per field and a `Form`; and back,
float16. Means over 8 x 8 px, as the published network computes them, are not enough: a sampler reads each pixel, and
its logits move by 0.02 to 0.7 (docs/measurements.md). Few pixels are independent, though, and which are depends on
the extractor. The first lattice that carries the field within 1/1000 of its RMS is stored:

- `corners`, 1/8, its outer points on the outer pixels: RAFT small computes there, and interpolates;
- `half`: DIS computes there, and interpolates;
- `full`: the codec's motion vectors as they are; RAFT large, which mixes its points of 1/8 with learned weights, as
  cosine transforms of the 8 x 8 px of each point. The smaller of the two is taken.

Values are rounded to multiples of a step, differenced along both axes, and deflated. A field's step is a share of its
RMS, the same for all fields of a clip: the least that fits, FINEST times a power of 2^(1/4).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

LATTICES = ("corners", "half", "full")
CELL = 8
"""px, a side of the cells of the cosine transform, and what one px of RAFT's own grid stands for."""
FIT = 1e-3
"""RMS of what a lattice may miss of a field, over the field's."""
FINEST = 1 / 256
"""At 224 x 224 px, and finer for fewer: the error of rounding averages out over what a sampler sums up."""
OCTAVES = 20
STILL_PX = 1 / 8
"""Fields that move less than this (RMS) are rounded like this: beside position and bias a sampler cannot tell them."""
LARGEST_CLIP = 1 << 30
"""Bytes of a clip as it is handed out: what a few bytes claim to be must not take all memory."""
LARGEST = 8191
"""Multiples of a step: their second differences fit 16 bits."""


class Form(NamedTuple):
    """How the numbers of a clip are to be read.

    Attributes:
        height, width: px of the field that is handed out.
        lattice: where the numbers lie.
        cosine: whether they are coefficients of CELL x CELL px.
    """

    height: int
    width: int
    lattice: str
    cosine: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of numbers of one plane."""
        part = {"corners": CELL, "half": 2, "full": 1}[self.lattice]
        return self.height // part, self.width // part

    def about(self) -> dict[str, str]:
        return {name: str(value) for name, value in self._asdict().items()}

    @classmethod
    def of(cls, about: Mapping[str, str]) -> Form:
        """Raises ValueError where `about` names no form."""
        sides = [int(about.get(name, "")) for name in ("height", "width")]
        form = cls(*sides, about.get("lattice", ""), about.get("cosine") == "True")
        if not all(1 <= side <= 1 << 13 for side in sides) or form.lattice not in LATTICES or not form.fits():
            raise ValueError(f"no such form: {form}")
        return form

    def fits(self) -> bool:
        """Whether there is such a lattice for this size."""
        part = CELL if self.cosine or self.lattice == "corners" else 2 if self.lattice == "half" else 1
        return self.height % part == 0 and self.width % part == 0 and not (self.cosine and self.lattice != "full")


class Coded(NamedTuple):
    """`data`: deflate stream; `steps`: float32 [T], px per unit."""

    data: bytes
    steps: np.ndarray
    form: Form


def encode(flow: np.ndarray, limit: int) -> Coded:
    """float [T,2,H,W] in at most `limit` bytes where a step below the field's RMS allows it."""
    flow = np.asarray(flow, dtype=np.float64)
    form, values = _carried(flow)
    rms = np.sqrt(np.square(values).mean((1, 2, 3)) + STILL_PX**2)
    forms = [(form, values)]
    if form.lattice == "full" and form._replace(cosine=True).fits() and flow.size:
        forms.append((form._replace(cosine=True), _to_cells(values)))
    finest = FINEST * np.sqrt(form.height * form.width) / 224 * rms
    for octave in range(OCTAVES + 1):
        found = [_coded(*one, 2.0**octave * finest) for one in forms]
        best = min(range(len(found)), key=lambda n: len(found[n].data))
        if len(found[best].data) <= limit:
            break
    finer = [_coded(*forms[best], 2 ** (octave - part / 4) * finest) for part in (3, 2, 1) if octave]
    return next((one for one in finer if len(one.data) <= limit), found[best])


def decode(coded: Coded) -> np.ndarray:
    """float16 [T,2,H,W].

    Raises:
        ValueError: the stream does not hold these numbers.
    """
    import torch

    data, steps, form = coded
    (rows, columns), length = form.grid, len(steps)
    count = length * 2 * rows * columns
    if 4 * length * form.height * form.width > LARGEST_CLIP:  # u and v, two bytes each
        raise ValueError(f"{length} fields of {form.height} x {form.width} px are more than {LARGEST_CLIP} bytes")
    if not ((steps >= 0) & (steps <= np.finfo(np.float16).max)).all():
        raise ValueError("expected finite steps of at least 0 that float16 holds")
    inflate = zlib.decompressobj(-15)
    try:
        raw = inflate.decompress(data, 3 * count + 1)
    except zlib.error as error:
        raise ValueError(f"not a deflate stream: {error}") from None
    pairs, large = np.frombuffer(raw[: count // 2], np.uint8), np.frombuffer(raw[count // 2 :], np.uint8)
    numbers = np.take(_PAIRS, pairs).view(np.float32)
    places = np.flatnonzero(numbers == _ELSEWHERE)
    if len(numbers) != count or len(large) != 2 * len(places) or not inflate.eof or inflate.unused_data:
        raise ValueError(f"expected {length} fields of 2 x {rows} x {columns} numbers")
    zigzag = large[: len(places)] | large[len(places) :].astype(np.int32) << 8
    numbers[places] = (zigzag >> 1) ^ -(zigzag & 1)
    out = torch.empty(2 * length, form.height, form.width, dtype=torch.float16)
    if count:
        one = np.empty((form.height, form.width), np.float32)  # goes out from the processor's cache
        shown, spread = torch.from_numpy(one), _spread(form)
        for plane, values in zip(out.unbind(), _summed(numbers, form) * steps.repeat(2)[:, None, None], strict=True):
            spread(values, one)
            plane.copy_(shown)
    return out.view(length, 2, form.height, form.width).numpy()


_NIBBLES = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1)
_PAIRS = ((_NIBBLES >> 1) ^ -(_NIBBLES & 1)).astype(np.float32).view(np.complex64)[:, 0]
"""The two numbers in a byte, as what NumPy looks up at once."""
_ELSEWHERE = -8
"""What 15 stands for in a pair: the number lies behind the pairs."""


def _coded(form: Form, values: np.ndarray, steps: np.ndarray) -> Coded:
    """Rounds, differences and deflates values [T,2,h,w], or cells' coefficients [T,2,CELL*CELL,h/CELL,w/CELL]."""
    if values.size:
        steps = np.maximum(steps, np.abs(values).reshape(len(values), -1).max(1) / LARGEST)
    steps = steps.astype(np.float32)
    units = values / steps.reshape(-1, *[1] * (values.ndim - 1)).astype(np.float64)
    numbers = np.rint(units).astype(np.int32)
    smooth = numbers[:, :, 0] if form.cosine else numbers
    tall = smooth.reshape(-1, smooth.shape[-1])
    smooth[...] = np.diff(np.diff(tall, axis=1, prepend=0), axis=0, prepend=0).reshape(smooth.shape)
    zigzag = ((numbers << 1) ^ (numbers >> 31)).reshape(-1)
    pairs, large = np.minimum(zigzag, 15).astype(np.uint8), zigzag[zigzag >= 15]
    raw = (pairs[::2] | pairs[1::2] << 4).tobytes()
    raw += (large & 255).astype(np.uint8).tobytes() + (large >> 8).astype(np.uint8).tobytes()
    packed = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_RLE)  # 30 times as fast, and noise is smaller
    return Coded(packed.compress(raw) + packed.flush(), steps, form)


def _carried(flow: np.ndarray) -> tuple[Form, np.ndarray]:
    """The coarsest lattice that carries the flow, and its values [T,2,h,w], by least squares."""
    height, width = flow.shape[-2:]
    allowed = FIT**2 * (np.square(flow).mean((1, 2, 3)) + STILL_PX**2)
    for lattice in LATTICES[:-1]:
        form = Form(height, width, lattice, False)
        if not form.fits():
            continue
        down, right = (_interpolation(lattice, side) for side in (height, width))
        values = np.linalg.pinv(down) @ flow @ np.linalg.pinv(right).T
        if (np.square(down @ values @ right.T - flow).mean((1, 2, 3)) <= allowed).all():
            return form, values
    return Form(height, width, "full", False), flow


@functools.lru_cache(maxsize=8)
def _interpolation(lattice: str, side: int) -> np.ndarray:
    """float64 [side, points]: each px as a mean of the two points beside it."""
    count = side // (CELL if lattice == "corners" else 2)
    if lattice == "corners":
        place = np.arange(side) * (count - 1) / max(1, side - 1)
    else:
        place = np.clip((np.arange(side) + 0.5) * count / side - 0.5, 0, count - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(count)))


@functools.lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    """float64 [CELL,CELL]: the orthonormal DCT-II."""
    k, x = np.arange(CELL)[:, None], np.arange(CELL)
    table = np.cos(np.pi * (2 * x + 1) * k / (2 * CELL)) * np.sqrt(2 / CELL)
    table[0] /= np.sqrt(2)
    return table


def _to_cells(flow: np.ndarray) -> np.ndarray:
    """[T,2,H,W] to coefficients [T,2,CELL*CELL,H/CELL,W/CELL], the mean first."""
    length, _, height, width = flow.shape
    cells = flow.reshape(length, 2, height // CELL, CELL, width // CELL, CELL).swapaxes(3, 4)
    cells = _cosines() @ cells @ _cosines().T
    return np.moveaxis(cells.reshape(length, 2, height // CELL, width // CELL, CELL * CELL), -1, 2)


def _spread(form: Form) -> Callable[[np.ndarray, np.ndarray], object]:
    """(numbers of one plane in px, as `_summed` gives them; where float32 [H,W] goes) -> nothing of interest."""
    import cv2

    if form.cosine:
        table = np.kron(_cosines(), _cosines()).astype(np.float32)  # [coefficient, px of a cell]
        rows, columns = form.height // CELL, form.width // CELL

        def cells(values: np.ndarray, out: np.ndarray) -> None:
            pixels = (values.T @ table).reshape(rows, columns, CELL, CELL)
            out.reshape(rows, CELL, columns, CELL)[...] = pixels.swapaxes(1, 2)

        return cells
    if form.lattice == "full":
        return lambda values, out: np.copyto(out, values)
    if form.lattice == "half":
        return lambda values, out: cv2.resize(values, out.shape[::-1], dst=out)
    down, right = (_interpolation(form.lattice, side).astype(np.float32) for side in (form.height, form.width))
    return lambda values, out: np.matmul(down @ values, right.T, out=out)


def _summed(numbers: np.ndarray, form: Form) -> np.ndarray:
    """Undoes the differences: float32 [planes,h,w], or [planes,CELL*CELL,cells]. Exact: all sums are below 2^24."""
    import cv2

    rows, columns = form.grid
    if not form.cosine:
        tall = cv2.integral(numbers.reshape(-1, columns), sdepth=cv2.CV_32F)
        return tall[1:, 1:].reshape(-1, rows, columns)
    numbers = numbers.reshape(-1, CELL * CELL, rows * columns // CELL**2)
    tall = cv2.integral(numbers[:, 0].reshape(-1, columns // CELL), sdepth=cv2.CV_32F)
    numbers[:, 0] = tall[1:, 1:].reshape(len(numbers), -1)
    return numbers
