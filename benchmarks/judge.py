"""What judging costs beside the judge: per verdict, cached and new. Run: python benchmarks/judge.py

"cached" is a second call of `lavis-lstp judge`: read the predictions, try the rules, find the verdict in the cache,
bootstrap 10,000 times and write both files. "kept" is what a new verdict costs to store, on disk before the next one
is asked. "rules" is the time of the rules alone, their dictionary loaded. The judge itself takes no time here: it is a
stand-in that gives a fixed verdict. The target is 5 ms for a cached verdict. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lavis_lstp.judging import judge as command
from lavis_lstp.judging.prompts import preset
from lavis_lstp.judging.rules import decide, rules_identity
from lavis_lstp.judging.verdict import Case, Verdict, identity

TARGET_MS = 5.0


class FixedJudge:
    """Says "yes, 4" to all, and notes how long each verdict took to be kept."""

    prompt = preset("strict")
    identity = identity("fixed", prompt=prompt.digest)

    def tokens(self, cases: Sequence[Case]) -> tuple[int, int]:
        return 0, 0

    def judge(self, cases, on_verdict) -> None:
        start = time.perf_counter()
        for case in cases:
            on_verdict(case, Verdict(self.identity, correct=True, score=4))
        self.seconds = time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=10_000, help="default: 10000")
    count = parser.parse_args().questions
    cases = [Case(f"what does the man do in part {n}?", f"walrus {n}", f"he feeds animal {n}") for n in range(count)]
    rules = rules_identity()
    decide(cases[0], rules)  # loads the dictionary
    start = time.perf_counter()
    assert not any(decide(case, rules) for case in cases)
    taken = {"rules": time.perf_counter() - start}
    judge = FixedJudge()
    command._judge = lambda args: judge
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "p.jsonl")
        rows = ({"question_id": str(n), "video_id": str(n // 24), **case._asdict()} for n, case in enumerate(cases))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        words = [str(path), "--judge", "openai", "--model", "m", "--cache", str(Path(folder, "c.sqlite"))]
        for _ in range(2):
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                assert command.main(words) == 0
            taken["cached"] = time.perf_counter() - start
        taken["kept"] = judge.seconds
    figures = {name: 1000 * seconds / count for name, seconds in taken.items()}
    for name in ("cached", "kept", "rules"):
        print(f"{name:<8}{figures[name]:8.3f} ms a verdict")
    print(f"a cached verdict takes {figures['cached']:.3f} ms, target {TARGET_MS} ms")
    machine = {"python": platform.python_version(), "cores": os.cpu_count()}
    print(json.dumps({"ms": figures, "questions": count, **machine}))


if __name__ == "__main__":
    main()
