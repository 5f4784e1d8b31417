"""Multiple choice: what is asked, which option an answer names, and the share of right ones by kind of question.

An answer that names no option, several, or a letter and another option's words, or that says what it is not, is
*unparsable*: wrong, counted, and never guessed at.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Mapping, Sequence

from lavis_lstp.metrics.qa import accuracy_interval, folded, normalise, without_markup, without_thoughts, yes_or_no

LETTERS = string.ascii_uppercase
_LONE = re.compile(r"[(\[{<'\"]*([A-Za-z])[)\]}>'\"]*[.:,;!\u3002]?")
_FIRST = re.compile(r"\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])[).:,](?![A-Za-z]\.)|([A-Z]) - ")
_NAMED = re.compile(
    r"(?:\b(?i:answer|option|choice|letter)(?: is)?|\u7b54\u6848\u662f?|\u9009\u9879):? ?"
    r"(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Z])(?=[).:,\u3002]|$|\s)|([a-z])(?=[.\u3002]?$))"
)
"""A letter behind such a word, in English or Chinese; a small one at the end alone, where "a" is no article."""
_DECIDES = re.compile(r"(?i:answer)(?: is|:)|\u7b54\u6848[\u662f:]")
_MORE = re.compile(r"\(([A-Za-z])\)|\b([A-Z])(?=[).:,]|$)")
"""Letters after the one that an answer begins with: "(A) or (B)", "A, B"."""
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_AROUND = " \t\"'`*_()[]{}<>.,;:!?\u3002\u2026"
_DENIES = frozenset("not never neither nor isnt arent wasnt werent doesnt dont didnt cannot cant".split())


def choice_prompt(question: str, options: Sequence[str]) -> str:
    """The question as the language model reads it, options and all. Held by a snapshot in the tests."""
    listed = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS[: len(options)], options, strict=True))
    return f"{question}\n{listed}\nAnswer with the letter of the right option."


def parse_choice(text: str, options: Sequence[str]) -> int | None:
    """The number of the one option that a text names, by its words, its letter, or both; None where it names none.

    The very words of an option come first, as they are written and then without case, outer blanks and outer
    punctuation; then a letter alone, a plain yes or no, and letters and words inside a sentence. A line that is an
    option or a letter is the answer, whatever explanation stands around it; so is "The answer is B." behind sentences
    that weigh B's words and others'. Two different readings are none.

    >>> parse_choice("(B)", ["red", "blue"]), parse_choice("It is blue.", ["red", "blue"])
    (1, 1)
    >>> parse_choice("A red one or a blue one", ["red", "blue"]) is None
    True
    """
    if exact := _words_alone(text, options):  # before tags are looked for: an option may be one
        return _one({*exact, *_letter_alone(text, options)}, options)
    text = without_thoughts(text)
    tagged = {_read(part, options) for part in _ANSWER.findall(text)}
    if tagged:
        return None if None in tagged else _one({i for i in tagged if i is not None}, options)
    return _read(text, options)


def _read(text: str, options: Sequence[str]) -> int | None:
    """`parse_choice` of a text without <answer> tags."""
    plain = without_markup(text)
    lines = [line for line in (text, *text.splitlines()) if line.strip()]
    alone = {i for line in lines for i in (*_words_alone(line, options), *_letter_alone(line, options))}
    if alone:
        letters = (LETTERS.index(letter) for letter in _letters(_NAMED, plain))
        return _one({*alone, *(i for i in letters if i < len(options))}, options)
    said = _polarity(plain, options)
    if said is not None:
        return said
    return _inside(plain, options)


def _one(found: Collection[int], options: Sequence[str]) -> int | None:
    """The first of options that say the same; None of options that differ."""
    return min(found) if len({folded(options[i]) for i in found}) == 1 else None


def _words_alone(text: str, options: Sequence[str]) -> list[int]:
    """Options that are all of the text, in the strictest of four comparisons that any option passes."""
    for same in (str.strip, folded, _bare, _normalised):
        if (key := same(text)) and (found := [i for i, option in enumerate(options) if same(option) == key]):
            return found
    return []


def _bare(text: str) -> str:
    """Without outer blanks, punctuation and brackets; a sign in front of a number stays."""
    return folded(text).strip(_AROUND)


def _normalised(text: str) -> str:
    """`normalise` of a text that does not begin with a letter of its own, which would pass for an article."""
    words = normalise(text)
    return "" if _LONE.fullmatch(words) or _FIRST.match(without_markup(text)) else words


def _letter_alone(text: str, options: Sequence[str]) -> list[int]:
    """The option whose letter is all of the text."""
    match = _LONE.fullmatch(without_markup(text))
    number = LETTERS.index(match.group(1).upper()) if match else len(options)
    return [number] if number < len(options) else []


def _polarity(text: str, options: Sequence[str]) -> int | None:
    """The option yes or no that a text says in a sentence, as the rules of `lavis-lstp judge` read it."""
    said = yes_or_no(text)
    kinds = [yes_or_no(option) if len(option.split()) == 1 else None for option in options]
    meant = [i for i, kind in enumerate(kinds) if kind is not None and kind is said]
    named = {i for i in _options_in(normalise(text), options) if kinds[i] is not said}
    return _one(meant, options) if meant and not named else None


def _letters(pattern: re.Pattern, text: str) -> list[str]:
    """Different letters in the groups of a pattern, in the order of the text."""
    return list(dict.fromkeys(next(filter(None, groups)).upper() for groups in pattern.findall(text)))


def _inside(text: str, options: Sequence[str]) -> int | None:
    """The option that a sentence names: a letter at its beginning or after "answer", or an option's words."""
    first = _FIRST.match(text)
    rest = text[first.end() :].strip() if first else text
    named = _options_in(normalise(rest), options)
    letters = [next(filter(None, first.groups())).upper()] if first else _letters(_NAMED, text)
    at = 0 if first or not letters else _NAMED.search(text).start()
    if at and LETTERS.index(letters[0]) in named and _DECIDES.match(text, at):
        # "A shows red, B blue. The answer is B.": what is weighed before the sentence that decides contradicts nothing
        rest = text[max(text.rfind(mark, 0, at) for mark in ".!?\u3002\n") + 1 :]
        named = _options_in(normalise(rest), options)
    if first:  # a letter that no option has is a word's: "A. in the U.S."
        others = _letters(_MORE, rest)
        letters += [letter for letter in others if letter != letters[0] and letter in LETTERS[: len(options)]]
    if not letters:
        if len(named) != 1 or _denied(rest, options[named[0]]):
            return None
        # "no" in "there is no doubt" is no answer no
        plain = len(options[named[0]].split()) == 1 and yes_or_no(options[named[0]]) is not None
        return None if plain and not normalise(rest).endswith(normalise(options[named[0]])) else named[0]
    number = LETTERS.index(letters[0])
    if number >= len(options):
        return None
    if normalise(rest) == normalise(options[number]):  # also where it ends like a letter: "(A) plan B"
        return number
    # further letters, and words that are another option's, contradict the letter
    agrees = all(normalise(options[i]) == normalise(options[number]) for i in named)
    return number if len(letters) == 1 and agrees else None


