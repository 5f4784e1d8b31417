"""Files and folders that are either complete or absent, and have one writer at a time.

Text, JSON, JSON lines or whatever a block writes go in; a file under its final name comes out only when all of it is on
disk: written under a temporary name beside it, flushed, then renamed. A process killed at any moment leaves the old
file or the new one, and a temporary one that the next owner of the place removes.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import socket
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from lavis_lstp.errors import AnnotationError, BusyError, ConfigError, LstpError

if TYPE_CHECKING:
    from filelock import FileLock

HOST = re.sub(r"\W", "_", socket.gethostname())[:32]
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?:\w*-)?\d+(?:-\d+)?\.tmp", re.DOTALL)
_NAME_BYTES = 160
"""Bytes of a file's name that a temporary name keeps; a name may have 255 in all."""
_counter = itertools.count()
_acquired = threading.local()


def expanded(path: str | os.PathLike) -> Path:
    """The path, `~` resolved.

    Raises:
        ConfigError: the system knows no home folder, as of a user who exists in no file of a container.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: no home folder is known; set HOME, or write the whole path") from None


def cache_folder() -> Path:
    """Where caches of this package lie, below XDG_CACHE_HOME. Raises ConfigError as `expanded`."""
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lavis_lstp"


# ---- complete or absent -----------------------------------------------------------------------------------------


def temporary(path: str | os.PathLike) -> Path:
    """A name beside `path` that no other process on any host uses, and that `sweep` recognises."""
    path = Path(path)
    name = path.name.encode()[:_NAME_BYTES].decode(errors="ignore")
    return path.with_name(f".{name}.{HOST}-{os.getpid()}-{next(_counter)}.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file's name is one that `temporary` gives."""
    return _TEMPORARY.fullmatch(name) is not None


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name to write to; the file is named `path` when the block ends, and vanishes when it raises.

    Raises:
        OSError: the system refuses; `filename` is `path` where it names no other file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary(path)
    try:
        with writing_to(path):
            yield partial
            _settle(partial)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[TextIO]:
    """Open a text file that replaces `path` when the block ends, and vanishes when it raises."""
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as handle:
        yield handle


