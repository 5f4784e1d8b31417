"""Scores of T candidate frames -> the K frames to show: pure rules, NumPy alone, one table.

In: a `Row`, which is what is known about one question. Out: frame numbers among the candidates, sorted, without
repeats, and how many of them the rule itself did not choose. A rule is a function of `SELECTORS`: it reads the row and
returns at most K numbers. What it returns too few of, or twice, `choose` fills with the best remaining scores and
counts, because an evaluation that fills with evenly spaced frames in silence measures another rule.

`frame_selector` has the rules of the published LSTP code, which work on logits of a batch.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from lavis_lstp.config.model import SELECTORS as OF_MODELS
from lavis_lstp.data.frame_numbers import uniform_centres
from lavis_lstp.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class Row:
    """Facts that a rule may read about one question and the T candidate frames of its video.

    Args:
        scores: float [T], larger = more useful for the question. `LazyScores` serve `focus`, which asks for few, and
            `global_local`; other rules take them all. None where nothing was scored.
        num_selected: K.
        times_s: float [T], ascending seconds of the candidates.
        question: its text.
        features: float [T,D], one vector for each candidate, of any length but 0.
        span: half-open range of candidates.
        rng: the source of random numbers.
    """

    scores: Any = None
    num_selected: int = 8
    times_s: Any = None
    question: str | None = None
    features: Any = None
    span: tuple[int, int] | None = None
    rng: np.random.Generator | None = None

    @property
    def num_frames(self) -> int:
        """T."""
        return next((len(part) for part in (self.scores, self.times_s, self.features) if part is not None), 0)


class LazyScores:
    """Scores of T candidates that are computed when they are asked for, and each of them once.

    Args:
        length: T.
        score: int64 [n] numbers of candidates -> float [n].

    Attributes:
        known: float64 [T], NaN where nobody has asked yet.
    """

    def __init__(self, length: int, score: Callable[[np.ndarray], Any]):
        self.known = np.full(length, np.nan)
        self._score = score

    def __len__(self) -> int:
        return len(self.known)

    def __getitem__(self, numbers: Any) -> np.ndarray:
        numbers = np.atleast_1d(np.asarray(numbers, dtype=np.int64))
        new = np.unique(numbers[np.isnan(self.known[numbers])])
        if len(new):
            self.known[new] = _numbers("scores", self._score(new), 1)
        return self.known[numbers]


Rule = Callable[..., list[int]]
"""(row, *, its own settings with their defaults) -> at most K frame numbers, in any order."""


class Selector(NamedTuple):
    """A rule, and what must be in the row."""

    rule: Rule
    needs: tuple[str, ...] = ()


class Chosen(NamedTuple):
    """Frame numbers, sorted, and how many of them were filled in."""

    frames: list[int]
    num_filled: int


# ---- rules --------------------------------------------------------------------------------------------------------


def uniform(row: Row) -> list[int]:
    """Centres of K equal parts of the video."""
    return uniform_centres(row.num_selected, row.num_frames)


def random(row: Row) -> list[int]:
    """K different frames, each as likely as another."""
    return row.rng.choice(row.num_frames, size=min(row.num_selected, row.num_frames), replace=False).tolist()


def topk(row: Row) -> list[int]:
    """The K best scores."""
    return best(row.scores, row.num_selected)


def aks(row: Row, *, mean_gap: float = 0.8, std_floor: float = -100.0, depth: int = 5) -> list[int]:
    """Adaptive keyframe sampling, arXiv 2502.21271: halves the video until its best frames stand out.

    Args:
        mean_gap: a part is split no further when the mean of its K best scores exceeds its mean by more than this.
        std_floor: and when the deviation of its scores is larger than this.
        depth: parts are halved so many times at most. A part of depth d gives its int(K / 2^d) best frames, so that
            few are chosen where K is smaller than 2^depth.
    """
    _check("depth", depth, least=0, most=30)
    scores = _from_0_to_1(row.scores)
    if len(scores) < row.num_selected:
        return list(range(len(scores)))
    chosen: list[int] = []
    parts = [(0, len(scores), 0)]
    while parts:
        start, end, level = parts.pop()
        if start == end:
            continue
        part = scores[start:end]
        order = np.argsort(-part, kind="stable")
        stands_out = part[order[: row.num_selected]].mean() - part.mean() > mean_gap and part.std() > std_floor
        if stands_out or level >= depth:
            chosen += (start + order[: row.num_selected >> level]).tolist()
        else:
            middle = start + (end - start) // 2
            parts += [(start, middle, level + 1), (middle, end, level + 1)]
    return chosen


def inverse_transform(row: Row, *, power: float = 1.0) -> list[int]:
    """Inverse transform sampling (BOLT, arXiv 2503.21483): equal shares of the sum of scores lie between frames.

    Args:
        power: of the scores, after they are brought to 0..1; a larger one draws frames towards the best scores.
    """
    _check("power", power, above=0)
    weights = np.asarray(row.scores, dtype=np.float64)
    weights = weights - weights.min()
    weights = np.ones_like(weights) if weights.max() == 0 else (weights / weights.max()) ** power
    shares = np.cumsum(weights / weights.sum())
    k = row.num_selected
    places = np.searchsorted(shares, np.linspace(1 / k, 1 - 1 / k, k))
    return np.minimum(places, len(shares) - 1).tolist()


def focus(
    row: Row, *, arm_s: float = 16.0, looks: int = 3, share: float = 0.25, best_share: float = 0.2, step_s: float = 1.0
) -> list[int]:
    """A bandit over parts of the video (FOCUS, ICLR 2026), which scores few frames.

    Only `row.scores[numbers]` of the frames that it looks at is read: first the middle frame and random ones of each
    part, then the parts whose optimistic bound (mean, plus what the variance of few looks leaves open) is highest.

    Args:
        arm_s: seconds of a part.
        looks: frames of each part that are scored first.
        share: of the parts, those scored closely.
        best_share: of the K frames, those that are simply the best ones scored; the others are taken from the closely
            scored parts in turn, in the order of their bounds.
        step_s: seconds between two frames that are scored closely.
    """
    for name, value in (("arm_s", arm_s), ("share", share), ("step_s", step_s)):
        _check(name, value, above=0)
    _check("looks", looks, least=1)
    times = np.asarray(row.times_s, dtype=np.float64)
    _, begins = np.unique((times - times[0]) // arm_s, return_index=True)
    arms = np.split(np.arange(len(times)), begins[1:])
    seen: dict[int, float] = {}

    def look(numbers: Sequence[int]) -> None:
        new = [int(i) for i in numbers if int(i) not in seen]
        if new:
            seen.update(zip(new, np.asarray(row.scores[np.asarray(new)], dtype=np.float64).tolist(), strict=True))

    first = []
    for arm in arms:
        middle = arm[(len(arm) - 1) // 2]
        others = arm[arm != middle]
        first += [middle, *row.rng.choice(others, size=min(looks - 1, len(others)), replace=False)]
    look(first)
    bounds = _bounds(arms, seen)
    order = np.argsort(-bounds, kind="stable").tolist()
    close = 0
    while close < len(order) and (close < math.ceil(share * len(arms)) or len(seen) < row.num_selected):
        arm = arms[order[close]]
        _, apart = np.unique((times[arm] - times[arm[0]]) // step_s, return_index=True)
        look(arm[apart])
        close += 1
    bounds = _bounds(arms, seen)
    numbers = sorted(seen)
    values = np.asarray([seen[i] for i in numbers])
    chosen = [numbers[i] for i in best(values, math.ceil(best_share * row.num_selected))] if best_share > 0 else []
    order = sorted(order[:close], key=lambda a: -bounds[a])
    left = [
        sorted((i for i in arms[a].tolist() if i in seen and i not in chosen), key=lambda i: -seen[i]) for a in order
    ]
    while len(chosen) < row.num_selected and any(left):
        for frames in left:
            if frames and len(chosen) < row.num_selected:
                chosen.append(frames.pop(0))
    rest = [i for i in numbers if i not in set(chosen)]
    chosen += [rest[i] for i in best([seen[i] for i in rest], row.num_selected - len(chosen))]
    return chosen


def _bounds(arms: Sequence[np.ndarray], seen: dict[int, float]) -> np.ndarray:
    """An upper bound of each part's mean score by its looks (empirical Bernstein), float [number of parts]."""
    log, wide = math.log(max(2, len(seen))), max(seen.values()) - min(seen.values())
    bounds = []
    for arm in arms:
        values = np.asarray([seen[i] for i in arm.tolist() if i in seen])
        slack = math.sqrt(2 * values.var() * log / len(values)) + 3 * wide * log / len(values)
        bounds.append(values.mean() + (slack if len(values) < len(arm) else 0.0))  # all seen: the mean is known
    return np.asarray(bounds)


