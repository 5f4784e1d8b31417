"""How fast shards are read, beside loose files and the bare `webdataset` pipeline; `pack.py` is about writing them.

    python benchmarks/shards.py [--videos 16 --sizes 640x360x240 480x320x96 320x240x240 --clips FOLDER --frames 16]

In: videos of a moving texture are made; with --clips also copies of the videos of a folder. Out: a table in Markdown
for each size (width x height x pictures) and the clips: samples a second in one process of one thread, after a first
pass that fills the page cache, and the time to the first batch of 8; then one against two loader processes, and how
memory grows over epochs. What is compared is measured turn by turn, so that other work on the machine slows all alike;
medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from video_files import moving_texture, write_video

from lavis_lstp.data.annotation import read_annotation
from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.data.shards.format import parse_flow, parse_frames
from lavis_lstp.data.shards.questions import ShardQuestions, unpack_frames
from lavis_lstp.models.where.flow import build_flow
from lavis_lstp.runners.data_order import Batches
from webdataset_tools import flow, reshard
from webdataset_tools.derive import derive
from webdataset_tools.pack import Settings, pack
from webdataset_tools.rewrite import about, kept_samples, rewrite
from webdataset_tools.sources import units


def rate(items: Iterable, seconds: float = 1.5) -> float:
    """Items a second, for so long or to the end."""
    begin, count = time.perf_counter(), 0
    for _ in items:
        count += 1
        if time.perf_counter() - begin > seconds:
            break
    return count / (time.perf_counter() - begin)


def turn_by_turn(works: dict[str, Callable[[], float]], turns: int = 5) -> dict[str, float]:
    """The median of what each gives."""
    found = [{name: work() for name, work in works.items()} for _ in range(turns)]
    return {name: statistics.median(turn[name] for turn in found) for name in works}


def write_data(root: Path, videos: int, what: str) -> None:
    """Videos of a size, or copies of those of a folder, and questions."""
    clips, rows = sorted(Path(what).glob("*.mp4")), []
    for n in range(videos):
        if clips:
            shutil.copy(clips[n % len(clips)], root / f"v{n}.mp4")
        else:
            width, height, length = map(int, what.split("x"))
            pictures = moving_texture(length, (1.5, 0.5 + n % 3), width=width, height=height, seed=n % 5)
            write_video(root / f"v{n}.mp4", pictures, fps=24)
        rows.append({"question_id": f"q{n}", "video": f"v{n}.mp4", "question": "what moves?", "answer": "texture"})
    (root / "a.json").write_text(json.dumps(rows))


def with_dis(dataset: VideoQADataset) -> Iterable:
    """Samples of loose videos, flow computed as the model would."""
    extractor = build_flow("dis")
    for number in range(len(dataset)):
        yield extractor(dataset[number]["frames"][None])


def bare(shards: list[str], num: int, size: int) -> Iterable:
    """The same members decoded by the same functions, behind webdataset's own pipeline."""
    import webdataset

    chosen = {"num": num, "fps": None, "short_videos": "keep", "size": size}
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
        json.loads(sample["json"])
        frames = unpack_frames(parse_frames(sample["frames"], "x"), "x", "x", **chosen)
        parse_flow(sample["flow"], "x")
        yield torch.from_numpy(frames)


def first_batch(make: Callable[[], VideoQADataset]) -> float:
    begin = time.perf_counter()
    dataset = make()
    dataset.collater([dataset[n] for n in range(8)])
    return time.perf_counter() - begin


def workers_rates(dataset: VideoQADataset, epochs: int = 8) -> dict[int, float]:
    """Samples/s of one and of two loader processes."""
    plan = [tuple(range(n, n + 4)) for n in range(0, len(dataset) - 3, 4)] * epochs
    pools = {workers: Batches(dataset, seed=0, num_workers=workers) for workers in (1, 2)}

    def run(workers: int) -> float:
        begin = time.perf_counter()
        for _ in pools[workers](plan):
            pass
        return len(plan) * 4 / (time.perf_counter() - begin)

    turn_by_turn({workers: lambda workers=workers: run(workers) for workers in pools}, 1)  # workers start
    return turn_by_turn({workers: lambda workers=workers: run(workers) for workers in pools})


