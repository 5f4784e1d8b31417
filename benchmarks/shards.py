"""How fast shards are written and read, beside loose files, copying, and the bare `webdataset` pipeline.

    python benchmarks/shards.py [--videos 40 --length 240 --frames 16 --size 224]

In: nothing; videos of a moving texture are made. Out: a table in Markdown: samples a second in one process, after a
first pass that fills the page cache, and the time to the first batch of 8; `pack` against copying and hashing the same
bytes; one against two loader processes; how memory grows over epochs. Numbers of a busy machine mean little.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from video_files import moving_texture, write_video

from lavis_lstp.data.annotation import read_annotation
from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.data.shards import ShardQuestions, unpack_frames
from lavis_lstp.models.flow import build_flow
from lavis_lstp.runners.data_order import Batches
from webdataset_tools import flow, reshard
from webdataset_tools.derive import derive
from webdataset_tools.format import parse_flow, parse_frames
from webdataset_tools.pack import Settings, pack
from webdataset_tools.rewrite import about, kept_samples, rewrite
from webdataset_tools.sources import units


def rate(items: Iterable, seconds: float = 4.0) -> float:
    """Items a second, for so long or to the end."""
    begin, count = time.perf_counter(), 0
    for _ in items:
        count += 1
        if time.perf_counter() - begin > seconds:
            break
    return count / (time.perf_counter() - begin)


def write_data(root: Path, videos: int, length: int) -> None:
    rows = []
    for n in range(videos):
        pictures = moving_texture(length, (1.5, 0.5 + n % 3), width=640, height=360, seed=n % 5)
        write_video(root / f"v{n}.mp4", pictures, fps=24)
        rows.append({"question_id": f"q{n}", "video": f"v{n}.mp4", "question": "what moves?", "answer": "texture"})
    (root / "a.json").write_text(json.dumps(rows))


def copied_and_hashed(root: Path, out: Path) -> float:
    """Seconds to copy all videos into one file and hash them once."""
    begin = time.perf_counter()
    with open(out, "wb") as target:
        for path in sorted(root.glob("*.mp4")):
            digest = hashlib.sha256()
            with open(path, "rb") as source:
                while block := source.read(1 << 20):
                    digest.update(block)
                    target.write(block)
        target.flush()
        os.fsync(target.fileno())
    return time.perf_counter() - begin


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def with_dis(dataset: VideoQADataset) -> Iterable:
    """Samples of loose videos, flow computed as the model would."""
    extractor = build_flow("dis", flow_size=28)
    for number in range(len(dataset)):
        yield extractor(dataset[number]["frames"][None])


def bare(shards: list[str], num: int, size: int) -> Iterable:
    """The same members decoded by the same functions, behind webdataset's own pipeline."""
    import webdataset

    chosen = {"num": num, "fps": None, "short_videos": "keep", "size": size}
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
        json.loads(sample["json"])
        frames = unpack_frames(parse_frames(sample["frames"], "x"), "x", "x", **chosen)
        parse_flow(sample["flow"], "x")[0].astype(np.float16)
        yield torch.from_numpy(frames)


def first_batch(make: Callable[[], VideoQADataset]) -> float:
    def work() -> None:
        dataset = make()
        dataset.collater([dataset[n] for n in range(8)])

    return timed(work)


def workers_rate(dataset: VideoQADataset, workers: int, epochs: int) -> float:
    batches = Batches(dataset, seed=0, num_workers=workers)
    plan = [tuple(range(n, n + 4)) for n in range(0, len(dataset) - 3, 4)]
    list(batches(plan))  # workers start
    begin = time.perf_counter()
    for epoch in range(epochs):
        list(batches(plan, epoch=epoch + 1))
    return epochs * len(plan) * 4 / (time.perf_counter() - begin)


