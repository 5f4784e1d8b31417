"""The errors a user can cause.

Each carries one line: what was expected, what came, where, and what to do. Every command line of the package runs in
`run_command`, which prints that line and gives status 2; in Python they are ordinary exceptions. Bugs of ours stay bare
Python exceptions with a traceback.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable

from lavis_lstp.redaction import printable, without_secrets


class LstpError(Exception):
    """Base of every error whose cause lies in the input, not in the program.

    Its text may be printed: it has no secret of an address in it, no escape of a terminal, and an end.
    """

    def __init__(self, *args: object):
        super().__init__(*(_told(one) if isinstance(one, str) else one for one in args))


MOST_TEXT = 4000
"""Characters of an error: a value or a name in it may be as long as the file that it comes from."""


def _told(text: str) -> str:
    text = printable(without_secrets(text))
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT // 2]} ... {text[-MOST_TEXT // 2 :]}"


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


class BusyError(LstpError, RuntimeError):
    """Another process is writing to the same place."""


STOPPED = 130
"""Exit status after Ctrl-C, 128 + SIGINT."""
BROKEN_PIPE = 141
"""Exit status when nobody reads the output any more (`| head`), 128 + SIGPIPE, as of any other program."""


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command line's work; whatever a user or the system can cause becomes one line on stderr and a status.

    Returns:
        What `command` returned (0 for None); 2 after an error of the user's, or of the system's such as a full disk;
        130 after Ctrl-C; 141, in silence, when the reader of the output has gone.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us, as `>&-` and services do
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))
    try:
        status = command() or 0
        sys.stdout.flush()
        return status
    except LstpError as error:
        return _tell(str(error))
    except BrokenPipeError:
        _mute()
        return BROKEN_PIPE
    except OSError as error:
        if error.filename is None:
            _mute()  # Python would try to flush it again at its end
        where = error.filename if error.filename is not None else "output"
        return _tell(f"{where}: {error.strerror}" if error.strerror else str(error) or type(error).__name__)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        return _tell(
            f"this command needs {error.name}, which is not installed; pip install {error.name}. Without it: "
            "lavis-lstp select VIDEO QUESTION --method uniform, with --answer-by MODEL for a server's answer"
        )
    except UnicodeEncodeError as error:
        if error.encoding == "utf-8":
            raise
        return _tell(
            f"{shortened(error.object)!a} cannot be written in this locale ({error.encoding}); set PYTHONUTF8=1"
        )
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED


def _tell(text: str) -> int:
    print(f"error: {' '.join(text.splitlines())}", file=sys.stderr)
    return 2


def _mute() -> None:
    """Let what is still in the buffer of stdout go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def no_value(text: object) -> str:
    """Return a remedy for Python's None and the like, which are texts in YAML; empty for any other text."""
    return "; no value is null there" if os.path.basename(str(text)) in ("None", "none", "nil", "NULL") else ""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """One line for a name that is not known: `unknown flow 'raftt'; did you mean 'raft_large'? known: ...`."""
    known, name = sorted(known), shortened(name)
    in_any_case = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), in_any_case, n=1, cutoff=0.5)
    hint = f"did you mean '{in_any_case[close[0]]}'? " if close else ""
    return f"unknown {kind} '{name}'; {hint}known: {', '.join(known)}"
