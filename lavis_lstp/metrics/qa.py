"""Scores of answers: strings in, numbers out.

`token_recall` is the published score that pseudo spans are made from and keeps its quirks. The others compare
predictions with gold answers for a report: exact match, token F1, ROUGE-1 and ROUGE-L.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

from lavis_lstp.metrics.coverage import Items, join_by_id

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DECIMAL_POINT = re.compile(r"(?<=\d)\.(?=\d)")
_WORD = re.compile(r"[^\W_]+")


def token_recall(gold: str, prediction: str) -> float:
    """Share of the gold answer's whitespace tokens that occur in the prediction, 0..1.

    Case sensitive; "," and "." alone do not count; a repeated gold token counts each time; no gold token gives 0.
    """
    tokens = [token for token in gold.split() if token not in (",", ".")]
    produced = set(prediction.split())
    return sum(token in produced for token in tokens) / len(tokens) if tokens else 0.0


def normalise(answer: str) -> str:
    """Lower case, no punctuation, no articles, single blanks, as in SQuAD.

    Two exceptions keep different answers apart: the point of 1.5 stays, and an answer made of articles alone ("A",
    as a choice) stays.
    """
    text = _DECIMAL_POINT.sub("\0", answer.lower()).translate(_PUNCTUATION).replace("\0", ".")
    return " ".join(_ARTICLES.sub(" ", text).split()) or " ".join(text.split())


def exact_match(gold: str, prediction: str) -> float:
    """1.0 where both are equal after `normalise`, else 0.0."""
    return float(normalise(gold) == normalise(prediction))


def token_f1(gold: str, prediction: str) -> float:
    """Harmonic mean of token precision and recall after `normalise`, 0..1; two empty answers agree."""
    return _f1(normalise(gold).split(), normalise(prediction).split())


def _f1(gold: Sequence[str], prediction: Sequence[str]) -> float:
    if not gold or not prediction:
        return float(not gold and not prediction)
    common = sum((Counter(gold) & Counter(prediction)).values())
    return 2 * common / (len(gold) + len(prediction))


def rouge(gold: str, prediction: str) -> dict[str, float]:
    """F-measures of ROUGE-1 (shared words) and ROUGE-L (longest common subsequence), 0..1.

    Words are runs of letters and digits, lower case, not stemmed; for ASCII text the numbers are those of the
    `rouge-score` package, whose words are ASCII only.
    """
    a, b = _WORD.findall(gold.lower()), _WORD.findall(prediction.lower())
    if not a or not b:
        return {"rouge_1": 0.0, "rouge_l": 0.0}
    return {"rouge_1": _f1(a, b), "rouge_l": 2 * _longest_common_subsequence(a, b) / (len(a) + len(b))}


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length, by a row of bits for each word of `b` (Hyyrö 2004): a bit that falls is a place where it grows."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    row = every = (1 << len(a)) - 1
    for word in b:
        both = row & places.get(word, 0)
        row = (row + both | row - both) & every
    return len(a) - row.bit_count()


def accuracy_interval(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of successes, within 0..1; (0, 1) where n is 0.

    Unlike the normal approximation it has a width at 0 and at n successes.
    """
    if n == 0:
        return 0.0, 1.0
    share, slack = successes / n, z * z / n
    centre = (share + slack / 2) / (1 + slack)
    half = z / (1 + slack) * math.sqrt(share * (1 - share) / n + slack / (4 * n))
    # the exact ends, which rounding would miss
    return (centre - half if successes > 0 else 0.0), (centre + half if successes < n else 1.0)


def _scores(gold: str, prediction: str) -> dict[str, float]:
    exact, f1 = exact_match(gold, prediction), token_f1(gold, prediction)
    return {"exact_match": exact, "token_f1": f1, **rouge(gold, prediction)}


def evaluate_answers(predictions: Items[str], answers: Items[str], *, allow_partial: bool = False) -> dict:
    """Mean scores of predictions, joined with the gold answers by question id.

    Args:
        predictions, answers: question id -> string, or pairs of them.
        allow_partial: see `join_by_id`; means are then over the questions that have a prediction.

    Returns:
        exact_match, token_f1, rouge_1, rouge_l (0..1), exact_match_interval (95 %, low and high), and the
        coverage: num_questions, num_scored, num_missing, num_extra, coverage, partial.

    Raises:
        CoverageError: predictions and questions are not one to one.
    """
    ids, predicted, gold, coverage = join_by_id(predictions, answers, allow_partial=allow_partial)
    known: dict[tuple[str, str], dict[str, float]] = {}  # short answers are often the same
    rows = [
        known.get(pair) or known.setdefault(pair, _scores(*pair)) for pair in ((gold[k], predicted[k]) for k in ids)
    ]
    result: dict = {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}
    correct = sum(row["exact_match"] for row in rows)
    return {**result, "exact_match_interval": accuracy_interval(correct, len(rows)), **coverage}
