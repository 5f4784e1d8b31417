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
from collections.abc import Sequence
from decimal import Decimal

from lavis_lstp.metrics.numbers import UNIT, counted, plain_characters

ARTICLES = frozenset(("a", "an", "the"))
_TOKEN = re.compile(rf"(?:{UNIT.pattern})(?!\w)|[^\W_]+(?:'[^\W_]+)*|[%$€£+#°=<>]")
_PLAIN_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d*[1-9])?")
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
    words: list[str] = []
    for token in _TOKEN.findall(counted(" ".join(plain_characters(text).lower().split()))):
        if _PLAIN_NUMBER.fullmatch(token):
            words.append(f"#{token}")
        elif token.endswith("n't"):
            words += [token[:-3], "not"]
        else:
            words.append(token.removesuffix("'s").replace("'", ""))
    return [word for word in words if word not in ARTICLES] or words


def number(unit: str) -> Decimal | None:
    """Value of a unit that is a number."""
    return Decimal(unit[1:]) if unit.startswith("#") and unit != "#" else None


@functools.lru_cache(maxsize=100_000)
def lemma(word: str) -> str:
    """Base form of an English word; the word itself where none is known."""
    if word in _KEPT or not word.isalpha():
        return word
    if word == "people":  # a noun of its own for the dictionary
        return "person"
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
