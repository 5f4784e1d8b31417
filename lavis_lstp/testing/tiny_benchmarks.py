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

from lavis_lstp.data.benchmarks import BENCHMARKS
from lavis_lstp.data.shapes import scene as world
from lavis_lstp.data.shapes.shapes_qa import write_video
from lavis_lstp.errors import ConfigError, unknown_name
from lavis_lstp.files import atomic_writer, whole_file, write_json, write_jsonl
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
    for task, facts in BENCHMARKS["lstp_mvbench"].forms["authors"].files.items():
        file = f"clip{EXTENSIONS.get(task, '.mp4')}"
        shown = [answer] if task == "counterfactual_inference" else options  # as in five questions of the real file
        row = {"video": file, "question": f"{question}?", "candidates": shown, "answer": answer}
        if facts["bounded"]:
            row |= {"start": start, "end": end}
        write_json(folder / "json" / f"{task}.json", [row])
        path = folder / "video" / facts["folder"] / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _write(path, clip)


def _asked() -> list[tuple[Clip, str, str, str, list[str]]]:
    """(clip, id, question, answer, four options), the answer among them."""
    found = []
    for i, clip, q in _questions():
        question, answer, options = _ask(clip, q)
        options = options[:4] if answer in options[:4] else [answer, *options[:3]]
        found.append((clip, f"{clip.number:03d}-{i + 1}", f"{question}?", answer, options))
    return found


def _lettered(options: Sequence[str]) -> list[str]:
    return [f"{letter}. {option}" for letter, option in zip("ABCDEFGH"[: len(options)], options, strict=True)]


def _shown_s(clip: Clip) -> list[float]:
    """Seconds in which the clip's shape is seen."""
    return [edge / world.FPS for edge in clip.shown]


SUBTITLE = "{number}\n00:00:0{start},000 --> 00:00:0{end},500\n{text}\n\n"


def _videomme(folder: Path) -> None:
    rows, videos = [], {}
    for clip, key, question, answer, options in _asked():
        outer = {"video_id": f"{clip.number:03d}", "duration": ("short", "medium", "long")[clip.number % 3]}
        outer |= {"domain": "Knowledge", "sub_category": "Geography"}
        row = {"question_id": key, "task_type": "Object Recognition", "question": question}
        row |= {"options": _lettered(options), "answer": "ABCD"[options.index(answer)]}
        rows.append({**outer, "url": "", "videoID": clip.name, **row})
        videos.setdefault(clip.name, {**outer, "questions": []})["questions"].append(row)
    _parquet(folder / "test-00000-of-00001.parquet", rows)
    write_json(folder / "questions.json", list(videos.values()))
    _videos(folder / "data", lambda clip: f"{clip.name}.mp4")
    (folder / "subtitle").mkdir(exist_ok=True)
    for clip in map(make_clip, range(VIDEOS - 1)):  # the authors' short videos are not all subtitled
        lines = [SUBTITLE.format(number=n, start=n, end=n + 1, text=f"line {n} of {clip.name}") for n in range(2)]
        with atomic_writer(folder / "subtitle" / f"{clip.name}.srt") as file:
            file.write("".join(lines))


def _parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Skipped where pyarrow is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return
    with whole_file(path) as partial:
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), partial)


def _longvideobench(folder: Path) -> None:
    rows = []
    for clip, key, question, answer, options in _asked():
        row = {"video_id": clip.name, "question": question, "question_wo_referring_query": question}
        row |= {"candidates": options, "correct_choice": options.index(answer), "position": [1]}
        row |= {"topic_category": "KG-Knowledge-Geography", "question_category": "O2E", "level": "L1-Perception"}
        row |= {"id": key, "video_path": f"{clip.name}.mp4", "subtitle_path": f"{clip.name}_en.json"}
        rows.append({**row, "duration_group": 15, "starting_timestamp_for_subtitles": 0, "duration": 2.0})
    write_json(folder / "lvb_val.json", rows)
    spread = [
        {
            **{k: v for k, v in row.items() if k != "candidates"},
            **dict(zip(OPTIONS, [*row["candidates"], "N/A"], strict=True)),
        }
        for row in rows
    ]
    _parquet(folder / "validation-00000-of-00001.parquet", spread)
    _videos(folder / "videos", lambda clip: f"{clip.name}.mp4")
    (folder / "subtitles").mkdir(exist_ok=True)
    for clip in map(make_clip, range(VIDEOS)):
        lines = [{"start": "00:00:00.000", "end": "00:00:01.000", "line": f"a line of {clip.name}"}]
        write_json(folder / "subtitles" / f"{clip.name}_en.json", lines)


OPTIONS = tuple(f"option{i}" for i in range(5))


def _mlvu(folder: Path) -> None:
    """Both MLVU benchmarks read this folder's files, each its own."""
    for task in ("lstp_mlvu", "lstp_mlvu_generation"):
        for name, facts in BENCHMARKS[task].forms["authors"].files.items():
            clip, _, question, answer, options = _asked()[0]
            row = {"video": f"{facts['task']}_1.mp4", "duration": 2.0, "question": question, "answer": answer}
            chosen = {"candidates": options} if task == "lstp_mlvu" else {}
            write_json(folder / "json" / f"{name}.json", [{**row, **chosen, "question_type": facts["task"]}])
            path = folder / "video" / facts["folder"] / f"{facts['task']}_1.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, clip)


