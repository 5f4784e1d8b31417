"""What was computed once about a video, kept on disk: flow, candidates, features, by what they were computed from.

In: a key, which is a digest of the video's content, the settings and the extractor's identity, and NumPy arrays. Out:
the same arrays, in any later process. One safetensors file is one entry, named by its key:

    flow-4f1c...e9.safetensors    features-09ab...77.safetensors

Files are read and written whole and get their name by renaming, so processes share a folder without a lock, over NFS,
too: of two that write one entry the later stays, and both contain the same. When the folder is full, the entry used the
longest ago goes first; a file's time of change says when that was. Nothing depends on the folder: where it cannot be
read or written, `get` finds nothing, `put` keeps nothing, and one warning says why.

The package `diskcache` is not used: it keeps values that are no text as pickles, which run what a damaged or foreign
file tells them to, and its index is an SQLite database, which does not work over a network and is one more file to
damage.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from lavis_lstp.data.shards.format import load_tensors
from lavis_lstp.errors import ConfigError, VideoError
from lavis_lstp.files import (
    cache_folder,
    expanded,
    is_temporary,
    sha256_file,
    sha256_json,
    sorted_header,
    strict_json,
    whole_file,
)

if TYPE_CHECKING:
    from lavis_lstp.data.video.reading import VideoFrames

logger = logging.getLogger(__name__)

FORMAT = "lavis_lstp.store"
VERSION = 1
MAX_BYTES = 10 << 30
ABANDONED_S = 3600
"""A temporary file that has not changed for so long belongs to a process that was killed."""
UNSETTLED_S = 2
"""A file that was changed so short a time ago may change again within the resolution of its time stamp."""
_ENTRY = re.compile(r"(?P<what>[a-z][a-z_]*)-[0-9a-f]{64}\.safetensors")


ENVIRONMENT = "LAVIS_LSTP_STORE"
"""The folder of the default store, or "off": nothing is kept on disk."""


def default_folder() -> Path:
    given = os.environ.get(ENVIRONMENT, "")
    return expanded(given) if given not in ("", "off") else cache_folder() / "store"


def default_store() -> Store | None:
    """The store in the default folder, None where the environment says that nothing is kept, or tells no folder."""
    if os.environ.get(ENVIRONMENT) == "off":
        return None
    try:
        return Store()
    except ConfigError as error:
        logger.warning("nothing about videos is kept on disk: %s; %s=off says that this is meant", error, ENVIRONMENT)
        return None


def array_digest(array: np.ndarray) -> str:
    """SHA-256 of an array's shape, type and numbers."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def entry_key(what: str, content: str, settings: Mapping[str, Any]) -> str:
    """The key of an entry.

    Args:
        what: flow, features, ...: `lavis-lstp cache` counts by it.
        content: digest of the video's content, such as `content_digest` gives.
        settings: everything else that decides the arrays, JSON values: frames, sizes, the extractor's name, weights
            and version.
    """
    return f"{what}-{sha256_json([VERSION, what, content, settings])}"


class Entry(NamedTuple):
    """One file of a store: `what` it contains, and when it was `used` last, in seconds since 1970."""

    path: Path
    what: str
    bytes: int
    used: float


