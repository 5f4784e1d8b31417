"""Evaluations -> the numbers of the page. Nothing is drawn and nothing is escaped here.

Accuracy, score and intervals are those of `lavis-lstp judge`, paired tests those of `compare`, agreement of judges that
of `calibrate`. Spans, confidence and time come from what the evaluation wrote of each answer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

from lavis_lstp.config.model import SELECTORS, Selector
from lavis_lstp.errors import CoverageError
from lavis_lstp.files import sha256_json
from lavis_lstp.judging.calibrate import calibrate
from lavis_lstp.judging.compare import ITSELF, Judged, compare
from lavis_lstp.judging.scores import score_verdicts
from lavis_lstp.judging.verdict import JUDGED, OPEN
from lavis_lstp.metrics.calibration import reliability
from lavis_lstp.metrics.grounding import RECALL_AT, evaluate_spans, moment_iou
from lavis_lstp.metrics.qa import accuracy, subtitles_shown
from lavis_lstp.metrics.resampling import RESAMPLES
from lavis_lstp.report.evaluations import EXACT, Evaluation
from lavis_lstp.schema import Prediction, Span

WRONG, UNJUDGED, RIGHT = "wrong", "unjudged", "right"
MOST_VIDEOS = 50
VIDEO_SHARES = ((0.0, "none right"), (0.5, "less than half"), (1.0, "half or more"), (2.0, "all right"))
FOUND_IOU = 0.5


def status(one: Judged | None) -> str:
    """right, wrong or unjudged, of a question that may have no gold answer."""
    if one is None or one.verdict.status != JUDGED:
        return UNJUDGED
    return RIGHT if one.verdict.correct else WRONG


def summaries(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """`summary` of each, its `gap` to the oracle, and the `series` of those that differ in number of frames alone."""
    return [
        {**summary(one), "gap": gap, "series": setup(one, but=("model.selector.num_selected",))}
        for one, gap in zip(evaluations, gaps(evaluations), strict=True)
    ]


def summary(one: Evaluation) -> dict[str, Any]:
    """Everything about one evaluation."""
    judged = one.judged
    verdicts = {key: item.verdict for key, item in judged.items()}
    rows = {key: item.row for key, item in judged.items()}
    scored = None
    if any(verdict.status not in OPEN for verdict in verdicts.values()):
        scored = score_verdicts(rows, verdicts, one.coverage, resamples=one.resamples, seed=one.seed)
    chosen = [row for row in one.rows.values() if "options" in row]
    return {
        "name": one.name,
        "letter": one.letter,
        "questions": len(one.rows),
        "hidden": len(one.rows) - len(judged),
        "scored": scored,
        "has_scores": any(v.score is not None for v in verdicts.values()),
        "counts": {name: sum(status(item) == name for item in judged.values()) for name in (RIGHT, WRONG, UNJUDGED)},
        "unparsable": sum(row.get("choice") is None for row in chosen) if chosen else None,
        "choosing": choosing(one),
        "grounding": grounding(one),
        "by_category": categories(one),
        "calibration": calibration(one),
        "sampler": sampler(one),
        "latency": latency(one),
    }


def categories(one: Evaluation) -> dict[str, dict[str, Any]]:
    """Accuracy by kind of question, with Wilson's interval; unjudged answers count as wrong."""
    right = _right(one)
    kinds = {key: str(one.rows[key].get("category") or "") for key in right}
    return accuracy(right, kinds).get("by_category", {}) if right else {}


def _right(one: Evaluation) -> dict[str, bool]:
    """Of what a verdict was asked for."""
    found = {key: item for key, item in one.judged.items() if item.verdict.status not in OPEN}
    return {key: status(item) == RIGHT for key, item in found.items()}


def choosing(one: Evaluation) -> dict[str, Any]:
    """Return who chose the frames, how many an answer saw, how many were scored for it, and which subtitles it read.

    None where nobody says. Predictions without a number of scored frames are of a rule that asks for no scores, or
    of a version that did not count; there a rule over scores has scored every candidate.
    """
    selector = _section(one, "model").get("selector") or {}
    name = next((known for known in SELECTORS if known == selector.get("name")), None)
    by_gold = name == "given" and selector.get("span_key") == "gold_span"
    shown = [len({i for i in row["frame_index"] if i >= 0}) for row in one.rows.values() if row.get("frame_index")]
    candidates = [row["num_frames"] for row in one.rows.values() if row.get("num_frames")]
    counted = [row["num_scored"] for row in one.rows.values() if "num_scored" in row]
    scored = _mean(counted) if counted else 0.0 if name and not SELECTORS[name].by_sampler else None
    if name and scored is None and candidates:
        scored = _mean(candidates)
    frames, subtitles = _mean(shown) if shown else None, subtitles_shown(one.rows.values())
    return {"by": "oracle" if by_gold else name, "frames": frames, "scored": scored, "subtitles": subtitles}