def mmr(row: Row, *, relevance: float = 0.5) -> list[int]:
    """Maximal marginal relevance: one frame after the other, each good and unlike those before.

    Args:
        relevance: 0..1, weight of the score (brought to 0..1) against the greatest cosine to a chosen frame.
    """
    _check("relevance", relevance, least=0, most=1)
    scores, features = relevance * _from_0_to_1(row.scores), _unit(row.features)
    alike = np.zeros(len(scores))
    chosen: list[int] = []
    open_ = np.ones(len(scores), dtype=bool)
    for _ in range(min(row.num_selected, len(scores))):
        gain = scores - ((1 - relevance) * alike if chosen else 0.0)
        chosen.append(int(np.where(open_, gain, -np.inf).argmax()))
        open_[chosen[-1]] = False
        cosine = features @ features[chosen[-1]]
        alike = cosine if len(chosen) == 1 else np.maximum(alike, cosine)
    return chosen


def dpp(row: Row, *, relevance: float = 0.7) -> list[int]:
    """A determinantal point process: greedily the set whose quality and difference span the largest volume.

    The kernel is q_i S_ij q_j with S = (1 + cosine) / 2 and q = exp(a * score), score in 0..1. Greedy search by
    Chen et al. 2018 (arXiv 1709.05135), O(K^2 T). Frames equal to chosen ones add no volume and are not taken.

    Args:
        relevance: r in 0 <= r < 1; a = r / (2 (1 - r)).
    """
    _check("relevance", relevance, least=0, below=1)
    quality = np.exp(relevance / (2 * (1 - relevance)) * _from_0_to_1(row.scores))
    features = _unit(row.features)
    volume = quality**2
    basis: list[np.ndarray] = []
    chosen: list[int] = []
    for _ in range(min(row.num_selected, len(quality))):
        pick = int(volume.argmax())
        if volume[pick] <= 1e-9:
            break
        kernel = quality[pick] * quality * (1 + features @ features[pick]) / 2
        kernel = kernel - sum((done[pick] * done for done in basis), np.zeros(len(quality)))
        basis.append(kernel / math.sqrt(volume[pick]))
        volume = np.maximum(volume - basis[-1] ** 2, 0)
        chosen.append(pick)
        volume[chosen] = -np.inf
    return chosen


