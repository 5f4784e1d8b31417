"""The judge that costs nothing: what can be decided by looking at the words.

In: a case. Out: a verdict, or None where the rules are not sure; those go to a judge, or count as wrong where there is
none. Right: the same words, the same number, the same yes or no, the same base forms, a synonym, and a sentence that
repeats the question around such an answer ("there are two dogs" for "how many dogs are there?" and "2"). Wrong: another
number, the opposite of yes or no, no answer at all.
"""

from __future__ import annotations

from importlib.metadata import version

from lavis_lstp.judging.verdict import MAX_SCORE, Case, Verdict, identity
from lavis_lstp.judging.words import ARTICLES, fold, lemma, number, units
from lavis_lstp.metrics.qa import spoken, yes_or_no

RULES_VERSION = 9
"""Changes with each change of a verdict, so that no two tables made by different rules look alike."""
UNDECIDED = "undecided"

# Words that carry a sentence and no answer; "not" and "no" are none of them, nor is "can", which is also a thing.
_FRAME = ARTICLES.union(
    "there here it its this that these those he she they i we you is are was were be been being am do does did has "
    "have had would".split()
)


def rules_identity() -> str:
    return identity("rules", version=RULES_VERSION, simplemma=version("simplemma"))


def decide(case: Case, judge: str | None = None) -> Verdict | None:
    """The rules' verdict, None where none of them is sure.

    Args:
        judge: `rules_identity()`, for callers that have it at hand.
    """
    decision = _decision(case.question, case.answer, spoken(case.prediction))
    if decision is None:
        return None
    rule, correct = decision
    return Verdict(judge or rules_identity(), correct=correct, score=MAX_SCORE if correct else 0, rule=rule)


def undecided(judge: str) -> Verdict:
    """What a case counts where the rules are the only judge: wrong."""
    return Verdict(judge, correct=False, score=0, rule=UNDECIDED)


def _decision(question: str, answer: str, prediction: str) -> tuple[str, bool] | None:
    if not prediction.strip():
        return "empty", not answer.strip()
    gold, given = units(answer), units(prediction)
    if answer.strip() == prediction.strip():
        return "exact", True
    if not gold or not given:
        return None
    polarity = yes_or_no(answer)
    if polarity is not None and len(gold) == 1:
        said = yes_or_no(prediction)
        return None if said is None else ("yes_no", said == polarity)
    if found := _same(gold, given):
        return found, True
    if len(gold) == len(given) == 1 and number(gold[0]) is not None and number(given[0]) is not None:
        return "number", False
    return _restated(question, gold, given)


def _same(gold: list[str], given: list[str]) -> str | None:
    """The rule by which two lists of units mean the same."""
    if gold == given:
        return "number" if len(gold) == 1 and number(gold[0]) is not None else "exact"
    if not any(number(unit) is not None for unit in (*gold, *given)) and "".join(gold) == "".join(given):
        return "exact"  # "ice cream", "icecream"
    gold_lemmas, given_lemmas = [lemma(word) for word in gold], [lemma(word) for word in given]
    if gold_lemmas == given_lemmas:
        return "lemma"
    # "glasses" is a group of its own although "glass" is its base form, hence the words as well
    if fold(gold_lemmas) == fold(given_lemmas):
        return "synonym"
    return None


def _restated(question: str, gold: list[str], given: list[str]) -> tuple[str, bool] | None:
    """An answer inside a sentence that otherwise only repeats the question, word for word.

    What stands before and after the answer must be runs of the question's words, so that "he runs before he jumps"
    is no answer "jumps" to "what does he do before he runs?".
    """
    asked = [lemma(word) for word in units(question) if word not in _FRAME]
    core = [word for word in given if word not in _FRAME]
    a_choice = bool(set(map(lemma, gold)) & set(asked))  # the question names the answers: none may count as repeated
    for length in range(len(core) if a_choice else 1, min(len(core), len(gold) + 2) + 1):
        for start in range(len(core) - length + 1):
            before, inner, after = core[:start], core[start : start + length], core[start + length :]
            if not (_run(before, asked) and _run(after, asked)):
                continue
            if found := _same([word for word in gold if word not in _FRAME] or gold, inner):
                return found, True
            if length == len(gold) == 1 and number(gold[0]) is not None and number(inner[0]) is not None:
                return "number", False
    return None


def _run(words: list[str], asked: list[str]) -> bool:
    lemmas = [lemma(word) for word in words]
    return any(asked[i : i + len(lemmas)] == lemmas for i in range(len(asked) - len(lemmas) + 1))
