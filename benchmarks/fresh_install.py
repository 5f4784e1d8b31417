"""Seconds from nothing to an answer on the page: a new environment, `lavis-lstp serve --example`, a browser.

    python benchmarks/fresh_install.py FOLDER        # is made; an environment that it has already is taken as it is

In: this checkout, Chromium and chromedriver, and selenium in the Python that runs this. Out: a Markdown table. What is
installed is what the Dockerfile copies, by the commands of the README.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from browser import Browser, chromium  # noqa: E402

ROW = json.loads((ROOT / "lavis_lstp" / "example" / "questions.json").read_text(encoding="utf-8"))[1]


def install(folder: Path) -> None:
    """The commands of the README, in a copy of the files that the Dockerfile copies."""
    source, bin_folder = folder / "source", folder / "environment" / "bin"
    for line in re.findall(r"(?m)^COPY (.+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8")):
        for name in line.split()[:-1]:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            source.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", folder / "environment"], check=True)
    for words in (".[serve]",), ("--no-deps", "salesforce-lavis==1.0.2"):
        subprocess.run([bin_folder / "python", "-m", "pip", "install", "-q", *words], check=True, cwd=source)


def until(true: Callable[[], Any], seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(Exception):
            if found := true():
                return found
        if time.monotonic() > deadline:
            raise SystemExit("it did not happen in time")
        time.sleep(0.05)


def ask(page: Browser, url: str) -> None:
    """Clicks an example and Ask, and waits for the answer with its four frames."""
    page.driver.get(url)
    until(lambda: page.script("document.querySelectorAll('#examples button').length > 1"))
    page.script("document.querySelectorAll('#examples button')[1].click()")
    until(lambda: page.script("document.querySelector('#question textarea, #question input').value"))
    until(lambda: page.script("!!document.querySelector('#video video')"))
    page.script("document.querySelector('#ask').click()")
    until(lambda: page.texts("#chat .bot.message") == [ROW["answer"]] and len(page.texts("#evidence .frame")) == 4)


def main(folder: Path) -> None:
    times = [("install", time.perf_counter())]
    if not (folder / "environment").is_dir():
        install(folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [folder / "environment" / "bin" / "lavis-lstp", "serve", "--example", "--port", "0"]
    for start in ("first", "second"):
        times.append((f"{start} start: until /health answers", time.perf_counter()))
        server = subprocess.Popen(
            [*command, "--files", folder / "files"], stdout=subprocess.PIPE, text=True, cwd=folder, env=environment
        )
        try:
            url = re.search(r"http://[^/]+", server.stdout.readline())[0]
            until(lambda url=url: urllib.request.urlopen(f"{url}/health", timeout=5).status == 200)
            times.append((f"{start} start: until the page shows the answer and its frames", time.perf_counter()))
            with chromium(folder / f"profile_{start}") as page:
                ask(page, url)
                page.screenshot(folder / "page.png")
        finally:
            server.terminate()
            server.wait(60)
    times.append(("", time.perf_counter()))
    print("| step | seconds |\n|---|---|")
    for (name, began), (_, ended) in zip(times, times[1:], strict=False):
        print(f"| {name} | {ended - began:.1f} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