def memory_slope(dataset: VideoQADataset, epochs: int = 20) -> float:
    """MB an epoch, by least squares over the second half."""
    process, seen = psutil.Process(), []
    for _ in range(epochs):
        for number in range(len(dataset)):
            dataset[number]
        seen.append(process.memory_info().rss / 1e6)
    half = seen[epochs // 2 :]
    return float(np.polyfit(range(len(half)), half, 1)[0])


def measure(root: Path, args: argparse.Namespace) -> list[tuple[str, str]]:
    write_data(root, args.videos, args.length)
    found = units("annotation", [root / "a.json"], root=root)
    size = sum(path.stat().st_size for path in root.glob("*.mp4"))
    copy_s = min(copied_and_hashed(root, root / "copy") for _ in range(3))
    runs = [timed(lambda n=n: pack(found, str(root / f"mp4_{n}/x"), root, max_count=10)) for n in range(3)]
    quick = Settings(probe=False)
    blind = [timed(lambda n=n: pack(found, str(root / f"blind_{n}/x"), root, settings=quick)) for n in range(3)]
    frames_set = Settings(frames=args.frames, size=args.size)
    pack(found, str(root / "frames/x"), root, settings=frames_set, max_count=10)
    mp4, frames = (sorted(map(str, (root / name).glob("*.tar"))) for name in ("mp4_0", "frames"))
    settings = flow.Settings(num_frames=args.frames, size=args.size, grid=args.size // 8)
    derive(frames, str(root / "flow/x"), "flow", flow.sample_flow, settings, {"made_by": settings.about()})
    fields = sorted(map(str, (root / "flow").glob("*.tar")))
    joined = reshard.joined(kept_samples(frames), kept_samples(fields))
    rewrite([joined[n : n + 10] for n in range(0, len(joined), 10)], str(root / "both/x"), about=about("reshard"))
    both = sorted(map(str, (root / "both").glob("*.tar")))
    common = {"num_frames": args.frames, "image_size": args.size}
    loose = VideoQADataset(read_annotation(root / "a.json"), root, **common)
    given = {**common, "flow": "precomputed"}
    sets = {
        "loose mp4": lambda: VideoQADataset(read_annotation(root / "a.json"), root, **common),
        "mp4 shards": lambda: VideoQADataset(ShardQuestions(mp4), **common),
        "frame shards": lambda: VideoQADataset(ShardQuestions(frames), **common),
        "frame+flow shards": lambda: VideoQADataset(ShardQuestions(both), **given),
    }
    rows = [("loose mp4, flow by DIS", f"{(base := rate(with_dis(loose))):.1f} samples/s")]
    rates = {}
    for name, make in sets.items():
        dataset = make()
        rate(map(dataset.__getitem__, range(len(dataset))), 60)
        rates[name] = max(rate(map(dataset.__getitem__, range(len(dataset)))) for _ in range(3))
        rows.append((name, f"{rates[name]:.1f} samples/s, first batch of 8 after {first_batch(make):.2f} s"))
    plain = max(rate(bare(both, args.frames, args.size)) for _ in range(3))
    flow_rate = rates["frame+flow shards"]
    rows.append(("bare webdataset, frame+flow shards", f"{plain:.1f} samples/s; ours {flow_rate / plain:.2f} of it"))
    rows.append(("frame+flow shards over loose mp4 with DIS", f"{flow_rate / base:.1f} x"))
    dataset = sets["frame+flow shards"]()
    one, two = (workers_rate(dataset, workers, 5) for workers in (1, 2))
    rows.append(("one, two loader processes", f"{one:.1f}, {two:.1f} samples/s: {two / one:.2f} x"))
    rows.append(("memory over 20 epochs", f"{memory_slope(dataset):.2f} MB an epoch"))
    for name, seconds in (("pack", min(runs)), ("pack --no-probe", min(blind))):
        speed = f"{size / 1e6 / copy_s:.0f}, {size / 1e6 / seconds:.0f} MB/s: {copy_s / seconds:.2f}"
        rows.append((f"copy and hash, {name} (videos of {size / 1e6 / args.videos:.1f} MB)", speed))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--videos", type=int, default=40)
    parser.add_argument("--length", type=int, default=240, help="pictures of a video")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args)
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| | |\n|---|---|")
    for name, text in rows:
        print(f"| {name} | {text} |")


if __name__ == "__main__":
    main()
