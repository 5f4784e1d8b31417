"""`lavis-lstp select VIDEO "question"`: which frames of a film to show for a question, and when they are.

In: a video, or a file of questions about videos. Out: a table; with --save a folder with selection.json, the frames and
one sheet of them; of a file of questions, JSON lines, one question each, which a killed run goes on with. --from takes
what is recorded in a file instead of choosing, and --format writes the forms of `data/selections.py`.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lavis_lstp.data.annotation import read_annotation
from lavis_lstp.data.folder import check_name
from lavis_lstp.data.selections import FORMS, Recorded, read_recorded, text_of
from lavis_lstp.data.store import default_store
from lavis_lstp.errors import AnnotationError, ConfigError, LstpError, VideoError
from lavis_lstp.files import (
    atomic_writer,
    find_path,
    json_text,
    owned,
    read_jsonl,
    sha256_file,
    strict_json,
    whole_file,
    write_jsonl,
)
from lavis_lstp.inference.selection import METHODS, Selection, load_options, select
from lavis_lstp.jobs import ENGINES, done_jobs, how
from lavis_lstp.redaction import printable


def table(found: Selection) -> str:
    """The frames, one a line: number in the file, seconds and, where there are scores, the nearest candidate's."""
    lines = [f"{'frame':>9}  {'seconds':>10}" + ("" if found.scores is None else f"  {'score':>8}")]
    for number, seconds in zip(found.frame_index, found.times_s, strict=True):
        line = f"{number:>9}  {seconds:>10.3f}"
        if found.scores is not None:
            near = min(range(len(found.scores)), key=lambda i: abs(found.candidate_times_s[i] - seconds))
            line += f"  {found.scores[near]:>8.4f}"
        lines.append(line)
    notes = [", ".join(f"{stage} {value:.2f} s" for stage, value in found.seconds.items())]
    filled = f"; {found.num_filled} of them were filled in by the best remaining scores" if found.num_filled else ""
    scored = "" if found.scores is None else f", {len(found.scores)} scored"
    if len(found.frame_index) < found.settings["k"]:
        among = "in the span" if found.span_s else "to choose among"
        notes.append(f"{found.settings['k']} were asked for, and there are no more {among}")
    told = f" ({'; '.join(filter(None, notes))})"
    lines.append(f"{len(found.frame_index)} of {found.num_frames} frames by {found.method}{scored}{filled}{told}")
    return "\n".join(lines)


def save(found: Selection, folder: Path) -> None:
    """selection.json, FRAME.png of each frame at full size, and sheet.png: all with times and scores."""
    import numpy as np
    from PIL import Image

    from lavis_lstp.inference.contact_sheet import contact_sheet, pictures_at, with_scores

    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in zip(found.frame_index, found.frames(), strict=True):
        with whole_file(folder / f"{number:07d}.png") as file:
            Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))).save(file, "PNG")
    sheet = contact_sheet(pictures_at(found.video, found.times_s), [f"{seconds:.2f} s" for seconds in found.times_s])
    if found.scores is not None:
        sheet = with_scores(sheet, found.candidate_times_s, found.scores, found.times_s, found.duration_s)
    with whole_file(folder / "sheet.png") as file:
        sheet.save(file, "PNG")
    found.write(folder / "selection.json")


