"""Scores of answers: strings in, numbers out.

`token_recall` is the published score that pseudo spans are made from and keeps its quirks. The others compare
predictions with gold answers for a report: exact match, token F1, ROUGE-1 and ROUGE-L.
"""

from __future__ import annotations

import importlib.util
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from lavis_lstp.errors import ConfigError
from lavis_lstp.metrics.coverage import Items, join_by_id
from lavis_lstp.metrics.numbers import UNIT, plain_characters, written
from lavis_lstp.schema import Prediction

_ARTICLES = re.compile(r"(?<!\S)(a|an|the)(?!\S)")
_SIGNS = frozenset("%$\u20ac\u00a3+#\u00b0=<>")
"""Symbols that make another answer: 5% is not 5, C# is not C++."""
_WORD = re.compile(r"[^\W_]+")
_COMMAND = re.compile(r"\\(?:fbox|boxed|text\w*|math\w+|bf|bm|emph|operatorname)\s*\{([^{}]*)\}")
_INNER = re.compile(r"\\(?:bf|rm|it|tt|sf|bfseries)\b\s*|(?<=\{)\s*\{([^{}]*)\}\s*(?=\})")
r"""LaTeX's old switches of fonts, and braces within braces: "{\bf B}", "{{B}}"."""
_CONTROL = re.compile(r"<[|\uff5c][^<>|\uff5c\n]{1,40}[|\uff5c]>|</?s>|<(?:bos|eos|pad|start_of_turn|end_of_turn)>")
"""Tokens of chat templates, as decoders that keep special tokens write them: `<|im_end|>`, `</s>`."""
_MARKUP = re.compile(
    r"[*`]+|(?<![^\W_])_+|_+(?![^\W_])|</?(?:[a-z]\w*|[A-Z]\w+)>|<([A-Z])>(?=[^\n<]{0,300}</\1>)|</[A-Z]>"
    rf"|{_CONTROL.pattern}"
    r"|\[/INST\]|\\[()\[\]]|(?<![\w$])\$+ ?([A-Za-z])(?: ?\$+|(?!\w))|\$(?=[({\[<\"][A-Za-z]\W)"
    r"|^[ \t]*(?:[-=]*>|[-\u2022\u2192\u21d2\u27a1\u25ba]|#{1,6})\ufe0f?[ \t]+",
    re.MULTILINE,
)
"""Bold, italic and code marks, tags and ends of texts, LaTeX's signs around a letter, bullets and headings."""
_THIN_SPACE = re.compile(r"\\[,;:](?=\s*[\\\w])|(?<=\d)~(?=\\?[A-Za-z])")
"""LaTeX's between a number and its unit."""
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)")
_MATH = re.compile(r"(?<![\w\\])(\$\$?)(?=[^\s$])([^$\n]{0,300})(?<=\S)\1(?!\w)|\\\(([^\n]{0,300}?)\\\)")
"""A formula between dollars, which "$5 or $6" is not: a blank stands within, or a digit behind."""
_THOUGHT_ENDS = re.compile(r"</think(?:ing)?>|\u25c1/think\u25b7", re.IGNORECASE)
_THOUGHT = re.compile(r"<think(?:ing)?>|\u25c1think\u25b7", re.IGNORECASE)
_KEY = (
    r"(?:[a-z]+[ _-])*(?:answer|choice|option|letter|selection|prediction|pred|\u7b54\u6848)"
    r"(?:[ _-](?:letter|label|text|choice|option))?"
)
_OF_KEY = re.compile(
    rf"""(["'])(?:{_KEY})\1\s*:\s*"""
    rf"""("(?:[^"\\]|\\.)*"|'[^'\n]*'|\[[^]]*\]|[^\s,}}\]"'{{][^,}}\]\n"'{{]*)""",
    re.IGNORECASE,
)
_ITEM = re.compile(r"""[^,\[\]"']+|"[^"]*"|'[^']*'""")
_WRAPPERS = (
    re.compile(r"<((?:final_?)?answer|option|choice|conclusion)>(.*?)(?:</\1>|\Z)", re.IGNORECASE | re.DOTALL),
    re.compile(r"<\|(begin_of_box)\|>(.*?)(?:<\|end_of_box\|>|\Z)", re.DOTALL),
    _OF_KEY,
    re.compile(r"\\(f?box(?:ed)?)\s*\{([^{}]*)\}"),
)
"""What models put around an answer: <answer> (R1), GLM's box, a key of a JSON object, and LaTeX's box."""

