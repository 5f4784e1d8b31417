"""How long `import lavis` takes, with and without what lavis_lstp puts off. Run: python benchmarks/import_time.py

Each figure is the median of five fresh interpreters, taken in turns so that a busy machine treats all alike; the
interpreter's own start is not counted. "all at once" is what LAVIS 1.0.2 does: every shim, nothing put off, because
without the shims it does not import at all. "registered" is what a user gets: put off, and lavis_lstp registered.
"floor" is what LAVIS cannot do without: torch, torchvision, transformers' model code and timm's vision transformer.
Prints a table, then the same as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version

TIMER = """
import sys, time
start = time.perf_counter()
{body}
sys.stdout.write(str(time.perf_counter() - start))
"""
BODIES = {
    "floor": "import torch, torchvision, transformers.modeling_utils, timm.models.vision_transformer",
    "all at once": "from lavis_lstp.host import lazy_imports, shims; lazy_imports.install = lambda: None; "
    "shims.apply(); import lavis; shims.apply_to_lavis()",
    "registered": "import lavis_lstp; lavis_lstp.register(); import lavis",
}


def seconds(body: str) -> float:
    """One import in a fresh interpreter, without the import hook, so that `body` alone decides what happens."""
    environment = {**os.environ, "LAVIS_LSTP_DISABLE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", TIMER.format(body=body)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return float(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="interpreters per figure (default: 5)")
    runs = parser.parse_args().runs
    for body in BODIES.values():
        seconds(body)  # once for the file cache
    taken = {name: [] for name in BODIES}
    for _ in range(runs):
        for name, body in BODIES.items():
            taken[name].append(seconds(body))
    median = {name: statistics.median(values) for name, values in taken.items()}
    for name, value in median.items():
        print(f"{name:<12} {value:6.2f} s   (from {min(taken[name]):.2f} to {max(taken[name]):.2f})")
    ratio = median["registered"] / median["all at once"]
    print(f"registered / all at once: {ratio:.2f}")
    versions = {package: version(package) for package in ("torch", "transformers", "timm", "salesforce-lavis")}
    machine = {"python": platform.python_version(), "cores": os.cpu_count()}
    print(json.dumps({"seconds": median, "ratio": ratio, "runs": runs, **machine, **versions}))


if __name__ == "__main__":
    main()