def _section(one: Evaluation, name: str) -> dict[str, Any]:
    return (one.manifest.get("config") or {}).get(name) or {}


# ---- several evaluations --------------------------------------------------------------------------------------------


def against_first(evaluations: Sequence[Evaluation], resamples: int = RESAMPLES) -> list[dict[str, Any] | None]:
    """For each evaluation its `compare` with the first; None for the first, and where no question is shared."""
    found: list[dict[str, Any] | None] = [None]
    first = evaluations[0]
    for one in evaluations[1:]:
        try:
            found.append(compare(first.judged, one.judged, resamples=resamples, seed=first.seed))
        except CoverageError as error:
            found.append({"warnings": [str(error)]})
    return found


_OF_A_RUN = ("output_dir", "device", "distributed", "world_size", "num_workers", "log_freq", "track")

_OF_A_SEED = (("run", "seed"), ("model", "checkpoint"), ("run", "resume_ckpt_path"))


def setup(one: Evaluation, *, but: Sequence[str] = ()) -> str | None:
    """Digest of what an evaluation was of, but for the settings (dotted) that may differ; None without a manifest."""
    if not one.manifest.get("config"):
        return None
    dropped = {*(f"run.{name}" for name in _OF_A_RUN), *but}
    judges = sorted({item.verdict.judge for item in one.judged.values()})
    return sha256_json([_without(one.manifest["config"], dropped), one.predictions.stem, judges])


def _without(section: Any, dropped: Collection[str], above: str = "") -> Any:
    """A tree of settings without those whose dotted names are dropped; three levels down all is kept."""
    if not isinstance(section, Mapping) or above.count(".") > 2:
        return section
    return {k: _without(v, dropped, f"{above}{k}.") for k, v in section.items() if f"{above}{k}" not in dropped}


def gaps(evaluations: Sequence[Evaluation], resamples: int = RESAMPLES) -> list[dict[str, Any] | None]:
    """Return how much better each would answer with frames of the gold moments: `compare` with the oracle's answers.

    The oracle of an evaluation differs from it in nothing but the selector. None for it, and where there is none.
    """
    rule = [f"model.selector.{key.name}" for key in fields(Selector) if key.name != "num_selected"]
    keys = [setup(one, but=rule) for one in evaluations]
    oracles = {key: one for key, one in zip(keys, evaluations, strict=True) if key and choosing(one)["by"] == "oracle"}
    found: list[dict[str, Any] | None] = []
    for key, one in zip(keys, evaluations, strict=True):
        best = oracles.get(key or "")
        same = best is not None and best is not one and best.judged.keys() == one.judged.keys()
        try:
            found.append(
                compare(one.judged, best.judged, resamples=resamples, seed=one.seed)["accuracy"] if same else None
            )
        except CoverageError:
            found.append(None)
    return found