_YES = frozenset(("yes", "yeah", "yep", "\u662f", "\u662f\u7684"))
_NO = frozenset(("no", "nope", "nah", "\u5426", "\u4e0d", "\u4e0d\u662f"))
_DOUBT = frozenset("but not never however maybe perhaps unless except nobody none neither nor".split())
_NEGATIONS = frozenset("not never nobody none neither nor".split())
"""Behind a no they say it once more."""
_NOT_BUT = re.compile(r"\bnot\b[^,.;]{0,100}?,? but\b")
_SENTENCE = re.compile(r"[.!?;]+(?:\s+|$)")
_UNSURE = re.compile(r"\b(?:maybe|perhaps|however|unsure|uncertain|unclear|not (?:sure|certain|clear))\b")
_ANSWERS_NO = r"no\b(?=\W*$|[,.;:!]| (?:it|he|she|they|there|that|this|these|those|i|we|you|wait|sorry|actually)\b)"
DENIES_ANOTHER = re.compile(
    rf"^\W*(?:{_ANSWERS_NO}|(?:not|never|wait|but|however)\b)"
    r"|\b(?:wrong|incorrect|false|untrue|inaccurate|invalid|implausible|whether|if"
    r"|unless|unclear|uncertain|unsure|ambiguous|doubt\w*|impossible|unlikely|suppos\w+|assum\w+|imagine|contradict\w*"
    r"|(?:not|never)(?: [a-z]+)? (?:sure|certain|correct|right|true|clear|enough|possible)"
    r"|(?:not|never)(?: (?:really|exactly|quite|be))? (?:the|be|it|that|this)"
    r"|none of the(?! others?\b)|unable|(?:can|could|do|does) ?not (?:tell|say|know|determine|be|see|answer))\b"
    r"|\b(?:no|not|never)\W*\Z"
)
"""A sentence with one of these may deny what another says, as in "The car is red. That is not true"."""
_NO_SUCH = re.compile(rf"\W*(?:(?!{_ANSWERS_NO})no|nobody|none|neither)\b")
"""Such a sentence says that something is not there, and denies no other one: "No other person is visible."."""
_WAIT = re.compile(r"\A(?:(?:actually|wait|well|sorry|h+m+|oh)\W+)+")
_SHORT_FORMS = (
    (re.compile(r"\b(c)(?:an't|annot)\b", re.IGNORECASE), r"\1an not"),
    (re.compile(r"\b(w)on't\b", re.IGNORECASE), r"\1ill not"),
    (re.compile(r"\b(s)han't\b", re.IGNORECASE), r"\1hall not"),
    (re.compile(r"(?<=[a-z])n't\b", re.IGNORECASE), " not"),
    (re.compile(r"\b(it|he|she|that|this|there|here|what|who|where|how)'s\b", re.IGNORECASE), r"\1 is"),
    (re.compile(r"\b(i)'m\b", re.IGNORECASE), r"\1 am"),
    (re.compile(r"(?<=[a-z])'re\b", re.IGNORECASE), " are"),
    (re.compile(r"(?<=[a-z])'ve\b", re.IGNORECASE), " have"),
    (re.compile(r"(?<=[a-z])'ll\b", re.IGNORECASE), " will"),
)
"""Short forms and what they are written as; "the man's" may be whose it is, and stays."""
REASON = re.compile(r"\b(?:because|since)\b")
_SPOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_POLAR = r"(?:yes|yeah|yep|nope|nah|no|\u662f\u7684?|\u5426|\u4e0d\u662f?)"
_EDGE = re.compile(r"^[^\w]+")
_LEADS = re.compile(
    r"(?:(?:so|thus|therefore|hence|assistant|i (?:think|believe|guess)|i(?: would|'d) say|(?:it|that)(?:'s| is)"
    r"|that|is|would be|(?:response|prediction|output|result|conclusion)(?=:)"
    r"|(?:(?:most )?likely|probably|indeed|absolutely|definitely|certainly|clearly|sure|oh|well|h+m+|of course)"
    r"|(?:from what|as far as) i can (?:see|tell)|according to (?:the|this) (?:video|clip|frames?|images?|footage)"
    r"|(?:based on|in) (?:the|this) (?:video|clip|frames?|images?|footage|scenes?)"
    r"|(?:\u6240\u4ee5)?\u7b54\u6848(?:[\u662f\u4e3a](?=[^\s.,\u3002])|(?=:))"
    r"|(?:(?:the|my|final|correct|right|short) )*answer(?: to (?:the|this|your) question)?)[\s,:\"'(\[{]*)*"
)
_DECIDED = re.compile(rf"\banswer(?: to (?:the|this|your) question)?(?: is| would be|:)[: ]*(?={_POLAR}\b)")
_FIRST_WORD = re.compile(
    rf"({_POLAR})(?!\w)[\"')\]}}]*\s*"
    r"(?:$|-(?!\w)|[^\w\s?/&+-]|(?=is (?:the |my )?(?:[a-z]+ )?(?:answer|option|choice|correct|right)\b)"
    r"|(?=(?:because|it|he|she|they|there|the|this|that|these|those|i|we|you"
    r"|an?|indeed|in|at|on|both|someone)\b))"
)
_LINE_ENDS = re.compile(r"(?<![\s.,:;!?])(?<!nswer)\s*\n\s*")
_SAID_LAST = re.compile(
    rf"(?:\A(?:it|he|she|they|there|this|that|these|those|we|you|i) [a-z]+(?: not)?,"
    rf"|[^,.;:!?]{{3}}[.!?](?: (?:so|thus|therefore|hence),?)?|, so) (?={_POLAR}\W*\Z)"
)
"""In front of a yes or no that ends the text: "It does, yes.", "The man opens the door. Yes."."""
_SURELY_NOT = re.compile(
    r"(?:(?:absolutely|definitely|certainly|probably|(?:most )?likely|clearly|surely|of course) not|not at all)"
    rf"(?:, {_POLAR})?\W*\Z"
)


