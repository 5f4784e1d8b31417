"""Times of the tools with many questions: data set, metrics, report and its page, verify-result, verify.

    python benchmarks/load.py [--questions 100000] [--members 100000] [--only PART ...]

Prints seconds, by the clock and of this process on a processor, which differ on a busy machine; and for the page its
size and how long Chromium takes to show it. Files go to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PARTS = ("data", "metrics", "report", "verify", "threads")
STEPS = """
import time, torch
layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
x = torch.randn(8, 48, 64)
for step in range(63):
    begin = time.perf_counter() if step == 3 else begin if step else 0
    layer(x).sum().backward()
print(f"{time.perf_counter() - begin:.2f} s")
"""


def questions(count: int) -> list[dict[str, Any]]:
    """Rows of predictions, five to a video, as an evaluation of a sampler writes them."""
    chance, rows = random.Random(0), []
    for i in range(count):
        start, right = i % 20, chance.random() < 0.6
        answer = chance.choice(("a man", "two dogs", "red", "on the table in the kitchen", "playing the guitar"))
        log_prob = round(-chance.random() * 3, 4)
        rows.append(
            {
                "question_id": f"question_{i:06d}",
                "video_id": f"video_{i // 5:05d}",
                "category": ("what", "who", "how", "where")[i % 4],
                "question": f"what is the person number {i} doing after the other one has left the room?",
                "answer": answer,
                "prediction": answer if right else f"nothing like {i % 977}",
                "log_prob": {"sum": log_prob, "mean": round(log_prob / 2, 4), "tokens": 2},
                "span": [start, start + 8],
                "num_frames": 32,
                "span_s": [start * 0.5, (start + 8) * 0.5],
                "entropy": {"start": 1.25, "end": 1.5},
                "frame_index": [start, start + 2, start + 4, start + 6],
                "frame_times": [start * 0.5, start * 0.5 + 1, start * 0.5 + 2, start * 0.5 + 3],
                "gold_span": [start + 1, start + 7],
            }
        )
    return rows


def timed(name: str, use: Callable[[], Any]) -> Any:
    begin, busy = time.perf_counter(), time.process_time()
    result = use()
    busy = time.process_time() - busy
    print(f"{name}: {time.perf_counter() - begin:.1f} s, {busy:.1f} s of the processor", flush=True)
    return result


def data(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Annotation file to a data set whose batches of an evaluation are known."""
    from lavis_lstp.data.annotation import read_annotation
    from lavis_lstp.data.qa_dataset import VideoQADataset
    from lavis_lstp.runners.evaluation import units_of

    kept = ("question_id", "video_id", "category", "question", "answer")
    entries = [{**{key: row[key] for key in kept}, "video": f"{row['video_id']}.mp4"} for row in rows]
    path = folder / "annotation.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    for name in {entry["video"] for entry in entries}:
        (folder / name).touch()
    print(f"{len(entries)} questions, {path.stat().st_size / 1e6:.1f} MB")

    def start() -> None:
        dataset = VideoQADataset(read_annotation(path), folder, num_frames=32)
        units_of(dataset, 8), dataset.fingerprint()

    timed("data set", start)


def metrics(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    from lavis_lstp.tasks.video_qa import VideoQATask

    timed("metrics of video_qa", lambda: VideoQATask({}).metrics(rows))


def report(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    from lavis_lstp.commands.report import report as write_report
    from lavis_lstp.files import write_jsonl
    from lavis_lstp.report.result import differences

    write_jsonl(folder / "out" / "result" / "test_video_qa.jsonl", rows)
    board = folder / "out" / "result" / "board.json"
    page, _ = timed("report", lambda: write_report([folder / "out"], pictures=0, result=board))
    wrong, _ = timed("verify-result", lambda: differences(board))
    assert not wrong, wrong
    print(f"page: {page.stat().st_size / 1e6:.1f} MB")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from browser import chromium

    with chromium(folder / "profile") as window:
        timed("page in Chromium", lambda: (window.open(page), window.texts("article")))
        typed = (
            "(() => { const s = document.getElementById('search'), t = performance.now(); s.value = 'number 77';"
            "s.dispatchEvent(new Event('input')); return performance.now() - t; })()"
        )
        print(f"a search in the page: {window.script(typed):.0f} ms, then {window.script(typed):.0f} ms")


def verify(folder: Path, members: int) -> None:
    """A shard of texts, each with one empty question, and its index."""
    from lavis_lstp.data.shards import index, sets
    from lavis_lstp.data.shards.format import SAMPLE_FORMAT, dump_json, media_key
    from lavis_lstp.data.shards.tar import ShardWriter
    from webdataset_tools.verify import verify as check

    for count in (members // 2, members):
        path, found = folder / f"shard{count}-000000.tar", []
        with ShardWriter(path) as shard:
            for n in range(count):
                row = {"question_id": f"q{n}", "question": "", "answer": ""}
                value = {"format": SAMPLE_FORMAT, "version": 1, "kind": "text", "video_id": "", "questions": [row]}
                placed = shard.add(media_key("text", f"q{n}"), {"json": dump_json(value)})
                found.append(index.sample_of(shard.samples[-1][0], placed, value))
        made = index.build(found, shard.bytes)
        index.write(made, path)
        sets.write_manifest(path, [sets.shard_entry(path.name, made)], {})
        result = timed(f"verify of {count} members", lambda path=path: check([str(path)]))
        assert not result["failed"], result["problems"][:3]


def threads(beside: int = 6) -> None:
    """60 steps of a small layer, beside as many busy processes: threads that spin and threads that sleep."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
    try:
        for policy in ("active", "passive"):
            for count in ("1", "2"):
                given = {**os.environ, "OMP_WAIT_POLICY": policy, "OMP_NUM_THREADS": count}
                done = subprocess.run(
                    [sys.executable, "-c", STEPS], env=given, capture_output=True, text=True, check=True
                )
                print(f"{beside} busy processes beside, {policy}, {count} threads: {done.stdout.strip()}", flush=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=100_000)
    parser.add_argument("--members", type=int, default=100_000)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="load_") as name:
        rows = questions(args.questions)
        for part, use in (("data", data), ("metrics", metrics), ("report", report)):
            if part in args.only:
                use(Path(name), rows)
        if "verify" in args.only:
            verify(Path(name), args.members)
    if "threads" in args.only:
        threads()
    return 0


if __name__ == "__main__":
    sys.exit(main())
