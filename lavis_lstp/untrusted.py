"""The line between data and the machine: what a file says stays data.

In: values that came out of a file which others may have written: a run's manifest, a checkpoint's, results, shards,
annotations, spans, verdicts. Out: the same values, or one error. Text out of a file is never interpolated, never a
command, never an address and never a place to write; only the configuration on the user's own command line may name
`pipe:`, http, what fsspec opens, caches and environment variables.

A recorded value becomes part of a configuration through `recorded`, an id becomes a file's name after
`why_no_file_name`. `redaction` has what a terminal may be shown.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from lavis_lstp.errors import ConfigError
from lavis_lstp.redaction import printable, without_secrets

SHOWN = 80
"""Characters of a refused value that its error shows."""

_COMMAND = re.compile(r"\s*pipe:", re.IGNORECASE)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|::|^\s*(?:\\\\|//)", re.IGNORECASE)
_BRACES = re.compile(r"\{[^{}]*(?:,|\.\.)[^{}]*\}")


def recorded(value: Any, source: object, *, replaced: Iterable[str] = ()) -> Any:
    """A value out of a file, fit to become part of a configuration.

    Args:
        value: plain containers, as JSON gives them.
        source: the file, for the message.
        replaced: dotted keys that the user's own command line sets; what the file says there is dropped.

    Returns:
        The same containers; None stands where a refused value is replaced.

    Raises:
        ConfigError: a text in it is a variable, a command or an address; the line names file and key.
    """
    return _checked(value, "", source, tuple(replaced))


def _checked(value: Any, key: str, source: object, replaced: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {
            _checked(str(name), f"{key}.{name}"[:SHOWN].lstrip("."), source, ()): _checked(
                one, f"{key}.{name}".lstrip("."), source, replaced
            )
            for name, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [_checked(one, f"{key}[{number}]", source, replaced) for number, one in enumerate(value)]
    kind = what_it_names(value) if isinstance(value, str) else None
    if kind is None:
        return value
    if any(key == one or key.startswith((f"{one}.", f"{one}[")) for one in replaced):
        return None
    shown = without_secrets(value)[:SHOWN]
    raise ConfigError(
        f"{source}: {key or 'a value'} is {kind}, {shown!r}, and what a file says is never run, resolved or opened; "
        "name it on your own command line (--options, --videos), where you want it"
    )


def what_it_names(text: str) -> str | None:
    """The kind of thing that a text would name if it were taken as configuration; None for plain text and paths.

    Braces before a colon count as a command, because `{pipe,x}:id` becomes one when braces are expanded.
    """
    if "${" in text or text.strip() == "???":
        return "a variable"
    if _ADDRESS.search(text):
        return "an address"
    if _COMMAND.match(text) or (":" in text and _BRACES.search(text)):
        return "a command"
    return None


def unicode_text(text: str, where: str) -> str:
    """The text itself. Raises ConfigError for half a surrogate pair, which JSON may bring and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: is not Unicode text, it has half a surrogate pair") from None
    return text


# ---- names that become files -----------------------------------------------------------------------------------------

LONGEST_NAME = 200
"""Bytes of an id that becomes a file's name; file systems take 255, ending and temporary marks included."""
LONGEST_PATH = 1024


def why_no_path(name: str) -> str | None:
    """Why a text is no relative path that stays inside its folder, on any system; None where it is one."""
    try:
        size = len(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return "is not Unicode text"
    parts = PurePosixPath(name).parts
    if not parts:
        return "is empty"
    if "\\" in name or "\0" in name or PureWindowsPath(parts[0]).drive:
        return "has a backslash, a drive letter or a null in it; folders are parted by /"
    if name.startswith("/") or ".." in parts:
        return "leads out of its folder"
    if size > LONGEST_PATH or any(len(os.fsencode(part)) > 255 for part in parts):
        return f"is longer than {LONGEST_PATH} bytes, or than 255 in one part"
    return None


def why_no_file_name(name: str) -> str | None:
    """Why an id cannot become the name of one file; None where it can. Writers and readers of such files ask here."""
    if "/" in name or name in ("", "."):
        return "is empty, a dot, or has a slash in it"
    why = why_no_path(name)
    return why or (f"is longer than {LONGEST_NAME} bytes" if len(os.fsencode(name)) > LONGEST_NAME else None)


# ---- what a log says -------------------------------------------------------------------------------------------------


def guard_log() -> None:
    """Messages that the root logger's handlers write from now on are printable and without secrets."""
    for handler in logging.getLogger().handlers:
        if _as_text not in handler.filters:
            handler.addFilter(_as_text)


def _as_text(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(without_secrets(record.getMessage())), None
    return True