def token_recall(gold: str, prediction: str) -> float:
    """Share of the gold answer's whitespace tokens that occur in the prediction, 0..1.

    Case sensitive; "," and "." alone do not count; a repeated gold token counts each time; no gold token gives 0.
    """
    tokens = [token for token in gold.split() if token not in (",", ".")]
    produced = set(prediction.split())
    return sum(token in produced for token in tokens) / len(tokens) if tokens else 0.0


def folded(text: str) -> str:
    """One spelling of equal characters: NFKC, straight quotes, one dash, lower case, single blanks."""
    return " ".join(plain_characters(text).lower().split())


def written_out(text: str) -> str:
    """Return the text with its short forms written out ("doesn't" is "does not") and blanks around a long dash."""
    text = re.sub(r"(?<=\w)\u2014(?=\w)", " - ", text)
    if "'" not in text and "\u2019" not in text and "annot" not in text:
        return text
    text = re.sub(r"(?<=\w)\u2019(?=\w)", "'", text)
    for pattern, long in _SHORT_FORMS:
        text = pattern.sub(long, text)
    return text


def without_thoughts(text: str) -> str:
    """Return the text behind the thoughts of a model that thinks aloud; nothing where thinking never ended."""
    return _THOUGHT.split(_THOUGHT_ENDS.split(text)[-1])[0]