def select_all(
    questions: Path,
    root: Path,
    out: Path,
    common: Mapping[str, Any],
    settings: Mapping[str, Any],
    by: str | None,
    recorded: Path | None = None,
    asked: tuple[str, tuple[str, ...]] | None = None,
    **engine: Any,
) -> tuple[int, int]:
    """A line of `out` for each question, in the order of the file; those that are there already are kept.

    Args:
        common, settings: arguments of `select`.
        by: whose sampler is asked, as the user names it.
        recorded: file whose frames are taken, whoever chose them.
        asked: arguments of `_predictor` for the one that is asked; None = nobody.
        engine: of `done_jobs`.

    Returns:
        How many were selected now, and how many there are.

    Raises:
        ConfigError: `out` holds selections by another method or with other settings.
    """
    rows = read_annotation(questions)
    wanted = {**common, "rule": dict(settings), "by": by}
    found = {}
    if recorded is not None:
        found, wanted = read_recorded(recorded, rows, "--from"), {"from": sha256_file(recorded)}
    with owned(out.parent):
        done = {}
        if out.exists():
            for line in read_jsonl(out):
                if not isinstance(line, Mapping) or line.get("asked") != wanted or "question_id" not in line:
                    raise ConfigError(f"{out}: holds selections made otherwise; name another file, or remove it")
                done[line["question_id"]] = line
            write_jsonl(out, done.values())  # without the line that a killed run left unfinished
        left = [row for row in rows if row["question_id"] not in done]
        jobs = [(row, root, {**common, **settings}, found.get(row["question_id"]), asked) for row in left]
        with out.open("a", encoding="utf-8") as file:
            for _, line in done_jobs(_selected, jobs, desc="select", unit="question", **engine):
                file.write(json_text({**line, "asked": wanted}) + "\n")
                file.flush()
        by_id = {line["question_id"]: line for line in read_jsonl(out)}
        write_jsonl(out, [by_id[row["question_id"]] for row in rows])
    return len(left), len(rows)


@cache
def _predictor(checkpoint: str, options: tuple[str, ...]) -> Any:
    from lavis_lstp.inference.predictor import load

    return load(checkpoint, options=options, store=default_store())


