"""A run as one file of the leaderboard, and `lavis-lstp verify-result FILE`, which recomputes its numbers.

In: an evaluation with its numbers; later the file and the predictions that it names. Out: JSON with digests of
configuration, weights, data, questions, predictions and verdicts, who judged, the command, and the numbers; then one
line that says what differs. Copies of predictions and verdicts lie beside the file, which leads nowhere else.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_lstp import __version__
from lavis_lstp.errors import AnnotationError
from lavis_lstp.files import no_collection, owned, read_record, sha256_file, sha256_json, whole_file, write_json
from lavis_lstp.redaction import printable, without_secrets, without_secrets_in
from lavis_lstp.report.evaluations import LARGEST, RESULT_FORMS, Evaluation, read_evaluation
from lavis_lstp.report.numbers import summary
from lavis_lstp.untrusted import why_no_file_name

FORMAT, VERSION = "lavis_lstp.result", 1
TOLERANCE = 1e-6
MOST_NUMBERS = 10_000
_INTERVALS = ("accuracy", "score")


def result_of(one: Evaluation, run: Mapping[str, Any]) -> dict[str, Any]:
    """The file's content.

    Args:
        run: `numbers.summary` of the evaluation.
    """
    config, time, command = one.manifest.get("config"), run["latency"], one.manifest.get("command")
    if isinstance(command, list) and command:  # a program's place says nothing to others
        command = [Path(str(command[0])).name, *command[1:]]
    made = {
        "format": FORMAT,
        "version": VERSION,
        "name": one.name,
        "command": command,
        "revision": one.manifest.get("git_revision"),
        "versions": {"lavis_lstp": __version__, **one.manifest.get("versions", {})},
        "frames_chosen_by": run["choosing"]["by"],
        "judges": run["scored"]["judges"] if run["scored"] else {},
        "bootstrap": {"resamples": one.resamples, "seed": one.seed},
        "digests": {
            "config": sha256_json(config) if config else None,
            **{name: one.digests.get(name) for name in ("weights", "data")},
            "questions": _questions(one),
        },
        "predictions": _named(one.predictions),
        "verdicts": one.verdicts and _named(one.verdicts),
        "numbers": numbers_of(run),
        "measured": {"ms_a_question": time["all"]["mean"]} if time else {},
    }
    return without_secrets_in(made)


def write_result(file: Path, one: Evaluation, run: Mapping[str, Any]) -> None:
    """Writes the file, and beside it under its name what `verify-result` reads: FILE.predictions.jsonl, ..."""
    made = result_of(one, run)
    with owned(file, beside=True):
        for name, path in (("predictions", one.predictions), ("verdicts", one.verdicts)):
            if path:
                copy = file.with_suffix(f".{name}.jsonl")
                made[name]["file"] = copy.name
                if path.resolve() != copy.resolve():
                    with whole_file(copy) as partial:
                        shutil.copyfile(path, partial)
        write_json(file, made)


def _named(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": sha256_file(path)}


def _questions(one: Evaluation) -> str:
    return sha256_json(sorted(one.rows))


def numbers_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what predictions and verdicts alone decide, one level deep: name -> number, or None."""
    found: dict[str, Any] = {"questions": run["questions"], "hidden": run["hidden"], **run["counts"]}
    if scored := run["scored"]:
        found |= {name: scored[name] for name in ("num_questions", "num_scored", "coverage", "partial")}
        for name in _INTERVALS[: 1 + run["has_scores"]]:
            low, high = scored[f"{name}_interval"]
            found |= {name: scored[name], f"{name}_low": low, f"{name}_high": high}
    found |= {f"accuracy of {kind}": one["accuracy"] for kind, one in run["by_category"].items()}
    found |= {f"ece of {kind}": one["ece"] for kind, one in run["calibration"].items()}
    found |= {"unparsable": run["unparsable"], "frames": run["choosing"]["frames"]}
    if moments := run["grounding"]:
        found |= {"moments": moments["questions"], "miou": moments["miou"]}
        found |= {f"r1_{at}": share for at, share in moments["r1"].items()}
    return found


