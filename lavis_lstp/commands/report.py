"""`lavis-lstp report OUT`: one HTML page about the evaluations in a folder, for a browser and nothing else.

In: output folders of evaluations, predictions or verdict files. Out: `report.html`: table with intervals and judges,
seeds, accuracy against frames, kinds of questions, videos, calibration, what the sampler did, time, and all questions
with the frames that were chosen; with `--export` the table as CSV, LaTeX or Markdown; with `--result` a file of the
leaderboard, which `lavis-lstp verify-result` recomputes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lavis_lstp.errors import ConfigError
from lavis_lstp.files import atomic_writer, no_collection, owned
from lavis_lstp.redaction import printable, without_secrets
from lavis_lstp.report.evaluations import find_evaluations
from lavis_lstp.report.numbers import by_seed, summaries
from lavis_lstp.report.page import question_order, write_page
from lavis_lstp.report.result import write_result
from lavis_lstp.report.table import FORMS, report_cells

PICTURES = 100


def report(
    paths: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    pictures: int = PICTURES,
    videos: str | None = None,
    title: str | None = None,
    exports: Sequence[str | Path] = (),
    result: str | Path | None = None,
) -> tuple[Path, str]:
    """Writes the page; returns where it is, and what was found, in a few lines.

    Args:
        out: file, by default report.html in the first folder, or beside the first file.
        pictures: of so many questions the chosen frames are shown, wrong ones first.
        videos: folder or shards, where the run's manifest does not lead to them.
        exports: files for the table alone; their endings say in which of FORMS.
        result: a JSON file for the numbers of the one evaluation there is; see `report.result`.

    Raises:
        LstpError: no predictions, or some that cannot be read.
    """
    first = Path(paths[0])
    target = Path(out) if out else (first if first.is_dir() else first.parent) / "report.html"
    if target.suffix != ".html" or target.is_dir():
        raise ConfigError(f"--out {target}: expected the name of a file that ends with .html")
    for path in map(Path, exports):
        if path.suffix not in FORMS or path.is_dir():
            raise ConfigError(f"--export {path}: expected the name of a file that ends with {', '.join(FORMS)}")
    with no_collection():
        return _report(paths, target, pictures, videos, title, exports, result)


def _report(
    paths: Sequence[str | Path],
    target: Path,
    pictures: int,
    videos: str | None,
    title: str | None,
    exports: Sequence[str | Path],
    result: str | Path | None,
) -> tuple[Path, str]:
    evaluations = find_evaluations(paths)
    if result and (len(evaluations) != 1 or Path(result).suffix != ".json"):
        names = ", ".join(f"{one.verdicts or one.predictions}" for one in evaluations)
        raise ConfigError(f"--result {result}: expected a name that ends with .json, and one evaluation, not {names}")
    runs = summaries(evaluations)
    order = question_order(evaluations)
    chosen: tuple = ({}, [], [])
    if pictures:
        from lavis_lstp.report.pictures import chosen_frames

        chosen = chosen_frames(evaluations, order[:pictures], videos)
    title = title or " and ".join(dict.fromkeys(path.resolve().name for path in map(Path, paths)))
    page, warnings = write_page(evaluations, runs, order, title=title, chosen=chosen, asked=min(pictures, len(order)))
    _write(target, "--out", page)
    if exports:
        cells = report_cells(runs, by_seed(evaluations, runs)[0])
    for path in map(Path, exports):
        _write(path, "--export", FORMS[path.suffix](cells))
    if result:
        with _told(Path(result), "--result"):
            write_result(Path(result), evaluations[0], runs[0])
    notes = [f"warning: {text}" for text in warnings] + [f"note: {text}" for text in chosen[2]]
    seen = len({key for key, _ in chosen[0]})
    size = f"{target.stat().st_size / 1e6:.1f} MB"
    several = "evaluation" if len(evaluations) == 1 else "evaluations"
    line = f"{target}: {len(evaluations)} {several}, {len(order)} questions, {seen} with pictures, {size}"
    return target, "\n".join([*notes, line])


def _write(path: Path, option: str, text: str) -> None:
    with _told(path, option), owned(path, beside=True), atomic_writer(path) as file:
        file.write(text)


@contextmanager
def _told(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written ({error.strerror or error})") from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lavis-lstp report", description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", metavar="OUT", help="output folders, predictions or verdict files")
    parser.add_argument("--out", help="page to write (default: report.html in the first folder)")
    parser.add_argument("--title", help="heading (default: the folders' names)")
    parser.add_argument(
        "--pictures",
        type=int,
        default=PICTURES,
        help="questions with pictures, wrong ones first (default: %(default)s)",
    )
    parser.add_argument("--videos", help="folder with the videos, or shards, if they are not where the run read them")
    parser.add_argument(
        "--export", nargs="+", action="extend", default=[], metavar="FILE", help="the table as .csv, .tex or .md, too"
    )
    told = "the numbers of one evaluation as .json, and beside it its predictions, for verify-result"
    parser.add_argument("--result", metavar="FILE", help=told)
    args = parser.parse_args(argv)
    if args.pictures < 0:
        raise ConfigError(f"--pictures must be at least 0, got {args.pictures}")
    extra = {"exports": args.export, "result": args.result}
    said = report(args.paths, args.out, pictures=args.pictures, videos=args.videos, title=args.title, **extra)[1]
    print(printable(without_secrets(said)))
    return 0
