"""`lavis-lstp ablate --cfg-path YAML --methods uniform random lstp oracle --num-frames 4 8`: does the sampler help?

In: evaluations, ways to choose frames and numbers of frames. Out, in a folder: one evaluation for each combination,
`table.md` and `table.json`: accuracy with its 95 % interval, an exact paired test against the first way of choosing,
frames scored and the time of each stage; and `accuracy.png`, accuracy against frames. LAVIS's own models stand in the
same table, on evenly spaced frames. `chain` runs the evaluations; one that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from lavis_lstp.config.load import flatten
from lavis_lstp.config.model import AUTO, FIGURES, SCORERS, SELECTORS, scorer_settings
from lavis_lstp.errors import ConfigError, unknown_name
from lavis_lstp.files import atomic_writer, owned, sha256_json, whole_file, write_json
from lavis_lstp.redaction import printable, without_secrets_in
from lavis_lstp.report.plots import accuracy_plot
from lavis_lstp.report.table import judge_line, measure, paired_p, table_lines
from lavis_lstp.untrusted import guard_log

WAYS = Path(__file__).resolve().parents[1] / "configs" / "ways.yaml"


@dataclass(frozen=True)
class Way:
    """A way to choose frames: what the table calls it, and the options that do it.

    keeps: selectors that a recipe keeps under this way, as they are ways of the same kind. data: options of each data
        set.
    """

    title: str
    options: tuple[str, ...]
    keeps: tuple[str, ...] = ()
    data: tuple[str, ...] = ()


def ways_of(file: Path | None = None) -> dict[str, Way]:
    """The ways that are listed (configs/ways.yaml, and the user's own), and every other selector as one, which with
    a scorer is a way RULE:SCORER (on the command line also RULE:SCORER=WEIGHTS).

    Raises:
        ConfigError: the file is missing, or an entry has no title or is not about `model`.
    """
    ways = {name: Way(name, (f"model.selector.name={name}",)) for name in SELECTORS}
    ways["keyframes"] = Way("key frames", ("model.selector.name=uniform",), data=("frames=keyframe",))
    for name in (name for name, kind in SELECTORS.items() if "scores" in kind.needs):
        ways |= {f"{name}:{scorer}": _scored(name, scorer) for scorer in SCORERS}
    for path in (WAYS, *([file] if file else [])):
        if not path.is_file():
            raise ConfigError(f"--ways {path}: no such file")
        try:
            listed = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"--ways {path}: not a YAML file ({str(error).splitlines()[0]})") from error
        for name, entry in (listed if isinstance(listed, dict) else {"": None}).items():
            known = isinstance(entry, dict) and set(entry) <= {"title", "model", "keeps"}
            if not known or not isinstance(entry.get("model"), dict) or not isinstance(entry.get("title"), str):
                raise ConfigError(f"{path}: '{name}' must have a title (text) and model (a mapping), and maybe keeps")
            leaves = flatten(entry["model"], "model.").items()
            options = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in leaves]
            ways[str(name)] = Way(entry["title"], tuple(options), tuple(entry.get("keeps") or ()))
    return ways


def _scored(rule: str, scorer: str) -> Way:
    """A rule over the scores of a scorer, NAME or NAME=WEIGHTS."""
    given = scorer_settings(scorer)
    told = [f"model.scorer.{key}={given[key]}" for key in ("name", "weights", "arch", "model_type") if given[key]]
    return Way(f"{rule}, scored by {scorer}", (f"model.selector.name={rule}", *told))


@dataclass(frozen=True)
class Cell:
    """One evaluation: its folder's name, its recipe and options, and how the table calls it."""

    name: str
    title: str
    recipe: str
    split: str
    options: tuple[str, ...]
    baseline: str
    """Name of the cell it is compared with."""
    series: str
    """The line of the plot that it is a point of."""
    frames: int | str
    """Frames shown to the language model; "auto" where the selector decides."""


# ---- the combinations -----------------------------------------------------------------------------------------------


def cells_of(
    recipes: Sequence[str], ways: Mapping[str, Way], counts: Sequence[int | str], options: Sequence[str]
) -> list[Cell]:
    """Every combination, those of one recipe and number together; LAVIS's models on evenly spaced frames alone.

    Args:
        ways: of choosing frames; the first is what the others are compared with.
        counts: of frames; "auto" is for ways that ask the sampler (config/model.py).

    Raises:
        ConfigError: a recipe is not complete, evaluates not exactly one split, or is of a task without answers; a way
            that asks for no scores and the count "auto".
    """
    from lavis_lstp import register

    register()
    from lavis.common.registry import registry

    from lavis_lstp.config import Config
    from lavis_lstp.models.lstp import LSTP

    cells = []
    for recipe in recipes:
        whole = Config(SimpleNamespace(cfg_path=recipe, options=list(options))).config
        splits = list(whole.run.get("test_splits") or [])
        if len(splits) != 1 or whole.run.task != "video_qa":
            raise ConfigError(
                f"{recipe}: ablate wants run.task video_qa and one split in run.test_splits, got {whole.run.task} and "
                f"{splits}"
            )
        label = f"{Path(recipe).stem}: " if len(recipes) > 1 else ""
        if not issubclass(registry.get_model_class(whole.model.arch), LSTP):
            for count in (count for count in counts if count != AUTO):
                own = tuple(f"datasets.{name}.image_frames={count}" for name in whole.datasets)
                even = ways_of()["uniform"].title
                cells.append(_cell(recipe, "uniform", even, count, label, splits[0], own, "uniform"))
            continue
        for count in counts:
            for name, way in ways.items():
                changed = () if whole.model.selector.name in way.keeps else way.options
                rule = dict(o.split("=", 1) for o in changed).get("model.selector.name", whole.model.selector.name)
                if count == AUTO and not SELECTORS[rule].by_sampler:
                    raise ConfigError(
                        f"--num-frames auto needs scores, and --frames {name} asks for none; leave it out"
                    )
                own = (*changed, f"model.selector.num_selected={count}")
                figures = [f"{name}=true" for name in FIGURES if name in SELECTORS[rule].needs]
                own += tuple(f"datasets.{s}.{one}" for s in whole.datasets for one in (*way.data, *figures))
                cells.append(_cell(recipe, name, way.title, count, label, splits[0], own, next(iter(ways))))
    return cells


def _cell(
    recipe: str, way: str, title: str, count: int | str, label: str, split: str, own: Sequence[str], baseline: str
) -> Cell:
    line = f"{label}{title}"
    name, compared = (f"{Path(recipe).stem}_{_in_a_name(one)}_{count}" for one in (way, baseline))
    return Cell(name, f"{line}, {count} frames", recipe, split, tuple(own), compared, line, count)


def _in_a_name(way: str) -> str:
    """A way as part of a folder's name; weights of a scorer by their last part and a digest."""
    rule, of, weights = way.partition("=")
    return f"{rule}_{Path(weights).name}_{sha256_json(weights)[:8]}" if of else way


def ablate(
    cells: Sequence[Cell], out: Path, options: Sequence[str] = (), launcher: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Evaluates every cell that is not done yet; returns the rows of the table."""
    from lavis_lstp.commands.chain import Chain, Step

    rows, rights = [], {}
    by_name = {cell.name: cell for cell in cells}

    def add_row(step: Step) -> None:
        cell = by_name[step.name]
        row, rights[cell.name] = measure(out / cell.name / "result", f"{cell.split}_video_qa")
        compared = cell.baseline if cell.baseline != cell.name and cell.baseline in rights else None
        p_value = None if compared is None else paired_p(rights[compared], rights[cell.name])
        facts = {"name": cell.name, "title": cell.title, "compared_with": compared, "p_value": p_value}
        rows.append({**facts, "series": cell.series, "frames": cell.frames, **row})
        write_json(out / "table.json", {"rows": rows, "options": without_secrets_in(list(options))})
        with atomic_writer(out / "table.md") as file:
            file.write("\n".join([*table_lines(rows, "frames"), "", judge_line(rows)]) + "\n")

    steps = [Step(cell.name, "evaluate", cell.recipe, options=cell.options) for cell in cells]
    Chain(out, options, launcher).run(steps, add_row)
    with whole_file(out / "accuracy.png") as partial:
        partial.write_bytes(accuracy_plot(rows))
    return rows


def _count(word: str) -> int | str:
    if word != AUTO and not (word.isdecimal() and int(word) >= 1):
        raise ConfigError(f"--num-frames must be at least 1, got {printable(word)}; auto is legal, too")
    return word if word == AUTO else int(word)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lavis-lstp ablate", description=__doc__.splitlines()[0])
    parser.add_argument("--cfg-path", required=True, nargs="+", help="evaluations, projects/lstp/eval/... or your own")
    ways = (
        "ways to choose frames (default: uniform random lstp); RULE:SCORER=WEIGHTS as in `lavis-lstp select --scorer`"
    )
    parser.add_argument("--methods", "--frames", dest="methods", nargs="+", metavar="WAY", help=ways)
    parser.add_argument("--ways", type=Path, help="YAML file of further ways to choose frames, as configs/ways.yaml")
    help_ = "frames shown to the language model; auto: as many as the scores ask for"
    parser.add_argument("--num-frames", nargs="+", default=["4"], metavar="K", help=help_)
    parser.add_argument("--out", type=Path, help="working folder (default: output/ablate/NAME)")
    parser.add_argument("--nproc", type=int, default=1, help="processes, one a GPU, on this machine")
    parser.add_argument("--options", nargs="+", action="extend", default=[], metavar="A.B=C", help="overrides")
    args = parser.parse_args(argv)
    counts = [_count(word) for word in args.num_frames]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    guard_log()
    known = ways_of(args.ways)
    methods = args.methods or ["uniform", "random", "lstp"]
    for name in methods:
        rule, of, weights = name.partition("=")
        if of and rule in known and ":" in rule:
            known[name] = _scored(rule.partition(":")[0], f"{rule.partition(':')[2]}={weights}")
        if name not in known:
            raise ConfigError(unknown_name("way to choose frames (--methods)", name, known))
    recipes, counts = (list(dict.fromkeys(given)) for given in (args.cfg_path, counts))
    cells = cells_of(recipes, {name: known[name] for name in methods}, counts, args.options)
    launcher = ["torchrun", "--standalone", f"--nproc-per-node={args.nproc}"] if args.nproc > 1 else []
    out = args.out or Path("output/ablate", Path(args.cfg_path[0]).stem)
    with owned(out):
        rows = ablate(cells, out, args.options, launcher)
    print(printable("\n" + "\n".join([*table_lines(rows, "frames"), "", judge_line(rows)])))
    first = ", ".join(dict.fromkeys(row["compared_with"] for row in rows if row["compared_with"]))
    print(f"\n{rows[0]['questions']} questions." + (f" p: exact McNemar test against {first}." if first else ""))
    print(f"Written: {', '.join(str(out / name) for name in ('table.md', 'table.json', 'accuracy.png'))}")
    return 0