def _lvbench(folder: Path) -> None:
    videos: dict[str, dict[str, Any]] = {}
    for clip, key, question, answer, options in _asked():
        listed = "".join(f"\n({letter}) {option}" for letter, option in zip("ABCD", options, strict=True))
        row = {"uid": key, "question": question + listed, "answer": "ABCD"[options.index(answer)]}
        row |= {"question_type": ["entity recognition", "reasoning"][: 1 + clip.number % 2]}
        info = {"duration_minutes": 2 / 60, "fps": 8.0, "resolution": {"width": 64, "height": 64}}
        video = videos.setdefault(clip.name, {"key": clip.name, "qa": [], "type": "cartoon", "video_info": info})
        video["qa"].append({**row, "time_reference": "00:00-00:01"})
    write_jsonl(folder / "video_info.meta.jsonl", videos.values())
    _videos(folder / "videos", lambda clip: f"{clip.name}.mp4")


def _cgbench(folder: Path) -> None:
    rows = []
    for number, (clip, _, question, answer, options) in enumerate(_asked()):
        row = {"qid": number, "video_uid": clip.name, "question": question, "answer": answer, "choices": options}
        row |= {
            "right_answer": "ABCD"[options.index(answer)],
            "clue_intervals": [[0, 0.5], [0.75, 1]][: 1 + number % 2],
        }
        rows.append({**row, "domain": "Driving", "sub_category": "Entity Perception", "duration": 2})
    write_json(folder / "cgbench_mini.json", rows)
    _videos(folder / "cg_videos_720p", lambda clip: f"{clip.name}.mp4")


def _nextgqa(folder: Path) -> None:
    rows, moments = [], {}
    for _, clip, q in _questions():
        question, answer, options = _ask(clip, q)
        video = str(4000 + clip.number)
        row = {"video_id": video, "frame_count": clip.length, "width": 64, "height": 64, "question": question}
        row |= {"answer": answer, "qid": q, "type": ("CW", "TN")[q], **{f"a{i}": o for i, o in enumerate(options)}}
        rows.append(row)
        about = moments.setdefault(video, {"duration": 2, "location": {}, "fps": world.FPS})
        about["location"][str(q)] = [_shown_s(clip)]
    for split in ("val", "test"):
        _table(folder / f"{split}.csv", rows, ",")
        write_json(folder / f"gsub_{split}.json", moments)
    write_json(folder / "map_vid_vidorID.json", {str(4000 + i): f"01{i:02d}/{4000 + i}" for i in range(VIDEOS)})
    _videos(folder / "NExTVideo", lambda clip: f"01{clip.number:02d}/{4000 + clip.number}.mp4")


def _charades_sta(folder: Path) -> None:
    for split in ("train", "test"):
        with atomic_writer(folder / f"charades_sta_{split}.txt") as file:
            for clip, _, _, answer, _ in _asked():
                start, end = _shown_s(clip)
                file.write(f"VID{clip.number} {start} {end}##a {answer} appears.\n")
    _videos(folder / "Charades_v1_480", lambda clip: f"VID{clip.number}.mp4")


def _by_video(spans: str, sentences: str, name: Callable[[Clip], str]) -> dict[str, Any]:
    """{video: {duration, parallel lists of moments and sentences}}"""
    found: dict[str, Any] = {}
    for clip, _, _, answer, _ in _asked():
        row = found.setdefault(name(clip), {"duration": 2.0, spans: [], sentences: []})
        row[spans].append(_shown_s(clip))
        row[sentences].append(f"A {answer} appears.")
    return found


def _activitynet_captions(folder: Path) -> None:
    for name in ("val_1", "val_2"):
        write_json(folder / f"{name}.json", _by_video("timestamps", "sentences", lambda clip: f"v_{clip.name}"))
    _videos(folder / "videos", lambda clip: f"v_{clip.name}.mp4")


def _timelens(folder: Path) -> None:
    for name in ("charades", "activitynet", "qvhighlights"):
        write_json(folder / f"{name}-timelens.json", _by_video("spans", "queries", lambda clip: clip.name))
        _videos(folder / "videos" / name, lambda clip: f"{clip.name}.mp4")


def _qvhighlights(folder: Path) -> None:
    rows = []
    for number, (clip, _, _, answer, _) in enumerate(_asked()):
        windows = [[0, 0.5], [0.75, 1]][: 1 + number % 2]
        row = {"qid": number, "query": f"A {answer} appears", "duration": 1, "vid": clip.name}
        rows.append({**row, "relevant_windows": windows, "relevant_clip_ids": [0], "saliency_scores": [[4, 3, 2]]})
    for split in ("train", "val"):
        write_jsonl(folder / f"highlight_{split}_release.jsonl", rows)
    _videos(folder / "videos", lambda clip: f"{clip.name}.mp4")


WRITERS: dict[str, Callable[[Path], None]] = {
    "msvd_qa": _authors_json("vid", ".avi"),
    "msrvtt_qa": _authors_json("video", ".mp4"),
    "activitynet_qa": _activitynet,
    "tgif_qa": _tgif,
    "nextqa": _nextqa,
    "star": _star,
    "egoschema": _egoschema,
    "mvbench": _mvbench,
    "videomme": _videomme,
    "longvideobench": _longvideobench,
    "mlvu": _mlvu,
    "mlvu_generation": lambda folder: _mlvu(folder.with_name("mlvu")),
    "lvbench": _lvbench,
    "cgbench": _cgbench,
    "nextgqa": _nextgqa,
    "charades_sta": _charades_sta,
    "activitynet_captions": _activitynet_captions,
    "qvhighlights": _qvhighlights,
    "timelens": _timelens,
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
