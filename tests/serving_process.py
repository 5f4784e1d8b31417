"""A server in this process for tests, at a free port, with the shipped example's model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lavis_lstp.inference.loading import EXAMPLE

CLIP = EXAMPLE / "clip.mp4"
ROWS = json.loads((EXAMPLE / "questions.json").read_text(encoding="utf-8"))
ASKED, ANSWER = ROWS[1]["question"], ROWS[1]["answer"]
WITHOUT = "the extra `serve` is not installed (pip install '.[test]')"


@contextlib.contextmanager
def running(predictor: Any, folder: Path, *, page: dict[str, Any] | None = None, **how: Any) -> Iterator[Any]:
    """A `Server` that answers at `server.url`; skips the test where the extra is missing.

    Args:
        folder: for uploads.
        page: arguments of `page.mounted`; None = the API alone.
        how: arguments of `Server`.
    """
    uvicorn = pytest.importorskip("uvicorn", reason=WITHOUT)
    pytest.importorskip("fastapi", reason=WITHOUT)
    from lavis_lstp.serving.app import Server, build_app

    server = Server(predictor, **{"name": "lstp-example", "files": folder, **how})
    with_page = None
    if page is not None:
        pytest.importorskip("gradio", reason=WITHOUT)
        from lavis_lstp.serving.page import mounted

        with_page = mounted(server, **page)
    app = build_app(server, with_page=with_page)
    own = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=own.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not own.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.02)
    server.url = f"http://127.0.0.1:{own.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        own.should_exit = True
        thread.join(30)


@contextlib.contextmanager
def serving(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The command `lavis-lstp serve --example` in a process of its own, and its address; ended by SIGTERM.

    Args:
        folder: for uploads and temporary files.
    """
    pytest.importorskip("fastapi", reason=WITHOUT)
    (folder / "tmp").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "lavis_lstp", "serve", "--example", "--port", "0", "--files", folder / "files"]
    environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
    process = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        yield process, re.search(r"http://[^/]+", line)[0]
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()
