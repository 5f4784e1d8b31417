"""Multiple choice: what is asked, which option an answer names, and the share of right ones by kind of question.

An answer that names no option, several, or a letter and another option's words, or that says what it is not, is
*unparsable*: wrong, counted, and never guessed at.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from lavis_lstp.metrics.qa import accuracy_interval, normalise

LETTERS = string.ascii_uppercase
_FIRST = re.compile(r"\(([A-Za-z])\)|([A-Za-z])[).:,]|([A-Za-z])$")
_NAMED = re.compile(r"\b(?i:answer|option|choice)(?: is)?:? ?(?:\(([A-Za-z])\)|([A-Z])(?=[).:,]|$|\s))")
_MORE = re.compile(r"\(([A-Za-z])\)|\b([A-Z])(?=[).:,]|$)")
"""Letters after the one that an answer begins with: "(A) or (B)", "A, B"."""
_DENIES = frozenset("not never neither nor isnt arent wasnt werent doesnt dont didnt cannot cant".split())


def choice_prompt(question: str, options: Sequence[str]) -> str:
    """The question as the language model reads it, options and all. Held by a snapshot in the tests."""
    listed = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question}\n{listed}\nAnswer with the letter of the right option."


def parse_choice(text: str, options: Sequence[str]) -> int | None:
    """The number of the one option that a text names, by its letter, its words, or both; None where it names none.

    >>> parse_choice("(B)", ["red", "blue"]), parse_choice("It is blue.", ["red", "blue"])
    (1, 1)
    >>> parse_choice("A red one or a blue one", ["red", "blue"]) is None
    True
    """
    text = text.strip()
    first = _FIRST.match(text)
    exact = [i for i, option in enumerate(options) if normalise(option) == normalise(text)]
    if exact and not first:  # equal options are the same answer
        return exact[0]
    rest = text[first.end() :].strip() if first else text
    named = _options_in(rest, options)
    found = [first.groups()] if first else _NAMED.findall(text)
    letters = list(dict.fromkeys(next(filter(None, groups)).upper() for groups in found))
    if first:  # a letter that no option has is a word's: "A. in the U.S."
        others = (next(filter(None, groups)).upper() for groups in _MORE.findall(rest))
        letters += [letter for letter in others if letter != letters[0] and letter in LETTERS[: len(options)]]
    if not letters:
        return named[0] if len(named) == 1 and not _denied(rest, options[named[0]]) else None
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
    """Options whose words stand in the text, but for those that are a part of a longer one that does."""
    words = f" {normalise(text)} "
    found = [i for i, option in enumerate(options) if f" {normalise(option)} " in words]
    longest = {
        i
        for i in found
        if not any(
            j != i
            and f" {normalise(options[i])} " in f" {normalise(options[j])} "
            and normalise(options[i]) != normalise(options[j])
            for j in found
        )
    }
    texts: dict[str, int] = {}
    for i in sorted(longest):
        texts.setdefault(normalise(options[i]), i)
    return list(texts.values())


def accuracy(correct: Mapping[str, bool], categories: Mapping[str, str] | None = None) -> dict:
    """Share of right answers with its 95 % interval, and the same for each kind of question.

    Args:
        correct: by question id.
        categories: kind of each question; '' counts in the whole alone.
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
    return result


def _share(rights: Sequence[bool]) -> dict:
    right, count = sum(rights), len(rights)
    return {
        "accuracy": right / count if count else 0.0,
        "accuracy_interval": accuracy_interval(right, count),
        "questions": count,
    }
