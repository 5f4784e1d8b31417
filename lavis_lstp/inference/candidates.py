"""One video, picture or text -> its candidate frames and their flow, kept in memory by content.

In: a path, bytes, a seekable binary file, a list of pictures, or None. Out: `Candidates`, all that does not depend on
the question. A second question about the same bytes neither reads nor decodes them, whatever they are called; nor does
another process, where files are kept on disk. Several threads may ask at once: the same medium is decoded once, and the
others wait for it.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lavis_lstp.data.store import content_digest
from lavis_lstp.errors import ConfigError, VideoError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lavis_lstp.data.store import Store
    from lavis_lstp.data.video.reading import VideoFrames, VideoInfo

Medium = str | os.PathLike | bytes | BinaryIO | Sequence[bytes] | None

PICTURE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6")
"""Files of pictures begin so, and WebP with RIFF, four bytes, WEBP. A GIF, a PNG or a WebP that moves is a video."""

DECODE_THREADS = 4
"""Parts of one file that are decoded at the same time, at most, fewer while other media are; frames are the same."""


@dataclass(frozen=True)
class Candidates:
    """The T frames of a medium among which an answer chooses; T is 1 for a picture and 0 for a text.

    Attributes:
        media: equal for equal content read in the same way, "" for a text.
        kind: video, image or text.
        frames: uint8 [T,3,S,S], RGB, as the model sees them.
        times_s: float64 [T], seconds since the start of the file.
        duration_s: when the last frame ends, or the clip that was asked for.
        flow: float32 [T,2,h,w], px per frame; None where the medium does not move or the selector needs none.
        codec_flow: the same from the codec's motion vectors, where the model is set to take them.
        numbers: T frame numbers in the file of a video.
        info: what the video is; None of other media.
        figure: float32 [T], that of `config.model.FIGURES` which the selector needs; None where it needs none.
    """

    media: str
    kind: str
    frames: Tensor
    times_s: np.ndarray
    duration_s: float
    flow: Tensor | None
    codec_flow: Tensor | None
    numbers: Sequence[int] = ()
    info: VideoInfo | None = None
    figure: np.ndarray | None = None


def num_bytes(value: Candidates | Tensor | np.ndarray) -> int:
    """Bytes of the tensors of a value that is kept."""
    parts = (value.frames, value.codec_flow) if isinstance(value, Candidates) else (value,)
    return sum(part.nbytes for part in parts if part is not None)


class Kept:
    """Values by key, the last used ones, at most so many bytes together; each is made once.

    Args:
        most_bytes: a value that is larger by itself is handed out and not kept.
        size: bytes of a value.
    """

    def __init__(self, most_bytes: int, size: Callable[[Any], int]):
        self.most_bytes, self._size = most_bytes, size
        self._found: OrderedDict[Hashable, Future] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = self.hits = self.misses = 0

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of `key`; an error of `make` is raised for all who wait for it, and nothing is kept."""
        with self._lock:
            known = self._found.get(key)
            if known is not None:
                self.hits += 1
                self._found.move_to_end(key)
            else:
                self.misses += 1
                own = self._found[key] = Future()
        if known is not None:
            return known.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                self._found.pop(key, None)
            own.set_exception(error)
            raise
        own.set_result(value)
        with self._lock:
            if self._found.get(key) is own:  # not cleared meanwhile
                self.num_bytes += self._size(value)
                self._forget_the_oldest()
        return value

    def _forget_the_oldest(self) -> None:
        for key in list(self._found):
            if self.num_bytes <= self.most_bytes:
                return
            if self._found[key].done():
                self.num_bytes -= self._size(self._found.pop(key).result())

    def clear(self) -> None:
        with self._lock:
            self._found.clear()
            self.num_bytes = 0


def is_picture(source: Medium) -> bool:
    """Whether a file or its bytes are a picture, by how they begin and not by a name."""
    if source is None or isinstance(source, list | tuple):
        return False
    start = _start(source, 12)
    if start.startswith(b"\x89PNG") or (start[:4] == b"RIFF" and start[8:12] == b"WEBP"):
        from lavis_lstp.data.pictures import is_animated

        return not is_animated(source)
    return start.startswith(PICTURE_MAGIC)


def _start(source: Medium, count: int) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source[:count])
    if isinstance(source, str | os.PathLike):
        if not os.path.isfile(source):
            return b""  # a folder of pictures, or what `read_frames` will refuse by its name
        with open(source, "rb") as file:
            return file.read(count)
    source.seek(0)
    return source.read(count)


