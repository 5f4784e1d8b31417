"""Where shards lie: local paths, http(s) addresses, `pipe:` commands, and whatever fsspec opens (s3://, gs://, hf://).

In: a storage as configurations write it, "set-{000000..000123}.tar" or a list of those. Out: the shards' locations, a
stream of a whole one, or the bytes at an offset of one. A `ShardError` has the cause to count by: not found, refused,
no ranges, connection, truncated.

What can pass is tried again, with waits that double: a connection that breaks or stalls, a server's error, too many
requests. What cannot (404, 403, a missing file) is not.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import itertools
import logging
import os
import random
import re
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lavis_lstp.errors import ConfigError, ShardError
from lavis_lstp.files import expanded

logger = logging.getLogger(__name__)

MOST_SHARDS = 1_000_000
SCAN_BLOCK = 16 << 10
"""Bytes asked for at once where little of a file is wanted: the end of a video, its JSON and the next header."""
REDIRECTS = "LAVIS_LSTP_REDIRECTS"
"""Environment variable: hosts, with commas between, that a server may redirect to; `*` = any."""
AT_ONCE = 16 << 20
"""Bytes of a body asked for at once: a server may promise more than it has, and than there is memory."""
SMALL_FILE_LIMIT = 256 << 20
"""Bytes of an index or a manifest; the index of a million members is 100 MB."""
PASSING = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Retry:
    """How often and how patiently remote reads are tried.

    Attributes:
        attempts: in all, so 1 = never again.
        wait_s: before the second; doubles each time, plus up to as much again by chance.
        timeout_s: without a byte, after which a connection counts as broken.
        redirects: hosts beside its own that a server may send us to; "*" = any. REDIRECTS in the environment names
            more, for commands.
    """

    attempts: int = 6
    wait_s: float = 0.5
    timeout_s: float = 30.0
    redirects: tuple[str, ...] = ()


RETRY = Retry()
LONG_S = 2.0
"""A pause of this length is a warning: a host that is down would otherwise be waited for in silence."""


def expand(storage: str | Sequence[str]) -> list[str]:
    """Locations of all shards, in order.

    >>> expand("a-{000..002}.tar")
    ['a-000.tar', 'a-001.tar', 'a-002.tar']

    Raises:
        ConfigError: nothing, something that is no text, braces that cannot be read, or a shard named twice.
    """
    from braceexpand import UnbalancedBracesError, braceexpand

    patterns = [storage] if isinstance(storage, (str, os.PathLike)) else storage
    if not isinstance(patterns, Sequence) or not patterns:
        raise ConfigError(f"expected a shard storage like 'train-{{000000..000123}}.tar', got {storage!r}")
    shards: list[str] = []
    for pattern in patterns:
        if not isinstance(pattern, (str, os.PathLike)) or not os.fspath(pattern):
            raise ConfigError(f"expected a shard storage like 'train-{{000000..000123}}.tar', got {pattern!r}")
        pattern = os.fspath(pattern)
        many = [abs(int(b) - int(a)) + 1 for a, b in re.findall(r"\{(\d+)\.\.(\d+)\}", pattern)]
        if any(count > MOST_SHARDS for count in many):
            raise ConfigError(f"{pattern!r} names more than {MOST_SHARDS} shards")
        try:
            shards += itertools.islice(braceexpand(pattern), MOST_SHARDS)
        except UnbalancedBracesError:
            raise ConfigError(f"{pattern!r}: braces that do not close") from None
    if len(set(shards)) < len(shards):
        twice = next(shard for n, shard in enumerate(shards) if shard in shards[:n])
        raise ConfigError(f"{twice!r} is named twice in {storage!r}; each of its samples would count twice")
    return shards


def scheme(location: str) -> str:
    """file, pipe, http (for https, too) or fsspec."""
    if location.startswith("pipe:"):
        return "pipe"
    found = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+)://", location)
    if not found:
        return "file"
    return {"http": "http", "https": "http", "file": "file"}.get(found[1].lower(), "fsspec")


def can_seek(location: str) -> bool:
    """Whether bytes at an offset can be had without all before."""
    return scheme(location) != "pipe"


def local_path(location: str) -> Path:
    path = urllib.parse.unquote(location[7:]) if location.startswith("file://") else location
    return expanded(path)


def beside(location: str, suffix: str) -> str:
    """The name of a shard's companion: `a/x-000000.tar` and ".index" give `a/x-000000.index`."""
    return re.sub(r"\.tar(?=$|\?)", suffix, location) if ".tar" in location else location + suffix


