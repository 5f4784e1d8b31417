"""`python -m lavis_lstp.testing.tiny_benchmarks OUT`: every benchmark in its authors' files, a few questions of each.

In: a folder. Out, in it, `inputs/<benchmark>/...` in the layout that configs/datasets expects, so that

    cd OUT && python -m lavis.evaluate --cfg-path projects/lstp/eval/nextqa_lstp_vicuna7b.yaml

reads it. Names, columns, delimiters and endings are the published ones (docs/benchmarks.md); the videos are of a
coloured shape that appears, and the questions are about it. To debug one's own copy of a benchmark against.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lavis_lstp.data.benchmarks import MVBENCH
from lavis_lstp.data.shapes import scene as world
from lavis_lstp.data.shapes.shapes_qa import write_video
from lavis_lstp.errors import ConfigError, unknown_name
from lavis_lstp.files import atomic_writer, write_json
from lavis_lstp.testing.tiny_instruct import Clip, make_clip

VIDEOS = 3
QUESTIONS = 2  # about each
EXTENSIONS = {"fine_grained_pose": ".avi", "action_antonym": ".webm", "episodic_reasoning": ""}
"""Of MVBench's videos where they are no .mp4; the last is a folder of pictures. All are MP4 inside."""


def _ask(clip: Clip, number: int) -> tuple[str, str, list[str]]:
    """Question, answer and five options."""
    words = list(world.COLOURS if number == 0 else world.KINDS)
    answer = clip.colour if number == 0 else clip.kind
    question = "what colour has the shape that appears" if number == 0 else "what appears in the video"
    start = (clip.number + number) % len(words)
    options = [words[(start + i) % len(words)] for i in range(5)]
    options = options if answer in options else [answer, *options[1:]]
    return question, answer, [*dict.fromkeys(options), "a cat", "a dog", "a bird"][:5]


def _questions() -> list[tuple[int, Clip, int]]:
    """(running number, clip, number of the question about it)"""
    clips = [make_clip(number) for number in range(VIDEOS)]
    return [(QUESTIONS * clip.number + number, clip, number) for clip in clips for number in range(QUESTIONS)]


def _videos(folder: Path, name: Callable[[Clip], str]) -> None:
    for number in range(VIDEOS):
        clip = make_clip(number)
        path = folder / name(clip)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, clip)


