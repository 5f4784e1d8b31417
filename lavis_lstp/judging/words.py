"""Words of short answers in a form in which equal meanings are equal strings.

In: a text. Out: a list of units: numbers as "#12" whether written as digits or in words, other words as they are,
lower case, without articles and punctuation. `lemma` gives the base form, `fold` also replaces synonyms.

Base forms come from simplemma: its dictionary is inside the wheel, where NLTK's WordNet and spaCy's tables are
downloads of their own. It takes -ing forms for nouns or makes verbs of its own ("playing" -> "playe", "cutting"), so
those are undone here first.

The synonyms are a table of our own, because a thesaurus is too generous to decide by: WordNet has "guy" beside "man",
but also "piece", "serviceman" and "homo". A group holds words that can replace one another as an answer about a video
and mean nothing else there: no "football" beside "soccer", no "rock" beside "stone", no "film" beside "movie".
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal

from lavis_lstp.metrics.choice import NUMBERS

ARTICLES = frozenset(("a", "an", "the"))
_TOKEN = re.compile(r"(?<![\w-])-?\d+(?:[.,:/]\d+)*(?!\w)|[^\W_]+(?:'[^\W_]+)*|[%$€£+#°=<>]")
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")
_PLAIN_NUMBER = re.compile(r"-?\d+(\.\d+)?")

_ONES = {word: int(n) for word, n in NUMBERS.items() if 1 <= int(n) <= 9}
_TEENS = {word: int(n) for word, n in NUMBERS.items() if int(n) == 0 or 10 <= int(n) <= 19}
_TENS = {w: 10 * n for n, w in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_ORDINALS = {
    w: f"{n}{'st' if n == 1 else 'nd' if n == 2 else 'rd' if n == 3 else 'th'}"
    for n, w in enumerate("first second third fourth fifth sixth seventh eighth ninth tenth".split(), 1)
}

# What the base form would turn into another thing, or is no form of a verb.
_KEPT = frozenset(
    "arms batting bowling boxing building being ceiling clothes clothing customs evening everything anything fencing "
    "glasses goods king meaning morning news nothing ring saw shorts something spring string thing wedding wing "
    "works".split()
)
_VOWELS = "aeiou"

SYNONYMS: tuple[tuple[str, ...], ...] = (
    # people
    ("man", "guy", "gentleman", "male"),
    ("woman", "lady", "female"),
    ("child", "kid"),
    ("person", "people", "human", "someone", "somebody"),
    ("mother", "mom", "mum", "mommy", "mummy"),
    ("father", "dad", "daddy"),
    ("grandmother", "grandma", "granny"),
    ("grandfather", "grandpa"),
    ("policeman", "police officer", "cop"),
    # things
    ("airplane", "aeroplane", "plane"),
    ("bicycle", "bike"),
    ("bucket", "pail"),
    ("car", "automobile"),
    ("cell phone", "cellphone", "mobile phone", "smartphone"),
    ("garbage", "trash", "rubbish"),
    ("glasses", "eyeglasses", "spectacles"),
    ("handbag", "purse"),
    ("motorcycle", "motorbike"),
    ("pants", "trousers"),
    ("phone", "telephone"),
    ("photo", "photograph"),
    ("rabbit", "bunny"),
    ("refrigerator", "fridge"),
    ("sofa", "couch"),
    ("taxi", "cab"),
    ("television", "tv"),
    ("truck", "lorry"),
    # doing and being
    ("begin", "start"),
    ("large", "big"),
    ("quick", "fast"),
    ("small", "little"),
    ("talk", "speak"),
    ("inside", "indoors"),
    ("outside", "outdoors"),
    ("left", "left side", "left hand side"),
    ("right", "right side", "right hand side"),
    ("table tennis", "ping pong"),
    # spelling
    ("center", "centre"),
    ("color", "colour"),
    ("gray", "grey"),
    ("pajamas", "pyjamas"),
    ("tire", "tyre"),
)


def units(text: str) -> list[str]:
    """Words and numbers of a text; articles stay where there is nothing else ("A", as a choice)."""
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'").replace("\u2212", "-")
    words: list[str] = []
    for token in _TOKEN.findall(text):
        if token.endswith("n't"):
            words += [token[:-3], "not"]
        else:
            words.append(token.removesuffix("'s").replace("'", ""))
    words = [word for word in words if word not in ARTICLES] or words
    return _with_numbers(words)


def number(unit: str) -> Decimal | None:
    """Value of a unit that is a number."""
    return Decimal(unit[1:]) if unit.startswith("#") and unit != "#" else None


def _with_numbers(words: Sequence[str]) -> list[str]:
    result: list[str] = []
    i = 0
    while i < len(words):
        value, after = _spoken(words, i)
        if after > i:
            result.append(f"#{value}")
            i = after
            continue
        result.append(_written(words[i]))
        i += 1
    return result


def _written(word: str) -> str:
    if _THOUSANDS.fullmatch(word):
        word = word.replace(",", "")
    if _PLAIN_NUMBER.fullmatch(word):
        value = Decimal(word)
        return f"#{value.to_integral_value() if value == value.to_integral_value() else value.normalize()}"
    return _ORDINALS.get(word, "percent" if word == "%" else word)


def _spoken(words: Sequence[str], i: int) -> tuple[int, int]:
    """Value of the number in words that begins at `i`, and where it ends; (0, i) where none begins."""
    total = current = 0
    last = ""
    j = i
    while j < len(words):
        word = words[j]
        if word in _ONES and last in ("", "tens", "hundred", "thousand"):
            current, last = current + _ONES[word], "ones"
        elif word in _TEENS and last in ("", "hundred", "thousand"):
            current, last = current + _TEENS[word], "teens"
        elif word in _TENS and last in ("", "hundred", "thousand"):
            current, last = current + _TENS[word], "tens"
        elif word == "hundred" and last in ("", "ones") and current < 10:
            current, last = (current or 1) * 100, "hundred"
        elif word == "thousand" and last != "thousand" and not total:
            total, current, last = (current or 1) * 1000, 0, "thousand"
        elif word == "and" and last in ("hundred", "thousand") and words[j + 1 : j + 2]:
            if words[j + 1] not in _ONES and words[j + 1] not in _TEENS and words[j + 1] not in _TENS:
                break
        else:
            break
        j += 1
    return total + current, j


@functools.lru_cache(maxsize=100_000)
def lemma(word: str) -> str:
    """Base form of an English word; the word itself where none is known."""
    if word in _KEPT or not word.isalpha():
        return word
    import simplemma

    found = simplemma.lemmatize(word, lang="en").lower()
    if word.endswith("ing") and _has_vowel(word[:-3]):
        return next((base for base in _bases(word[:-3]) if simplemma.is_known(base, lang="en")), found)
    if re.fullmatch(r".+(x|sh|ch|ss|zz)es", word) and found == word[:-1] and simplemma.is_known(word[:-2], lang="en"):
        return word[:-2]
    if word.endswith("ed") and found == word[:-1] and _has_vowel(word[:-2]):
        return next((base for base in _bases(word[:-2]) if simplemma.is_known(base, lang="en")), found)
    return found


def _has_vowel(stem: str) -> bool:
    return any(letter in _VOWELS + "y" for letter in stem)


def _bases(stem: str) -> list[str]:
    """Verbs that an -ing or -ed form may come from, the likelier first."""
    doubled = len(stem) > 2 and stem[-1] == stem[-2] and stem[-1] not in _VOWELS
    if doubled:
        return [stem, stem[:-1]] if stem[-1] in "dlsz" else [stem[:-1]]
    # one vowel between consonants would have been doubled: "hoping" comes from "hope", "opening" from "open"
    short = re.fullmatch(r"[^aeiou]*[aeiouy][^aeiouywx]", stem) is not None
    if stem.endswith("i"):
        return [stem[:-1] + "y"]
    return [stem + "e"] if short else [stem, stem + "e"]


@functools.cache
def _phrases() -> tuple[dict[tuple[str, ...], str], int]:
    """Base forms of each synonym -> the first of its group, and the length of the longest."""
    found = {tuple(map(lemma, units(phrase))): group[0] for group in SYNONYMS for phrase in group}
    return found, max(map(len, found))


def fold(lemmas: Sequence[str]) -> list[str]:
    """Base forms with each synonym replaced by the first of its group, the longest phrase first."""
    phrases, longest = _phrases()
    result: list[str] = []
    i = 0
    while i < len(lemmas):
        for length in range(longest, 0, -1):
            phrase = tuple(lemmas[i : i + length])
            if len(phrase) == length and phrase in phrases:
                result.append(phrases[phrase])
                break
        else:
            length = 1
            result.append(lemmas[i])
        i += length
    return result
