"""Subtitle files (SRT, VTT, LongVideoBench's JSON) -> lines with their seconds, as plain text.

In: entries of a data set and the folder of their files. Out: for each question the lines of its video. All files are
read when the data set is built, so that one without times is an error of one line before an epoch begins. The text of
a line is data: tags, escape codes and control characters are gone, and no angle bracket is left to begin a mark.
"""

from __future__ import annotations

import html
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lavis_lstp.config.data import SUBTITLES
from lavis_lstp.data.annotation import MOST_SECONDS, SECTION, parse
from lavis_lstp.data.folder import check_name
from lavis_lstp.errors import AnnotationError, ConfigError
from lavis_lstp.files import find_path

logger = logging.getLogger(__name__)

ENDINGS = (".srt", ".vtt", ".json")
MOST_BYTES = 1 << 24
"""Size of a file; ten hours of speech have about 1 MB."""
NOT_TEXT = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\{\\[^}]*\}|[<>]")
"""Escape codes, overrides of SubStation and angle brackets."""
JOINERS = "\u200c\u200d"
"""Characters without a width that scripts and emoji need."""
CLOCK = re.compile(r"(\d{1,6}):(\d{1,2}):(\d{1,2}(?:[.,]\d{1,9})?)")
_TIME = r"\s*(?P<{0}_sign>-?)(?:(?P<{0}_h>\d{{1,6}}):)?(?P<{0}_m>\d{{1,2}}):(?P<{0}_s>\d{{1,2}}(?:[.,]\d{{1,9}})?)\s*"
CUE = re.compile(_TIME.format("a") + "-->" + _TIME.format("b") + r"(?<=[\s\d])(?:[A-Za-z]\w*:\S*(?:\s+|$))*")
"""Times with or without hours and fractions; behind them settings such as `align:start` or `X1:40`."""
NEARLY = re.compile(r"\s*-?[\d:.,]*\d:\d[\d.,]*\s*[-\u2013\u2014=]+>?\s*-?\d+:\d[\d:.,]*\s*$")
WRITE = "write times as 00:01:02,500 --> 00:01:04,000"
COMMENT = re.compile(r"NOTE(\s|$)|(STYLE|REGION)\s*$")
TAG = re.compile(r"</?[A-Za-z][^<>]*>|<[\d:.]+>|</>")
INSTANT_S = 0.1
"""Captions this near to one another follow directly, and one this short is only a step of the next."""

NOT_PACKED = "its shard holds no subtitles; pack the set with --subtitles FOLDER"


class Line(NamedTuple):
    """A text that is said or written from `start_s` to `end_s`, seconds since the start of the video."""

    start_s: float
    end_s: float
    text: str


def read_subtitles(path: Path, begin_s: float = 0.0) -> list[Line]:
    """The lines of a file, in the order of time.

    Args:
        begin_s: where the video begins, in seconds of the file; lines before are left out.

    Raises:
        AnnotationError: the file cannot be read, has a line without times, or one that ends before it begins.
    """
    if path.suffix.lower() not in ENDINGS:
        raise AnnotationError(f"{path}: subtitles must be a file {', '.join(ENDINGS)}")
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it has NUL characters")
    except (OSError, ValueError) as error:
        raise AnnotationError(
            f"{path}: subtitles cannot be read as UTF-8 text ({error}); convert them: iconv -f ENCODING -t UTF-8"
        ) from None
    if len(content) > MOST_BYTES:
        raise AnnotationError(f"{path}: has more than {MOST_BYTES >> 20} MB; subtitles have not")
    return parse_subtitles(text, path.suffix.lower(), path, begin_s)


def form_of(text: str) -> str:
    """The ending that a file of this text would have, by how it begins."""
    start = text.lstrip("\ufeff \r\n\t")
    return ".json" if start[:1] == "[" else ".vtt" if start.startswith("WEBVTT") else ".srt"