class Store:
    """A folder of entries; may be pickled, forked and used by any number of processes and threads.

    Args:
        folder: where entries lie; made with the first of them.
        max_bytes: size of all entries; those used the longest ago are removed to make room. Processes that write at
            the same moment can exceed it by what they write.
    """

    def __init__(self, folder: str | os.PathLike | None = None, *, max_bytes: int = MAX_BYTES):
        self.folder = expanded(folder) if folder is not None else default_folder()
        self.max_bytes = max_bytes
        self._mode = 0o700 if folder is None else 0o777  # frames of one's own videos are nobody else's
        self._warned = False

    def get(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays of a key, None where there are none or the entry is damaged."""
        path = self._path(key)
        try:
            if not path.is_file():  # a named pipe would never end
                return None
            raw = path.read_bytes()
        except FileNotFoundError:  # another process made room meanwhile
            return None
        except OSError as error:
            self._warn(error)
            return None
        try:
            arrays, _, facts = load_tensors(raw)
            if facts != self._facts(key, arrays):
                raise ValueError("not what was written under this name")
        except ValueError as error:
            logger.warning("%s: damaged (%s); it is made anew", path, error)
            return None
        with contextlib.suppress(OSError):  # in a read-only folder nothing makes room, either
            os.utime(path)
        return arrays

    def put(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays under a key, in place of what was there; where the system refuses, a warning says so once."""
        from safetensors.numpy import save

        path = self._path(key)
        arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        raw = sorted_header(save(arrays, self._facts(key, arrays)))
        if len(raw) > self.max_bytes:
            return
        try:
            self.folder.mkdir(self._mode, parents=True, exist_ok=True)
            self.trim(self.max_bytes - len(raw), besides=path)
            with whole_file(path) as partial:
                partial.write_bytes(raw)
        except OSError as error:
            self._warn(error)

    def entries(self) -> list[Entry]:
        """All entries, those first that were used the longest ago.

        Raises:
            OSError: the folder cannot be read.
        """
        found = []
        for file in self._files():
            match = _ENTRY.fullmatch(file.name)
            if match and (status := _status(file)) is not None:
                found.append(Entry(Path(file.path), match["what"], status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: (entry.used, entry.path))

    def trim(self, max_bytes: int, besides: Path | None = None) -> None:
        """Remove the entries used the longest ago until the rest has at most `max_bytes`, and what killed writers left.

        Args:
            besides: an entry that is about to be replaced, and does not count.

        Raises:
            OSError: the folder cannot be read or written.
        """
        for file in self._files():
            status = _status(file) if is_temporary(file.name) else None
            if status is not None and time.time() - status.st_mtime > ABANDONED_S:
                Path(file.path).unlink(missing_ok=True)
        entries = [entry for entry in self.entries() if entry.path != besides]
        total = sum(entry.bytes for entry in entries)
        for entry in entries:
            if total <= max_bytes:
                break
            entry.path.unlink(missing_ok=True)
            total -= entry.bytes

    def clear(self, what: str | None = None) -> list[Entry]:
        """Remove all entries, or those of a kind, and return them; other files stay.

        Raises:
            OSError: the folder cannot be read or written.
        """
        chosen = [entry for entry in self.entries() if what in (None, entry.what)]
        for entry in chosen:
            entry.path.unlink(missing_ok=True)
        return chosen

    def _files(self) -> Iterator[os.DirEntry]:
        try:
            with os.scandir(self.folder) as files:
                yield from files
        except FileNotFoundError:
            return

    def _path(self, key: str) -> Path:
        assert _ENTRY.fullmatch(f"{key}.safetensors"), f"{key!r} is not made by entry_key"
        return self.folder / f"{key}.safetensors"

    @staticmethod
    def _facts(key: str, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
        """The metadata of an entry: what it must be, and a check sum against damage of disk or transfer."""
        check = 0
        for name, array in sorted(arrays.items()):
            check = zlib.crc32(f"{name}\0{array.dtype.str}{array.shape}".encode(), check)
            check = zlib.crc32(array.reshape(-1).view(np.uint8), check)
        return {"format": FORMAT, "version": str(VERSION), "key": key, "crc32": f"{check:08x}"}

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            said = error.strerror or error
            logger.warning("%s: cannot be used (%s); going on without it, each time from the video", self.folder, said)


def _status(file: os.DirEntry) -> os.stat_result | None:
    """Size and times of a plain file; None for anything else, and for what another process has just removed."""
    try:
        return file.stat(follow_symlinks=False) if file.is_file(follow_symlinks=False) else None
    except FileNotFoundError:
        return None


def content_digest(source: str | os.PathLike | bytes | BinaryIO | Sequence[bytes], store: Store | None = None) -> str:
    """SHA-256 of the content of a video or picture, whatever it is called: 64 hexadecimal digits.

    Args:
        source: a path, also of a folder, whose pictures count; the file's bytes or the file, open; or the bytes of
            several pictures.
        store: where the digest of a path is kept under the file's place, size and times, so that the next question
            about the same file reads nothing of it.

    Raises:
        VideoError: the file cannot be read, or changes meanwhile.
    """
    if isinstance(source, list | tuple):
        return sha256_file("".join(content_digest(one) for one in source).encode())
    if not isinstance(source, str | os.PathLike):
        return sha256_file(source)
    path = Path(source)
    try:
        before = _look_of(path)
        if not (path.is_file() or path.is_dir()):
            raise ValueError("not a file")  # a device or a pipe would never end
        key = entry_key("digest", "", {"file": before})
        kept = store.get(key) if store is not None else None
        if kept is not None and kept.keys() == {"sha256"} and kept["sha256"].nbytes == 32:
            return kept["sha256"].tobytes().hex()
        settled = time.time_ns() - max(look[-1] for look in before) > UNSETTLED_S * 10**9
        digest = (_remembered if settled else _digest_of)(path, before)
    except (OSError, ValueError) as error:  # ValueError: no system takes a zero byte in a name
        raise VideoError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if store is not None and settled:
        store.put(key, {"sha256": np.frombuffer(bytes.fromhex(digest), dtype=np.uint8)})
    return digest


@functools.lru_cache(1024)
def _remembered(path: Path, look: tuple[tuple[Any, ...], ...]) -> str:
    """Returns the digest that a file had when it looked so: reading a film for it takes seconds."""
    return _digest_of(path, look)


def _digest_of(path: Path, look: tuple[tuple[Any, ...], ...]) -> str:
    if path.is_dir():
        from lavis_lstp.data.video.picture_folder import sha256_of_pictures

        digest = sha256_of_pictures(path)
    else:
        digest = sha256_file(path)
    if _look_of(path) != look:
        raise VideoError(f"{path}: changes while it is read; call again when it is complete")
    return digest


def _look_of(path: Path) -> tuple[tuple[Any, ...], ...]:
    """(file, size, inode, two times of change in ns, the later one last) of a file, or of each picture of a folder."""
    files = [path]
    if path.is_dir():
        from lavis_lstp.data.video.picture_folder import pictures_in

        files = pictures_in(path)
    found = []
    for file in files:
        status = file.stat()
        times = sorted((status.st_ctime_ns, status.st_mtime_ns))
        found.append((str(file.resolve()), status.st_size, status.st_ino, *times))
    return tuple(found)


def kept_motion(store: Store | None, content: str, source: Any, **how: Any) -> np.ndarray:
    """Return what `motion_energy` gives, without decoding where a store contains it; arguments as for `read_kept`."""
    from lavis_lstp.data.video.codec_figures import PLACES, RUN, motion_energy
    from lavis_lstp.data.video.reading import READING_VERSION

    if store is None:
        return motion_energy(source, **how)
    measured = {"places": how.get("places", PLACES), "run": RUN}
    key = entry_key("motion", content, {**measured, "reading": READING_VERSION, "av": version("av")})
    kept = store.get(key)
    if kept is None:
        kept = {"energy": motion_energy(source, **how)}
        store.put(key, kept)
    return kept["energy"]


def kept_figures(
    names: Sequence[str],
    store: Store | None,
    content: str,
    source: Any,
    indices: Sequence[int],
    between_s: tuple[float, float] | None = None,
    **how: Any,
) -> dict[str, np.ndarray]:
    """Return what the codec says of the part of a video around each candidate: name of `FIGURES` -> float32 [T].

    Args:
        indices: T frame numbers in the file. between_s: the clip they are of; None = the whole video.
        how: name and max_megapixels, as for `packet_costs`.

    Raises:
        VideoError: not a video file, such as a folder of pictures, or damaged.
    """
    from lavis_lstp.data.video.choosing import frames_between
    from lavis_lstp.data.video.codec_figures import of_candidates, packet_costs

    costs = packet_costs(source, **how)
    made = {"bit_cost": lambda: costs.num_bytes, "motion_energy": lambda: kept_motion(store, content, source, **how)}
    inside = np.asarray(frames_between(costs.times_s, between_s))
    places = np.asarray(indices) - inside[0]
    return {name: of_candidates(made[name]()[inside], places).astype(np.float32) for name in names}


def read_kept(store: Store | None, content: str, source: Any, *, name: str | None = None, **how: Any) -> VideoFrames:
    """Return what `read_frames` gives, without decoding where a store contains it; `count` is then None.

    Args:
        content: SHA-256 of the source, see `store.content_digest`.
        how: JSON values, which with the decoder's version are the settings of the entry; threads are none of them.
    """
    from lavis_lstp.data.video.reading import READING_VERSION, VideoFrames, VideoInfo, read_frames

    if store is None:
        return read_frames(source, name=name, **how)
    decides = {key: value for key, value in how.items() if key != "threads"}
    package = {"pyav": "av"}.get(backend := how.get("backend", "pyav"), backend)
    key = entry_key("frames", content, {**decides, "reading": READING_VERSION, package: version(package)})
    kept = store.get(key)
    if kept is None:
        found = read_frames(source, name=name, **how)
        facts = json.dumps(asdict(found.info)).encode()
        arrays = {"frames": found.frames, "times_s": found.times_s, "indices": np.asarray(found.indices, np.int64)}
        flow = {} if found.flow is None else {"flow": found.flow}
        store.put(key, {**arrays, **flow, "info": np.frombuffer(facts, np.uint8)})
        return found
    info = VideoInfo(**strict_json(kept["info"].tobytes()))
    return VideoFrames(kept["frames"], kept["times_s"], kept["indices"].tolist(), info, kept.get("flow"))
