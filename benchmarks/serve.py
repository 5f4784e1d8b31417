"""Questions a second of `lavis-lstp serve`, and their latencies, at 1, 8 and 64 clients.

    python benchmarks/serve.py                       # the shipped tiny model, one server process, clients beside it
    python benchmarks/serve.py --checkpoint RUN --seconds 30

In: nothing, or a checkpoint. Out: a Markdown table. Each client asks one question after the other about a clip that was
uploaded once. The base line is the same server with batches of one question and one client. Ratios are of one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import httpx
import numpy as np

from lavis_lstp.inference.loading import EXAMPLE

CLIENTS = (1, 8, 64)
QUESTIONS = [row["question"] for row in json.loads((EXAMPLE / "questions.json").read_text(encoding="utf-8"))]


def served(words: Sequence[str], batch: int, folder: str) -> tuple[subprocess.Popen, str]:
    """A server's process and its address."""
    command = [sys.executable, "-m", "lavis_lstp", "serve", *words, "--port", "0", "--no-page", "--files", folder]
    process = subprocess.Popen([*command, "--batch", str(batch), "--queue", "128"], stdout=subprocess.PIPE, text=True)
    found = re.search(r"http://\S+?(?=/v1)", process.stdout.readline())
    if not found:
        raise SystemExit("the server did not start")
    return process, found[0]


async def client(url: str, file_id: str, number: int, until: float, seconds: list[float]) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=120) as session:
        while time.perf_counter() < until:
            question = QUESTIONS[(number + len(seconds)) % len(QUESTIONS)]
            content = [{"type": "video_url", "video_url": {"url": file_id}}, {"type": "text", "text": question}]
            started = time.perf_counter()
            answer = await session.post(
                "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]}
            )
            answer.raise_for_status()
            seconds.append(time.perf_counter() - started)


async def measure(url: str, clients: int, duration: float) -> tuple[float, float, float]:
    """Answers a second, and p50 and p95 of their latencies in ms."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as session:
        sent = await session.post("/v1/files", files={"file": ("clip.mp4", (EXAMPLE / "clip.mp4").read_bytes())})
    file_id, warm, seconds = sent.json()["id"], [], []
    await asyncio.gather(*(client(url, file_id, i, time.perf_counter() + 1, warm) for i in range(clients)))
    started = time.perf_counter()
    await asyncio.gather(*(client(url, file_id, i, started + duration, seconds) for i in range(clients)))
    rate = len(seconds) / (time.perf_counter() - started)
    return rate, *(1000 * float(np.quantile(seconds, q)) for q in (0.5, 0.95))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="default: the shipped example")
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement (default: 8)")
    parser.add_argument("--batch", type=int, default=16, help="of the server (default: 16)")
    args = parser.parse_args(argv)
    words = ["--checkpoint", args.checkpoint] if args.checkpoint else ["--example"]
    rows = []
    for batch, clients in ((1, (1, 8)), (args.batch, CLIENTS)):
        with tempfile.TemporaryDirectory() as folder:
            process, url = served(words, batch, folder)
            try:
                rows += [(batch, count, *asyncio.run(measure(url, count, args.seconds))) for count in clients]
            finally:
                process.terminate()
                process.wait()
    print(
        "| largest batch | clients | answers/s | against one at a time | p50, ms | p95, ms |\n|---|---|---|---|---|---|"
    )
    for batch, clients, rate, p50, p95 in rows:
        print(f"| {batch} | {clients} | {rate:.1f} | {rate / rows[0][2]:.1f} x | {p50:.0f} | {p95:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
