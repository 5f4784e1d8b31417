"""Numbers, pictures and questions -> the HTML of a report.

Text from data sets and models goes through Jinja's escaping in tables, and as JSON, which the script shows by
`textContent`, in the list of questions. Two calls over the same files give equal bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from lavis_lstp import __version__
from lavis_lstp.judging.rows import named
from lavis_lstp.report import numbers
from lavis_lstp.report.evaluations import Evaluation
from lavis_lstp.report.plots import plots, stages_in_order
from lavis_lstp.report.shell import FOLDER, page_of
from lavis_lstp.schema import Prediction


def question_order(evaluations: Sequence[Evaluation]) -> list[str]:
    """All question ids, those that the first evaluation got wrong before unjudged and right ones."""
    keys = list(dict.fromkeys(key for one in evaluations for key in one.rows))
    rank = {numbers.WRONG: 0, numbers.UNJUDGED: 1, numbers.RIGHT: 2}
    first = evaluations[0]
    return sorted(keys, key=lambda key: rank[numbers.status(first.judged.get(key))] if key in first.rows else 3)


def write_page(
    evaluations: Sequence[Evaluation],
    runs: Sequence[Mapping[str, Any]],
    order: Sequence[str],
    *,
    title: str,
    chosen: tuple[Mapping[tuple[str, int], Sequence[int]], Sequence[str], Sequence[str]],
    asked: int,
) -> tuple[str, list[str]]:
    """The page, and its warnings.

    Args:
        runs: `numbers.summaries` of the evaluations.
        order: question ids.
        chosen: as `pictures.chosen_frames` gives it; asked: the number of questions that pictures were asked for.
    """
    from markupsafe import Markup

    against = numbers.against_first(evaluations)
    agreements = numbers.agreements(evaluations)
    seeds, doubts = numbers.by_seed(evaluations, runs)
    warnings = _warnings(evaluations, runs, against) + doubts
    places, uris, problems = chosen
    drawn = {name: [Markup(tag) for tag in tags] for name, tags in plots(runs).items()}
    has = {
        "seeds": seeds,
        "frames": drawn["frames"],
        "categories": [
            (kind, [run["by_category"].get(kind) for run in runs])
            for kind in sorted({kind for run in runs for kind in run["by_category"]})
        ],
        "videos": numbers.videos(evaluations),
        "calibrated": any(run["calibration"] for run in runs),
        "agreements": agreements,
        "sampler": _sampler_rows(runs),
        "latency": [
            (stage, [(run["latency"] or {}).get(stage) for run in runs])
            for stage in stages_in_order(run["latency"] or {} for run in runs)
        ],
    }
    sections = [("table", "Table")]
    for key, label in (
        ("seeds", "Seeds"),
        ("frames", "Frames"),
        ("categories", "Kinds"),
        ("videos", "Videos"),
        ("calibrated", "Calibration"),
    ):
        if has[key] or (key == "calibrated" and agreements):
            sections.append(("calibration" if key == "calibrated" else key, label))
    sections += [(key, label) for key, label in (("sampler", "Sampler"), ("latency", "Time")) if has[key]]
    scored = [run["scored"]["bootstrap"] for run in runs if run["scored"]]
    body = _template().render(
        title=title,
        version=__version__,
        runs=runs,
        total=len(order),
        warnings=warnings,
        sections=[*sections, ("questions", "Questions"), ("runs", "What was run")],
        table=_table(runs, against),
        bootstrap=scored[0] if scored else {"resamples": 0, "of": "questions"},
        plots=drawn,
        picture_note=_picture_note(places, len(order), asked),
        missing_pictures=problems,
        about=[{"letter": one.letter, "name": one.name, "facts": _facts(one)} for one in evaluations],
        data=_data(evaluations, order, places, uris),
        **has,
    )
    return page_of(title, body, script=(FOLDER / "browse.js").read_text(encoding="utf-8")), warnings


@functools.cache
def _template():
    """The report's template; compiling it takes longer than filling it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template("report.html")


def _picture_note(places: Mapping[tuple[str, int], Any], total: int, asked: int) -> str:
    shown = len({key for key, _ in places})
    note = f"The frames that were chosen are shown for {shown} of {total} questions"
    return f"{note}; pictures were asked for of the first {asked}, wrong ones first (--pictures)."


