"""Numbers in texts, each one unit that is spelt one way: "10 000", "10,000" and "ten thousand" are 10000.

One grammar for exact match, options and the rules of `lavis-lstp judge`. A unit is all of a number: "1,5" holds no 5,
"two hundred" no 2, and "half past two" no 2 either. `written` reads digits, `counted` reads words as well.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

_CHARACTERS = str.maketrans(
    {**dict.fromkeys("\u2018\u2019\u201b\u2032\u02bc", "'"), **dict.fromkeys("\u201c\u201d\u201e\u2033", '"')}
    | {**dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"), "\u2044": "/"}
)
_POWER = re.compile(r"(?<=\d)([\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+)|(?<=\d)\^\{([-+]?\d+)\}")
_VULGAR = re.compile(r"(\d?)([\u00bc-\u00be\u2150-\u215e])|(\d?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_THOUSANDS = re.compile(r"\d{1,3}(?:[ ']\d{3})+(?:[.,]\d+)?|[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_THOUSANDS_BY_POINT = re.compile(r"[1-9]\d{0,2}(?:(?:\.\d{3})+,\d+|(?:\.\d{3}){2,})")
_DECIMAL = re.compile(r"(\d*)(?:[.,](\d+))?")
_N = (
    r"(?:(?<![\d.,])(?<!\d )\d{1,3}(?: \d{3}){1,4}(?! ?\d)(?:[.,]\d+)?"
    r"|(?<!\d)(?<!\d[.,])\d+(?:[.,]\d+|'\d{3}(?!\d))*|(?<![\w.,])\.\d+)"
)
"""Digits with marks: thousands parted by blanks, points, commas, apostrophes, and the leading point."""
_JOIN = r"(?:[-/:]|\^[-+]?| - | / | : )"
_AFTER = (
    "mm|cm|km|nm|m|ft|kg|mg|g|lbs?|oz|ml|l|ms|s|secs?|mins?|h|hrs?|mph|kmh|fps|px|am|pm|rpm|hz|khz|mhz|ghz|v|kv|w|kw"
    "|ev|kev|mev|gev|j|kj|kcal|n|pa|kpa|mol|kb|mb|gb|tb"
)
UNIT = re.compile(
    rf"[<>\u2264\u2265]?(?:[$\u20ac\u00a3] ?)?(?<![^\W_])[-+]?{_N}(?:{_JOIN}{_N})*(?: ?%| ?\u00b0(?: ?[cf]\b)?)?"
    rf"|{_N}(?:{_JOIN}{_N})*"
)
"""A number with its sign, what it is joined with (2-3, 1/2, 10:30, 2026-11-28, 10^2), and its percent."""
_MIXED = re.compile(r"(?<![\w.,/:^-])(\d{1,9})[ -](\d{1,2})/(\d{1,2})(?![\w/]|[.,]\d)")
_LISTED = re.compile(r"(?<![\w.,])\d{1,9}(?:,\d{1,9}){2,}(?![\w%]|[.,]\d)")
"""Three numbers or more without blanks: "3,5,7" is "3, 5, 7", but "1,000,000" is one; in "3,5" it may be a point."""
_STUCK = re.compile(rf"(?<![\w.,:])(?<!\bthe )(?!\d{{4}}s\b)([\d.,:]*\d)(?=(?:{_AFTER})\b)")
"""A number that its unit is stuck to: 5m, but neither mp3s nor the 90s."""

_COUNTED = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_SMALL = {word: n for n, word in enumerate(f"{_COUNTED} seventeen eighteen nineteen".split())}
_TENS = {w: 10 * n for n, w in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_NTH = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth"
_ORDINALS = {
    word: n for n, word in enumerate(f"{_NTH} fifteenth sixteenth seventeenth eighteenth nineteenth".split(), 1)
}
_ORDINALS |= {word[:-1] + "ieth": n for word, n in _TENS.items()}
_WORD = "|".join((*_ORDINALS, *sorted((*_SMALL, *_TENS, *_SCALES, "hundred"), key=len, reverse=True)))
_RUN = re.compile(rf"(?<![\w'])(?:{_WORD})(?:(?: and |[ -])(?:{_WORD}))*(?![\w'])")
_NTH_ONE = re.compile(rf"\b({'|'.join(_ORDINALS)}) one\b")
_DIGIT, _ANY = re.compile(r"\d"), re.compile(rf"\d|\b(?:{_WORD}|dozen|once|twice|thrice)\b")
_PARTS = {word: n for n, words in {2: "half halve", 4: "quarter"}.items() for word in words.split()}
_PARTS |= {word: _ORDINALS[word] for word in "third fourth fifth sixth eighth tenth".split()}
_PART_OF = re.compile(rf"\b(one|two|three|four|five|seven|nine|\d+)[ -]({'|'.join(_PARTS)})(s?)\b")
_BIG = re.compile(rf"({_N}) (hundred|thousand|million|billion)\b")
_ONE = rf"(?:{_N}|\bone\b)"
_RANGE = rf"({_ONE})((?: ?%| [a-z]+)?) (?:to|or|AND) ({_ONE})\2(?!\w)"
_JOINED = [  # in this order; what is joined in words
    (re.compile(pattern), joined)
    for pattern, joined in (
        (r"\b(?:minus|negative) (?=\d|one\b)", "-"),
        (rf"\b(half )?(?:({_ONE}|a) )?dozen\b", lambda m: _scaled(_digits(m[2]), 6 if m[1] else 12)),
        (r"\bonce or twice\b", "1-2 times"),
        (r"(?<!\bat )\bonce(?=\W*$|[.,;!])", "1 time"),  # neither "at once" nor "once he sits"
        (r"\btwice\b(?! (?:as|the|a|that|his|her|its|their|more)\b)", "2 times"),
        (r"\bthrice\b", "3 times"),
        (r"(?<=\d) point (?=\d)", "."),
        (r"\b(one|\d+) and (?:a |one )?half\b", r"\1.5"),
        (r"\b(one|\d+) and (?:a |one )?quarter\b", r"\1.25"),
        (r"\bhalf past (one|\d\d?)\b", r"\1:30"),
        (r"\b(?:a )?quarter past (one|\d\d?)\b", r"\1:15"),
        (r"\b(?:a )?quarter to (one|\d\d?)\b", lambda m: f"{(int(_digits(m[1])) - 2) % 12 + 1}:45"),
        (r"\b(5|10|20|25)(?: minutes)? past (one|\d\d?)\b", lambda m: f"{m[2]}:{m[1]:0>2}"),
        (r"\b(one|\d\d?) o'?clock\b", r"\1:00"),
        (r"(?<=\d) per ?cent\b", "%"),
        (rf"({_ONE}) or more\b", "\u2265\\1"),
        (rf"({_ONE}) or (?:less|fewer)\b", "\u2264\\1"),
        (rf"\bbetween {_RANGE.replace('AND', 'and')}", r"\1-\3\2"),
        (_RANGE, r"\1-\3\2"),
        (rf"({_ONE}) out of ({_ONE})", r"\1/\2"),
        (rf"\b(?:at most|up to|no more than) ({_ONE})", "\u2264\\1"),
        (rf"\b(?:at least|no less than|no fewer than) ({_ONE})", "\u2265\\1"),
        (rf"\bmore than ({_ONE})", r">\1"),
        (rf"\b(?:(?:less|fewer) than|nearly|almost) ({_ONE})", r"<\1"),
        (r"\bof (?:the|these|those) (?=\d)", "of-"),  # "one of the two" is not two
        (r"\bone(?=[-:./]\d)|(?<=[-/<>\u2264\u2265])one\b", "1"),
    )
]


def plain_characters(text: str) -> str:
    """Return NFKC with straight quotes, one dash and one slash; powers (10^2) and fractions (2 1/2) stay such."""
    if text.isascii() and "^" not in text and "frac" not in text:
        return text
    text = _POWER.sub(lambda match: "^" + (match[1] or match[2]), text)
    text = _VULGAR.sub(_fraction, text)
    return unicodedata.normalize("NFKC", text).translate(_CHARACTERS)


def _fraction(match: re.Match) -> str:
    before = match[1] or match[3] or ""
    return f"{before}{' ' if before else ''}{match[2] or f'{match[4]}/{match[5]}'}"


def written(text: str) -> str:
    """Return a text of plain characters in lower case, its numbers in digits as units: "1,000.50 m" has 1000.5."""
    if not _DIGIT.search(text):
        return text
    text = _MIXED.sub(_mixed, _STUCK.sub(r"\1 ", _LISTED.sub(_apart, text)))
    return UNIT.sub(_canonical, text)


def counted(text: str, one: bool = True) -> str:
    """Return `written` with numbers in words as well; without `one` a lone "one", which means much, stays."""
    if not _ANY.search(text):
        return text
    text = re.sub(r"\ban? (?=hundred|thousand|million|billion)", "", _NTH_ONE.sub(r"\1", text))  # "the third one"
    text = _BIG.sub(lambda match: _scaled(match[1], _SCALES.get(match[2], 100)), text)
    text = _RUN.sub(_run, _PART_OF.sub(_part, text))
    for pattern, joined in _JOINED:
        text = pattern.sub(joined, text)
    return written(re.sub(r"\bone\b", "1", text) if one else text)


def _plain(number: str) -> str:
    """Return a number without marks of thousands and needless zeros; as it is where it is none (1.2.3, a list)."""
    if _THOUSANDS.fullmatch(number):
        number = re.sub(r"[ ']" if re.search(r"[ ']", number) else ",", "", number)
    elif _THOUSANDS_BY_POINT.fullmatch(number):
        number = number.replace(".", "")
    decimal = _DECIMAL.fullmatch(number)
    if decimal is None or re.fullmatch(r"[1-9]\d{0,2}\.000", number):  # one or a thousand: nothing is guessed
        return number
    whole, part = decimal[1].lstrip("0") or "0", (decimal[2] or "").rstrip("0")
    return f"{whole}.{part}" if part else whole


def _canonical(match: re.Match) -> str:
    text = match[0]
    if match.start() and match.string[match.start() - 1].isalpha():
        return text  # a part of a word: v1.50
    text = re.sub(
        rf"{_N}",
        lambda number: number[0] if text[number.start() - 1 : number.start()] == ":" else _plain(number[0]),
        text,
    )
    return re.sub(r"^0:0?(?=\d+:)", "", re.sub(r"(?<=\D) | (?=\D)", "", text))


def _apart(match: re.Match) -> str:
    return match[0] if _THOUSANDS.fullmatch(match[0]) else match[0].replace(",", ", ")


def _mixed(match: re.Match) -> str:
    whole, part, of = (int(match[i]) for i in (1, 2, 3))
    if not 0 < part < of <= 16:
        return match[0]
    value = Decimal(whole * of + part) / of
    return str(value) if of in (2, 4, 5, 8, 10, 16) else f"{whole * of + part}/{of}"


def _part(match: re.Match) -> str:
    number = str(_SMALL.get(match[1], match[1]))
    return f"{number}/{_PARTS[match[2]]}" if (number == "1") != bool(match[3]) else match[0]


def _digits(word: str | None) -> str:
    return "1" if word in (None, "a", "one") else word


def _scaled(number: str, scale: int) -> str:
    plain = _plain(number)
    return f"{Decimal(plain) * scale:f}" if plain.replace(".", "", 1).isdigit() else f"{number}-{scale}"


def _run(match: re.Match) -> str:
    """Return words of numbers side by side in digits: two hundred (and) five, twenty-first; two thirty is a time."""
    words = re.split(r"( and |[ -])", match[0])
    said, before, i = "", "", 0
    while i < len(words):
        value, after = _spoken(words, i)
        mark = words[i - 1] if i else ""
        if mark == " " and before.isdigit() and value.isdigit():
            time = int(before) <= 12 and 10 <= int(value) < 60
            mark = ":" if time else "" if int(before) <= 20 and 10 <= int(value) < 100 else "-"
        lone = words[i:after] == ["one"] and mark in ("", " and ") and words[after : after + 1] in ([], [" and "])
        said += mark + ("one" if lone else value)
        before, i = value, after + 1
    return said


def _spoken(words: list[str], i: int) -> tuple[str, int]:
    """Return in digits the number in words at `i`, and where it ends; words and what parts them take turns."""
    total = current = 0
    last, scale = "", 10**12
    while True:
        word = words[i]
        if word in _ORDINALS:
            nth = total + current + _ORDINALS[word]
            ending = "th" if nth % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(nth % 10, "th")
            return f"{nth}{ending}", i + 1
        if word in _SMALL:
            current, last = current + _SMALL[word], "ones" if 0 < _SMALL[word] < 10 else "teens"
        elif word in _TENS:
            current, last = current + _TENS[word], "tens"
        elif word == "hundred":
            current, last = (current or 1) * 100, "hundred"
        else:
            total, current, last, scale = total + (current or 1) * _SCALES[word], 0, "scale", _SCALES[word]
        if i + 2 >= len(words) or not _goes_on(last, current, scale, words[i + 1], words[i + 2]):
            return str(total + current), i + 1
        i += 2


def _goes_on(last: str, current: int, scale: int, between: str, word: str) -> bool:
    if between == " and " and last not in ("hundred", "scale"):
        return False
    if word in _SCALES:
        return _SCALES[word] < scale and last != "scale" and between != " and "
    if word == "hundred":
        return last in ("ones", "teens", "tens") and current < 100
    value = _SMALL.get(word, _TENS.get(word, _ORDINALS.get(word, 0)))
    return value > 0 and (last in ("hundred", "scale") or (last == "tens" and value < 10))