def _selected(job: tuple[Mapping[str, Any], Path, Mapping[str, Any], Recorded | None, tuple | None]) -> dict[str, Any]:
    """The line of one question; a job is its row, the folder of videos, and arguments as `select_all` has them."""
    row, root, arguments, recorded, asked = job
    if "video" not in row:
        raise AnnotationError(f"question {row['question_id']}: has no video to select frames of")
    check_name(row["video"], root, f"question {row['question_id']}")
    path = find_path(root, row["video"])
    try:
        if recorded is not None:
            found = Selection.recorded(path, row["question"], recorded)
        else:
            predictor = {} if asked is None else {"predictor": _predictor(*asked)}
            found = select(path, row["question"], clip_s=row.get("clip_s"), **arguments, **predictor)
    except VideoError as error:
        raise VideoError(f"question {row['question_id']}: {error}") from None
    return {"question_id": row["question_id"], **found.to_json()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lavis-lstp select", description=__doc__.splitlines()[0])
    parser.add_argument("video", nargs="?", help="video file")
    parser.add_argument("question", nargs="?", default="")
    parser.add_argument("-k", type=int, default=8, help="frames to choose (default: 8)")
    parser.add_argument("--method", default="lstp", help=f"{', '.join(METHODS)} (default: lstp)")
    parser.add_argument("--seed", type=int, default=0, help="of methods that draw")
    parser.add_argument("--num-candidates", type=int, help="frames, or parts of the video, that are scored")
    parser.add_argument(
        "--candidates-per-s", type=float, help="score so many frames a second, at most --num-candidates"
    )
    parser.add_argument("--checkpoint", help="whose sampler is asked (default: the shipped tiny one's)")
    words = "in place of a sampler: clip, siglip, itm, itc or answerer (--checkpoint's)"
    weights = "hub id or folder, or for itm and itc LAVIS's model, such as blip_image_text_matching/large"
    parser.add_argument("--scorer", metavar="NAME[=WEIGHTS]", help=f"{words}; WEIGHTS: {weights}")
    parser.add_argument(
        "--frames", choices=("exact", "keyframe"), help="keyframe: candidates are the nearest key frames"
    )
    parser.add_argument("--flow-pairs", choices=("sampled", "local"), help="local: flow to the file's next picture")
    clip = "the question is about this part alone; rows of --questions have their own clip_s"
    parser.add_argument("--clip-s", nargs=2, type=float, metavar=("START", "END"), help=clip)
    parser.add_argument("--settings", nargs="*", default=[], metavar="A=B", help="of the method, such as power=2.0")
    parser.add_argument("--save", type=Path, help="folder for selection.json, the frames and a sheet of them")
    help_ = "ask this model of the server at OPENAI_BASE_URL about the frames, and print its answer"
    parser.add_argument("--answer-by", metavar="MODEL", help=help_)
    parser.add_argument("--json", action="store_true", help="print JSON, as --format jsonl does")
    parser.add_argument("--format", choices=FORMS, help="print, or write to --out, in this form (default: jsonl)")
    parser.add_argument("--from", dest="recorded", type=Path, metavar="FILE", help="take the frames of a file")
    parser.add_argument("--questions", type=Path, help="annotation file: select for every question of it")
    parser.add_argument("--root", type=Path, help="folder of its videos (default: that of the file)")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--workers", type=int, default=1, help="--questions: processes of this machine (default: 1)")
    parser.add_argument("--engine", choices=ENGINES, default="local", help="--questions: local, or a Ray cluster")
    parser.add_argument("--ray-address", default="auto", help="of the Ray cluster")
    args = parser.parse_args(argv)
    common = {"k": args.k, "method": args.method, "seed": args.seed, "num_candidates": args.num_candidates}
    common["candidates_per_s"] = args.candidates_per_s
    settings = dict(_setting(word) for word in args.settings)
    if args.answer_by and (args.questions or args.json or args.format or not args.question.strip()):
        parser.error("--answer-by MODEL goes with one video and a question, and prints no JSON")
    if args.questions is None and (args.video is None) == (args.recorded is None):
        parser.error("name a video, --from FILE, or --questions FILE --out FILE")
    if args.questions is None and (args.root or args.workers != 1 or args.engine != "local"):
        parser.error("--root, --workers and --engine go with --questions FILE")
    of_choosing = [*common, "clip_s", "settings", "checkpoint", "scorer", "frames", "flow_pairs"]
    asked_for = [name for name in of_choosing if getattr(args, name) != parser.get_default(name)]
    if args.recorded is not None and asked_for:
        parser.error(f"--from FILE takes frames as they were chosen; leave out {', '.join(asked_for)}")
    if args.video is not None and not Path(args.video).exists():
        raise LstpError(f"{args.video}: no such video file")
    common |= {key: value for key in ("scorer", "frames", "flow_pairs") if (value := getattr(args, key)) is not None}
    options = None if args.recorded is not None else load_options(args.method, args.scorer)
    asked = None if options is None else (args.checkpoint or "example", tuple(options))
    if asked:
        if args.checkpoint is None:
            print("note: the shipped tiny sampler knows moving shapes alone; --checkpoint names yours", file=sys.stderr)
    elif args.checkpoint:
        raise ConfigError(f"--checkpoint: {args.scorer or 'method ' + args.method} asks no sampler; leave it out")
    if args.questions is not None:
        if args.out is None or args.video or args.save:
            parser.error("--questions FILE goes with --out FILE, and without a video and --save")
        if args.clip_s:
            parser.error("--clip-s is of one video; rows of --questions have their own clip_s")
        root, by = args.root or args.questions.parent, args.checkpoint
        other = args.format not in (None, "jsonl")
        lines = args.out.with_name(f"{args.out.name}.jsonl") if other else args.out  # what a killed run goes on with
        made, count = select_all(args.questions, root, lines, common, settings, by, args.recorded, asked, **how(args))
        if other:
            with atomic_writer(args.out) as file:
                file.write(text_of(args.format, read_jsonl(lines)))
        print(printable(f"{args.out}: {count} questions, {made} of them selected now"))
        return 0
    if args.recorded is not None:
        found = Selection.read(args.recorded)
    else:
        predictor = {"predictor": _predictor(*asked)} if asked else {}
        found = select(args.video, args.question, clip_s=args.clip_s, **common, **settings, **predictor)
    if args.save:
        save(found, args.save)
    form = args.format or ("jsonl" if args.json or args.out else None)
    written = text_of(form, [found.to_json()]) if form else ""
    if args.out:
        with atomic_writer(args.out) as file:
            file.write(written)
    shown = form and (args.json or not args.out)
    print(written.rstrip("\n") if shown else printable(table(found)))
    if args.answer_by:
        print(printable(found.answer(args.answer_by)))
    return 0


def _setting(word: str) -> tuple[str, Any]:
    name, given, value = word.partition("=")
    if not given or not name.isidentifier():
        raise ConfigError(f"--settings {word}: expected NAME=VALUE")
    if name in inspect.signature(select).parameters:
        raise ConfigError(f"--settings {word}: is no setting of a method; `lavis-lstp select --help` lists the options")
    try:
        return name, strict_json(value)
    except ValueError:
        return name, value
