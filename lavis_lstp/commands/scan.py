"""`lavis-lstp doctor --scan FOLDER`: keys and passwords in a folder, before it is shared.

In: a folder of a run, of results or of shards. Out: file, line and kind of each find, never the secret itself. The
forms of keys are those of `detect-secrets`, which are kept up to date there, and what `redaction` cuts out of our own
files; this module adds where to look: lines of texts, headers of safetensors, JSON in tars, the pickle inside a `.pt`,
and the strings of other files, such as the judge's cache. Guesses by entropy are left out, as
every manifest has digests.
"""

from __future__ import annotations

import functools
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lavis_lstp.errors import ConfigError, ShardError
from lavis_lstp.redaction import KEYS, without_secrets

MOST_BYTES = 64 << 20
"""A file that is no text is searched up to here, and a header is read up to here."""
LONGEST_LINE = 1 << 20
"""Characters; a longer line is searched in pieces that overlap."""
OVERLAP = 1 << 12
NOISY = {"IPPublicDetector", "ArtifactoryDetector"}
"""Forms that ordinary words and addresses have, too."""
MEDIA = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".gif", ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif"}
_DATA_URI = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]+")
_STRINGS = re.compile(rb"[\x20-\x7e]{8,}")


class Found(NamedTuple):
    """One find: where it is, and what kind of secret it looks like."""

    file: str
    line: int
    kind: str


def scan(folder: str | Path) -> Iterator[Found]:
    """Every find in the files below a folder, in the order of their names; links are not followed.

    A file that cannot be read to its end is a find, too: nobody knows what is in it.

    Raises:
        ConfigError: there is no such folder.
    """
    root = Path(folder)
    if not root.exists():
        raise ConfigError(f"{root}: no such file or folder to scan")
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    for path in files:
        if path.is_symlink() or path.suffix.lower() in MEDIA:
            continue
        try:
            for name, number, text in _texts(path):
                for kind in sorted(kinds_in(text)):
                    yield Found(name, number, kind)
        except (OSError, ShardError, zipfile.BadZipFile) as error:
            yield Found(str(path), 0, f"not searched to its end: {' '.join(str(error).split())}")


def kinds_in(text: str) -> set[str]:
    """Kinds of secrets that a text seems to hold."""
    text = _DATA_URI.sub("", text)
    found = set()
    for start in range(0, max(1, len(text)), LONGEST_LINE):
        piece = text[start : start + LONGEST_LINE + OVERLAP]
        found |= {kind for kind, search in _detectors() if search(piece)}
        if not found and without_secrets(piece) != piece:
            found.add("password or token in an address, a header or an option")
    return found


@functools.lru_cache(maxsize=1)
def _detectors() -> list[tuple[str, Callable[[str], object]]]:
    try:
        from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
        from detect_secrets.plugins.base import RegexBasedDetector
    except ImportError:
        raise ConfigError("doctor --scan needs detect-secrets: pip install detect-secrets") from None
    classes = get_mapping_from_secret_type_to_class().values()
    known = [one for one in classes if issubclass(one, RegexBasedDetector) and one.__name__ not in NOISY]
    theirs = [(one.secret_type, functools.partial(_any_of, one())) for one in known]
    return [*theirs, *((kind, re.compile(rf"\b{form}").search) for kind, form in KEYS.items())]


def _any_of(plugin, text: str) -> bool:
    return any(match.strip("*") for match in plugin.analyze_string(text) if "***" not in match)


def _texts(path: Path) -> Iterator[tuple[str, int, str]]:
    """(what to call it, line, text) of all that is to be searched in a file."""
    if path.suffix == ".tar":
        yield from _tar(path)
    elif path.suffix in (".safetensors", ".frames", ".flow", ".index"):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            yield f"{path} (header)", 1, file.read(min(size, MOST_BYTES)).decode("utf-8", "replace")
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith((".pkl", ".json", ".txt", ".yaml")):
                    with archive.open(info) as file:
                        yield f"{path} ({info.filename})", 1, _strings(file.read(MOST_BYTES))
    else:
        with open(path, "rb") as file:
            is_text = b"\0" not in file.read(1 << 16)
            file.seek(0)
            if is_text:
                for number, line in enumerate(file, start=1):
                    yield str(path), number, line.decode("utf-8", "replace")
            else:
                yield f"{path} (strings)", 1, _strings(file.read(MOST_BYTES))


def _strings(raw: bytes) -> str:
    return b"\n".join(_STRINGS.findall(raw)).decode("ascii")


def _tar(path: Path) -> Iterator[tuple[str, int, str]]:
    """JSON and headers of safetensors in a shard; ShardError where a tar is damaged."""
    from lavis_lstp.data.shards.tar import TarScan

    with open(path, "rb") as stream:
        tar = TarScan(stream, str(path))
        for member in tar:
            if member.size > MOST_BYTES or Path(member.name).suffix.lower() in MEDIA:
                continue
            raw = tar.content()
            if member.name.endswith((".frames", ".flow", ".safetensors")):
                raw = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
            elif member.name.endswith(".json"):
                raw = _unescaped(raw)
            for number, line in enumerate(raw.decode("utf-8", "replace").split("\n"), start=1):
                yield f"{path}, {member.name}", number, line


def _unescaped(raw: bytes) -> bytes:
    """JSON with one line a value, so that an escape hides nothing; as it is where it is none."""
    try:
        return json.dumps(json.loads(raw), ensure_ascii=False, indent=0).encode("utf-8", "replace")
    except (ValueError, RecursionError):
        return raw


def report(folder: str | Path) -> tuple[list[Found], str]:
    """All finds, and the lines that a terminal shows."""
    found = list(scan(folder))
    lines = [f"{one.file}:{one.line}: {one.kind}" for one in found]
    verdict = f"{len(found)} places may hold keys or passwords; replace the keys before you share {folder}"
    return found, "\n".join([*lines, verdict if found else f"{folder}: no key or password found"])
