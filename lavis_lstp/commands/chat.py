"""`lavis-lstp chat VIDEO`: a conversation about a video in a terminal, or one question a line through a pipe.

In: a video, and lines: questions, or commands that begin with a slash. Out: answers as they are written, and the
seconds they came from. Lines are edited with prompt_toolkit, which brings history, keys and wide characters; without a
terminal nothing of it is imported. A line that cannot be answered is one line on stderr, and the conversation goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_lstp.commands.cli import add_model_options, built_predictor, check_model_options
from lavis_lstp.data.store import default_store
from lavis_lstp.data.subtitles import Line, read_subtitles
from lavis_lstp.errors import ConfigError, LstpError, unknown_name
from lavis_lstp.files import expanded, strict_json, whole_file, write_json
from lavis_lstp.inference.loading import EXAMPLE
from lavis_lstp.redaction import printable

if TYPE_CHECKING:
    from lavis_lstp.inference.prediction import Prediction
    from lavis_lstp.inference.predictor import Predictor

HELP = """\
/frames [FILE.png]    the frames that the last answer came from
/video FILE           another video or picture; the conversation begins anew
/subtitles FILE       lines near the shown frames are read before a question; without FILE none
/set NAME=VALUE       a setting of the answers to come, such as num_selected=8; NAME= takes it back
/save FILE.json       the conversation with the evidence of each answer
/reset                forget the turns so far
/help, /quit"""
SHEET_COLUMNS = 100


class Chat:
    """A conversation about a video.

    Args:
        predictor: the model that answers.
        video: path of the video or picture.
        history: the model reads the earlier turns, too.
    """

    def __init__(self, predictor: Predictor, video: str, *, history: bool):
        self.predictor, self.video, self.reads_history = predictor, video, history
        self.settings: dict[str, Any] = {}
        self.lines: list[Line] | None = None
        self.turns: list[Prediction] = []
        self.commands: dict[str, Callable[[str], None]] = {
            "/frames": self.frames,
            "/video": self.open,
            "/subtitles": self.read,
            "/set": self.set,
            "/save": self.save,
            "/reset": lambda _: self.turns.clear(),
            "/help": lambda _: print(HELP),
        }

    def line(self, line: str) -> None:
        """Answer a question, or follow a command.

        Raises:
            LstpError: it cannot be done; the message is one line.
        """
        word, _, rest = line.partition(" ")
        if not word.startswith("/"):
            return self.ask(line)
        if word not in self.commands:
            raise ConfigError(unknown_name("command", word, [*self.commands, "/quit"]))
        return self.commands[word](rest.strip())

    def ask(self, question: str) -> None:
        history = [(turn.question, turn.prediction) for turn in self.turns] if self.reads_history else []
        how = {"history": history, "subtitles": self.lines, **self.settings}
        for piece in self.predictor.stream(self.video, question, **how):
            if isinstance(piece, str):
                print(printable(piece), end="", flush=True)
            else:
                found = piece
        print()
        if found.span_s is not None:
            times = ", ".join(f"{time:.2f}" for time in found.frame_times_s)
            print("  [{:.2f} to {:.2f} s; frames at {} s]".format(*found.span_s, times), flush=True)
        self.turns.append(found)

    def frames(self, file: str) -> None:
        from lavis_lstp.inference.contact_sheet import as_blocks, as_png, contact_sheet, pictures_at

        if not self.turns:
            raise ConfigError("/frames: nothing has been asked yet")
        times = self.turns[-1].frame_times_s
        if not times:
            raise ConfigError("/frames: the last answer looked at no frames")
        sheet = contact_sheet(pictures_at(self.video, times), [f"{time:.2f} s" for time in times])
        path = _path(file or f"{Path(self.video).stem}_frames.png")
        with whole_file(path) as partial:
            partial.write_bytes(as_png(sheet))
        in_colour = os.environ.get("COLORTERM") in ("truecolor", "24bit") and not os.environ.get("NO_COLOR")
        if sys.stdout.isatty() and in_colour:
            print(as_blocks(sheet, min(SHEET_COLUMNS, shutil.get_terminal_size().columns)))
        print(printable(f"  [{path}]"))

    def open(self, file: str) -> None:
        path = _path(file)
        if not path.exists():
            raise LstpError(f"{path}: no such video file")
        self.video, self.lines = str(path), None
        self.turns.clear()

    def read(self, file: str) -> None:
        self.lines = read_subtitles(_path(file)) if file else None

    def set(self, words: str) -> None:
        if not words:
            print(printable("\n".join(f"{name}={value}" for name, value in self.settings.items()) or "nothing is set"))
            return
        name, equals, value = (part.strip() for part in words.partition("="))
        if not equals:
            raise ConfigError(f"/set: expected NAME=VALUE, got {words!r}")
        wanted = {key: kept for key, kept in self.settings.items() if key != name}
        if value:
            wanted[name] = _value(value)
        self.predictor.settings(**wanted)
        self.settings = wanted

    def save(self, file: str) -> None:
        if not file:
            raise ConfigError("/save: name a file")
        path = _path(file)
        write_json(path, {"video": self.video, "settings": self.settings, "turns": [t.as_dict() for t in self.turns]})
        print(printable(f"  [{path}]"))


def _path(text: str) -> Path:
    """The file or folder that a line names; `~` is the user's own folder."""
    if "\0" in text:
        raise ConfigError(f"{text}: a name of a file has no null character")
    return expanded(text)


def _value(text: str) -> Any:
    """A number, true, false, null, or the text itself."""
    try:
        value = strict_json(text)
    except ValueError:
        return text
    return value if value is None or isinstance(value, bool | int | float | str) else text


def lines() -> Iterator[str]:
    """Yields the lines that the user types, or those of a pipe."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        raise ConfigError("a terminal needs prompt_toolkit: pip install prompt_toolkit; pipes do without it") from None
    session: PromptSession[str] = PromptSession("> ")
    while True:
        try:
            yield session.prompt()
        except EOFError:  # Ctrl-D
            return
        except KeyboardInterrupt:  # Ctrl-C empties the line
            continue


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lavis-lstp chat",
        description=__doc__.splitlines()[0],
        epilog=f"In the conversation:\n{HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("video", nargs="?", help="video or picture file")
    add_model_options(parser)
    parser.add_argument("--subtitles", metavar="FILE", help="as /subtitles FILE")
    parser.add_argument(
        "--no-history", action="store_true", help="the model reads each question alone, as --example's was trained"
    )
    args = parser.parse_args(argv)
    check_model_options(args)
    if args.video is None and not args.example:
        parser.error("name a video, or --example")
    args.video = args.video or str(EXAMPLE / "clip.mp4")
    if not Path(args.video).exists():  # before the seconds that a model takes
        raise LstpError(f"{args.video}: no such video file")
    with built_predictor(args, store=default_store()) as predictor:
        chat = Chat(predictor, args.video, history=not (args.no_history or args.example))
        chat.read(args.subtitles or "")
        return converse(chat)


def converse(chat: Chat) -> int:
    """Answers every line until the end, and returns the exit status: 2 where a line of a pipe could not be answered."""
    failed = False
    for line in lines():
        if line.strip() == "/quit":
            break
        if not line.strip():
            continue
        try:
            chat.line(line.strip())
        except KeyboardInterrupt:  # gives the answer up
            print("\n  [stopped]")
        except BrokenPipeError:  # nobody reads the answers any more
            raise
        except (LstpError, OSError) as error:
            failed = True
            text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
            print(printable(f"error: {' '.join(text.split())}"), file=sys.stderr, flush=True)
    return 2 if failed and not sys.stdin.isatty() else 0