GLOBAL = re.compile(
    r"\b(?:how many (?:times|different)|in total|altogether|overall|throughout|entire|whole (?:video|film|clip|time)"
    r"|summar\w+|main(?:ly)? (?:\w+ ){0,2}(?:idea|topic|theme|purpose|point|about|character|message|subject)"
    r"|(?:video|film|clip|documentary) (?:mainly|mostly|primarily|about|title)|(?:best|mainly) (?:describe|title)\w*"
    r"|what is (?:the|this) (?:video|film|clip) about|genre|mood|atmosphere|most (?:often|frequent\w*|common\w*)"
    r"|(?:order|sequence) of (?:the )?(?:event|step|scene|action)\w*|what (?:kind|type|sort) of (?:video|film)"
    r"|how (?:does|did) (?:the )?\w+ (?:change|develop|evolve))\b",
    re.IGNORECASE,
)
"""Words of questions about a whole video. The language model of DIG (CVPR 2026) decides this by itself."""


def question_kind(question: str) -> str:
    """ "global", of a question about the whole video by the words in `GLOBAL`, or "local"."""
    return "global" if GLOBAL.search(question) else "local"


def global_local(row: Row, *, local: str = "inverse_transform") -> list[int]:
    """Evenly spaced frames for a question about the whole video, another rule for any other one.

    Args:
        local: that rule, with its own defaults.
    """
    if local not in SELECTORS or SELECTORS[local].rule is global_local:
        raise ConfigError(
            unknown_name("setting local of selector global_local", local, SELECTORS.keys() - {"global_local"})
        )
    if question_kind(row.question) == "global":
        return uniform(row)
    _check_needs(local, row)
    return SELECTORS[local].rule(_scored(local, row))


