"""Questions a second of `lavis-lstp serve`, and their latencies, at 1, 8 and 64 clients.

    python benchmarks/serve.py                       # the shipped tiny model, one server process, clients beside it
    python benchmarks/serve.py --checkpoint RUN --seconds 30

In: nothing, or a checkpoint. Out: a Markdown table. Each client asks one question after the other about a clip that was
uploaded once. The base line is one client and batches of one question. Both servers are measured in turns, and medians
of the rounds count, so that what else the machine does concerns all lines alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
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


async def client(session: httpx.AsyncClient, file_id: str, number: int, until: float, seconds: list[float]) -> None:
    while time.perf_counter() < until:
        question = QUESTIONS[(number + len(seconds)) % len(QUESTIONS)]
        content = [{"type": "video_url", "video_url": {"url": file_id}}, {"type": "text", "text": question}]
        started = time.perf_counter()
        answer = await session.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
        answer.raise_for_status()
        seconds.append(time.perf_counter() - started)


async def measure(url: str, clients: int, duration: float) -> tuple[float, float, float]:
    """Answers a second, and p50 and p95 of their latencies in ms."""
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as session:
        sent = await session.post("/v1/files", files={"file": ("clip.mp4", (EXAMPLE / "clip.mp4").read_bytes())})
        file_id = sent.json()["id"]
        for length in (1, duration):  # the first one opens connections and warms up
            started, seconds = time.perf_counter(), []
            await asyncio.gather(*(client(session, file_id, i, started + length, seconds) for i in range(clients)))
            rate = len(seconds) / (time.perf_counter() - started)
    return rate, *(1000 * float(np.quantile(seconds, q)) for q in (0.5, 0.95))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="default: the shipped example")
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="of all measurements; medians count (default: 3)")
    parser.add_argument("--batch", type=int, default=8, help="of the server (default: 8)")
    args = parser.parse_args(argv)
    words = ["--checkpoint", args.checkpoint] if args.checkpoint else ["--example"]
    cases = [(1, 1), (1, 8), *((args.batch, count) for count in CLIENTS)]
    found: dict[tuple[int, int], list[tuple[float, float, float]]] = {case: [] for case in cases}
    with contextlib.ExitStack() as at_the_end:
        servers = {}
        for batch in (1, args.batch):
            folder = at_the_end.enter_context(tempfile.TemporaryDirectory())
            process, servers[batch] = served(words, batch, folder)
            at_the_end.callback(process.wait)
            at_the_end.callback(process.terminate)
        for _ in range(args.rounds):
            for batch, clients in cases:
                found[batch, clients].append(asyncio.run(measure(servers[batch], clients, args.seconds)))
    medians = {case: np.median(rows, axis=0) for case, rows in found.items()}
    print(
        "| largest batch | clients | answers/s | against one at a time | p50, ms | p95, ms |\n|---|---|---|---|---|---|"
    )
    for (batch, clients), (rate, p50, p95) in medians.items():
        print(f"| {batch} | {clients} | {rate:.1f} | {rate / medians[1, 1][0]:.1f} x | {p50:.0f} | {p95:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
