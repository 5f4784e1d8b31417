"""`stats`: what is in a set: counts, durations, frame rates, sizes, lengths of texts, balance of answers.

Only the JSON of each sample is read. --html writes a page with a plot of each; it needs nothing but a browser.
"""

from __future__ import annotations

import argparse
import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lavis_lstp.data.shards import sets
from lavis_lstp.data.shards.storage import expand
from lavis_lstp.files import atomic_writer
from lavis_lstp.jobs import how, run_jobs
from lavis_lstp.report.shell import page_of, picture_tag

HELP = "counts, durations, lengths and balance, with plots in an HTML page"
MOST_ANSWERS = 20
FEW_VALUES = 8
ANSWER_LETTERS = 40
TOTALLED = ("duration_s", "num_frames", "bytes", "questions")
NUMBERS = {
    "duration_s": "duration of a video, s",
    "fps": "frames a second",
    "num_frames": "frames of a video",
    "megapixels": "size of a picture or frame, megapixels",
    "bytes": "bytes of a sample",
    "questions": "questions of a sample",
    "question_words": "words of a question",
    "answer_words": "words of an answer",
}


def shard_stats(location: str) -> dict[str, Any]:
    """Counters and lists of numbers of one shard."""
    found = sets.ShardSet([location])
    numbers: dict[str, list[float]] = {name: [] for name in NUMBERS}
    counts: dict[str, Counter] = {name: Counter() for name in ("kinds", "members", "codecs", "categories", "answers")}
    for sample, one in enumerate(found.index(0).samples()):
        value = found.read_json(0, sample)
        counts["kinds"][value["kind"]] += 1
        counts["members"].update(name for name, _ in one.members)
        numbers["bytes"].append(sum(member.size for _, member in one.members))
        numbers["questions"].append(len(value["questions"]))
        for name in ("duration_s", "fps", "num_frames"):
            if name in value:
                numbers[name].append(value[name])
        if "width" in value:
            numbers["megapixels"].append(value["width"] * value["height"] / 1e6)
        if "codec" in value:
            counts["codecs"][value["codec"]] += 1
        for row in value["questions"]:
            turns = row.get("conversations")
            question = turns[-2]["value"] if turns and len(turns) > 1 else row.get("question", "")
            answer = turns[-1]["value"] if turns else row["answer"] or ""
            numbers["question_words"].append(len(question.split()))
            numbers["answer_words"].append(len(answer.split()))
            counts["answers"][answer] += 1
            counts["categories"][row.get("category", "")] += 1
    return {"numbers": numbers, "counts": counts}


def summary(values: Sequence[float], total: bool) -> dict[str, float]:
    quantiles = np.quantile(values, [0, 0.05, 0.5, 0.95, 1]).tolist()
    named = dict(zip(("least", "5 %", "median", "95 %", "most"), quantiles, strict=True))
    if total:
        named["sum"] = float(np.sum(values))
    return {name: round(value, 4) for name, value in named.items()}


def stats(shards: Sequence[str], *, page: str | None = None, **how: Any) -> dict[str, Any]:
    """Everything about a set; with `page`, also as HTML."""
    results = run_jobs(shard_stats, shards, desc="stats", **how)
    numbers = {name: [x for one in results for x in one["numbers"][name]] for name in NUMBERS}
    counts = {name: sum((one["counts"][name] for one in results), Counter()) for name in results[0]["counts"]}
    answers = counts.pop("answers")
    total = sum(answers.values())
    report = {
        "shards": len(shards),
        "samples": sum(counts["kinds"].values()),
        "questions": total,
        **{name: dict(sorted(counter.items())) for name, counter in counts.items()},
        "numbers": {name: summary(values, name in TOTALLED) for name, values in numbers.items() if values},
        "answers": {
            "different": len(answers),
            "share_of_the_first": round(max(answers.values()) / total, 4) if total else 0.0,
            "first": [[name, count] for name, count in sorted(answers.items(), key=_most_first)[:MOST_ANSWERS]],
        },
    }
    if page:
        with atomic_writer(Path(page)) as file:
            file.write(_page(report, numbers))
        report["page"] = page
    return report


def _most_first(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _page(report: dict[str, Any], numbers: dict[str, list[float]]) -> str:
    what = headline(report)
    parts = [f"<h1>{what}</h1>"]
    for name in ("kinds", "members", "codecs", "categories"):
        cells = ((html.escape(key), n) for key, n in report[name].items() if key)
        rows = "".join(f'<tr><th scope="row">{key}</th><td>{n}</td></tr>' for key, n in cells)
        parts.append(f'<h2>{name}</h2><div class="scroll"><table>{rows}</table></div>' if rows else "")
    for name, title in NUMBERS.items():
        if numbers[name]:
            facts = facts_of(report["numbers"][name])
            tag = picture_tag(_histogram(numbers[name]), f"Histogram: {title}. {facts}")
            parts.append(f'<h2>{title}</h2><p>{facts}</p><div class="plots"><figure>{tag}</figure></div>')
    first = report["answers"]["first"]
    if first:
        heading = f"<h2>{report['answers']['different']} different answers; the first ones</h2>"
        parts.append(f'{heading}<div class="scroll"><table class="bars">{_bars(first)}</table></div>')
    return page_of(what, "".join(parts))


def _axes(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _histogram(values: Sequence[float]) -> Any:
    """How often; a bar for each value where these are few."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(2.2)
    counts = Counter(values)
    names = [say(value) for value in sorted(counts)]
    if len(set(names)) == len(counts) <= FEW_VALUES:
        axes.bar(names, [counts[value] for value in sorted(counts)], width=0.6)
        axes.set_xlim(-0.6, max(4, len(names)) - 0.4)
    else:
        axes.hist(values, bins=40)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _bars(counts: Sequence[tuple[str, int]]) -> str:
    """Rows of a table: a text, a bar and a number. Texts are the browser's to draw: matplotlib has no font for most."""
    most = max(count for _, count in counts)
    return "".join(
        f'<tr><th scope="row" dir="auto">{html.escape(name[:ANSWER_LETTERS]) or "(empty)"}</th>'
        f'<td><div style="width: {100 * count / most:.1f}%"></div></td><td>{count}</td></tr>'
        for name, count in counts
    )


def headline(report: dict[str, Any]) -> str:
    counted = ((name, report[name]) for name in ("samples", "questions", "shards"))
    return ", ".join(f"{count:,} {name if count != 1 else name[:-1]}" for name, count in counted)


def facts_of(facts: dict[str, float]) -> str:
    return ", ".join(f"{name} {say(value)}" for name, value in facts.items())


def say(value: float) -> str:
    """A number as one reads it: four digits that count, or all of a whole number."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", help="paths or addresses of shards, braces allowed")
    parser.epilog = "example: python -m webdataset_tools stats 'train-{000000..000123}.tar' --html stats.html"
    parser.add_argument("--html", metavar="FILE", help="also write a page with plots")


def run(args: argparse.Namespace) -> dict[str, Any]:
    return stats(expand(args.shards), page=args.html, **how(args))


def show(report: dict[str, Any], args: argparse.Namespace) -> str:
    lines = [headline(report)]
    for name in ("kinds", "members", "codecs", "categories"):
        found = ", ".join(f"{key} {count}" for key, count in report[name].items() if key)
        lines += [f"{name}: {found}"] if found else []
    for name, facts in report["numbers"].items():
        lines.append(f"{NUMBERS[name]}: {facts_of(facts)}")
    answers = report["answers"]
    lines.append(f"answers: {answers['different']} different, the first is {answers['share_of_the_first']:.1%}")
    return "\n".join(lines)