def check_medium(source: Any) -> None:
    """Raises ConfigError for what is no `Medium`, such as decoded frames or a file opened as text."""
    if source is None or isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        return
    if isinstance(source, list | tuple):
        if source and all(isinstance(one, bytes | str | os.PathLike) for one in source):
            return
        got = f"a {type(source).__name__} of {', '.join(sorted({type(one).__name__ for one in source})) or 'nothing'}"
    elif hasattr(source, "seek") and hasattr(source, "read") and isinstance(source.read(0), bytes):
        return
    else:
        got = f"{type(source).__name__}, which is none of these"
    known = "a path, bytes, a seekable file opened as binary, or a list of pictures' bytes"
    raise ConfigError(f"a video or picture is {known}; got {got}")


class Reader:
    """Reads candidates for one model and keeps them.

    Args:
        model: an LSTP in eval mode.
        cache_bytes: of frames and flow that are kept in memory.
        max_seconds: a longer video is refused; None = any.
        max_megapixels: a larger picture, or video with larger pictures, is refused.
        decoders: media that are decoded at a time.
        reading: how videos are read, by the keys `recorded.READING` of a data set.
        store: where frames of files, and flow, are kept on disk for other processes; None = nowhere.
    """

    def __init__(
        self,
        model: Any,
        *,
        cache_bytes: int,
        max_seconds: float | None,
        max_megapixels: float,
        decoders: int,
        reading: Mapping[str, Any] | None = None,
        store: Store | None = None,
    ):
        how = {"frames": "exact", "flow_pairs": "sampled", **(reading or {})}
        self.flow_pairs, exact = how.pop("flow_pairs"), how.pop("frames") == "exact"
        side = model.backbone.image_size
        self.how = {"exact": exact, "size": side, "max_megapixels": max_megapixels, **how}  # arguments of `read_frames`
        self.store = store
        if store is not None:
            model.chooser.keep_in(store)
        self._decoders = threading.Semaphore(decoders)
        self._decoding: list[dict] = []  # one entry for each medium that is decoded just now
        self.model, self.max_seconds = model, max_seconds
        self.kept = Kept(cache_bytes, num_bytes)

    def read(
        self,
        source: Medium,
        num_frames: int,
        *,
        flow: bool,
        figure: str | None = None,
        name: str | None = None,
        fps: float | None = None,
        reading: Mapping[str, str] | None = None,
        clip_s: Sequence[float] | None = None,
    ) -> tuple[Candidates, dict[str, float]]:
        """The candidates of a medium, and the seconds of the stages that they took just now (none where kept).

        Args:
            source: see `Medium`; None is a text.
            num_frames: T, evenly spaced frames of a video.
            flow: whether flow is needed. figure: which of `config.model.FIGURES` is; None = none.
            name: what errors call the medium; default: its path.
            fps: so many frames a second of a video, where these are at most T; None = T.
            reading: frames and flow_pairs, in place of the reader's own.
            clip_s: start and end in seconds of the part of a video that is read; None = all of it.

        Raises:
            VideoError: it is missing, not a readable video or picture, too long or too large.
            ConfigError: it is no medium at all.
        """
        check_medium(source)
        seconds: dict[str, float] = {}
        if source is None:
            return self._text(), seconds
        digest = content_digest(source, self.store)

        def timed(stage: str, make: Callable[..., Any], *args: Any) -> Any:
            with self._decoders:
                self._decoding.append(seconds)
                started = time.perf_counter()
                try:
                    value = make(*args)
                finally:
                    self._decoding.pop()
                seconds[stage] = time.perf_counter() - started
            return value

        changed = dict(reading or {})
        pairs = changed.get("flow_pairs", self.flow_pairs)
        exact = {"exact": changed["frames"] == "exact"} if "frames" in changed else {}
        how = {"num": num_frames, "name": name, **self.how, **exact, **({"fps": fps} if fps else {})}
        how |= {"between_s": tuple(clip_s)} if clip_s else {}
        named = [digest, num_frames, *([fps] if fps else []), *changed.values(), *(clip_s or ())]
        key = " ".join(map(str, named))
        found = self.kept.get(key, lambda: timed("decode", self._decode, source, key, how, pairs))
        if flow and len(found.frames) > 1:
            field = self.kept.get((key, "flow"), lambda: timed("flow", self._flow, found, source, how, pairs))
            found = replace(found, flow=field)
        if figure is not None:
            made = self.kept.get((key, figure), lambda: timed("codec", self._figure, found, source, how, figure))
            found = replace(found, figure=made)
        return found, seconds

    def _figure(self, found: Candidates, source: Medium, how: dict[str, Any], figure: str) -> np.ndarray:
        import numpy as np

        from lavis_lstp.data.store import kept_figures
        from lavis_lstp.data.video.container import source_name

        if found.kind != "video":
            return np.ones(len(found.frames), np.float32)
        if isinstance(source, list | tuple):
            raise VideoError(f"{source_name(source, how['name'])}: {figure} is of a video file, and these are pictures")
        store = self.store if isinstance(source, str | os.PathLike) else None
        named = {key: how[key] for key in ("name", "max_megapixels")}
        between_s = how.get("between_s")
        return kept_figures([figure], store, found.media.split()[0], source, found.numbers, between_s, **named)[figure]

    def _text(self) -> Candidates:
        import numpy as np
        import torch

        side = self.model.backbone.image_size
        nothing = torch.zeros(0, 3, side, side, dtype=torch.uint8)
        return Candidates("", "text", nothing, np.zeros(0), 0.0, None, None, figure=np.zeros(0, np.float32))

    def _decode(self, source: Medium, media: str, how: dict[str, Any], flow_pairs: str) -> Candidates:
        import numpy as np
        import torch

        from lavis_lstp.data.pictures import open_picture
        from lavis_lstp.data.video.container import source_name
        from lavis_lstp.data.video.reading import probe, resize_frames

        named = {key: how[key] for key in ("name", "max_megapixels")}
        if is_picture(source):
            given = Path(source) if isinstance(source, str | os.PathLike) else _all_bytes(source)
            picture = open_picture(given, source_name(source, how["name"]), max_megapixels=how["max_megapixels"])
            frames = resize_frames(np.asarray(picture).transpose(2, 0, 1)[None], how["size"])
            return Candidates(media, "image", torch.from_numpy(frames), np.zeros(1), 0.0, None, None)
        source = list(source) if isinstance(source, tuple) else source
        if self.max_seconds is not None and not isinstance(source, list):
            self._refuse_long(probe(source, **named).duration_s, source_name(source, how["name"]))
        codec = self.model.chooser.flow_from_data == "motion_vectors"
        if codec:
            how = {**how, "motion_vectors": True, "flow_pairs": flow_pairs}
        clip = self._read(source, media, how)
        frames, given = torch.from_numpy(clip.frames), torch.from_numpy(clip.flow) if codec else None
        info = clip.info
        end_s = min(info.duration_s, how.get("between_s", (0, math.inf))[1])
        return Candidates(media, "video", frames, clip.times_s, end_s, None, given, clip.indices, info)

    def _read(self, source: Medium, media: str, how: dict[str, Any]) -> VideoFrames:
        """Frames as the model sees them; those of a file from the store, where they are there."""
        from lavis_lstp.data.store import read_kept

        store = self.store if isinstance(source, str | os.PathLike) and os.path.isfile(source) else None
        threads = max(1, min(DECODE_THREADS, os.cpu_count() or 1) // len(self._decoding))
        return read_kept(store, media.split()[0], source, threads=threads, **how)

    def _flow(self, found: Candidates, source: Medium, how: dict[str, Any], flow_pairs: str) -> Tensor:
        import torch

        device = next(self.model.parameters()).device
        if flow_pairs == "local" and self.model.flow.estimator is not None:  # each frame and the file's next
            source = list(source) if isinstance(source, tuple) else source
            both = torch.from_numpy(self._read(source, found.media, {**how, "with_next": True}).frames)
            return self.model.flow.of_pairs(both.unflatten(0, (-1, 2)).to(device))[0].cpu()
        given = None if found.codec_flow is None else found.codec_flow[None].to(device)
        return self.model.flow(found.frames[None].to(device), flow=given)[0].cpu()

    def _refuse_long(self, duration_s: float, name: str) -> None:
        if duration_s > self.max_seconds:
            raise VideoError(
                f"{name}: lasts {duration_s:.1f} s, more than the {self.max_seconds:g} s that are allowed; send the "
                "part that the question is about"
            )


def _all_bytes(source: Medium) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    source.seek(0)
    return source.read()