def memory_slope(dataset: VideoQADataset, epochs: int = 20) -> float:
    """MB an epoch, by least squares over the second half."""
    process, seen = psutil.Process(), []
    for _ in range(epochs):
        for number in range(len(dataset)):
            dataset[number]
        seen.append(process.memory_info().rss / 1e6)
    half = seen[epochs // 2 :]
    return float(np.polyfit(range(len(half)), half, 1)[0])


def write_shards(root: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    """The same videos as mp4, as frames, and as frames with flow."""
    found = units("annotation", [root / "a.json"], root=root)
    pack(found, str(root / "mp4/x"), root, max_count=10)
    frames_set = Settings(frames=args.frames, size=args.size)
    pack(found, str(root / "frames/x"), root, settings=frames_set, max_count=10)
    frames = sorted(map(str, (root / "frames").glob("*.tar")))
    settings = flow.Settings(num_frames=args.frames, size=args.size)
    derive(frames, str(root / "flow/x"), "flow", flow.sample_flow, settings, {"made_by": settings.about()})
    fields = sorted(map(str, (root / "flow").glob("*.tar")))
    joined = reshard.joined(kept_samples(frames), kept_samples(fields))
    rewrite([joined[n : n + 10] for n in range(0, len(joined), 10)], str(root / "both/x"), about=about("reshard"))
    return {name: sorted(map(str, (root / name).glob("*.tar"))) for name in ("mp4", "frames", "both")}


def measure(root: Path, args: argparse.Namespace) -> tuple[list[tuple[str, str]], VideoQADataset]:
    """Rows of the table, and the data set of frames and flow."""
    shards = write_shards(root, args)
    common = {"num_frames": args.frames, "image_size": args.size}
    given = {**common, "flow": "precomputed"}
    sets = {
        "loose mp4": lambda: VideoQADataset(read_annotation(root / "a.json"), root, **common),
        "mp4 shards": lambda: VideoQADataset(ShardQuestions(shards["mp4"]), **common),
        "frame shards": lambda: VideoQADataset(ShardQuestions(shards["frames"]), **common),
        "frame+flow shards": lambda: VideoQADataset(ShardQuestions(shards["both"]), **given),
    }
    ready = {name: make() for name, make in sets.items()}
    passes = {
        "loose mp4, flow by DIS": lambda: with_dis(ready["loose mp4"]),
        **{name: lambda one=one: map(one.__getitem__, range(len(one))) for name, one in ready.items()},
        "bare webdataset, frame+flow shards": lambda: bare(shards["both"], args.frames, args.size),
    }
    works = {name: lambda make=make: rate(make()) for name, make in passes.items()}
    turn_by_turn(works, 1)
    rates = turn_by_turn(works)
    firsts = {name: first_batch(make) for name, make in sets.items()}
    rows = [
        (name, f"{one:.1f} samples/s" + (f", first batch of 8 after {firsts[name]:.2f} s" if name in firsts else ""))
        for name, one in rates.items()
    ]
    ours = rates["frame+flow shards"]
    rows.append(("ours over bare webdataset", f"{ours / rates['bare webdataset, frame+flow shards']:.2f}"))
    rows.append(("frame+flow shards over loose mp4 with DIS", f"{ours / rates['loose mp4, flow by DIS']:.1f}"))
    return rows, ready["frame+flow shards"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--sizes", nargs="+", default=["640x360x240", "480x320x96", "320x240x240"])
    parser.add_argument("--clips", metavar="FOLDER", help="of mp4 files")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    kinds = [*args.sizes, *([args.clips] if args.clips else [])]
    for number, kind in enumerate(kinds):
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder), args.videos, kind)
            rows, dataset = measure(Path(folder), args)
            if number + 1 == len(kinds):
                one, two = workers_rates(dataset).values()
                rows.append(("one, two loader processes", f"{one:.1f}, {two:.1f} samples/s: {two / one:.2f} x"))
                rows.append(("memory over 20 epochs", f"{memory_slope(dataset):.2f} MB an epoch"))
        load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {load}\n\n| {Path(kind).name} | |\n|---|---|")
        print("\n".join(f"| {name} | {text} |" for name, text in rows) + "\n", flush=True)


if __name__ == "__main__":
    main()