def _warnings(
    evaluations: Sequence[Evaluation], runs: Sequence[Mapping[str, Any]], against: Sequence[Mapping[str, Any] | None]
) -> list[str]:
    """What makes a number on this page doubtful."""
    found = []
    open_ended = [one for one in evaluations if one.unjudged_by_anyone]
    if open_ended:
        letters = f"{', '.join(one.letter for one in open_ended)}: " if len(runs) > 1 else ""
        found.append(
            f"{letters}no judge has seen these answers, so right means exact match; for a judge's word: "
            f"lavis-lstp judge {open_ended[0].predictions.name} --judge ..."
        )
    for one, run in zip(evaluations, runs, strict=True):
        name = f"{one.letter}, {one.name}" if len(runs) > 1 else one.name
        if not one.answers:
            continue
        if run["scored"] is None:
            found.append(f"{name}: no score: no question has an answer to compare with, or no verdict")
        elif run["scored"]["partial"]:
            scored = run["scored"]
            found.append(
                f"{name}: PARTIAL, over {scored['num_scored']} of {scored['num_questions']} questions: not the score "
                f"of the data set{f'; no prediction for {named(one.missing)}' if one.missing else ''}"
            )
        if run["hidden"]:
            found.append(f"{name}: the answers of {run['hidden']} questions are hidden; these are not scored")
    for run, result in zip(runs, against, strict=True):
        found += [f"{runs[0]['letter']} and {run['letter']}: {text}" for text in (result or {}).get("warnings", ())]
    return found


# ---- tables ---------------------------------------------------------------------------------------------------------


