"""What lavis_lstp costs an interpreter that never imports LAVIS. Run: python benchmarks/startup.py

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
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "PYTHONPYCACHEPREFIX": os.path.join(folder, "pyc"), "PYTHONDONTWRITEBYTECODE": ""}
        import_us(env, folder)  # compiles
        costs = [import_us(env, folder) for _ in range(runs)]
    print(f"import lavis_lstp at start-up: best {min(costs)} us, median {statistics.median(costs):.0f} us of {runs}")


if __name__ == "__main__":
    main()