def uniform_in_span(row: Row) -> list[int]:
    """Centres of K equal parts of the span; all of its frames where it has fewer."""
    start, end = row.span
    return [start + i for i in uniform_centres(row.num_selected, end - start)]


SELECTORS: dict[str, Selector] = {
    **{
        name: Selector(globals()[kind.rule.partition(":")[2]], kind.needs)
        for name, kind in OF_MODELS.items()
        if "scores" in kind.needs
    },
    "uniform": Selector(uniform),
    "random": Selector(random, needs=("rng",)),
    "uniform_in_span": Selector(uniform_in_span, needs=("span",)),
}
"""Name -> rule, and the parts of the row that it cannot do without: the rules over scores of `config.model.SELECTORS`,
and those of callers who bring a span, or have no scores. A rule's settings are its keyword arguments."""


# ---- what all rules have in common --------------------------------------------------------------------------------


def asks_few(method: str) -> bool:
    """Return whether a rule reads the scores of the frames that it looks at alone, where they are `LazyScores`."""
    return SELECTORS[method].rule in (focus, global_local)


def _scored(method: str, row: Row) -> Row:
    """The row with all scores, for a rule that reads them all."""
    if isinstance(row.scores, LazyScores) and not asks_few(method):
        row = replace(row, scores=row.scores[np.arange(row.num_frames)])
    return row


def choose(method: str, row: Row, *, repeats: bool = False, **settings: Any) -> Chosen:
    """K frames by a rule; all T where there are no more.

    Args:
        method: a name of `SELECTORS`.
        repeats: keep frames that the rule names twice. Otherwise the best remaining scores take their place, or, where
            there are no scores, the frames nearest to the chosen ones.
        settings: those of the rule.

    Raises:
        ConfigError: unknown method or setting, a setting of another type or out of range, K below 1, or a part of the
            row that the rule needs is missing or of another length.
    """
    settings = selector_settings(method, settings)
    row = _checked(row)
    _check_needs(method, row)
    row = _scored(method, row)
    if row.num_selected >= row.num_frames:
        return Chosen(list(range(row.num_frames)), 0)
    frames = [int(i) for i in SELECTORS[method].rule(row, **settings)]
    kept = frames if repeats else list(dict.fromkeys(frames))
    missing = row.num_selected - len(kept)
    assert missing >= 0, f"rule {method} gave {len(kept)} frames, {row.num_selected} were asked for"
    wrong = [i for i in kept if not 0 <= i < row.num_frames]
    assert not wrong, f"rule {method} gave frames {wrong[:4]}, those of the video are 0 to {row.num_frames - 1}"
    return Chosen(sorted(kept + _fill(row, kept, missing)), missing)


def select_from_scores(
    scores: Any,
    k: int,
    method: str = "topk",
    *,
    times_s: Any = None,
    features: Any = None,
    question: str | None = None,
    span: tuple[int, int] | None = None,
    seed: int = 0,
    repeats: bool = False,
    **settings: Any,
) -> list[int]:
    """Frame numbers that a rule chooses by given scores.

    >>> select_from_scores([0.1, 0.9, 0.2, 0.8], k=2)
    [1, 3]

    Args:
        scores: float [T], one a candidate frame.
        k: so many frames, fewer where T is smaller.
        method: a name of `SELECTORS`.
        times_s: float [T], for "focus"; without them candidates are one second apart.
        features: float [T,D], for "mmr" and "dpp".
        question: for "global_local".
        span: half-open range of candidates, for "uniform_in_span".
        seed: of the random numbers of "random" and "focus".
        repeats: see `choose`.
        settings: those of the method, such as `power` of "inverse_transform" or `depth` of "aks".

    Returns:
        Numbers of candidates, ascending.

    Raises:
        ConfigError: see `choose`.
    """
    scores = np.asarray(scores)
    times_s = np.arange(len(scores), dtype=np.float64) if times_s is None and scores.ndim == 1 else times_s
    row = Row(scores, k, times_s, question, features, span, np.random.default_rng(seed))
    return choose(method, row, repeats=repeats, **settings).frames


