"""Uploaded videos and pictures: kept under random names, admitted by content, seen by their owner alone.

In: a stream of bytes and who sent it. Out: a file id, and later the path behind it. In the folder, `<id>.bin` is the
content and `<id>.json`, written last, says whose it is; a restart finds both again. Nothing a client sends becomes part
of a path.
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lavis_lstp.data.pictures import picture_size
from lavis_lstp.data.video.reading import probe
from lavis_lstp.errors import ConfigError, LstpError, VideoError
from lavis_lstp.files import strict_json, sweep, whole_file, write_json
from lavis_lstp.inference.candidates import is_picture
from lavis_lstp.redaction import printable
from lavis_lstp.serving.limits import Limits

logger = logging.getLogger(__name__)

ID = re.compile(r"file-[0-9a-f]{32}\Z")
CHUNK = 1 << 20
MOST_NAME = 200


class NoSuchFile(LstpError):
    """The file does not exist, or it belongs to another client; the error does not say which."""


class TooLarge(LstpError):
    """The file has more bytes than the server admits."""


@dataclass(frozen=True)
class Stored:
    """An uploaded file.

    Attributes:
        owner: a digest that stands for a client.
        filename: what the client calls it, for display alone.
        kind: video or image.
    """

    id: str
    owner: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    kind: str

    def public(self) -> dict[str, Any]:
        """OpenAI's file object."""
        shown = {key: value for key, value in asdict(self).items() if key not in ("owner", "kind")}
        return {"object": "file", **shown, "status": "processed"}


def copied(source: BinaryIO, target: BinaryIO, most: int) -> int:
    """Copy a stream, and return the number of its bytes.

    Raises:
        TooLarge: there are more than `most`.
    """
    total = 0
    while chunk := source.read(CHUNK):
        total += len(chunk)
        if total > most:
            raise TooLarge(f"the file has more than the {most} bytes that are admitted")
        target.write(chunk)
    return total


def check_content(source: Any, limits: Limits, name: str) -> str:
    """Return "video" or "image", the kind of the content.

    Raises:
        VideoError: it is neither, damaged, too long or too large.
    """
    if is_picture(source):
        picture_size(source, name, max_megapixels=limits.max_megapixels)
        return "image"
    info = probe(source, name=name, max_megapixels=limits.max_megapixels)
    if info.duration_s > limits.max_seconds:
        raise VideoError(f"{name}: lasts {info.duration_s:.1f} s, more than the {limits.max_seconds:g} s admitted")
    return "video"


class FileStore:
    """Files of all clients in one folder; methods block and run in threads.

    Args:
        folder: made where it is missing, for this user alone.
        limits: of size, content, number and age.
        now: the clock, in seconds.
    """

    def __init__(self, folder: Path, limits: Limits, now: Callable[[], float] = time.time):
        self.folder, self.limits, self.now = folder, limits, now
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        sweep(folder)

    def add(self, owner: str, content: BinaryIO, *, filename: str, purpose: str) -> Stored:
        """Admit a file.

        Raises:
            TooLarge, VideoError: it is not admitted.
            ConfigError: the client has as many as it may.
        """
        self.delete_old()
        if sum(1 for _ in self.of(owner)) >= self.limits.most_files:
            raise ConfigError(f"there are {self.limits.most_files} files already; delete some (DELETE /v1/files/ID)")
        created, name = int(self.now()), printable(filename)[:MOST_NAME] or "upload"
        file_id = f"file-{secrets.token_hex(16)}"
        with whole_file(self._content(file_id)) as partial:
            with partial.open("wb") as target:
                size = copied(content, target, self.limits.upload_bytes)
            kind = check_content(partial, self.limits, "the file")
        stored = Stored(
            file_id, owner, size, created, created + int(self.limits.keep_hours * 3600), name, printable(purpose), kind
        )
        write_json(self._facts(file_id), asdict(stored))
        return stored

    def get(self, owner: str, file_id: str) -> Stored:
        """Return the facts of an upload. Raises NoSuchFile where this owner has none of that id."""
        stored = self._read(file_id) if ID.match(file_id) else None
        if stored is None or not hmac.compare_digest(stored.owner, owner) or stored.expires_at <= self.now():
            raise NoSuchFile("there is no such file; upload it first (POST /v1/files)")
        return stored

    def path(self, owner: str, file_id: str) -> Path:
        """Return the path of the content. Raises NoSuchFile as `get` does."""
        return self._content(self.get(owner, file_id).id)

    def of(self, owner: str) -> Iterator[Stored]:
        for stored in self._all():
            if stored.owner == owner and stored.expires_at > self.now():
                yield stored

    def delete(self, owner: str, file_id: str) -> None:
        """Delete an upload. Raises NoSuchFile as `get` does."""
        self._remove(self.get(owner, file_id).id)

    def delete_old(self) -> None:
        """Delete uploads that are past their time, and content whose facts were never written."""
        known = set()
        for stored in list(self._all()):
            known.add(stored.id)
            if stored.expires_at <= self.now():
                self._remove(stored.id)
        for content in self.folder.glob("file-*.bin"):
            if content.stem not in known and content.stat().st_mtime < self.now() - 3600:
                content.unlink(missing_ok=True)

    def _all(self) -> Iterator[Stored]:
        for facts in sorted(self.folder.glob("file-*.json")):
            stored = self._read(facts.stem)
            if stored is not None:
                yield stored

    def _read(self, file_id: str) -> Stored | None:
        try:
            return Stored(**strict_json(self._facts(file_id).read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            logger.warning("the record of upload %s is damaged (%s); it is left out", file_id, type(error).__name__)
            return None

    def _remove(self, file_id: str) -> None:
        self._facts(file_id).unlink(missing_ok=True)
        self._content(file_id).unlink(missing_ok=True)

    def _content(self, file_id: str) -> Path:
        return self.folder / f"{file_id}.bin"

    def _facts(self, file_id: str) -> Path:
        return self.folder / f"{file_id}.json"
