"""Tar files: written so that equal samples give equal bytes, read so that nothing wrong with one goes unnoticed.

In: keys and members, as bytes or files. Out: a complete tar under its name, and where each member lies in it.

Headers are made by the standard library's `tarfile`; `webdataset.TarWriter`, with a fixed mtime, writes equal bytes,
too, but takes each member as bytes in memory, where a video is copied and hashed here in one pass, and does not say
where in the file a member went, which the index is about. Reading is not done by `tarfile`: it takes a damaged header
in the middle, or a cut between two members, for the end of the file and silently gives fewer. What is written here is
read by `tar`, `tarfile` and `webdataset`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lavis_lstp.data.shards.format import by_member, split_member
from lavis_lstp.errors import ShardError
from lavis_lstp.files import whole_file

BLOCK = 512
COPY = 1 << 20
SKIP = 16 << 10
AT_ONCE = 16 << 20
"""Bytes asked for at once: a header may name more than the file has, and than there is memory."""
END = bytes(2 * BLOCK)
LONG_NAME_LIMIT = 64 << 10
CONTENT_LIMIT = 4 << 30
"""Bytes of one member, or of a sample's members, that are read into memory at once."""
MEMBERS_LIMIT = 20_000_000
"""Members of one tar; each is 512 bytes there and more in memory, and a pipe need not end."""
_DATA = (tarfile.REGTYPE, tarfile.AREGTYPE)


_PLAIN = b"%b0000444\x00" + b"0000000\x00" * 2 + b"%011o\x00" + b"0" * 11 + b"\x00" + b" " * 8
_PLAIN += b"0" + bytes(100) + b"ustar  " + bytes(248)
"""A header's name, mode, owner, group, size, date, blanks for the check sum, type, link, and magic."""


class Member(NamedTuple):
    """One file in a tar. `offset` is that of its first byte, `sha256` None where it was not read."""

    name: str
    offset: int
    size: int
    sha256: bytes | None = None


def header(name: str, size: int) -> bytes:
    """The same header whoever writes it, and when: of 1970, owned by nobody, readable by all."""
    raw = name.encode("utf-8")
    if len(raw) <= 100 and size < 8**11:  # what `tarfile` makes of these, in a tenth of the time
        head = _PLAIN % (raw.ljust(100, b"\0"), size)
        return b"%b%06o\0 %b" % (head[:148], sum(head), head[156:])
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o444
    info.uid = info.gid = 0
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