# ---------------------------------------------------------------- reading


def read_at(location: str, offset: int, size: int, retry: Retry = RETRY) -> bytes:
    """Exactly `size` bytes from `offset` on.

    Raises:
        ShardError: they are not there, or cannot be had after all attempts.
    """
    if size == 0:
        return b""
    kind = scheme(location)
    if kind == "pipe":
        raise ShardError(f"{location}: a pipe has no offsets; it can only be streamed", "pipe")
    if kind == "file":
        data = _local(location, lambda file: _pread(file, offset, size))
    else:
        data = _up_to(location, offset, size, retry)
    return _all_of(location, offset, size, data)


def _all_of(location: str, offset: int, size: int, data: bytes) -> bytes:
    if len(data) != size:
        raise ShardError(f"{location}: {len(data)} of {size} bytes at offset {offset}; truncated", "truncated")
    return data


def read_all(location: str, retry: Retry = RETRY) -> bytes:
    """A whole small file, such as an index.

    Raises:
        ShardError: it cannot be read, or has more than SMALL_FILE_LIMIT bytes.
    """
    kind, most = scheme(location), SMALL_FILE_LIMIT + 1
    if kind == "file":
        data = _local(location, lambda file: _pread(file, 0, most))
    elif kind == "http":
        data = _again(location, retry, lambda: _http_get(location, most, retry))
    elif kind == "pipe":
        with open_stream(location, retry) as stream:
            data = _body(stream, most)
    else:
        data = _again(location, retry, lambda: _fsspec(location).cat_file(_strip(location)))
    if len(data) >= most:
        text = f"{location}: more than {SMALL_FILE_LIMIT} bytes, where an index or a manifest was expected"
        raise ShardError(text, "refused")
    return data


@contextlib.contextmanager
def open_stream(location: str, retry: Retry = RETRY) -> Iterator[BinaryIO]:
    """A shard from its beginning. A remote one goes on where its connection broke."""
    kind = scheme(location)
    if kind == "file":
        file = _local(location, None)
        with file:
            yield file
    elif kind == "pipe":
        yield from _pipe(location)
    elif kind == "http":
        with contextlib.closing(_HttpStream(location, retry)) as raw:
            yield io.BufferedReader(raw, 1 << 20)
    else:
        with _again(location, retry, lambda: _fsspec(location).open(_strip(location), "rb")) as file:
            yield file


@contextlib.contextmanager
def open_scan(location: str, retry: Retry = RETRY) -> Iterator[BinaryIO]:
    """A shard from its beginning, of which little is wanted: what is skipped is not transferred, where that can be."""
    if scheme(location) in ("file", "pipe") or not knows_ranges(location, retry):
        with open_stream(location, retry) as stream:
            yield stream
    else:
        with _Ranges(location, retry) as raw:
            yield io.BufferedReader(raw, SCAN_BLOCK)


def knows_ranges(location: str, retry: Retry = RETRY) -> bool:
    """Whether a remote place gives a part of a file when asked for it."""
    try:
        _up_to(location, 0, 1, retry)
    except ShardError as error:
        if error.cause != "no ranges":
            raise
        return False
    return True


def _up_to(location: str, offset: int, size: int, retry: Retry) -> bytes:
    """Bytes from `offset` on, fewer where the file ends before."""
    if scheme(location) == "http":
        return _again(location, retry, lambda: _http_range(location, offset, size, retry))
    return _again(location, retry, lambda: _fsspec(location).cat_file(_strip(location), offset, offset + size))


def _pread(file: BinaryIO, offset: int, size: int) -> bytes:
    size = min(size, os.fstat(file.fileno()).st_size - offset)  # an index may say anything
    if size <= 0:
        return b""
    file.seek(offset)
    return file.read(size)


def _local(location: str, use: Callable[[BinaryIO], bytes] | None) -> Any:
    """What `use` makes of the open file, or that file."""
    path = local_path(location)
    try:
        file = open(path, "rb")
        if use is None:
            return file
        with file:
            return use(file)
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file", "not found") from None
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror or error})", "refused") from None


