"""Files and folders that are either complete or absent.

Text, JSON and JSON lines go in; a file under its final name comes out only when all of it is on disk: written under
a temporary name beside it, flushed, then renamed. A process killed at any moment leaves the old file or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from lavis_lstp.errors import AnnotationError, ConfigError, LstpError


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[TextIO]:
    """Open a text file that replaces `path` when the block ends, and vanishes when it raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "w", encoding="utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def complete_folder(path: str | os.PathLike) -> Iterator[Path]:
    """An empty folder that is named `path` when the block ends, and vanishes when it raises.

    Raises:
        ConfigError: `path` is a file, or a folder with something in it.
    """
    path = Path(path).expanduser()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(f"'{path}' exists already; expected the name of a new folder")
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.mkdir(parents=True)
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~mask)  # safetensors leaves 0600, which no colleague can read
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        if path.is_dir():
            path.rmdir()
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path}: cannot be read as JSON ({reason})") from None
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, got {type(value).__name__}")
    for key, is_good in (forms or {}).items():
        if key not in value:
            raise error(f"{path}: key '{key}' is missing; it has {', '.join(value)[:80] or 'none'}")
        if not is_good(value[key]):
            raise error(f"{path}: '{key}' is not of the form that was written: {value[key]!r:.80}")
    return value


def sha256_file(path: str | os.PathLike) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
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