def parse_subtitles(text: str, form: str, name: Path | str, begin_s: float = 0.0) -> list[Line]:
    """The lines of a file's text; see `read_subtitles`.

    Args:
        form: one of ENDINGS.
        name: of the file, for messages.
    """
    of_json = form == ".json"
    text = text.removeprefix("\ufeff")
    found = _of_json(parse(text, Path(name), "file"), name) if of_json else _of_cues(text, name, form)
    return _lines(found, begin_s)


def _lines(found: Iterable[tuple[str, float, float, str]], begin_s: float = 0.0) -> list[Line]:
    lines = []
    for place, start, end, said in found:
        if not (0 <= start <= end and start <= MOST_SECONDS):
            raise AnnotationError(
                f"{place}: must begin at 0 s or later and before it ends, got {start:g} to {end:g} s; correct its times"
            )
        plain = _plain(said)
        if plain and end > begin_s:
            lines.append(Line(max(0.0, start - begin_s), end - begin_s, plain))
    return sorted(set(lines))  # converters write one twice


def _plain(text: str) -> str:
    """The text in one line, without what a terminal, a page or a tokenizer would take for something else."""
    text = NOT_TEXT.sub(" ", html.unescape(text))
    return " ".join("".join(c if c.isprintable() or c in JOINERS else " " for c in text).split())


def _of_cues(text: str, path: Path | str, form: str) -> Iterable[tuple[str, float, float, str]]:
    """Yields lines of SRT and VTT: a line with times, and what stands until the next one, blank lines or not."""
    lines = re.split("\r\n|\r|\n", text)
    vtt = form == ".vtt" or lines[0].startswith("WEBVTT")
    if vtt:
        _blank_comments(lines)
    starts = [i for i, line in enumerate(lines) if "-->" in line or NEARLY.match(line)]
    cues, number = [], None
    for i in starts:
        if (found := CUE.fullmatch(lines[i])) is None:
            raise AnnotationError(
                f"{path}, line {i + 1}: expected times 'START --> END', got {lines[i].strip()[:80]!r}; {WRITE}"
            )
        if cues:
            _check_numbers(lines, cues[-1][0] + 1, i - 1, number, path)
        number = _take_name(lines, i, vtt)
        cues.append((i, found))
    if cues:
        _check_numbers(lines, cues[-1][0] + 1, len(lines), number, path)
    first = next((i for i, line in enumerate(lines[: starts[0] if starts else None]) if line.strip()), None)
    if first is not None:
        what = "has text before its first times" if starts else f"is no {form[1:].upper()} file with times"
        raise AnnotationError(f"{path}, line {first + 1}: {what}; {WRITE} above each subtitle")
    ends = [*starts[1:], len(lines)] if starts else []
    blocks = [
        [" ".join(TAG.sub("", line).split()) for line in lines[i + 1 : end]]
        for i, end in zip(starts, ends, strict=True)
    ]
    times = [(_clock(found, "a"), _clock(found, "b")) for _, found in cues]
    said = _once(times, [[line for line in block if line] for block in blocks])
    for (i, _), edges, block in zip(cues, times, said, strict=True):
        yield f"{path}, line {i + 1}", *edges, " ".join(block)


def _blank_comments(lines: list[str]) -> None:
    """Blanks what a VTT file says to players: its head, notes, styles and regions."""
    inside = lines[0].startswith("WEBVTT")
    for i, line in enumerate(lines):
        begins = not i or not lines[i - 1].strip()
        inside = bool(line.strip()) and "-->" not in line and (inside or (begins and COMMENT.match(line) is not None))
        lines[i] = "" if inside else line


def _take_name(lines: list[str], i: int, vtt: bool) -> int | None:
    """Blanks the name above the times in line `i`; returns it where it is a number."""
    above = i - 1 if vtt or (i and lines[i - 1].strip()) else i - 2
    if above < 0 or not (name := lines[above].strip()):
        return None
    begins, number = not above or not lines[above - 1].strip(), name.isdecimal() and len(name) < 10
    if (begins and (number or vtt)) or (number and not vtt and above == i - 1):
        lines[above] = ""
        return int(name) if number else None
    return None