@contextlib.contextmanager
def complete_folder(path: str | os.PathLike) -> Iterator[Path]:
    """An empty folder that is named `path` when the block ends, and vanishes when it raises; see `owned`.

    Raises:
        ConfigError: `path` is a file, or a folder with something in it.
        BusyError: another process is making it.
    """
    path = expanded(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(f"'{path}' exists already; expected the name of a new folder")
    with owned(path, beside=True):
        partial = temporary(path)
        try:
            with writing_to(path):
                partial.mkdir(parents=True)
                yield partial
                for file in partial.rglob("*"):
                    if file.is_file():
                        _settle(file)
                if path.is_dir():
                    path.rmdir()
                os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _settle(file: Path) -> None:
    """Bring a file to disk, and let colleagues read it where safetensors left it at 0600."""
    with open(file, "rb") as handle:
        if os.fstat(handle.fileno()).st_mode & 0o777 == 0o600:
            mask = os.umask(0)
            os.umask(mask)
            file.chmod(0o666 & ~mask)
        os.fsync(handle.fileno())


@contextlib.contextmanager
def writing_to(path: str | os.PathLike) -> Iterator[None]:
    """Turn what goes wrong in the block into an OSError with a file's name, where it is the system's refusal to write.

    A full disk makes Python raise an OSError without a name, safetensors an error of its own, and torch a RuntimeError
    about "unexpected pos".
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise
    except _tensor_errors() as error:
        cause = system_error(error, path)
        if cause is None:
            raise
        raise cause from error


def _tensor_errors() -> tuple[type[Exception], ...]:
    safetensors = sys.modules.get("safetensors")
    return (RuntimeError, safetensors.SafetensorError) if safetensors else (RuntimeError,)


def system_error(error: Exception, path: str | os.PathLike) -> OSError | None:
    """The OSError behind what safetensors or torch raised while writing `path`; None where there is none."""
    text = str(error)
    if isinstance(error, (LstpError, OSError)):
        return error if isinstance(error, OSError) else None
    if number := re.search(r"\(os error (\d+)\)", text):
        code = int(number[1])
    elif "unexpected pos" in text or "PytorchStreamWriter failed writing" in text:
        code = errno.ENOSPC  # torch's zip writer hides what the system said; in practice it is this
    else:
        return None
    return OSError(code, os.strerror(code), os.fspath(path))


# ---- one writer at a time ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def owned(
    target: str | os.PathLike, *, beside: bool = False, leftovers: Callable[[str], bool] | None = None
) -> Iterator[None]:
    """Let no other process write `target` while the block runs, and remove what killed ones left there.

    The lock is the kernel's (`flock`), so that it ends with its process however that ends. A process may own a target
    several times over; its forked children do not own it.

    Args:
        target: an output folder, in which the lock lies.
        beside: `target` is a file, a set or a new folder; the lock lies beside it.
        leftovers: from the final name of a temporary file to whether it belongs to `target`; by default everything
            in the folder, or what has exactly the name.

    Raises:
        BusyError: another process owns it; the line says who, where and since when.
        OSError: the folder cannot be written.
    """
    target = expanded(target)
    folder, stem = (target.parent, f".{target.name}.owner") if beside else (target, ".owner")
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / f"{stem}.json"
    lock = _lock(folder / f"{stem}.lock")
    if lock is None:
        raise BusyError(f"{target}: {_who(owner)}; wait for it, or end it")
    first = lock.lock_counter == 1
    try:
        if first:
            ours = leftovers or ((lambda name: name == target.name) if beside else (lambda name: True))
            sweep(folder, lambda name: name == owner.name or ours(name))
            started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])
            write_json(owner, {"pid": os.getpid(), "host": socket.gethostname(), "since": started, "command": command})
        yield
        if first:  # of workers that were killed, and whose work others did again
            sweep(folder, ours)
    finally:
        if first:
            owner.unlink(missing_ok=True)
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _lock(path: Path) -> FileLock | None:
    """The kernel's lock on a file that its holder removes; None where another process has it."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, mode=0o666, is_singleton=True, on_acquired=_remember)
    while True:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        with contextlib.suppress(FileNotFoundError):
            if lock.lock_counter > 1 or os.path.samestat(_acquired.status, os.stat(path)):
                return lock
        lock.release()  # of a file that its holder removed after it was opened here


def _remember(descriptor: int) -> None:
    _acquired.status = os.fstat(descriptor)


def _who(owner: Path) -> str:
    """The holder of a lock by its own words, for which one that has just begun gets a second."""
    for _ in range(20):
        try:
            said = json.loads(owner.read_text(encoding="utf-8"))
            facts = [ascii(str(said[key])[:80])[1:-1] for key in ("pid", "host", "command", "since")]
            return "process {} on {} ({}) has been working here since {}".format(*facts)
        except (OSError, ValueError, TypeError, KeyError):
            time.sleep(0.05)
    return "another process works here"


def sweep(folder: Path, ours: Callable[[str], bool] = lambda name: True) -> None:
    """Remove files and folders that never got their final names; for the owner of what `ours` accepts."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(path.name)
        if match and ours(match["name"]):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def find_path(root: Path, name: str) -> Path:
    """The file or folder below `root` that a name means: as it is written, else with its accents encoded otherwise.

    File systems and tools write an accent as a letter of its own (NFD) or as part of one (NFC).
    """
    path = root / name
    if name.isascii() or path.exists():
        return path
    here = root
    for part in Path(name).parts:
        if here.is_dir() and not (here / part).exists():
            part = _by_nfc(here, here.stat().st_mtime_ns).get(unicodedata.normalize("NFC", part), part)
        here = here / part
    return here


@functools.lru_cache(maxsize=16)
def _by_nfc(folder: Path, changed_ns: int) -> dict[str, str]:
    """NFC of each non-ASCII name in a folder -> the name; read once for each state of the folder, however many ask."""
    names = (name for name in sorted(os.listdir(folder)) if not name.isascii())
    return {unicodedata.normalize("NFC", name): name for name in names}


# ---- JSON -------------------------------------------------------------------------------------------------------


def write_json(path: str | os.PathLike, value: Any, *, indent: int | None = 2) -> None:
    with atomic_writer(path) as handle:
        handle.write(json_text(value, indent=indent) + "\n")


def write_jsonl(path: str | os.PathLike, rows: Iterable[Any]) -> None:
    with atomic_writer(path) as handle:
        for row in rows:
            handle.write(json_text(row) + "\n")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON that every reader takes: a number that is infinite or NaN becomes null."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def strict_json(text: str | bytes, *, finite: bool = True, names: bool = True) -> Any:
    """The value of a JSON text, where every reader would find the same one.

    Args:
        finite: refuse NaN, Infinity and numbers such as 1e999, too.
        names: take half a character where it may be a byte of a file's name that is no text.

    Raises:
        HalfCharacter: an escape holds another one.
        ValueError: it is no JSON, or too deep, or a key stands twice in one object.
    """
    try:
        plain = text if isinstance(text, str) else text.decode(json.detect_encoding(text), "surrogatepass")
        value = (_FINITE if finite else _ANY_NUMBER).decode(plain)
        if "\\u" in text if isinstance(text, str) else b"\\u" in text:
            errors = "surrogateescape" if names else "strict"
            if not _is_text(json.dumps(value, ensure_ascii=False), errors):
                raise HalfCharacter(place_in(value, lambda one: isinstance(one, str) and not _is_text(one, errors)))
    except _NotFinite as error:
        place = ""
        with contextlib.suppress(RecursionError, ValueError):  # nested too deep, or wrong behind the number, too
            place = place_in(_ANY_NUMBER.decode(plain), lambda one: isinstance(one, float) and not math.isfinite(one))
        raise ValueError(f"{place}: {error}" if place else str(error)) from None
    except RecursionError as error:
        raise ValueError(str(error)) from None
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r:.80} stands twice in one object")
    return found


class _NotFinite(ValueError):
    """A number stands there that is none: NaN, Infinity or 1e999."""


def _no_number(name: str) -> Any:
    raise _NotFinite(f"{name} is no number of JSON; write null, as pandas' to_json does")


def _number(text: str) -> float:
    if not math.isfinite(float(text)):
        raise _NotFinite(f"{text[:40]} is larger than any number")
    return float(text)


def place_in(value: Any, wrong: Callable[[Any], bool]) -> str:
    """Return where the first wrong value or key is, such as `entry 3, key 'duration'`; empty where it stands alone."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        word = "key" if isinstance(value, dict) else "entry"
        for name, one in pairs:
            if isinstance(one, dict | list) and (below := place_in(one, wrong)):
                return f"{word} {name!r:.80}, {below}"
            if wrong(one) or wrong(name):
                return f"{word} {name!r:.80}"
    return ""


class HalfCharacter(ValueError):
    """A text holds one half of a character that two escapes write, as of an emoji that was cut."""

    def __init__(self, place: str = ""):
        where = f"{place}: " if place else ""
        super().__init__(f"{where}half a character (a lone \\ud800 to \\udfff), which no text has")


def _is_text(text: str, errors: str) -> bool:
    try:
        text.encode("utf-8", errors)
    except UnicodeEncodeError:
        return False
    return True


_ANY_NUMBER = json.JSONDecoder(object_pairs_hook=_no_key_twice)
_FINITE = json.JSONDecoder(object_pairs_hook=_no_key_twice, parse_constant=_no_number, parse_float=_number)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection while many rows are read: they are millions of objects without a cycle, and counting them
    again and again takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _spans_lines(text: str) -> bool:
    """Return whether a text that begins with an object goes on with it behind its first line, as editors indent it."""
    first, _, rest = text.partition("\n")
    if not rest.strip() or rest.lstrip("\r\n").startswith("{"):
        return False
    try:
        strict_json(first, finite=False)
    except ValueError:
        return True
    return False


def json_rows(text: str, path: str | os.PathLike, parse: Callable[[str, str], Any]) -> list[tuple[str, Any]]:
    """(place, row) of each row of a JSON list or of JSON lines; `place` names file and row, for messages.

    An object that spans several lines is one row.

    Args:
        parse: (text, place) -> the value, or an error that names the place.
    """
    if text.lstrip()[:1] == "[":
        return [(f"{path}, entry {n}", row) for n, row in enumerate(parse(text, f"{path}, file"))]
    if text.lstrip()[:1] == "{" and _spans_lines(text.lstrip()):
        return [(place := f"{path}, its one object", parse(text, place))]
    lines = enumerate(text.split("\n"), 1)  # not splitlines: a JSON string may hold U+2028
    places = ((f"{path}, line {n}", line) for n, line in lines if line.strip())
    return [(place, parse(line, place)) for place, line in places]


def read_jsonl(path: str | os.PathLike) -> Iterator[Any]:
    """Rows of a JSON-lines file, each an object, up to the first line a killed writer left unfinished.

    Raises:
        AnnotationError: a line holds something else than an object.
    """
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line.decode("utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError):
                return
            except RecursionError:
                row = None
            if not isinstance(row, dict):
                raise AnnotationError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}")
            yield row


def read_record(
    path: str | os.PathLike, forms: Mapping[str, Callable[[Any], bool]] | None = None, *, error: type[LstpError]
) -> dict[str, Any]:
    """A JSON object that this package has written, out of a file that anybody may have changed since.

    Args:
        forms: key -> whether its value is of the form that was written; all of these keys must be there.
        error: what is raised.

    Raises:
        LstpError: the file cannot be read, or is not of that form; of the class `error`.
    """
    path = Path(path)
    try:
        value = strict_json(path.read_text(encoding="utf-8-sig"), finite=False)
    except (OSError, ValueError) as reason:
        raise error(f"{path}: cannot be read as JSON ({reason})") from None
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, got {type(value).__name__}")
    for key, is_good in (forms or {}).items():
        if key not in value:
            raise error(f"{path}: key '{key}' is missing; it has {', '.join(value)[:80] or 'none'}")
        if not is_good(value[key]):
            raise error(f"{path}: '{key}' is not of the form that was written: {value[key]!r:.80}")
    return value


def sha256_file(source: str | os.PathLike | bytes | BinaryIO) -> str:
    """SHA-256 of a file, given by its path, by its bytes or open: 64 hexadecimal digits, in pieces of 1 MiB."""
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as handle:
            return sha256_file(handle)
    if isinstance(source, bytes | bytearray | memoryview):
        return hashlib.sha256(source).hexdigest()
    digest = hashlib.sha256()
    source.seek(0)
    while block := source.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Digest of a value made of plain containers; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def sorted_header(raw: bytes) -> bytes:
    """safetensors writes its metadata in the order of a hash map, another in each process; here it is sorted."""
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header = {name: dict(sorted(value.items())) for name, value in sorted(header.items())}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]