class ShardWriter:
    """Writes one tar under a temporary name; `close` gives it its own.

        with ShardWriter(path) as shard:
            shard.add(key, {"mp4": Path("film.mp4"), "json": b"..."})

    A block that raises leaves nothing behind, a process that is killed a hidden `.tmp` file.

    Attributes:
        samples: (key, members) of what was added, in order.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._whole = contextlib.ExitStack()
        self._file = self._whole.enter_context(open(self._whole.enter_context(whole_file(self.path)), "wb", COPY))
        self._at = 0
        self.samples: list[tuple[str, list[Member]]] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:
            self._whole.__exit__(kind, error, trace)

    @property
    def bytes(self) -> int:
        return self._at

    def add(self, key: str, members: Mapping[str, bytes | Path]) -> dict[str, Member]:
        """Appends a sample's members in their fixed order.

        Raises:
            ShardError: the key or a member's name is not safe.
        """
        for name in members:
            split_member(f"{key}.{name}")
        return {name: self.append(key, name, members[name]) for name in by_member(members)}

    def append(self, key: str, name: str, content: bytes | Path, sha256: bytes | None = None) -> Member:
        """Appends one member; those of a key follow each other.

        Args:
            sha256: of content's bytes, where the caller has it.
        """
        full = f"{key}.{name}"
        split_member(full)
        member = self._copy(full, content) if isinstance(content, Path) else self._put(full, content, sha256)
        if not self.samples or self.samples[-1][0] != key:
            self.samples.append((key, []))
        self.samples[-1][1].append(member)
        return member

    def _put(self, full: str, content: bytes, sha256: bytes | None) -> Member:
        start = self._start(full, len(content))
        self._file.write(content)
        self._end(len(content))
        return Member(full, start, len(content), sha256 or hashlib.sha256(content).digest())

    def _copy(self, full: str, path: Path) -> Member:
        with open(path, "rb") as source:
            size = os.fstat(source.fileno()).st_size
            start, left, digest = self._start(full, size), size, hashlib.sha256()
            while left and (block := source.read(min(left, COPY))):
                digest.update(block)
                self._file.write(block)
                left -= len(block)
            if left or source.read(1):
                raise ShardError(f"{path}: changed its size while it was packed; pack again", "changed")
        self._end(size)
        return Member(full, start, size, digest.digest())

    def _start(self, full: str, size: int) -> int:
        head = header(full, size)
        self._file.write(head)
        self._at += len(head)
        return self._at

    def _end(self, size: int) -> None:
        self._at += size
        padding = -self._at % BLOCK
        self._file.write(bytes(padding))
        self._at += padding

    def close(self) -> None:
        with self._whole:
            self._file.write(END)
            self._at += len(END)


# ---------------------------------------------------------------- reading


class _Counted:
    """A stream that knows where it is, reads whole blocks and skips by seeking where it can."""

    def __init__(self, stream: BinaryIO, name: str):
        self.stream, self.name, self.at = stream, name, 0
        self.seekable = stream.seekable() if hasattr(stream, "seekable") else False

    def read(self, size: int) -> bytes:
        parts = []
        while size and (part := self._part(min(size, AT_ONCE))):
            parts.append(part)
            size -= len(part)
            self.at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _part(self, size: int) -> bytes:
        try:
            return self.stream.read(size)
        except OSError as error:
            said = error.strerror or error
            raise ShardError(f"{self.name}: cannot be read at byte {self.at} ({said})", "refused") from None

    def exactly(self, size: int, what: str) -> bytes:
        data = self.read(size)
        if len(data) < size:
            raise self._ended(what)
        return data

    def _ended(self, what: str) -> ShardError:
        return ShardError(f"{self.name}: ends inside {what}, at byte {self.at}", "truncated")

    def skip(self, size: int, what: str) -> None:
        if self.seekable and size > SKIP:
            try:
                self.stream.seek(size - 1, os.SEEK_CUR)
            except (OSError, OverflowError, ValueError) as error:  # which of them depends on the stream
                if isinstance(error, OSError) and error.errno != errno.EINVAL:
                    raise
                raise self._ended(what) from None  # farther than any file reaches
            self.at += size - 1
            size = 1  # reading the last byte tells whether it is there
        while size:
            size -= len(self.exactly(min(size, COPY), what))


class TarScan:
    """Members of a tar in the order of the file, from any stream.

        for member in TarScan(stream, name):
            content = scan.content()    # of this member; what is not taken is skipped

    Raises:
        ShardError: with cause magic, empty, truncated, header, link, unsafe name; `name` is part of each message.
    """

    def __init__(self, stream: BinaryIO, name: str):
        self._in = _Counted(stream, name)
        self.name = name
        self._left = 0
        self._padding = 0
        self._member = ""

    def __iter__(self) -> Iterator[Member]:
        long_name, headers = None, 0
        while (info := self._next_header()) is not None:
            headers += 1
            if headers > MEMBERS_LIMIT:
                raise ShardError(f"{self.name}: more than {MEMBERS_LIMIT} members; split the shard", "too many members")
            if info.type == tarfile.GNUTYPE_LONGNAME and info.size <= LONG_NAME_LIMIT:
                long_name = self._text(self._take(info).rstrip(b"\0"))
            elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE) and info.size <= LONG_NAME_LIMIT:
                long_name = self._pax_path(self._take(info)) or long_name
            elif info.type == tarfile.XGLTYPE and info.size <= LONG_NAME_LIMIT:
                self._take(info)
            elif info.type == tarfile.DIRTYPE:
                long_name = None
            elif info.type not in _DATA:
                kind = "link" if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) else "file type"
                raise ShardError(f"{self.name}: {info.name!r} is not a plain file (type {info.type!r})", kind)
            else:
                name, long_name = long_name or info.name, None
                self._member, self._left, self._padding = name, info.size, -info.size % BLOCK
                yield Member(name, self._in.at, info.size)
                self._finish()

    def content(self, limit: int | None = None) -> bytes:
        """The bytes of the member just given.

        Raises:
            ShardError: it ends early, or has more than `limit` (else CONTENT_LIMIT) bytes, of which none is read.
        """
        most = CONTENT_LIMIT if limit is None else limit
        if self._left > most:
            cause = "member too large" if limit is None else "json too large"
            raise ShardError(f"{self.name}: {self._member}: {self._left} bytes, at most {most} are read", cause)
        data = self._in.exactly(self._left, repr(self._member))
        self._left = 0
        return data

    def blocks(self) -> Iterator[bytes]:
        """The same in pieces."""
        while self._left:
            data = self._in.exactly(min(self._left, COPY), repr(self._member))
            self._left -= len(data)
            yield data

    def _finish(self) -> None:
        self._in.skip(self._left + self._padding, repr(self._member))
        self._left = self._padding = 0

    def _next_header(self) -> tarfile.TarInfo | None:
        at = self._in.at
        block = self._in.read(BLOCK)
        if not block and not at:
            raise ShardError(f"{self.name}: empty (0 bytes), expected a tar", "empty")
        if len(block) < BLOCK:
            raise ShardError(f"{self.name}: ends without an end mark, at byte {self._in.at}", "truncated")
        if block == END[:BLOCK]:
            if self._in.read(BLOCK) != END[:BLOCK]:
                raise ShardError(f"{self.name}: half an end mark at byte {at}", "truncated")
            return None
        if (info := _own(block)) is not None:
            return info
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except UnicodeDecodeError:
            raise ShardError(f"{self.name}: the name at byte {at} is not UTF-8", "unsafe name") from None
        except tarfile.HeaderError as error:
            cause = "magic" if at == 0 else "header"
            raise ShardError(f"{self.name}: no tar header at byte {at} ({error}){_hint(block)}", cause) from None
        if info.size < 0:
            raise ShardError(f"{self.name}: a member of {info.size} bytes at byte {at}", "header")
        return info

    def _take(self, info: tarfile.TarInfo) -> bytes:
        data = self._in.exactly(info.size, "a long name")
        self._in.skip(-info.size % BLOCK, "a long name")
        return data

    def _text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ShardError(f"{self.name}: a name at byte {self._in.at} is not UTF-8", "unsafe name") from None

    def _pax_path(self, raw: bytes) -> str | None:
        """`path` of a pax header, "LENGTH key=value\\n" repeated."""
        while raw:
            length, _, rest = raw.partition(b" ")
            if not length.isdigit() or len(length) > 9 or not 0 < int(length) <= len(raw):
                raise ShardError(f"{self.name}: a damaged pax header at byte {self._in.at}", "header")
            key, _, value = raw[len(length) + 1 : int(length) - 1].partition(b"=")
            if key == b"path":
                return self._text(value)
            if key == b"size":
                raise ShardError(f"{self.name}: sizes in pax headers are not read; write it with GNU tar", "header")
            raw = raw[int(length) :]
        return None


def _own(block: bytes) -> tarfile.TarInfo | None:
    """What `header` wrote, in a fifth of the time; None for any other block."""
    digits = block[124:135]
    if block[156:157] != tarfile.REGTYPE or not digits.isdigit():
        return None
    raw = block[:100].rstrip(b"\0")
    try:
        name, size = raw.decode("utf-8"), int(digits, 8)
        if header(name, size) != block:
            return None
    except ValueError:  # digits that are not octal, or no UTF-8
        return None
    info = tarfile.TarInfo(name)
    info.size = size
    return info


def _hint(block: bytes) -> str:
    for magic, kind in ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")):
        if block.startswith(magic):
            return f"; it is compressed ({kind}), unpack it first: a compressed tar cannot be read at an offset"
    return ""


def samples(scan: TarScan) -> Iterator[tuple[str, Iterator[tuple[str, Member]]]]:
    """(key, its members) of consecutive members of one key; members must be taken before the next sample is.

    Raises:
        ShardError: a name that is no key and member, a member twice in a sample.
    """
    members = iter(scan)

    def following() -> tuple[str, str, Member] | None:
        member = next(members, None)
        if member is None:
            return None
        try:
            return *split_member(member.name), member
        except ShardError as error:
            raise ShardError(f"{scan.name}: {error}", error.cause) from None

    ahead = following()
    while ahead is not None:
        key = ahead[0]

        def of_key(key: str = key) -> Iterator[tuple[str, Member]]:
            nonlocal ahead
            seen: set[str] = set()
            while ahead is not None and ahead[0] == key:
                if ahead[1] in seen:
                    raise ShardError(f"{scan.name}: {ahead[2].name!r} occurs twice", "duplicate member")
                seen.add(ahead[1])
                yield ahead[1:]
                ahead = following()

        group = of_key()
        yield key, group
        for _ in group:
            pass