def _write(path: Path, clip: Clip) -> None:
    if path.suffix == "":
        path.mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(clip.frames()[::3]):
            Image.fromarray(frame).save(path / f"{number + 1:05d}.jpg")
    elif path.suffix == ".gif":
        first, *more = [Image.fromarray(frame) for frame in clip.frames()]
        first.save(path, save_all=True, append_images=more, duration=1000 // world.FPS, loop=0)
    else:
        write_video(path, clip.frames())


def _table(path: Path, rows: Sequence[dict[str, Any]], delimiter: str) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    with atomic_writer(path) as file:
        file.write(text.getvalue())


def _authors_json(video: str, ending: str) -> Callable[[Path], None]:
    """test_qa.json of MSVD-QA and MSRVTT-QA."""

    def write(folder: Path) -> None:
        rows = [
            {"answer": _ask(clip, q)[1], "id": 100 + i, "question": f"{_ask(clip, q)[0]}?", "video_id": clip.number + 1}
            for i, clip, q in _questions()
        ]
        write_json(folder / "test_qa.json", rows)
        _videos(folder / "videos", lambda clip: f"{video}{clip.number + 1}{ending}")

    return write


def _activitynet(folder: Path) -> None:
    asked = [(f"v_{clip.name}_{q}", clip, *_ask(clip, q)[:2]) for _, clip, q in _questions()]
    questions = [{"video_name": c.name, "question": text, "question_id": key} for key, c, text, _ in asked]
    answers = [{"answer": answer, "type": 4 + i % 2, "question_id": key} for i, (key, _, _, answer) in enumerate(asked)]
    write_json(folder / "test_q.json", questions)
    write_json(folder / "test_a.json", answers[::-1])  # another order: nothing may hang on it
    endings = (".mp4", ".mkv", ".mov")
    _videos(folder / "videos", lambda clip: f"{'v_' * (clip.number > 0)}{clip.name}{endings[clip.number]}")


def _tgif(folder: Path) -> None:
    rows = [
        {
            "gif_name": f"tumblr_{clip.number}_250",
            "question": f"{_ask(clip, q)[0]} ?",
            "answer": _ask(clip, q)[1],
            "type": 2 if q == 0 else 0,
            "vid_id": f"FRAMEQA{i}",
            "key": clip.number,
            "description": f"a {clip.colour} {clip.kind} appears .",
        }
        for i, clip, q in _questions()
    ]
    _table(folder / "Test_frameqa_question.csv", rows, "\t")
    _videos(folder / "gifs", lambda clip: f"tumblr_{clip.number}_250.gif")


def _nextqa(folder: Path) -> None:
    rows = []
    for _, clip, q in _questions():
        question, answer, options = _ask(clip, q)
        sizes = {"frame_count": clip.length, "width": 64, "height": 64}
        row = {"video": 4000 + clip.number, **sizes, "question": question, "answer": options.index(answer), "qid": q}
        rows.append({**row, "type": ("DO", "TN")[q], **{f"a{i}": option for i, option in enumerate(options)}})
    for split in ("val", "test"):
        _table(folder / f"{split}.csv", rows, ",")
    write_json(folder / "map_vid_vidorID.json", {str(4000 + i): f"01{i:02d}/{4000 + i}" for i in range(VIDEOS)})
    _videos(folder / "NExTVideo", lambda clip: f"01{clip.number:02d}/{4000 + clip.number}.mp4")


def _star(folder: Path) -> None:
    rows = []
    for i, clip, q in _questions():
        question, answer, options = _ask(clip, q)
        options = options[:4] if answer in options[:4] else [answer, *options[:3]]
        start, end = (edge / world.FPS for edge in clip.shown)
        row = {"question_id": f"{('Interaction', 'Sequence')[q]}_T1_{i}", "question": f"{question}?"}
        row |= {"video_id": f"VID{clip.number}", "start": start, "end": end, "answer": f"The {answer}."}
        choices = [{"choice_id": n, "choice": f"The {option}."} for n, option in enumerate(options)]
        rows.append({**row, "question_program": [], "choices": choices, "situations": {}})
    write_json(folder / "STAR_val.json", rows)
    write_json(folder / "STAR_test.json", [{k: v for k, v in row.items() if k != "answer"} for row in rows])
    _videos(folder / "Charades_v1_480", lambda clip: f"VID{clip.number}.mp4")


def _egoschema(folder: Path) -> None:
    rows, answers = [], {}
    for clip in (make_clip(number) for number in range(VIDEOS)):
        question, answer, options = _ask(clip, 0)
        named = {f"option {i}": option for i, option in enumerate(options)}
        rows.append({"q_uid": f"uid-{clip.number}", "google_drive_id": "", "question": f"{question}?", **named})
        answers[f"uid-{clip.number}"] = options.index(answer)
    answers.pop("uid-1")  # only a part of the answers is public
    write_json(folder / "questions.json", rows)
    write_json(folder / "subset_answers.json", answers)
    _videos(folder / "videos", lambda clip: f"uid-{clip.number}.mp4")


def _mvbench(folder: Path) -> None:
    clip = make_clip(1)
    (folder / "json").mkdir(exist_ok=True)
    question, answer, options = _ask(clip, 0)
    options = options[:3] if answer in options[:3] else [answer, *options[:2]]
    start, end = (edge / world.FPS for edge in clip.shown)
    for task, facts in MVBENCH.items():
        file = f"clip{EXTENSIONS.get(task, '.mp4')}"
        row = {"video": file, "question": f"{question}?", "candidates": options, "answer": answer}
        if facts["bounded"]:
            row |= {"start": start, "end": end}
        write_json(folder / "json" / f"{task}.json", [row])
        path = folder / "video" / facts["folder"] / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _write(path, clip)


WRITERS: dict[str, Callable[[Path], None]] = {
    "msvd_qa": _authors_json("vid", ".avi"),
    "msrvtt_qa": _authors_json("video", ".mp4"),
    "activitynet_qa": _activitynet,
    "tgif_qa": _tgif,
    "nextqa": _nextqa,
    "star": _star,
    "egoschema": _egoschema,
    "mvbench": _mvbench,
}


def write_benchmarks(out: str | Path, only: Sequence[str] = tuple(WRITERS)) -> dict[str, Path]:
    """Writes `out`/inputs/<benchmark> and gives these folders by name.

    Raises:
        ConfigError: a name in `only` is not known.
    """
    folders = {}
    for name in only:
        if name not in WRITERS:
            raise ConfigError(unknown_name("benchmark", name, WRITERS))
        folders[name] = Path(out) / "inputs" / name
        folders[name].mkdir(parents=True, exist_ok=True)
        WRITERS[name](folders[name])
    return folders


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lavis_lstp.testing.tiny_benchmarks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--only", nargs="+", default=list(WRITERS), choices=list(WRITERS), help="default: all")
    args = parser.parse_args(argv)
    for name, folder in write_benchmarks(args.out, args.only).items():
        print(f"{name}: {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