def _check_numbers(lines: Sequence[str], begin: int, end: int, number: int | None, path: Path | str) -> None:
    """Refuses the next number with a text and no times, which would pass for a part of the text before."""
    for i in range(begin, end):
        after = lines[i + 1].strip() if i + 1 < end else ""
        if number is not None and lines[i].strip() == str(number + 1) and not lines[i - 1].strip() and after:
            raise AnnotationError(f"{path}, line {i + 1}: subtitle {number + 1} has no times; {WRITE} below it")


def _clock(found: re.Match, edge: str) -> float:
    hours, minutes, seconds = (found[f"{edge}_{part}"] for part in ("h", "m", "s"))
    value = int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))
    return -value if found[f"{edge}_sign"] else value


def _once(times: Sequence[tuple[float, float]], said: list[list[str]]) -> list[list[str]]:
    """Return rolling captions with each line once, where it is first shown, and others as they are.

    Captions roll where at least half of the neighbours in time begin with the lines that the one before ends with, and
    bring a new line or last for an instant, as YouTube's recognised speech does. A sentence said twice does not.
    """
    order = sorted((i for i in range(len(said)) if said[i]), key=lambda i: times[i])
    repeated, rolling = {}, 0
    for a, b in zip(order, order[1:], strict=False):
        if times[b][0] <= times[a][1] + INSTANT_S:
            shared = (n for n in range(min(len(said[a]), len(said[b])), 0, -1) if said[a][-n:] == said[b][:n])
            repeated[b] = next(shared, 0)
            rolling += bool(repeated[b]) and (repeated[b] < len(said[b]) or times[b][1] - times[b][0] <= INSTANT_S)
    if 2 * rolling < len(order) - 1 or not rolling:
        return said
    return [block[repeated.get(i, 0) :] for i, block in enumerate(said)]


def _of_json(rows: Any, path: Path | str) -> Iterable[tuple[str, float, float, str]]:
    """LongVideoBench's two forms: {start, end, line} with clocks, and {timestamp: [s, s], text}; no end = the end."""
    if not isinstance(rows, list):
        raise AnnotationError(f"{path}: subtitles must be a list, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        place, row = f"{path}, subtitle {number}", row if isinstance(row, dict) else {}
        edges, said = row.get("timestamp", [row.get("start"), row.get("end")]), row.get("line", row.get("text"))
        if not isinstance(said, str) or not isinstance(edges, list) or len(edges) != 2:
            raise AnnotationError(f"{place}: expected start, end and line, or timestamp and text, got {row!r:.80}")
        start, end = _seconds(edges[0]), math.inf if edges[1] is None else _seconds(edges[1])
        if start is None or end is None:
            raise AnnotationError(f"{place}: has no times; expected H:MM:SS or seconds, got {edges!r:.80}")
        yield place, start, end, said


def _seconds(value: Any) -> float | None:
    if type(value) in (int, float):
        return float(value) if abs(value) <= MOST_SECONDS else None
    found = CLOCK.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        return None
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3].replace(",", "."))


