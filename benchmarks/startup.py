"""Start-up times of commands, and the cost of lavis_lstp to any other interpreter. Run: python benchmarks/startup.py

The table has the best of some runs of each command, beside `python -c pass`, the imports of torch, transformers and
LAVIS, and `lavis.evaluate` with a misspelt key, which is how long reading and checking a configuration takes.

Starts `python -c pass` many times and reads the time of the one import that lavis_lstp.pth makes from -X importtime.
The best of the runs is the cost, the rest is the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

CLI = ("-m", "lavis_lstp")
TOOLS = ("-m", "webdataset_tools")
COMMANDS = (
    ("-c", "pass"),
    ("-c", "import torch"),
    ("-c", "import torch, transformers.modeling_utils"),
    ("-c", "import lavis"),
    ("-m", "lavis.evaluate", "--cfg-path", "projects/lstp/tiny_eval.yaml", "--options", "run.batch_size_evl=3"),
    (*CLI, "--help"),
    *((*CLI, "list", kind) for kind in ("models", "datasets", "tasks", "runners", "recipes")),
    *((*CLI, name, "--help") for name in ("judge", "compare", "calibrate", "report")),
    (*TOOLS, "--help"),
    *((*TOOLS, verb, "--help") for verb in ("verify", "stats", "spans", "reshard", "repair", "extract")),
)


def seconds(words: tuple[str, ...]) -> float:
    """One run of `python WORDS`."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode != (2 if "run.batch_size_evl=3" in words else 0):
        raise SystemExit(done.stderr)
    return time.perf_counter() - started


def import_us(env: dict[str, str], folder: str) -> int:
    """Microseconds that `import lavis_lstp` took in one new interpreter."""
    command = [sys.executable, "-X", "importtime", "-c", "pass"]
    report = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=True).stderr
    lines = [line.split("|") for line in report.splitlines() if line.split("|")[-1].strip() == "lavis_lstp"]
    if not lines:
        raise SystemExit("lavis_lstp is not installed in this environment; run: pip install .")
    return int(lines[0][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each command (default: 3)")
    args = parser.parse_args()
    runs = args.runs
    for words in COMMANDS:
        print(f"python {' '.join(words)[:70]:<70} {min(seconds(words) for _ in range(args.repeat)):6.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONPYCACHEPREFIX": os.path.join(folder, "pyc"), "PYTHONDONTWRITEBYTECODE": ""}
        import_us(env, folder)  # compiles
        costs = [import_us(env, folder) for _ in range(runs)]
    print(f"import lavis_lstp at start-up: best {min(costs)} us, median {statistics.median(costs):.0f} us of {runs}")


if __name__ == "__main__":
    main()