def _denied(text: str, option: str) -> bool:
    """Whether "not" or the like stands beside the words of an option: "it is not red"."""
    beside = f" {normalise(text)} ".replace(f" {normalise(option)} ", " ")
    return not _DENIES.isdisjoint(beside.split())


def _options_in(text: str, options: Sequence[str]) -> list[int]:
    """Options whose words stand in a normalised text, but for those that are a part of a longer one that does.

    Of options that say the same, the first.
    """
    words = f" {text} "
    plain = [f" {normalise(option)} " for option in options]
    found = [i for i, option in enumerate(plain) if option.strip() and option in words]
    longest = [i for i in found if not any(plain[i] in plain[j] and plain[i] != plain[j] for j in found)]
    return list({folded(options[i]): i for i in reversed(longest)}.values())[::-1]


def accuracy(
    correct: Mapping[str, bool],
    categories: Mapping[str, str] | None = None,
    axes: Mapping[str, Mapping[str, str | Sequence[str]]] | None = None,
) -> dict:
    """Share of right answers with its 95 % interval, and the same for each kind of question.

    Args:
        correct: by question id.
        categories: kind of each question; '' counts in the whole alone.
        axes: {axis: kind or kinds} of each question; one of several kinds counts in each of them (`by_axis`).
    """
    result: dict = _share(list(correct.values()))
    kinds: dict[str, list[bool]] = {}
    for key, right in correct.items():
        if categories and categories.get(key):
            kinds.setdefault(categories[key], []).append(right)
    if kinds:
        result["by_category"] = {kind: _share(kinds[kind]) for kind in sorted(kinds)}
        shares = [value["accuracy"] for value in result["by_category"].values()]
        result["mean_of_categories"] = sum(shares) / len(shares)
    found: dict[str, dict[str, list[bool]]] = {}
    for key, right in correct.items():
        for axis, named in (axes or {}).get(key, {}).items():
            for kind in [named] if isinstance(named, str) else named:
                if kind:
                    found.setdefault(axis, {}).setdefault(kind, []).append(right)
    if found:
        by_axis = {axis: {kind: _share(kinds[kind]) for kind in sorted(kinds)} for axis, kinds in found.items()}
        result["by_axis"] = by_axis
    return result


def _share(rights: Sequence[bool]) -> dict:
    right, count = sum(rights), len(rights)
    return {
        "accuracy": right / count if count else 0.0,
        "accuracy_interval": accuracy_interval(right, count),
        "questions": count,
    }