def by_seed(
    evaluations: Sequence[Evaluation], runs: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Evaluations that differ in seed or checkpoint alone, as one row each: mean and spread; and warnings.

    Args:
        runs: `summary` of each.
    """
    groups: dict[str, list[int]] = {}
    for i, one in enumerate(evaluations):
        key = setup(one, but=[f"{part}.{name}" for part, name in _OF_A_SEED])
        if key and runs[i]["scored"]:
            groups.setdefault(key, []).append(i)
    found, warnings = [], []
    for places in groups.values():
        members = [evaluations[i] for i in places]
        letters = ", ".join(one.letter for one in members)
        seeds = [[_section(one, part).get(name) for part, name in _OF_A_SEED] for one in members]
        why = None
        if any(one.judged.keys() != members[0].judged.keys() for one in members):
            why = "they do not answer the same questions"
        elif len({sha256_json(seed) for seed in seeds}) < len(seeds):
            why = "two of them have the same seed and checkpoint"
        if why and len(members) > 1:
            warnings.append(f"{letters}: not averaged over seeds, because {why}")
        elif len(members) > 1:
            own = [runs[i] for i in places]
            row = {
                "accuracy": _over_runs([run["scored"]["accuracy"] for run in own]),
                "miou": _over_runs([run["grounding"] and run["grounding"]["miou"] for run in own]),
                "ms": _over_runs([run["latency"] and run["latency"]["all"]["mean"] for run in own]),
            }
            found.append({"letters": letters, "runs": own, "seeds": [seed for seed, *_ in seeds], **row})
    return found, warnings


def _over_runs(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, standard deviation (of a sample), smallest and largest; None where one has no value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return {"mean": _mean(known), "sd": statistics.stdev(known), "low": min(known), "high": max(known)}


def agreements(evaluations: Sequence[Evaluation], resamples: int = RESAMPLES) -> list[dict[str, Any]]:
    """`calibrate` of each two judges of the same predictions."""
    found = []
    for i, a in enumerate(evaluations):
        for b in evaluations[i + 1 :]:
            if a.predictions == b.predictions:
                try:
                    result = calibrate(a.judged, b.judged, resamples=resamples, seed=a.seed)
                except CoverageError as error:
                    result = {"all": None, "warnings": [str(error)]}
                found.append({"a": a.letter, "b": b.letter, **result})
    return found


def videos(evaluations: Sequence[Evaluation]) -> dict[str, Any] | None:
    """Right answers by video: those where the first evaluation does worst, and how many do how well."""
    counts: dict[str, list[list[int]]] = {}
    for number, one in enumerate(evaluations):
        for key, right in _right(one).items():
            name = one.rows[key].get("video_id")
            if name is not None:
                pair = counts.setdefault(str(name), [[0, 0] for _ in evaluations])[number]
                pair[0] += right
                pair[1] += 1
    first = {name: pairs[0] for name, pairs in counts.items() if pairs[0][1]}
    if not first:
        return None
    shares = {name: right / count for name, (right, count) in first.items()}
    spread = {label: 0 for _, label in VIDEO_SHARES}
    for share in shares.values():
        spread[next(label for limit, label in VIDEO_SHARES if share <= limit and (share < limit or not limit))] += 1
    order = sorted(first, key=lambda name: (shares[name], -first[name][1], name))
    return {
        "count": len(first),
        "spread": spread,
        "rows": [{"video_id": name, "counts": counts[name]} for name in order[:MOST_VIDEOS]],
    }


# ---- one evaluation -------------------------------------------------------------------------------------------------


def confidences(row: Prediction) -> dict[str, float]:
    """How likely the model took its answer to be, 0..1, by how that is counted."""
    if row.get("option_log_prob") and row.get("choice"):
        # of options the likeliest was taken, by mean or sum: the softmax of the one that gives this choice
        chosen = ord(row["choice"]) - ord("A")
        for kind in ("mean", "sum"):
            values = [option[kind] for option in row["option_log_prob"]]
            if None not in values and values[chosen] == max(values):
                return {"option": 1 / math.fsum(math.exp(value - values[chosen]) for value in values)}
    log_prob = row.get("log_prob")
    if not isinstance(log_prob, dict) or not log_prob.get("tokens") or None in (log_prob["sum"], log_prob["mean"]):
        return {}
    return {"answer": math.exp(min(0.0, log_prob["sum"])), "token": math.exp(min(0.0, log_prob["mean"]))}


CONFIDENCES = {
    "option": "the option among the options",
    "answer": "the whole answer (product of its tokens)",
    "token": "a token of it (geometric mean)",
}


def calibration(one: Evaluation) -> dict[str, Any]:
    """`reliability` by kind of confidence, of the answers that were judged."""
    pairs: dict[str, list[tuple[float, bool]]] = {}
    for item in one.judged.values():
        if item.verdict.status == JUDGED:
            for kind, value in confidences(item.row).items():
                pairs.setdefault(kind, []).append((value, bool(item.verdict.correct)))
    return {
        kind: {"title": CONFIDENCES[kind], "count": len(pairs[kind]), **reliability(*zip(*pairs[kind], strict=True))}
        for kind in CONFIDENCES
        if kind in pairs
    }


def sampler(one: Evaluation) -> dict[str, Any] | None:
    """Spans beside gold spans, their length, the sampler's entropy, and how often the span is the whole video."""
    rows = {key: row for key, row in one.rows.items() if row.get("span") and row["span"][1] > row["span"][0]}
    if not rows:
        return None
    found: dict[str, Any] = {"spans": len(rows), "gold": None, "entropy": None, "video_share": None}
    measured = [row for row in rows.values() if row.get("num_frames")]
    if measured:
        found["video_share"] = _mean((r["span"][1] - r["span"][0]) / r["num_frames"] for r in measured)
    gold = {key: row["gold_span"] for key, row in rows.items() if row.get("gold_span")}
    if gold:
        found["gold"] = _against_gold(one, {key: rows[key] for key in gold}, gold)
    asked = [row for row in measured if row.get("entropy")]
    if asked:
        most = [math.log2(row["num_frames"]) for row in asked]
        fallbacks = sum(row["span"] == [0, row["num_frames"]] for row in asked)
        found["entropy"] = {
            "questions": len(asked),
            **{edge: _mean(row["entropy"][edge] for row in asked) for edge in ("start", "end")},
            "possible": _mean(most),
            "values": [(row["entropy"]["start"] + row["entropy"]["end"]) / 2 for row in asked],
            "fallbacks": fallbacks,
            "fallback_share": fallbacks / len(asked),
        }
    return found


def _against_gold(one: Evaluation, rows: dict[str, Prediction], gold: dict[str, Sequence[int]]) -> dict[str, Any]:
    ious = {key: Span(*row["span"]).iou(Span(*gold[key])) for key, row in rows.items()}
    covered, inside = [], []
    for key, row in rows.items():
        start, end = gold[key]
        overlap = min(end, row["span"][1]) - max(start, row["span"][0])
        covered.append(max(0, overlap) / max(1, end - start))
        frames = {frame for frame in row.get("frame_index", ()) if frame >= 0}
        if frames:
            inside.append(sum(start <= frame < end for frame in frames) / len(frames))
    right = _right(one)
    halves = {
        "found": [right[key] for key in ious if key in right and ious[key] >= FOUND_IOU],
        "missed": [right[key] for key in ious if key in right and ious[key] < FOUND_IOU],
    }
    return {
        **evaluate_spans({key: row["span"] for key, row in rows.items()}, gold),
        "values": list(ious.values()),
        "gold_covered": _mean(covered),
        "frames_inside": _mean(inside) if inside else None,
        "accuracy": {name: (len(hits), _mean(hits) if hits else None) for name, hits in halves.items()},
    }


CURVE_AT = tuple(round(0.05 * step, 2) for step in range(1, 21))


def grounding(one: Evaluation) -> dict[str, Any] | None:
    """Span against gold moment of every question that has one: mean IoU, R@1 at RECALL_AT, and the curve of R@1.

    In seconds, against the moment that the span meets best, where moments are known, else in frames. No span is a miss.
    """
    golds = {key: row for key, row in one.rows.items() if row.get("moments_s")}
    unit = "seconds" if golds else "frames"
    golds = golds or {key: row for key, row in one.rows.items() if row.get("gold_span")}
    if not any(row.get("span") for row in golds.values()):
        return None
    ious = [_best_iou(row, unit) for row in golds.values()]
    recalls = {at: sum(iou >= at for iou in ious) / len(ious) for at in (*CURVE_AT, *RECALL_AT)}
    return {
        "unit": unit,
        "questions": len(ious),
        "miou": _mean(ious),
        "r1": {str(at): recalls[at] for at in RECALL_AT},
        "curve": [(at, recalls[at]) for at in CURVE_AT],
    }


def _best_iou(row: Prediction, unit: str) -> float:
    if unit == "frames":
        return Span(*row["span"]).iou(Span(*row["gold_span"])) if row.get("span") else 0.0
    return max(moment_iou(row["span_s"], one) for one in row["moments_s"]) if row.get("span_s") else 0.0


def latency(one: Evaluation) -> dict[str, Any] | None:
    """Milliseconds a question by stage: mean, median and 95th percentile."""
    if not one.timings:
        return None
    stages = dict.fromkeys(name for row in one.timings for name in row if name != "question_id")
    columns = {name: [1000 * row.get(name, 0.0) for row in one.timings] for name in stages}
    columns["all"] = [sum(values) for values in zip(*columns.values(), strict=True)]
    return {name: _spread(values) for name, values in columns.items()}


def _spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "mean": _mean(values),
        "median": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)],
    }


def _mean(values: Any) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def judge_word(judge: str) -> str:
    """How the page speaks of a judge."""
    texts = {
        EXACT: "nobody: exact match",
        ITSELF: "the right option was chosen",
    }
    return texts.get(judge, judge)
