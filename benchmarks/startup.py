"""What lavis_lstp costs an interpreter that never imports LAVIS. Run: python benchmarks/startup.py

Starts `python -c pass` many times with the hook on and off, and reads the import's own time from -X importtime.
Prints microseconds; the best of the runs is the cost, the rest is the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time


def start(env: dict[str, str], folder: str) -> tuple[float, int | None]:
    """One interpreter: wall time in us, and the time of `import lavis_lstp` in us, None where it is off."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "pass"],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    wall_us = (time.perf_counter() - began) * 1e6
    lines = [line.split("|") for line in done.stderr.splitlines() if line.split("|")[-1].strip() == "lavis_lstp"]
    return wall_us, int(lines[0][1]) if lines else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        base = {**os.environ, "PYTHONPYCACHEPREFIX": os.path.join(folder, "pyc"), "PYTHONDONTWRITEBYTECODE": ""}
        on, off = dict(base, LAVIS_LSTP_DISABLE="0"), dict(base, LAVIS_LSTP_DISABLE="1")
        for env in (on, off):  # byte code, file cache
            start(env, folder)
        pairs = [(start(on, folder), start(off, folder)) for _ in range(runs)]
    imports = [with_hook[1] for with_hook, _ in pairs if with_hook[1] is not None]
    if not imports:
        raise SystemExit("the hook is not installed in this environment; run: pip install .")
    print(f"import lavis_lstp at start: best {min(imports)} us, median {statistics.median(imports):.0f} us")
    best = min(with_hook[0] for with_hook, _ in pairs) - min(without[0] for _, without in pairs)
    print(f"whole interpreter, hook on minus LAVIS_LSTP_DISABLE=1: {best:.0f} us (best of {runs} each)")


if __name__ == "__main__":
    main()
