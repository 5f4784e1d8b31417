"""Writes small videos with known contents and odd properties, for tests. Encoded with PyAV's own libx264."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

ACCENTS = pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="file names of this locale are ASCII")
STEP = 6  # grey levels between one frame's number patch and the next one's


def numbered_picture(number: int, width: int = 160, height: int = 96) -> np.ndarray:
    """uint8 [H,W,3]: a coloured corner (top left red, top right green, bottom left blue) and a grey middle that
    says the frame's number, so that order, rotation and identity can be read back from lossy video."""
    picture = np.full((height, width, 3), 16 + STEP * (number % 38), np.uint8)
    h, w = height // 4, width // 4
    picture[:h, :w] = (220, 20, 20)
    picture[:h, -w:] = (20, 200, 20)
    picture[-h:, :w] = (20, 20, 220)
    return picture


def read_number(frame: np.ndarray) -> int:
    """Number of a numbered picture, [3,H,W]."""
    h, w = frame.shape[1:]
    middle = frame[:, 3 * h // 8 : 5 * h // 8, 3 * w // 8 : 5 * w // 8].mean()
    return round((float(middle) - 16) / STEP)


def corners(frame: np.ndarray) -> str:
    """Colours of the corners of [3,H,W], clockwise from the top left: "rg.b" where upright."""
    h, w = frame.shape[1] // 8, frame.shape[2] // 8
    patches = (frame[:, :h, :w], frame[:, :h, -w:], frame[:, -h:, -w:], frame[:, -h:, :w])
    means = [patch.mean(axis=(1, 2)) for patch in patches]
    return "".join("rgb"[int(m.argmax())] if m.max() - m.min() > 80 else "." for m in means)


def write_video(
    path: Path | str,
    pictures,
    *,
    fps: int = 25,
    ticks=None,
    codec: str = "libx264",
    options: dict | None = None,
    shift: int = 0,
    rotation: int | None = None,
    hflip: bool = False,
    container_options: dict | None = None,
    container_format: str | None = None,
    pixel_format: str = "yuv420p",
) -> Path:
    """Encodes uint8 [H,W,3] pictures.

    Args:
        ticks: presentation times in units of 1/fps; default 0, 1, 2, ...
        shift: added to all stored times, in those units.
    """
    pictures = list(pictures)
    height, width = pictures[0].shape[:2]
    with av.open(str(path), "w", container_format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.time_base = Fraction(1, fps)
        stream.options = options or {}
        if rotation is not None:
            stream.set_display_rotation(rotation, hflip=hflip)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = number if ticks is None else ticks[number]
            frame.time_base = Fraction(1, fps)
            _mux(container, stream.encode(frame), shift, fps)
        _mux(container, stream.encode(None), shift, fps)
    return Path(path)


def _mux(container, packets, shift: int, fps: int) -> None:
    for packet in packets:
        ticks = round(shift / fps / packet.time_base)
        packet.pts += ticks
        packet.dts += ticks
        container.mux(packet)


def numbered_video(
    path: Path | str, count: int = 30, *, width: int = 160, height: int = 96, gop: int = 10, **kw
) -> Path:
    """A clip of numbered pictures with a key frame every `gop` and B-frames, unless `options` say otherwise."""
    kw.setdefault("options", {"g": str(gop), "keyint_min": str(gop), "sc_threshold": "0", "bf": "2", "crf": "12"})
    return write_video(path, (numbered_picture(i, width, height) for i in range(count)), **kw)


def moving_texture(count: int, velocity: tuple[float, float], width: int = 192, height: int = 128, seed: int = 0):
    """Pictures of a smooth random texture that moves by `velocity` (x right, y down) px per frame."""
    margin = 64 + int(count * max(abs(v) for v in velocity))
    noise = np.random.default_rng(seed).integers(0, 256, (height + 2 * margin, width + 2 * margin, 3))
    texture = cv2.GaussianBlur(noise.astype(np.float32), (0, 0), 3)
    texture = (texture - texture.min()) / np.ptp(texture) * 255
    for i in range(count):
        shift = np.float32([[1, 0, velocity[0] * i - margin], [0, 1, velocity[1] * i - margin]])
        yield cv2.warpAffine(texture, shift, (width, height), flags=cv2.INTER_LINEAR).round().astype(np.uint8)


def audio_file(path: Path | str, seconds: float = 0.5) -> Path:
    """A file with a sound track and no picture."""
    rate = 16000
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        samples = np.sin(np.arange(int(rate * seconds)) * 0.1).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        frame.pts = 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return Path(path)


def lengthen(clip: Path, path: Path, times: int) -> Path:
    """A file of `times` copies of a clip's packets, one behind the other: two hours take a second to write."""
    with av.open(str(clip)) as source, av.open(str(path), "w") as out:
        stream = source.streams.video[0]
        track = out.add_stream_from_template(stream)
        packets = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in source.demux(stream) if p.size]
        for shift in range(0, times * stream.duration, stream.duration):
            for content, pts, dts, is_key in packets:
                packet = av.Packet(content)
                packet.pts, packet.dts, packet.stream = pts + shift, dts + shift, track
                packet.time_base, packet.is_keyframe = stream.time_base, is_key
                out.mux(packet)
    return path
