"""Numbers of several evaluations -> plots, as `img` elements that say in words what they show.

Evaluations are called by their letters; a name of a folder may hold anything, and matplotlib reads `$` as mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lavis_lstp.config.model import AUTO
from lavis_lstp.report import numbers
from lavis_lstp.report.shell import picture_bytes, picture_tag
from lavis_lstp.report.table import STAGES

LOUD = 6
"""Evaluations in one plot at most; more cannot be told apart."""


def stages_in_order(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Stages in the order in which they run, then those nobody knows, "all" last."""
    names = dict.fromkeys(key for mapping in mappings for key in mapping)
    known = [name for name in STAGES if name in names]
    others = [name for name in names if name not in (*STAGES, "all")]
    return known + others + ["all"] * ("all" in names)


def plots(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    loud = runs[:LOUD]
    found: dict[str, list[str]] = {"frames": [], "calibration": [], "sampler": [], "latency": []}
    series: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["series"] and run["scored"] and run["choosing"]["frames"]:
            series.setdefault(run["series"], []).append(run)
    if any(len({run["choosing"]["frames"] for run in line}) > 1 for line in series.values()):
        found["frames"].append(_frames_plot(list(series.values())))
    for kind in numbers.CONFIDENCES:
        tables = {run["letter"]: run["calibration"][kind] for run in loud if kind in run["calibration"]}
        if tables:
            found["calibration"].append(_reliability_plot(tables))
    ious = {run["letter"]: run["sampler"]["gold"]["values"] for run in loud if _has(run, "gold")}
    if ious:
        found["sampler"].append(_histogram(ious, "IoU of span and gold span", (0.0, 1.0)))
    curves = {run["letter"]: run["grounding"] for run in loud if run["grounding"]}
    if curves:
        found["sampler"].append(_curves_plot(curves))
    entropies = {run["letter"]: run["sampler"]["entropy"]["values"] for run in loud if _has(run, "entropy")}
    if entropies:
        most = max(run["sampler"]["entropy"]["possible"] for run in loud if _has(run, "entropy"))
        found["sampler"].append(_histogram(entropies, "entropy of start and end, mean, bits", (0.0, max(most, 1e-6))))
    times = {run["letter"]: run["latency"] for run in loud if run["latency"]}
    if times:
        found["latency"].append(_stages_plot(times))
    return found


def accuracy_plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG: accuracy and its interval against the number of frames, a line for each `series` of an ablation's rows.

    A row whose selector decided the number stands at the mean.
    """
    rows = [{**row, "frames": row["frames_per_answer"] if row["frames"] == AUTO else row["frames"]} for row in rows]
    figure, axes = _figure()
    for series in dict.fromkeys(row["series"] for row in rows):
        own = sorted((row for row in rows if row["series"] == series), key=lambda row: row["frames"])
        x, y = [row["frames"] for row in own], [row["accuracy"] for row in own]
        low, high = ([abs(value - row["interval"][end]) for value, row in zip(y, own, strict=True)] for end in (0, 1))
        label = series.replace("$", r"\$")
        axes.errorbar(x, y, yerr=[low, high], marker="o", markersize=4, capsize=2, label=label)
    counts = sorted({row["frames"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:.4g}" for count in counts])
    axes.minorticks_off()
    axes.set(ylim=(0, 1), xlabel="frames shown", ylabel="accuracy")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    return picture_bytes(figure)


def _has(run: Mapping[str, Any], key: str) -> bool:
    return bool(run["sampler"] and run["sampler"][key])


def _figure(height: float = 3.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, height), layout="constrained")
    return figure, figure.add_subplot()


def _reliability_plot(tables: Mapping[str, Mapping[str, Any]]) -> str:
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
    title = next(iter(tables.values()))["title"]
    for letter, table in tables.items():
        bins = table["bins"]
        x, y = [row["confidence"] for row in bins], [row["accuracy"] for row in bins]
        bars = [
            [max(0.0, v - row["interval"][0]) for v, row in zip(y, bins, strict=True)],
            [max(0.0, row["interval"][1] - v) for v, row in zip(y, bins, strict=True)],
        ]
        axes.errorbar(
            x,
            y,
            yerr=bars,
            marker="o",
            markersize=4,
            capsize=2,
            label=f"{letter}: ECE {table['ece']:.3f}" if len(tables) > 1 else f"ECE {table['ece']:.3f}",
        )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="share of right answers")
    axes.set_title(f"Confidence of {title}", fontsize=10)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    words = "; ".join(f"{letter}: expected calibration error {t['ece']:.3f}" for letter, t in tables.items())
    return picture_tag(figure, f"Reliability diagram, confidence of {title}. {words}")


def _frames_plot(series: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """Accuracy with its interval against frames an answer; a line for each way of choosing them."""
    figure, axes = _figure()
    words = []
    for line in series:
        line = sorted(line, key=lambda run: run["choosing"]["frames"])
        x, y = [run["choosing"]["frames"] for run in line], [100 * run["scored"]["accuracy"] for run in line]
        edges = [[100 * edge for edge in run["scored"]["accuracy_interval"]] for run in line]
        bars = [[max(0.0, v - low) for v, (low, _) in zip(y, edges, strict=True)]]
        bars.append([max(0.0, high - v) for v, (_, high) in zip(y, edges, strict=True)])
        label = f"{line[0]['choosing']['by'] or 'frames'} ({', '.join(run['letter'] for run in line)})"
        axes.errorbar(x, y, yerr=bars, marker="o", markersize=4, capsize=2, label=label)
        words.append(f"{label}: {', '.join(f'{b:.1f} % at {a:.4g}' for a, b in zip(x, y, strict=True))}")
    axes.set(xlabel="frames an answer", ylabel="accuracy, %")
    figure.legend(fontsize=8, loc="outside lower center", ncols=2, frameon=False)
    return picture_tag(figure, f"Accuracy against frames. {'; '.join(words)}")


def _curves_plot(curves: Mapping[str, Mapping[str, Any]]) -> str:
    figure, axes = _figure()
    for letter, found in curves.items():
        axes.plot(*zip(*found["curve"], strict=True), marker=".", label=f"{letter}: mean IoU {found['miou']:.3f}")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="IoU threshold", ylabel="R@1")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    words = "; ".join(
        f"{letter}: {', '.join(f'{share:.3f} at {at}' for at, share in found['r1'].items())}"
        for letter, found in curves.items()
    )
    return picture_tag(figure, f"R@1 against the threshold of IoU. {words}")


def _histogram(values: Mapping[str, Sequence[float]], label: str, limits: tuple[float, float]) -> str:
    figure, axes = _figure()
    axes.hist(list(values.values()), bins=10, range=limits, label=list(values))
    axes.set(xlabel=label, ylabel="answers")
    axes.yaxis.get_major_locator().set_params(integer=True)
    if len(values) > 1:
        figure.legend(fontsize=8, loc="outside upper center", ncols=LOUD, frameon=False)
    means = ", ".join(f"{name}: mean {math.fsum(v) / len(v):.3f}" for name, v in values.items())
    return picture_tag(figure, f"Histogram of {label}. {means}")


def _stages_plot(times: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    figure, axes = _figure(1.2 + 0.4 * len(times))
    letters = list(times)[::-1]
    left = [0.0] * len(letters)
    for stage in stages_in_order(times.values())[:-1]:
        widths = [times[letter].get(stage, {}).get("mean", 0.0) for letter in letters]
        axes.barh(letters, widths, left=left, label=stage.replace("$", r"\$"))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel("ms a question")
    figure.legend(fontsize=8, loc="outside upper center", ncols=5, frameon=False)
    words = "; ".join(f"{letter}: {times[letter]['all']['mean']:.1f} ms" for letter in times)
    return picture_tag(figure, f"Time by stage. {words}")
