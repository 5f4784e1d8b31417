"""How fast `pack` writes shards, beside a process that copies and hashes the same files and does nothing else.

    python benchmarks/pack.py [--clips ../shared/videos --repeats 7]

In: nothing, or a folder of clips; others are made. Out: a table in Markdown: MB/s of copying and hashing into one file,
and what share of it `pack` and `pack --no-probe` reach, one process on either side, turn by turn, medians; all end with
the bytes on the disk. Files come from the page cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from video_files import moving_texture, write_video

from lavis_lstp.data.shapes import shapes_qa
from webdataset_tools.media import Settings
from webdataset_tools.pack import pack
from webdataset_tools.sources import Unit, units

SECONDS = (6, 10, 15)
SIZES = ((320, 240), (320, 240), (480, 360))


def typical(root: Path, count: int = 8) -> None:
    """Clips of 0.3 to 3 MB: 6 to 15 s, with sensor noise, as MSVD's and MSR-VTT's are."""
    chance = np.random.default_rng(0)
    for number in range(count):
        width, height = SIZES[number % 3]
        pictures = moving_texture(25 * SECONDS[number % 3], (1.5, 0.5), width=width, height=height, seed=number)
        grain = 6 + 2 * (number % 4)
        noisy = (np.clip(p + chance.normal(0, grain, (height, width, 1)), 0, 255).astype(np.uint8) for p in pictures)
        write_video(root / f"{number}.mp4", noisy, options={"crf": "24", "preset": "veryfast"})


def repeated(clips: list[Path], root: Path, count: int) -> list[Unit]:
    """`count` distinct files of some clips, with a question each."""
    rows = []
    for number in range(count):
        shutil.copyfile(clips[number % len(clips)], root / f"c{number:04d}.mp4")
        rows.append({"question_id": f"q{number}", "video": f"c{number:04d}.mp4", "question": "what?", "answer": "that"})
    (root / "a.json").write_text(json.dumps(rows))
    return units("annotation", [root / "a.json"], root=root)


def copy_and_hash(paths: list[Path], out: Path) -> None:
    with open(out, "wb") as target:
        for path in paths:
            digest = hashlib.sha256()
            with open(path, "rb") as source:
                while block := source.read(1 << 20):
                    digest.update(block)
                    target.write(block)
        target.flush()
        os.fsync(target.fileno())


def measure(found: list[Unit], root: Path, out: Path, repeats: int) -> str:
    paths = [root / unit.source for unit in found]
    works = {
        "copy": lambda folder: copy_and_hash(paths, folder / "copy"),
        "pack": lambda folder: pack(found, str(folder / "x"), root),
        "blind": lambda folder: pack(found, str(folder / "x"), root, settings=Settings(probe=False)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            os.sync()
            begin = time.perf_counter()
            work(out)
            seconds[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first warms up
    size = sum(path.stat().st_size for path in paths) / 1e6
    shares = " | ".join(f"{median['copy'] / median[name]:.2f}" for name in ("pack", "blind"))
    return f"{len(paths)} | {size / len(paths):.2f} | {size / median['copy']:.0f} | {shares}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--clips", type=Path, help="a folder of .mp4 files to measure with, too")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("made", "typical", "clips", "shapes"):
            (Path(folder) / name).mkdir()
        made, out = Path(folder) / "made", Path(folder) / "out"
        typical(made)
        sets = {"typical": sorted(made.glob("*.mp4"))}
        sets |= {"clips": sorted(args.clips.glob("*.mp4"))} if args.clips else {}
        for name, clips in sets.items():
            found = repeated(clips, Path(folder) / name, 200)
            rows.append(f"| {name} | {measure(found, Path(folder) / name, out, args.repeats)} |")
        tiny = Path(folder) / "shapes"
        shapes_qa.generate(tiny, seed=0, train_videos=200, val_videos=1, test_videos=1, train_images=0)
        rows.append(f"| Shapes-QA | {measure(units('shapes', [tiny], root=tiny), tiny, out, args.repeats)} |")
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| videos | files | MB each | MB/s copied and hashed | pack | pack --no-probe |\n|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
