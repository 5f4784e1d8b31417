"""How fast shards are read, beside loose files and the bare `webdataset` pipeline; `pack.py` is about writing them.

    python benchmarks/shards.py [--videos 16 --sizes 640x360x240 480x320x96 320x240x240 --clips FOLDER --frames 16]
    python benchmarks/shards.py --remote [--latency-ms 50 --connection-mb-s 50]

In: videos of a moving texture are made; with --clips also copies of the videos of a folder. Out: a table in Markdown
for each size (width x height x pictures) and the clips: samples a second in one process of one thread, after a first
pass that fills the page cache, and the time to the first batch of 8; then one against two loader processes, and how
memory grows over epochs. With --remote instead: shards of frames and flow, and of mp4, on a local HTTP server that
waits before it answers a request and limits each connection, read as a stream, at offsets, and by bare webdataset:
samples a second of whole epochs in one process, its CPU time and requests (curl, which webdataset starts for each
shard, is a process of its own). What is compared is measured turn by turn, so
that other work on the machine slows all alike; medians.
"""

from __future__ import annotations

import argparse
import http.server
import json
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from video_files import moving_texture, write_video

from lavis_lstp.config.data import Shards
from lavis_lstp.data.annotation import read_annotation
from lavis_lstp.data.qa_dataset import VideoQADataset
from lavis_lstp.data.shards.format import parse_flow, parse_frames
from lavis_lstp.data.shards.questions import ShardQuestions, unpack_frames
from lavis_lstp.data.shards.stream import Wanted
from lavis_lstp.data.video.reading import read_frames
from lavis_lstp.models.where.flow import build_flow
from lavis_lstp.runners.data_order import Batches, TrainOrder, sampling_of
from lavis_lstp.runners.shard_stream import StreamBatches
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


def cpu_ms(items: Iterable) -> float:
    """Milliseconds of this process's CPU time for an item; other work on the machine does not count."""
    begin = time.process_time()
    count = sum(1 for _ in items)
    return 1e3 * (time.process_time() - begin) / count


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
        if "mp4" in sample:
            video = read_frames(sample["mp4"], num=num, size=size, name="x")
            yield torch.from_numpy(video.frames)
            continue
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


# ---- a slow server ----------------------------------------------------------------------------------------------


class SlowHandler(http.server.SimpleHTTPRequestHandler):
    """Files with ranges, after a wait, at a limited speed."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        self.server.requests.value += 1

    def do_GET(self) -> None:
        server = self.server
        time.sleep(server.latency_s)
        path = Path(server.root, self.path.lstrip("/"))
        if not path.is_file():
            return self.send_error(404)
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        last = min(size, int(asked[2]) + 1 if asked and asked[2] else size)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(last - first))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{size}")
        self.end_headers()
        begin, sent = time.perf_counter(), 0
        with open(path, "rb") as file:
            file.seek(first)
            while sent < last - first:
                self.wfile.write(piece := file.read(min(256 << 10, last - first - sent)))
                sent += len(piece)
                time.sleep(max(0.0, sent / server.bytes_per_s - (time.perf_counter() - begin)))


class SlowServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client has read what it wanted."""


def serve(root: Path, args: argparse.Namespace, ready: Any, requests: Any) -> None:
    """A process of its own, so that it takes no time of the reader's."""
    server = SlowServer(("127.0.0.1", 0), SlowHandler)
    server.root, server.latency_s, server.requests = root, args.latency_ms / 1000, requests
    server.bytes_per_s = args.connection_mb_s * 1e6
    ready.put(server.server_port)
    server.serve_forever()


def remote_rows(name: str, there: list[str], size: float, args: argparse.Namespace, requests: Any) -> list:
    """Rows of the table for one set of shards of `size` MB."""
    flow_kind, what = {"both": ("precomputed", "frames and flow"), "mp4": ("none", "mp4")}[name]
    common = {"num_frames": args.frames, "image_size": args.size, "flow": flow_kind}
    streamed = VideoQADataset(ShardQuestions(there), shards=Shards(loader="stream"), **common)
    offsets = VideoQADataset(ShardQuestions(there), **common)
    order = TrainOrder([len(streamed)], batch_size=8, accumulate=1, seed=0, sampling=[sampling_of(streamed)])
    plans = list(order.steps(0))
    wanted = [Wanted(*one) for plan in plans for one in zip(plan.batches[0], plan.places[0], strict=True)]
    shuffled = torch.randperm(len(offsets), generator=torch.Generator().manual_seed(0)).tolist()
    passes = {
        "stream": lambda: StreamBatches(streamed, seed=0).pipeline(wanted, 0),
        "offsets": lambda: map(offsets.__getitem__, shuffled),
        "bare webdataset": lambda: bare(there, args.frames, args.size),
    }
    asked = {}
    for way, make in passes.items():
        before = requests.value
        assert sum(1 for _ in make()) == len(offsets)
        asked[way] = requests.value - before
    works = {way: lambda make=make: rate(make(), 60) for way, make in passes.items()}
    works |= {f"{way}, CPU": lambda make=make: cpu_ms(make()) for way, make in passes.items()}
    rates = turn_by_turn(works, args.turns)
    about = f"{what}, {len(offsets)} samples of {size / len(offsets):.2f} MB in {len(there)} shards"
    return [
        *(
            (
                f"{about}: {way}",
                f"{rates[way]:.1f} samples/s, {rates[f'{way}, CPU']:.1f} ms CPU, {asked[way]} requests",
            )
            for way in passes
        ),
        (f"{what}: stream over bare", f"{rates['stream'] / rates['bare webdataset']:.2f}"),
        (f"{what}: stream over offsets", f"{rates['stream'] / rates['offsets']:.2f}"),
    ]


def measure_remote(root: Path, args: argparse.Namespace) -> list[tuple[str, str]]:
    shards, context = write_shards(root, args), multiprocessing.get_context("fork")
    ready, requests = context.Queue(), context.Value("i", 0)
    process = context.Process(target=serve, args=(root, args, ready, requests), daemon=True)
    process.start()
    url = f"http://127.0.0.1:{ready.get()}"
    rows = []
    for name in ("both", "mp4"):
        there = [f"{url}/{name}/{Path(shard).name}" for shard in shards[name]]
        size = sum(Path(shard).stat().st_size for shard in shards[name]) / 1e6
        rows += remote_rows(name, there, size, args, requests)
    process.terminate()
    process.join()
    return rows


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
    parser.add_argument("--remote", action="store_true", help="measure on a slow HTTP server")
    parser.add_argument("--latency-ms", type=float, default=50)
    parser.add_argument("--connection-mb-s", type=float, default=50)
    parser.add_argument("--turns", type=int, default=5, help="of --remote (default: 5)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    kinds = [*args.sizes, *([args.clips] if args.clips else [])]
    for number, kind in enumerate(kinds):
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder), args.videos, kind)
            if args.remote:
                show(kind, measure_remote(Path(folder), args))
                continue
            rows, dataset = measure(Path(folder), args)
            if number + 1 == len(kinds):
                one, two = workers_rates(dataset).values()
                rows.append(("one, two loader processes", f"{one:.1f}, {two:.1f} samples/s: {two / one:.2f} x"))
                rows.append(("memory over 20 epochs", f"{memory_slope(dataset):.2f} MB an epoch"))
        show(kind, rows)


def show(kind: str, rows: Iterable[tuple[str, str]]) -> None:
    load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {load}\n\n| {Path(kind).name} | |\n|---|---|")
    print("\n".join(f"| {name} | {text} |" for name, text in rows) + "\n", flush=True)


if __name__ == "__main__":
    main()