def stored(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Lines as a shard's JSON has them, and a file that `read_subtitles` reads; no end = the end of the video."""
    return [{"timestamp": [a, None if math.isinf(b) else b], "text": text} for a, b, text in lines]


def from_stored(value: Any, place: str) -> list[Line]:
    """Lines out of a shard's JSON.

    Raises:
        AnnotationError: it is of another form.
    """
    return _lines(_of_json(value, place))


class Subtitles:
    """Lines of a data set's videos.

    Args:
        rows: entries; none of shards, whose entries bring `lines`. `subtitles` names a file below `root`; without it
            the video's own name with .srt, .vtt or .json is looked for. `subtitles_begin_s`: where the video begins, in
            seconds of the file.
        root: folder of the files.
        shown: frames: lines within `window_s` of a chosen frame; whole: all of them.
        section: of the configuration, for messages.

    Raises:
        AnnotationError: a file cannot be read, or its name leads out of the folder.
        ConfigError: no video has one.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], root: Path, shown: str, window_s: float, section: str = SECTION
    ):
        assert shown in SUBTITLES[1:]
        self.window_s = math.inf if shown == "whole" else float(window_s)
        self._lines: dict[tuple[str, float], list[Line]] = {}
        self._root, without = root, set()
        for row in rows:
            if "video" in row:
                _check(row)
                key = self._key(row)
                if key not in self._lines:
                    path = self._file(row)
                    self._lines[key] = [] if path is None else read_subtitles(path, key[1])
                    without |= {row["video"]} if path is None else set()
        if self._lines and len(without) == len(self._lines):
            raise ConfigError(
                f"{section}.subtitles: none of {len(without)} videos has a file in {root}; expected a name such as "
                f"{Path(min(without)).with_suffix(ENDINGS[0])} ({section}.build_info.subtitles.storage)"
            )
        if without:
            logger.warning(
                "%s: %d of %d videos have no subtitles, first %s", section, len(without), len(self._lines), min(without)
            )

    @staticmethod
    def _key(row: Mapping[str, Any]) -> tuple[str, float]:
        return row.get("subtitles") or row["video"], float(row.get("subtitles_begin_s") or 0)

    def _file(self, row: Mapping[str, Any]) -> Path | None:
        given = row.get("subtitles")
        names = (
            [given]
            if given
            else [str(Path(row["video"]).with_suffix(ending)) for lower in ENDINGS for ending in (lower, lower.upper())]
        )
        for name in names:
            check_name(name, self._root, f"subtitles of question {row['question_id']!r}")
        return next((path for path in (find_path(self._root, name) for name in names) if path.is_file()), None)

    def of(self, row: Mapping[str, Any]) -> list[Line]:
        """The lines of a question's video, or of the part that it is about; none for pictures and texts."""
        lines = self.of_video(row) if "video" in row else []
        start, end = row.get("clip_s") or (-math.inf, math.inf)
        return [line for line in lines if line.start_s < end and line.end_s > start]

    def of_video(self, row: Mapping[str, Any]) -> list[Line]:
        """The lines of the whole video.

        Raises:
            AnnotationError: those of a shard are of another form, or there are none.
        """
        if "place" not in row:
            return self._lines[self._key(row)]
        if row.get("lines") is None:
            raise AnnotationError(f"question {row['question_id']!r}: {NOT_PACKED}")
        return from_stored(row["lines"], f"subtitles of question {row['question_id']!r}")

    def identity(self) -> Any:
        """Return what decides the lines that are shown, as plain containers."""
        return [self.window_s, sorted([*key, *map(list, lines)] for key, lines in self._lines.items())]


def _check(row: Mapping[str, Any]) -> None:
    where, begin = f"question {row['question_id']!r}", row.get("subtitles_begin_s")
    if not isinstance(row.get("subtitles", ""), str):
        raise AnnotationError(f"{where}: 'subtitles' must be a file name, got {row['subtitles']!r:.80}")
    if begin is not None and not (type(begin) in (int, float) and 0 <= begin <= MOST_SECONDS):
        raise AnnotationError(f"{where}: 'subtitles_begin_s' must be seconds from 0 on, got {begin!r:.80}")


def nearest_first(lines: Sequence[Line], times_s: Sequence[float], window_s: float) -> list[Line]:
    """Lines at most `window_s` from a time, nearest first, then in the order of time; infinity = all of them."""
    away = {line: min((max(line[0] - t, t - line[1], 0.0) for t in times_s), default=math.inf) for line in lines}
    return sorted((line for line in lines if away[line] <= window_s), key=lambda line: (away[line], line))
