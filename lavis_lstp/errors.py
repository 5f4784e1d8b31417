"""The errors a user can cause.

Each carries one line: what was expected, what came, where, and what to do. The command line entry points
(`lavis.train`, `lavis.evaluate`, `lavis-lstp`) print that line and exit with status 2; in Python they are
ordinary exceptions. Bugs of ours stay bare Python exceptions with a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from lavis_lstp.redaction import printable, without_secrets


class LstpError(Exception):
    """Base of every error whose cause lies in the input, not in the program.

    Its text may be printed: it has no secret of an address in it, and no escape of a terminal.
    """

    def __init__(self, *args: object):
        super().__init__(*(printable(without_secrets(one)) if isinstance(one, str) else one for one in args))


class ConfigError(LstpError, ValueError):
    """A configuration file, an override or a combination of settings cannot be used."""


class AnnotationError(LstpError, ValueError):
    """An annotation file or one of its entries is not of the documented form."""


class VideoError(LstpError, RuntimeError):
    """A video is missing, unreadable or does not hold the frames asked for."""


class ShardError(LstpError, RuntimeError):
    """A tar shard, its index or its manifest is missing, damaged, or not of the documented form.

    Attributes:
        cause: a few words that are the same for all errors of one kind, to count by.
    """

    def __init__(self, message: str, cause: str = "other"):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self):
        return type(self), (str(self), self.cause)


class WeightsError(LstpError, RuntimeError):
    """Model weights are missing, of the wrong shape, or not safe to read."""


class CoverageError(LstpError, RuntimeError):
    """An evaluation did not produce exactly one prediction for each question."""


def shortened(value: object, most: int = 200) -> str:
    """A value of any length for a line of text."""
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """One line for a name that is not known: `unknown flow 'raftt'; did you mean 'raft_large'? known: ...`."""
    known, name = sorted(known), shortened(name)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"unknown {kind} '{name}'; {hint}known: {', '.join(known)}"