def _is_named(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("file"), str)
        and why_no_file_name(value["file"]) is None
        and isinstance(value.get("sha256"), str)
    )


def _are_numbers(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MOST_NUMBERS
        and all(one is None or type(one) in (bool, int, float) and abs(one) <= LARGEST for one in value.values())
        and all(type(value.get(name)) is int for name in ("questions", "hidden"))
        and type(value.get("num_questions", 0)) is int
    )


FORMS = {
    "format": lambda value: value == FORMAT,
    "version": lambda value: type(value) is int and value == VERSION,
    "predictions": _is_named,
    "verdicts": lambda value: value is None or _is_named(value),
    "numbers": _are_numbers,
    "bootstrap": lambda value: RESULT_FORMS["bootstrap"](value) and {"resamples", "seed"} <= value.keys(),
    "digests": lambda value: isinstance(value, dict),
    "judges": lambda value: isinstance(value, dict),
}
"""Keys of the file that are read, and their forms."""


def differences(file: Path, predictions: Path | None = None, verdicts: Path | None = None) -> tuple[list[str], int]:
    """Return what the file says otherwise than its predictions do, and how many numbers were recomputed.

    Args:
        predictions, verdicts: where they are not beside the file under the names that it gives.

    Raises:
        AnnotationError: the file, predictions or verdicts cannot be read, or are of another form.
    """
    said = read_record(file, FORMS, error=AnnotationError)
    places = {"predictions": predictions, "verdicts": verdicts}
    for name, given in places.items():
        if given is None and said[name] is not None:
            places[name] = file.parent / said[name]["file"]
            if not places[name].is_file():
                raise AnnotationError(f"{file}: no {said[name]['file']} beside it; say where it is (--{name} PATH)")
    with no_collection():
        one = read_evaluation(places["predictions"], places["verdicts"])
        one.resamples, one.seed = said["bootstrap"]["resamples"], said["bootstrap"]["seed"]
        one.num_questions = max(one.num_questions, said["numbers"].get("num_questions", 0))
        run = summary(one)
    found = numbers_of(run)
    wrong = [
        f"sha256 of {name} is {digest}, recorded {said[name]['sha256']:.80}"
        for name, path in places.items()
        if path and said[name] and (digest := sha256_file(path)) != said[name]["sha256"]
    ]
    if (digest := _questions(one)) != said["digests"].get("questions"):
        wrong.append(f"digest of the questions is {digest}, recorded {str(said['digests'].get('questions')):.80}")
    judges = run["scored"]["judges"] if run["scored"] else {}
    if without_secrets_in(judges) != said["judges"]:
        wrong.append(f"judges are {judges}, recorded {str(said['judges']):.200}")
    for name in dict.fromkeys([*found, *said["numbers"]]):
        own, other = found.get(name), said["numbers"].get(name)
        same = own == other if None in (own, other) else abs(own - other) <= TOLERANCE
        if not same or (name in found) != (name in said["numbers"]):
            wrong.append(f"{name:.80} is {own}, recorded {other}")
    return wrong, len(found)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lavis-lstp verify-result", description="Recompute the numbers of a result file from its predictions."
    )
    parser.add_argument("file", type=Path, help="written by `lavis-lstp report OUT --result FILE`")
    parser.add_argument("--predictions", type=Path, help="default: beside it, under the name that it gives")
    parser.add_argument("--verdicts", type=Path, help="the judge's, likewise")
    args = parser.parse_args(argv)
    wrong, count = differences(args.file, args.predictions, args.verdicts)
    line = f"{count} numbers recomputed, all as recorded"
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        line = f"DIFFERS: {'; '.join(wrong[:5])}{more}"
    print(" ".join(printable(without_secrets(f"{args.file}: {line}")).split()))
    return 1 if wrong else 0