def selector_settings(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """All settings of a rule: the given ones, checked by the type of their defaults, and the defaults of the others.

    Raises:
        ConfigError: unknown method or setting, or a value of another type.
    """
    if method not in SELECTORS:
        raise ConfigError(unknown_name("selector", method, SELECTORS))
    parameters = inspect.signature(SELECTORS[method].rule).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    settings = dict(defaults)
    for name, value in given.items():
        if name not in defaults:
            own = f"it has {', '.join(defaults)}" if defaults else "it has none"
            raise ConfigError(f"selector '{method}' has no setting '{name}'; {own}")
        kind = type(defaults[name])
        good = type(value) is kind or (kind is float and type(value) is int)
        if not good or (kind is float and not math.isfinite(value)):
            raise ConfigError(f"setting {name} of selector '{method}' must be {kind.__name__}, got {value!r:.80}")
        settings[name] = kind(value)
    return settings


def best(scores: Any, count: int) -> list[int]:
    """Numbers of the `count` best scores, ascending. Of equal ones at the edge, evenly spaced ones are taken.

    >>> best([5, 1, 1, 1, 1], 2)
    [0, 2]
    """
    scores = np.asarray(scores, dtype=np.float64)
    count = min(count, len(scores))
    if count < 1:
        return []
    edge = np.sort(scores)[-count]
    above, equal = np.flatnonzero(scores > edge), np.flatnonzero(scores == edge)
    return sorted([*above.tolist(), *equal[uniform_centres(count - len(above), len(equal))].tolist()])


def num_for_mass(scores: Any, mass: float, least: int, most: int) -> int:
    """The smallest number of best scores whose sum is the share `mass` of all, within bounds and the T at hand.

    Scores count from the lowest of them, as in `inverse_transform`: those of encoders are cosines, far from 0.

    >>> num_for_mass([0.1, 4, 4, 0.1], mass=0.9, least=1, most=8)
    2

    Args:
        scores: float [T]; where all are equal nothing stands out, and as many as allowed are taken.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))[::-1]
    total = np.cumsum(ordered - ordered[-1])
    needed = int(np.searchsorted(total, mass * total[-1] * (1 - 1e-9))) + 1 if total[-1] > 0 else len(total)
    return min(max(least, min(needed, most)), len(total))


def best_span(start: Any, end: Any) -> tuple[int, int]:
    """The half-open span whose start plus end score is largest, start <= last frame; see `frame_selector.best_spans`.

    Args:
        start, end: float [T].
    """
    start = np.asarray(start, dtype=np.float64)
    total = np.maximum.accumulate(start) + np.asarray(end, dtype=np.float64)
    last = int(total.argmax())
    return int(start[: last + 1].argmax()), last + 1


def best_spans(start: Any, end: Any, most: int) -> list[tuple[int, int]]:
    """At most `most` half-open spans without a common frame, the likeliest first; `best_span` for one.

    A span's score is how much likelier than chance its ends are: log(T p(start)) + log(T p(last)), of the softmax of
    each. The spans with the largest sum of scores are found, at least one: a further one must be likelier than chance.

    >>> best_spans([0, 9, 0, 0, 0, 8], [0, 0, 9, 0, 0, 8], most=4)
    [(1, 3), (5, 6)]

    Args:
        start, end: float [T], logits.
    """
    starts, ends = ((x - np.logaddexp.reduce(x) + math.log(len(x))).tolist() for x in map(np.asarray, (start, end)))
    nothing = (-math.inf, ())
    closed, open_ = [(0.0, ()), *[nothing] * most], [nothing] * most  # (sum, spans), by the number of closed spans
    for t, (begin, last) in enumerate(zip(starts, ends, strict=True)):
        for n in reversed(range(most)):
            if closed[n][0] + begin > open_[n][0]:
                open_[n] = closed[n][0] + begin, (*closed[n][1], t)
            if open_[n][0] + last > closed[n + 1][0]:
                *before, first = open_[n][1]
                closed[n + 1] = open_[n][0] + last, (*before, (first, t + 1))
    spans = max(closed[1:], key=lambda one: one[0])[1]
    return sorted(spans, key=lambda span: -starts[span[0]] - ends[span[1] - 1])


def _fill(row: Row, taken: Sequence[int], count: int) -> list[int]:
    """`count` frames that are not taken: the best scores, or without scores those nearest to the taken ones."""
    left = np.asarray(sorted(set(range(row.num_frames)) - set(taken)), dtype=np.int64)
    if count < 1:
        return []
    if row.scores is not None:
        return left[best(np.asarray(row.scores[left], dtype=np.float64), count)].tolist()
    if not taken:
        return left[uniform_centres(count, len(left))].tolist()
    away = np.abs(left[:, None] - np.asarray(taken)[None]).min(axis=1)
    return left[np.argsort(away, kind="stable")[:count]].tolist()


def _from_0_to_1(scores: Any) -> np.ndarray:
    """float64 [T]; zeros where all are equal."""
    scores = np.asarray(scores, dtype=np.float64)
    scores = scores - scores.min()
    return scores / scores.max() if scores.max() > 0 else scores


def _unit(features: Any) -> np.ndarray:
    """float64 [T,D], each of length 1; a vector of zeros stays one."""
    features = np.asarray(features, dtype=np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _check(name: str, value: float, *, least=None, above=None, most=None, below=None) -> None:
    for limit, words, good in (
        (least, "at least", lambda: value >= least),
        (above, "greater than", lambda: value > above),
        (most, "at most", lambda: value <= most),
        (below, "less than", lambda: value < below),
    ):
        if limit is not None and not good():
            raise ConfigError(f"setting {name} must be {words} {limit}, got {value}")


def _check_needs(method: str, row: Row) -> None:
    missing = [name for name in SELECTORS[method].needs if getattr(row, name) is None]
    if missing:
        raise ConfigError(f"selector '{method}' needs {', '.join(missing)}")


def _checked(row: Row) -> Row:
    """The row with arrays for lists.

    Raises:
        ConfigError: K below 1, no frames, a number that is none, or parts of different lengths.
    """
    if type(row.num_selected) is not int or row.num_selected < 1:
        raise ConfigError(f"k must be a whole number of at least 1, got {row.num_selected!r:.80}")
    scores = row.scores
    if scores is not None and not isinstance(scores, LazyScores):
        scores = _numbers("scores", scores, 1)
    times_s = None if row.times_s is None else _numbers("times_s", row.times_s, 1)
    features = None if row.features is None else _numbers("features", row.features, 2)
    row = Row(scores, row.num_selected, times_s, row.question, features, row.span, row.rng)
    lengths = {
        k: len(v) for k, v in (("scores", scores), ("times_s", times_s), ("features", features)) if v is not None
    }
    if len(set(lengths.values())) > 1:
        raise ConfigError(
            "one value a candidate frame is expected, got " + ", ".join(f"{n} {k}" for k, n in lengths.items())
        )
    if row.num_frames < 1:
        raise ConfigError("there is no candidate frame to select from")
    if row.span is not None and not 0 <= row.span[0] < row.span[1] <= row.num_frames:
        raise ConfigError(f"span {list(row.span)} is no half-open range of the {row.num_frames} candidate frames")
    return row


def _numbers(name: str, values: Any, axes: int) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError):
        raise ConfigError(f"{name} must be numbers, got {values!r:.80}") from None
    if array.ndim != axes:
        raise ConfigError(f"{name} must have {axes} {'axis' if axes == 1 else 'axes'}, got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        first = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0])
        raise ConfigError(f"{name} must be finite numbers; frame {first} has {array[first]!r:.80}")
    return array