def _pipe(location: str) -> Iterator[BinaryIO]:
    command = location[len("pipe:") :]
    process = subprocess.Popen(["/bin/sh", "-c", command], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    whole = False
    try:
        yield process.stdout
        whole = not process.stdout.read(1 << 20).strip(b"\0")  # what follows a tar's end is zeros
    finally:
        process.stdout.close()
        status = process.wait()
    if status and whole:
        raise ShardError(f"{location}: the command failed with status {status}", "pipe")


def _again(location: str, retry: Retry, attempt: Callable[[], Any]) -> Any:
    """What an attempt gives; repeated where that can help."""
    for number in range(1, retry.attempts + 1):
        try:
            return attempt()
        except FileNotFoundError:
            raise ShardError(f"{location}: no such file (404)", "not found") from None
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 410):
                raise ShardError(f"{location}: no such file ({error.code})", "not found") from None
            if error.code not in PASSING:
                raise ShardError(f"{location}: refused ({error.code} {error.reason})", "refused") from None
            said = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:  # urllib's URLError is an OSError; so is a timeout
            said = str(getattr(error, "reason", None) or error) or type(error).__name__
        if number < retry.attempts:
            pause_s = retry.wait_s * 2 ** (number - 1) * (1 + random.random())
            level = logging.INFO if pause_s < LONG_S else logging.WARNING
            logger.log(level, "%s: %s; attempt %d of %d in %.1f s", location, said, number + 1, retry.attempts, pause_s)
            time.sleep(pause_s)
    raise ShardError(f"{location}: {said}, {retry.attempts} times", "connection")