def _table(runs: Sequence[Mapping[str, Any]], against: Sequence[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """Rows of the first table: a label and a text for each evaluation; those nobody has anything for are left out."""

    def scored(run: Mapping[str, Any], use: Any) -> str | None:
        return None if run["scored"] is None else use(run["scored"])

    def own(run: Mapping[str, Any], use: Any) -> str | None:
        return scored(run, use) if run["has_scores"] else None

    found: list[tuple[str, list[str | None]]] = [
        ("questions", [str(run["questions"]) for run in runs]),
        ("coverage", [scored(run, _coverage) for run in runs]),
        ("accuracy", [scored(run, lambda s: _percent(s["accuracy"], s["accuracy_interval"])) for run in runs]),
    ]
    if len(runs) > 1:
        found.append((f"difference to {runs[0]['letter']}, points", [_difference(one, "accuracy") for one in against]))
        found.append(("p, McNemar", [_p_value(one) for one in against]))
    found += [
        ("score, 0 to 5", [own(run, lambda s: _plain(s["score"], s["score_interval"])) for run in runs]),
        ("accuracy, published style", [own(run, lambda s: _style(s, "accuracy", _percent)) for run in runs]),
        ("score, published style", [own(run, lambda s: _style(s, "score", _plain)) for run in runs]),
        ("right, wrong, unjudged", ["{right}, {wrong}, {unjudged}".format(**run["counts"]) for run in runs]),
        ("unparsable choices", [None if run["unparsable"] is None else str(run["unparsable"]) for run in runs]),
        ("span IoU", [_from_gold(run, "iou") for run in runs]),
        ("ECE", [_first_ece(run) for run in runs]),
        ("frames an answer", [_count(run["choosing"]["frames"]) for run in runs]),
        ("frames scored for an answer", [_count(run["choosing"]["scored"]) for run in runs]),
        ("subtitles", [run["choosing"]["subtitles"] for run in runs]),
        ("gap to the oracle, points", [run["gap"] and _points(run["gap"]) for run in runs]),
        ("ms a question", [None if not run["latency"] else f"{run['latency']['all']['mean']:.1f}" for run in runs]),
        ("judged by", [scored(run, _judges) for run in runs]),
    ]
    return _rows(found)


def _rows(found: Sequence[tuple[str, Sequence[str | None]]]) -> list[dict[str, Any]]:
    return [
        {"label": label, "cells": ["-" if cell is None else cell for cell in cells]}
        for label, cells in found
        if any(cell is not None for cell in cells)
    ]


def _percent(value: float, interval: Sequence[float] | None = None) -> str:
    text = f"{100 * value:.1f} %"
    return text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _plain(value: float, interval: Sequence[float] | None = None) -> str:
    return f"{value:.2f}" if interval is None else f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _style(scored: Mapping[str, Any], name: str, show: Any) -> str | None:
    published = scored["published_style"]
    return None if published[name] is None else show(published[name], published[f"{name}_interval"])


def _coverage(scored: Mapping[str, Any]) -> str:
    text = f"{scored['num_scored']} of {scored['num_questions']} ({_percent(scored['coverage'])})"
    return f"{text}, PARTIAL" if scored["partial"] else text


def _judges(scored: Mapping[str, Any]) -> str:
    return "; ".join(f"{numbers.judge_word(judge)} ({count})" for judge, count in scored["judges"].items())


def _count(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _difference(result: Mapping[str, Any] | None, name: str) -> str | None:
    return None if result is None or name not in result else _points(result[name])


def _points(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{100 * found['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _p_value(result: Mapping[str, Any] | None) -> str | None:
    return None if result is None or "mcnemar" not in result else f"{result['mcnemar']['p']:.2g}"


def _first_ece(run: Mapping[str, Any]) -> str | None:
    kind = next(iter(run["calibration"].values()), None)
    return None if kind is None else f"{kind['ece']:.3f}"


def _from_gold(run: Mapping[str, Any], key: str) -> str | None:
    gold = (run["sampler"] or {}).get("gold")
    return None if not gold or gold[key] is None else f"{gold[key]:.2f}"


def _sampler_rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    evidence = [run["sampler"] or {} for run in runs]

    def gold(use: Any) -> list[str | None]:
        return [use(one["gold"]) if one.get("gold") else None for one in evidence]

    def moment(use: Any) -> list[str | None]:
        found = [run["grounding"] for run in runs]  # in frames, the rows below have it
        return [one and one["unit"] == "seconds" and use(one) or None for one in found]

    def asked(use: Any) -> list[str | None]:
        return [use(one["entropy"]) if one.get("entropy") else None for one in evidence]

    def hits(name: str) -> list[str | None]:
        pairs = [one["gold"]["accuracy"][name] if one.get("gold") else (0, None) for one in evidence]
        return [None if share is None else f"{_percent(share)} of {count}" for count, share in pairs]

    found = [
        ("moments in seconds, questions that have one", moment(lambda g: str(g["questions"]))),
        ("mean IoU with the moment, in seconds", moment(lambda g: f"{g['miou']:.3f}")),
        ("R@1 at 0.3, 0.5, 0.7, in seconds", moment(lambda g: ", ".join(_percent(v) for v in g["r1"].values()))),
        ("answers with a span", [str(one["spans"]) if one else None for one in evidence]),
        ("with a gold span", gold(lambda g: str(g["num_scored"]))),
        ("IoU with the gold span", gold(lambda g: f"{g['iou']:.3f}")),
        ("IoU of 0.3 or more", gold(lambda g: _percent(g["recall_0.3"], g["recall_0.3_interval"]))),
        ("IoU of 0.5 or more", gold(lambda g: _percent(g["recall_0.5"], g["recall_0.5_interval"]))),
        ("coverage: share of the gold span inside the span", gold(lambda g: _percent(g["gold_covered"]))),
        (
            "chosen frames inside the gold span",
            gold(lambda g: None if g["frames_inside"] is None else _percent(g["frames_inside"])),
        ),
        ("accuracy where IoU is 0.5 or more", hits("found")),
        ("accuracy where it is less", hits("missed")),
        (
            "share of the video in the span",
            [None if one.get("video_share") is None else _percent(one["video_share"]) for one in evidence],
        ),
        ("answers that asked the sampler", asked(lambda e: str(e["questions"]))),
        (
            "entropy of start, of end, bits (the most possible)",
            asked(lambda e: f"{e['start']:.2f}, {e['end']:.2f} ({e['possible']:.2f})"),
        ),
        (
            "fallbacks: the span is the whole video",
            asked(lambda e: f"{e['fallbacks']} ({_percent(e['fallback_share'])})"),
        ),
    ]
    return _rows(found) if any(evidence) else []


def _facts(one: Evaluation) -> list[tuple[str, str]]:
    """What was run, from the manifest; nothing that depends on when this page was made."""
    config, versions = _object(one.manifest.get("config")), _object(one.manifest.get("versions"))
    model = _object(config.get("model"))
    facts = [
        ("predictions", str(one.predictions)),
        ("verdicts", str(one.verdicts) if one.verdicts else None),
        ("model", " ".join(str(model[key]) for key in ("arch", "model_type") if model.get(key))),
        ("checkpoint", model.get("checkpoint")),
        ("frames chosen by", _object(model.get("selector")).get("name")),
        ("data sets", ", ".join(_object(config.get("datasets")))),
        ("device", one.manifest.get("device")),
        ("revision", one.manifest.get("git_revision")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return [(name, ", ".join(map(str, v)) if isinstance(v, list) else str(v)) for name, v in facts if v]


def _object(value: Any) -> Mapping[str, Any]:
    """A part of a manifest; {} where it is not of the form that a run writes."""
    return value if isinstance(value, Mapping) else {}


# ---- the list of questions ------------------------------------------------------------------------------------------


def _data(
    evaluations: Sequence[Evaluation],
    order: Sequence[str],
    places: Mapping[tuple[str, int], Sequence[int]],
    uris: Sequence[str],
) -> dict[str, Any]:
    """Data that the script shows: columns over the questions, and columns over the same for each evaluation."""
    rows = [next(one.rows[key] for one in evaluations if key in one.rows) for key in order]
    questions = {
        "id": list(order),
        "question": [str(row.get("question", "")) for row in rows],
        "answer": [None if row.get("answer") is None else str(row["answer"]) for row in rows],
        "video": [row.get("video_id") for row in rows],
        "category": [row.get("category") for row in rows],
        "options": [row.get("options") for row in rows],
    }
    runs = []
    for number, one in enumerate(evaluations):
        said = [_said(one, key, places.get((key, number))) if key in one.rows else {} for key in order]
        columns = {name: _column([row.get(name) for row in said]) for name in SAID}
        runs.append({"letter": one.letter, "name": one.name, "columns": _kept(columns)})
    columns = {name: _column(values) for name, values in questions.items()}
    return {"count": len(order), "columns": _kept(columns), "runs": runs, "pictures": list(uris)}


SAID = ("status", "said", "facts", "span", "seconds", "gold", "length", "frames", "times", "pictures")
"""Columns of what an evaluation said; a question that it does not have has no status."""


def _kept(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {name: column for name, column in columns.items() if column is not None}


def _column(values: list[Any]) -> Any:
    """The values; or where most repeat {of: different ones, at: the place of each}, -1 for null; None without any."""
    place: dict[Any, int] = {}
    at = [-1 if v is None else place.setdefault(tuple(v) if type(v) is list else v, len(place)) for v in values]
    if not place:
        return None
    return values if 2 * len(place) > len(values) else {"of": list(place), "at": at}


def _said(one: Evaluation, key: str, pictures: Sequence[int] | None) -> dict[str, Any]:
    row, judged = one.rows[key], one.judged.get(key)
    facts = []
    if row.get("options"):
        facts.append(f"choice {row.get('choice') or 'unparsable'}")
    if judged is not None:
        verdict = judged.verdict
        if verdict.score is not None:
            facts.append(f"score {verdict.score}")
        if verdict.status != "judged":
            facts.append(verdict.status)
        if verdict.rule:
            facts.append(f"rule: {verdict.rule}")
    facts += [f"confidence {value:.2f}" for value in list(numbers.confidences(row).values())[:1]]
    if row.get("entropy"):
        facts.append("entropy {start:.2f}, {end:.2f} bits".format(**row["entropy"]))
    found = {
        "status": numbers.status(judged),
        "said": str(row.get("prediction", "")),
        "facts": " · ".join(facts),
        **_where(row),
        "pictures": pictures,
    }
    return {name: value for name, value in found.items() if value is not None and (value != "" or name == "said")}


def _where(row: Prediction) -> dict[str, Any]:
    """Span, frames and their times."""
    frames, times = row.get("frame_index") or [], row.get("frame_times") or []
    return {
        "span": row.get("span"),
        "seconds": row.get("span_s"),
        "gold": row.get("gold_span"),
        "length": row.get("num_frames"),
        "frames": sorted({frame for frame in frames if frame >= 0}) or None,
        "times": times or None,
    }
