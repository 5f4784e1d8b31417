"""Chaos: every command that writes is killed before one of its file operations, started again, and compared.

As a script: `python tests/chaos.py [--trials N] [--commands NAME ...] [--seed S]`, a table on stdout, status 1 where a
trial failed. Commands run in forked children of a process that has imported everything once, so that a trial takes
milliseconds. A file operation is what Python's audit hook reports below the trial's folder: opening to write, renaming,
removing, making folders and links.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import toy
from PIL import Image

from lavis_lstp.commands import cli
from lavis_lstp.errors import run_command
from lavis_lstp.models.weights.reading import load_state_dict_file, weights_file
from webdataset_tools import __main__ as tools

OPERATIONS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate", "shutil.rmtree"}
KINDS = ("kill", "disk", "term", "clock")
TIMEOUT_S = 120


@dataclass
class Command:
    """A command under test.

    Attributes:
        run: writes below the given folder; returns an exit status.
        before: makes what it reads, in the folder of the inputs, once.
        result: what must be equal after a restart; by default every file's content.
        ranks: processes that run it together.
        new: it refuses a folder that is there, so that a finished one needs no restart.
    """

    name: str
    run: Callable[[Path, Path], int]
    before: Callable[[Path], None] = lambda inputs: None
    result: Callable[[Path], object] = field(default=lambda out: contents(out))
    ranks: int = 1
    new: bool = False


def contents(out: Path) -> dict[str, str]:
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if ".owner." not in path.name
    }


# ---- one process or several, disturbed ------------------------------------------------------------------------------


def disturb(kind: str, number: int, out: Path, seen: list[int]) -> None:
    """Let something happen to this process before file operation `number` (from 0)."""

    def hook(event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (writes or event in OPERATIONS) or str(out) not in str(args[0]):
            return
        seen[0] += 1
        if seen[0] - 1 != number:
            return
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif kind == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        elif kind == "clock":
            real, shift = time.time, random.Random(number).choice([-1e9, 1e9])
            time.time = lambda: real() + shift

    sys.addaudithook(hook)


def attempt(command: Command, inputs: Path, out: Path, kind: str = "", number: int = -1) -> tuple[list[int], str, int]:
    """Exit statuses by rank (negative for a signal), what stderr says, and file operations of the first rank."""
    with tempfile.TemporaryDirectory() as scratch:
        said, sink = os.pipe()  # a pipe has no size that could be limited
        pids = []
        for rank in range(command.ranks):
            pid = os.fork()
            if pid == 0:
                child(command, inputs, out, Path(scratch), rank, kind, number, sink)
            pids.append(pid)
        statuses = wait(pids)
        os.close(sink)
        with open(said, errors="replace") as stream:
            said = stream.read()
        count = Path(scratch, "count")
        return statuses, said, int(count.read_text()) if count.is_file() else 0


def child(
    command: Command, inputs: Path, out: Path, scratch: Path, rank: int, kind: str, number: int, sink: int
) -> None:
    status, seen = 1, [0]
    try:
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        logging.disable(logging.CRITICAL)
        torch.set_num_threads(1)
        if command.ranks > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(command.ranks))
            init = f"file://{scratch}/store"
            torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=command.ranks)
        if rank == (number % command.ranks if kind else 0):
            disturb(kind, number // command.ranks, out, seen)
        try:
            status = command.run(inputs, out)
        except SystemExit as error:
            status = error.code
        if rank == 0 and not kind:
            (scratch / "count").write_text(str(seen[0]))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def wait(pids: list[int]) -> list[int]:
    """Statuses by rank; as under torchrun the death of one ends the others."""
    found: dict[int, int] = {}
    until = time.monotonic() + TIMEOUT_S
    while len(found) < len(pids):
        for pid in set(pids) - set(found):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found[pid] = os.waitstatus_to_exitcode(status)
        if any(found.values()):
            until = min(until, time.monotonic() + 1)
        if time.monotonic() > until:
            for pid in set(pids) - set(found):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [found[pid] for pid in pids]


# ---- the campaign -----------------------------------------------------------------------------------------------


def problem_of(command: Command, inputs: Path, out: Path, kind: str, number: int, wanted: object) -> str | None:
    """What is wrong after one disturbed attempt and a restart; None where nothing is."""
    statuses, said, _ = attempt(command, inputs, out, kind, number)
    if "Traceback" in said and command.ranks == 1:  # of several, the others say that their peer has gone
        return f"traceback: {said.strip().splitlines()[-1]}"
    if kind == "disk" and any(statuses) and not any(line.startswith("error: ") for line in said.splitlines()):
        return f"status {statuses} without a line: {said[-200:]!r}"
    if any(statuses) and not (command.new and command.result(out) == wanted):
        statuses, said, _ = attempt(command, inputs, out)
    elif command.new:  # the lock of a killed owner stays until the next one, and no next one came
        return None if command.result(out) == wanted else "it said that it was done, and the result differs"
    if any(statuses):
        return f"the restart ended with {statuses}: {said.strip()[-300:]}"
    if command.result(out) != wanted:
        return "the result differs from that of an undisturbed run"
    left = [str(path.relative_to(out)) for path in out.rglob(".*") if path.name.endswith((".tmp", ".lock"))]
    return f"left behind: {left}" if left else None


def campaign(commands: list[Command], trials: int, seed: int = 0) -> dict[str, tuple[int, list[str]]]:
    """Trials and failures by command; `trials` for each, the file operations and kinds of disturbance drawn evenly."""
    found = {}
    for command in commands:
        with tempfile.TemporaryDirectory() as folder:
            inputs, out = Path(folder, "in"), Path(folder, "out")
            inputs.mkdir()
            command.before(inputs)
            statuses, said, count = attempt(command, inputs, out)
            assert not any(statuses), f"{command.name}, undisturbed: {statuses}, {said}"
            wanted, failures = command.result(out), []
            moments = [(kind, number) for kind in KINDS for number in range(count * command.ranks)]
            chosen = random.Random(f"{seed} {command.name}").sample(moments, min(trials, len(moments)))
            for kind, number in chosen:
                shutil.rmtree(out)
                problem = problem_of(command, inputs, out, kind, number, wanted)
                if problem:
                    failures.append(f"{kind} before operation {number} of {count}: {problem}")
            found[command.name] = len(chosen), failures
    return found


# ---- commands ---------------------------------------------------------------------------------------------------


def pictures(inputs: Path) -> None:
    rows = []
    for number in range(4):
        Image.new("RGB", (24, 24), (40 * number, 10, 99)).save(inputs / f"{number}.jpg")
        rows.append({"question_id": f"q{number}", "image": f"{number}.jpg", "question": "Which?", "answer": "this"})
    (inputs / "a.json").write_text(json.dumps(rows))


def shards(inputs: Path) -> None:
    pictures(inputs)
    with contextlib.redirect_stdout(io.StringIO()):
        assert tools.main(["pack", f"{inputs}/s/x", f"{inputs}/a.json", "--max-count", "2", "--workers", "1"]) == 0


def predictions(inputs: Path) -> None:
    rows = [
        {"question_id": f"q{n}", "question": "Which?", "answer": "red", "prediction": "red" if n % 2 else "blue"}
        for n in range(6)
    ]
    (inputs / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def verb(name: str, *words: str) -> Callable[[Path, Path], int]:
    def run(inputs: Path, out: Path) -> int:
        placed = [word.format(i=inputs, o=out) for word in words]
        workers = [] if name == "extract" else ["--workers", "1"]
        return tools.main([name, *placed, *workers])

    return run


def lstp(*words: str) -> Callable[[Path, Path], int]:
    return lambda inputs, out: cli.main([word.format(i=inputs, o=out) for word in words])


def toy_run(**options: object) -> Callable[[Path, Path], int]:
    return lambda inputs, out: run_command(lambda: toy.make_runner(out, **{**RUN, **options}).train() and None)


RUN = {"length": 12, "batch_size_train": 2, "save_every_steps": 2, "keep_last": 2, "resume_ckpt_path": "auto"}
RUN |= {"valid_splits": ["val"], "test_splits": ["test"], "max_epoch": 1}


def trained(out: Path) -> object:
    """Weights, what is best, predictions and their metrics, and where `last` points."""
    state = load_state_dict_file(weights_file(out / "checkpoints/last"))
    best = json.loads((out / "checkpoints/best.json").read_text())
    results = contents(out / "result")
    steps = [row["step"] for row in map(json.loads, (out / "log.jsonl").read_text().splitlines())]
    return (
        {k: v.tolist() for k, v in state.items()},
        best,
        results,
        sorted(set(steps)),
        os.readlink(out / "checkpoints/last"),
    )


def evaluated(out: Path) -> object:
    return contents(out / "result")


COMMANDS = [
    Command("pack", verb("pack", "{o}/x", "{i}/a.json", "--max-count", "2"), pictures),
    Command("reshard", verb("reshard", "{i}/s/x-000000.tar", "{i}/s/x-000001.tar", "--out", "{o}/y"), shards),
    Command("flow", verb("flow", "{i}/s/x-000000.tar", "{i}/s/x-000001.tar", "--out", "{o}/f", "--size", "16"), shards),
    Command("repair", verb("repair", "{i}/s/x-000000.tar", "--out", "{o}/r"), shards),
    Command("extract", verb("extract", "{i}/s/x-000000.tar", "--out", "{o}/e"), shards, new=True),
    Command(
        "judge",
        lstp(
            "judge", "{i}/p.jsonl", "--judge", "rules", "--cache", "{i}/c", "--out", "{o}/v.jsonl", "--resamples", "9"
        ),
        predictions,
    ),
    Command("report", lstp("report", "{i}/p.jsonl", "--out", "{o}/r.html", "--pictures", "0"), predictions),
    Command("evaluate", toy_run(evaluate=True, resume_ckpt_path=None), result=evaluated),
    Command("train", toy_run(), result=trained),
    Command("train, DDP", toy_run(), result=trained, ranks=2),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=120, help="of each command; default: %(default)s")
    parser.add_argument("--commands", nargs="+", choices=[c.name for c in COMMANDS], help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    total, wrong = 0, 0
    for command in COMMANDS:
        if args.commands and command.name not in args.commands:
            continue
        started = time.perf_counter()
        trials, failures = campaign([command], args.trials, args.seed)[command.name]
        total, wrong = total + trials, wrong + len(failures)
        print(
            f"{command.name:<12}{trials:>6} trials{len(failures):>5} failures {time.perf_counter() - started:>6.0f} s",
            flush=True,
        )
        for line in failures[:5]:
            print(f"    {line}", flush=True)
    print(f"{'in all':<12}{total:>6} trials{wrong:>5} failures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