def _request(location: str, headers: dict[str, str]) -> urllib.request.Request:
    return urllib.request.Request(location, headers={"User-Agent": "lavis_lstp", **headers})


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a server to its own host, and to others that the user has named: the request tells who asks for what."""

    def __init__(self, hosts: Iterable[str] = ()):
        self.hosts = hosts

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        before, after = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        named = {name.strip().lower() for name in (*self.hosts, *os.environ.get(REDIRECTS, "").split(","))}
        same = _place(before) == _place(after) or (_place(before), _place(after)) == (
            (before.hostname, 80),
            (before.hostname, 443),
        )
        downgraded = after.scheme != "https" and (after.scheme != "http" or before.scheme == "https")
        if downgraded or not (same or "*" in named or after.hostname in named):
            where = f"{after.scheme}://{after.netloc}"
            trust = f"another host; where you trust it, set shards.redirects=[{after.hostname}] of the data set, or "
            why = "which is not encrypted" if downgraded else f"{trust}{REDIRECTS}={after.hostname}"
            raise ShardError(f"{req.full_url}: redirected to {where}, {why}", "refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _place(parts: urllib.parse.SplitResult) -> tuple[str | None, int]:
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


@functools.lru_cache(maxsize=8)
def _opener(redirects: tuple[str, ...]) -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Redirects(redirects))


def _body(response: Any, most: int) -> bytes:
    """The bytes that a server or a pipe sends, `most` at most, whatever it promises."""
    parts, left = [], most
    while left and (part := response.read(min(left, AT_ONCE))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _stated_length(response: Any) -> int | None:
    stated = response.headers.get("Content-Length", "")
    return int(stated) if re.fullmatch("[0-9]{1,18}", stated) else None


def _http_get(location: str, most: int, retry: Retry) -> bytes:
    with _opener(retry.redirects).open(_request(location, {}), timeout=retry.timeout_s) as response:
        data, stated = _body(response, most), _stated_length(response)
    if stated is not None and len(data) != min(stated, most):
        raise http.client.IncompleteRead(data)
    return data


def _http_range(location: str, offset: int, size: int, retry: Retry) -> bytes:
    """The range; fewer bytes only where the file ends before."""
    headers = {"Range": f"bytes={offset}-{offset + size - 1}"}
    try:
        with _opener(retry.redirects).open(_request(location, headers), timeout=retry.timeout_s) as response:
            if response.status != 206:
                raise _no_ranges(location, response.status)
            data, end = _body(response, size + 1), _stated_end(location, response, offset)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        return b""
    if len(data) > size:
        raise ShardError(f"{location}: asked for {size} bytes from {offset} on, the server sends more", "refused")
    if len(data) != end - offset:
        raise http.client.IncompleteRead(data, size - len(data))
    return data


def _no_ranges(location: str, status: int) -> ShardError:
    return ShardError(
        f"{location}: the server answers range requests with {status}; expected 206. Copy the shards to a disk or a "
        "server that knows ranges; a data set copies them to a folder named in its shards.cache",
        "no ranges",
    )


def _stated_end(location: str, response: Any, offset: int) -> int:
    """The byte after the last one that a server sends, which must begin with `offset`."""
    stated = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]+|\*)", stated.strip())
    if not found or int(found[1]) != offset:
        raise ShardError(f"{location}: asked for bytes from {offset} on, got {stated[:80]!r}", "refused")
    return int(found[2]) + 1


class _Ranges(io.RawIOBase):
    """A remote file read in pieces, wherever one seeks to."""

    def __init__(self, location: str, retry: Retry):
        self.location, self.retry, self.at = location, retry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            raise io.UnsupportedOperation("its end is not known")
        self.at = offset + (self.at if whence == os.SEEK_CUR else 0)
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer) -> int:
        data = _up_to(self.location, self.at, len(buffer), self.retry)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


class _HttpStream(io.RawIOBase):
    """A file over HTTP, from a byte on, that reconnects at the byte it has reached."""

    def __init__(self, location: str, retry: Retry, at: int = 0):
        self.location, self.retry, self.at, self.first = location, retry, at, at
        self._response: Any = None
        self._length: int | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = _again(self.location, self.retry, lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        try:
            if self._response is None:
                self._connect()
            data = self._response.read1(size)  # what has come; a break later loses none of it
            if not data and self._length is not None and self.at < self._length:
                raise http.client.IncompleteRead(b"", self._length - self.at)
            return data
        except (OSError, http.client.HTTPException):
            self._disconnect()
            raise

    def _connect(self) -> None:
        headers = {"Range": f"bytes={self.at}-"} if self.at else {}
        try:
            response = _opener(self.retry.redirects).open(
                _request(self.location, headers), timeout=self.retry.timeout_s
            )
        except urllib.error.HTTPError as error:
            if error.code != 416 or self.at != self.first:
                raise
            error.close()
            self._response, self._length = io.BytesIO(), self.at  # the file ends before
            return
        self._response = response
        if not self.at:
            self._length = _stated_length(response)
        elif response.status == 206:
            self._length = _stated_end(self.location, response, self.at)
        elif self.at == self.first:
            raise _no_ranges(self.location, response.status)
        else:
            raise ShardError(f"{self.location}: broke at byte {self.at}, and the server knows no ranges", "connection")

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def close(self) -> None:
        self._disconnect()
        super().close()


class ForwardReader:
    """Bytes at rising offsets of one shard, over one connection, where `read_at` makes a request each time.

    What lies between two reads is transferred and dropped, up to `skip` bytes; beyond, and for an offset before the
    last one, a new connection is made.
    """

    def __init__(self, location: str, retry: Retry = RETRY, *, skip: int = 4 << 20):
        self.location, self.retry, self.skip = location, retry, skip
        self._at = 0
        self._stream: BinaryIO | None = None

    def read_at(self, location: str, offset: int, size: int, retry: Retry) -> bytes:
        """Reads as the function `read_at` does, from this shard alone, with the same errors."""
        assert location == self.location and retry == self.retry, "one reader for each shard"
        kind = scheme(location)
        if kind in ("file", "pipe") or not size:
            return read_at(location, offset, size, retry)
        read = self._http if kind == "http" else self._seek
        data = read(offset, size)
        self._at = offset + len(data)
        return _all_of(location, offset, size, data)

    def _http(self, offset: int, size: int) -> bytes:
        gap = offset - self._at
        if self._stream is None or not 0 <= gap <= self.skip:
            self.close()
            self._stream = io.BufferedReader(_HttpStream(self.location, self.retry, offset), 1 << 20)
            gap = 0
        with self._closed_on_error():
            _body(self._stream, gap)
            return _body(self._stream, size)

    def _seek(self, offset: int, size: int) -> bytes:
        def attempt() -> bytes:
            with self._closed_on_error():
                if self._stream is None:
                    self._stream = _fsspec(self.location).open(_strip(self.location), "rb")
                self._stream.seek(offset)
                return _body(self._stream, size)

        return _again(self.location, self.retry, attempt)

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """Closes the connection where the block fails, whatever the error: nobody knows where it stands then."""
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            yield
            undo.pop_all()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _fsspec(location: str) -> Any:
    try:
        import fsspec
    except ImportError:
        raise ConfigError(f"{location}: needs fsspec; pip install fsspec") from None
    try:
        return fsspec.core.url_to_fs(location)[0]
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{location}: fsspec cannot open it ({error})") from None


def _strip(location: str) -> str:
    import fsspec

    return fsspec.core.url_to_fs(location)[1]