def spoken(prediction: str) -> str:
    """Return what a model says: no thoughts, and no control tokens of its chat template.

    >>> spoken("<think>Two, no, three.</think>3<|im_end|>")
    '3'
    """
    return _CONTROL.sub(" ", without_thoughts(prediction)).strip()


def wrapped(text: str) -> list[str]:
    r"""Return what stands inside of <answer>, a JSON object's "answer" or LaTeX's box; the text itself without these.

    >>> wrapped('{"answer": "B", "reason": "It is red."}'), wrapped("So it is $\\boxed{\\text{(B)}}$.")
    (['B'], ['(B)'])
    """
    parts = [_without_commands(text, keep="box")]
    for pattern in _WRAPPERS:
        parts = [inner for part in parts for inner in (_unwrapped(pattern, part) or [part])]
    return parts


def _unwrapped(pattern: re.Pattern, text: str) -> list[str]:
    found = [match[2].strip() for match in pattern.finditer(text)]
    if pattern is not _OF_KEY:
        return found
    values = [part.strip() for value in found for part in (_ITEM.findall(value) if value[:1] == "[" else [value])]
    return [value[1:-1] if value[:1] in ("'", '"') else value for value in values]


def _without_commands(text: str, keep: str = "") -> str:
    """The text without LaTeX's commands around words, but for those with `keep` in their names."""
    text = _INNER.sub(lambda match: match[1] or "", _THIN_SPACE.sub(" ", text))
    for _ in range(4):  # as deep as they are nested
        text = _COMMAND.sub(lambda match: match[0] if keep and keep in match[0].partition("{")[0] else match[1], text)
    return text


def without_latex(text: str) -> str:
    r"""Return the text without LaTeX's marks of formulas and fonts; a price stays one, and so does a box.

    >>> without_latex(r"$10\,\text{kg}$"), without_latex("$5 or $6")
    ('10 kg', '$5 or $6')
    """
    if "$" not in text and "\\" not in text:
        return text
    text = _DEGREES.sub("\u00b0", plain_characters(text)).replace("\\%", "%")
    return _MATH.sub(lambda match: match[2] or match[3] or "", _without_commands(text, keep="box")).strip()


def without_markup(text: str) -> str:
    """A text without bold marks, tags, bullets and boxes around words; in NFKC, its case and lines as they were."""
    return _MARKUP.sub(lambda match: match[2] or "", _without_commands(plain_characters(text))).strip()


def normalise(answer: str, numbers: Callable[[str], str] = written) -> str:
    """Lower case, no punctuation, no articles, single blanks, as in SQuAD; equal characters are spelt alike.

    What makes another answer stays: marks inside numbers (1.5, 1/2, 2-3), a minus, symbols such as % and #, and an
    answer made of articles alone ("A", as a choice). `numbers` spells each number one way ("1,000" is "1000").
    """
    text = numbers(_PARTED.sub(r"\g<0> ", folded(without_latex(answer))))
    inside = {place for match in UNIT.finditer(text) for place in range(*match.span())}

    def kept(match: re.Match) -> str:
        return match[0] if match.start() in inside or match[0] in _SIGNS or not _is_punctuation(match[0]) else ""

    text = _NO_LETTER.sub(kept, text)
    return " ".join(_ARTICLES.sub(" ", text).split()) or " ".join(text.split())


_PARTED = re.compile(r"(?<=[^\W\d_])[,;](?=[^\W\d_])")
"""It parts two words though no blank does: "red,blue" is "red, blue"."""
_NO_LETTER = re.compile(r"[^\w\s]|_")


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character)[0] == "P"


def yes_or_no(text: str) -> bool | None:
    """True for a plain yes, False for a plain no, None for anything else, a yes or no in doubt included.

    >>> yes_or_no("Yes, it is."), yes_or_no("No, there isn't."), yes_or_no("Yes, but not now")
    (True, False, None)
    """
    said = {_polarity(part) for part in wrapped(without_thoughts(text))}
    return said.pop() if len(said) == 1 else None


def _polarity(text: str) -> bool | None:
    """`yes_or_no` of a text without tags: its first word behind "I think" and the like, or what "the answer is"."""
    text = _EDGE.sub("", written_out(folded(_LINE_ENDS.sub(". ", without_markup(written_out(text))))))
    if _SURELY_NOT.match(text):
        return None if _YES & set(_SPOKEN.findall(text)) else False
    match = _FIRST_WORD.match(text, _LEADS.match(text).end())
    if match is None:
        decided = _DECIDED.search(text) or _SAID_LAST.search(text)
        match = decided and _FIRST_WORD.match(text, decided.end())
    if match is None:
        return None
    positive = match[1] in _YES
    opposite, doubt, denies = (_NO, _DOUBT, DENIES_ANOTHER) if positive else (_YES, _DOUBT - _NEGATIONS, _UNSURE)
    said, *others = _SENTENCE.split(REASON.split(text[match.end(1) :], maxsplit=1)[0].lstrip())
    words = _SPOKEN.findall(said if positive else _NOT_BUT.sub(" ", said))
    later = [_WAIT.sub("", other) for other in others if not _NO_SUCH.match(other)]
    words += [word for other in later for word in _SPOKEN.findall(other)[:1]]  # "Yes, there is. But ..."
    unsure = any(word in opposite or word in doubt for word in words) or any(denies.search(other) for other in others)
    return None if unsure or opposite & set(_SPOKEN.findall(text[: match.start()])) else positive


def exact_match(gold: str, prediction: str) -> float:
    """1.0 where both are equal after `normalise`, else 0.0."""
    return float(normalise(gold) == normalise(spoken(prediction)))


def is_right(record: Prediction) -> bool:
    """Return whether a record with an answer has the right option or, where there were none, the same words."""
    return bool(record["correct"]) if "options" in record else exact_match(record["answer"], record["prediction"]) == 1


def subtitles_shown(records: Iterable[Prediction]) -> str | None:
    """Say in words which lines of the subtitles stood in the prompts; None where there were none."""
    windows = dict.fromkeys(record["subtitles"]["window_s"] for record in records if "subtitles" in record)
    return ", ".join("whole" if w is None else f"within {w:g} s of the frames" for w in windows) or None


def token_f1(gold: str, prediction: str) -> float:
    """Harmonic mean of token precision and recall after `normalise`, 0..1; two empty answers agree."""
    return _f1(normalise(gold).split(), normalise(spoken(prediction)).split())


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
    a, b = _WORD.findall(folded(gold)), _WORD.findall(folded(spoken(prediction)))
    if not a or not b:
        return {"rouge_1": 0.0, "rouge_l": 0.0}
    return {"rouge_1": _f1(a, b), "rouge_l": 2 * _longest_common_subsequence(a, b) / (len(a) + len(b))}


def bleu_1(golds: Sequence[str], predictions: Sequence[str]) -> float:
    """Corpus BLEU of single words, with brevity penalty, 0..1; words are parted by blanks, case counts (published).

    Equal to the BLEUScore(n_gram=1) of torchmetrics 1.9 on 400 random corpora, within 5e-8 (its float32).

    Raises:
        ConfigError: sacrebleu is not installed.
    """
    require_bleu()
    from sacrebleu.metrics import BLEU

    bleu = BLEU(max_ngram_order=1, tokenize="none", smooth_method="none")
    score = bleu.corpus_score(list(map(spoken, predictions)), [list(golds)]).score
    return min(1.0, score / 100)  # by logarithms, so 1 + 4e-16


def require_bleu() -> None:
    """Raises ConfigError where sacrebleu is not installed."""
    if not importlib.util.find_spec("sacrebleu"):
        raise ConfigError("run.metric bleu1 needs the package sacrebleu, which is not installed; pip install sacrebleu")


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
