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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import toy
from PIL import Image
from video_files import numbered_video

from lavis_lstp.commands import cli
from lavis_lstp.data.shapes.shapes_qa import generate
from lavis_lstp.errors import run_command
from lavis_lstp.host import evaluate
from lavis_lstp.inference.loading import EXAMPLE
from lavis_lstp.judging.words import lemma
from lavis_lstp.models.weights.reading import load_state_dict_file, weights_file
from lavis_lstp.report import page  # noqa: F401, imported once and not in each child
from lavis_lstp.testing.tiny_checkpoints import write_all
from webdataset_tools import __main__ as tools

OPERATIONS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate", "shutil.rmtree"}
KINDS = ("kill", "disk", "term", "int", "gone", "clock", "full", "readonly")
"""SIGKILL, no file above 200 bytes, SIGTERM, Ctrl-C, the output folder vanishes, the clock jumps; and where this
process may mount file systems: one that is full, and one that is read-only after a kill."""
TIMEOUT_S = 120
BUSY = ("still works here", "has been working here")


@dataclass
class Command:
    """A command under test.

    Attributes:
        run: writes below the given folder; returns an exit status.
        before: makes what it reads, in the folder of the inputs, once.
        result: what must be equal after a restart; by default every file's content.
        ranks: processes that run it together.
        new: it refuses a folder that is there, so that a finished one needs no restart.
        slow: a trial takes seconds; left out where no command is named and trials are few.
    """

    name: str
    run: Callable[[Path, Path], int]
    before: Callable[[Path], None] = lambda inputs: None
    result: Callable[[Path], object] = field(default=lambda out: contents(out))
    ranks: int = 1
    new: bool = False
    slow: bool = False


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
        elif kind in ("term", "int"):
            os.kill(os.getpid(), signal.SIGTERM if kind == "term" else signal.SIGINT)
        elif kind == "gone":
            for path in out.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            with contextlib.suppress(OSError):  # a mount stays
                out.rmdir()
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
        with open(said, encoding="utf-8", errors="replace") as stream:
            said = stream.read()
        count = Path(scratch, "count")
        return statuses, said, int(count.read_text(encoding="utf-8")) if count.is_file() else 0


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


def may_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        done = (
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
            if shutil.which("mount")
            else None
        )
        if done is None or done.returncode:
            return False
        subprocess.run(["umount", folder], check=True)
    return True


@contextlib.contextmanager
def mounted(out: Path, size: int = 1 << 28) -> Iterator[Callable[[str], object]]:
    """A file system of `size` bytes at `out`, and what changes its options."""
    out.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", out], check=True)
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", out], check=True)
    finally:
        subprocess.run(["umount", "-l", out], check=True)


def size_of(out: Path) -> int:
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def problem_of(
    command: Command, inputs: Path, out: Path, kind: str, number: int, wanted: object, room: float = 0
) -> str | None:
    """What is wrong after one disturbed attempt and a restart; None where nothing is.

    Args:
        room: bytes of the file system that is full.
    """
    if kind == "full":
        with mounted(out, max(1, int(room))) as remount:
            statuses, said, _ = attempt(command, inputs, out)
            remount(f"size={1 << 28}")
            return judged(command, inputs, out, "disk", statuses, said, wanted)
    if kind == "readonly":
        with mounted(out) as remount:
            attempt(command, inputs, out, "kill", number)
            remount("ro")
            statuses, said, _ = attempt(command, inputs, out)
            remount("rw")
            done = not any(statuses) and command.result(out) == wanted
            return None if done else judged(command, inputs, out, "disk", statuses, said, wanted)
    statuses, said, _ = attempt(command, inputs, out, kind, number)
    return judged(command, inputs, out, kind, statuses, said, wanted)


def judged(
    command: Command, inputs: Path, out: Path, kind: str, statuses: list[int], said: str, wanted: object
) -> str | None:
    """What is wrong with a disturbed attempt that ended so, or with its restart."""
    if "Traceback" in said and command.ranks == 1:  # of several, the others say that their peer has gone
        return f"traceback: {said.strip().splitlines()[-1]}"
    if kind == "disk" and any(statuses) and not any(line.startswith("error: ") for line in said.splitlines()):
        return f"status {statuses} without a line: {said[-200:]!r}"
    if kind == "gone" or (any(statuses) and not (command.new and command.result(out) == wanted)):
        if kind == "gone" and not any(
            statuses
        ):  # whoever removes results of a command that goes on must remove the rest
            shutil.rmtree(out, ignore_errors=True)
        until = time.monotonic() + TIMEOUT_S
        while True:
            statuses, said, _ = attempt(command, inputs, out)
            if not (any(statuses) and any(word in said for word in BUSY) and time.monotonic() < until):
                break
            time.sleep(0.2)  # a child of what was killed is still at work
    elif command.new:  # the lock of a killed owner stays until the next one, and no next one came
        return None if command.result(out) == wanted else "it said that it was done, and the result differs"
    if any(statuses):
        return f"the restart ended with {statuses}: {said.strip()[-300:]}"
    if command.result(out) != wanted:
        return "the result differs from that of an undisturbed run"
    left = [str(path.relative_to(out)) for path in out.rglob(".*") if path.name.endswith((".tmp", ".owner.lock"))]
    return f"left behind: {left}" if left else None


def campaign(commands: list[Command], trials: int, seed: int = 0) -> dict[str, tuple[int, list[str]]]:
    """Trials and failures by command; `trials` for each, the file operations and kinds of disturbance drawn evenly."""
    found, mounts = {}, may_mount()
    for command in commands:
        with tempfile.TemporaryDirectory() as folder:
            inputs, out = Path(folder, "in"), Path(folder, "out")
            inputs.mkdir()
            command.before(inputs)
            statuses, said, count = attempt(command, inputs, out)
            assert not any(statuses), f"{command.name}, undisturbed: {statuses}, {said}"
            wanted, failures, size = command.result(out), [], size_of(out)
            kinds = [kind for kind in KINDS if mounts or kind not in ("full", "readonly")]
            moments = [(kind, number) for kind in kinds for number in range(count * command.ranks)]
            chosen = random.Random(f"{seed} {command.name}").sample(moments, min(trials, len(moments)))
            for kind, number in chosen:
                shutil.rmtree(out, ignore_errors=True)
                room = size * (number + 1) / (count * command.ranks + 1)
                problem = problem_of(command, inputs, out, kind, number, wanted, room)
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


def videos(inputs: Path) -> None:
    (inputs / "videos").mkdir()
    for number in range(3):
        numbered_video(inputs / f"videos/{number}.mp4", 6, width=32, height=32)


def shapes(inputs: Path) -> None:
    generate(inputs / "shapes", workers=1, **SHAPES)


def published(inputs: Path) -> None:
    (file,) = write_all(inputs / "hub", only=["lstp-7b"]).values()
    shutil.copyfile(file, inputs / "lstp.ckpt")


def steps(inputs: Path) -> None:
    predictions(inputs)
    report = [str(inputs / "p.jsonl"), "--pictures", "0", "--out"]
    first = ["judge", str(inputs / "p.jsonl"), "--judge", "rules", "--cache", "{out}/c", "--out", "{out}/v.jsonl"]
    chain = {"steps": {"judge": {"command": [*first, "--resamples", 9]}}}
    chain["steps"]["page"] = {"command": ["report", *report, "{out}/r.html"]}
    (inputs / "chain.yaml").write_text(json.dumps(chain))


def zero(stage: int) -> dict:
    section = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    return {"runner": "runner_deepspeed", "deepspeed": {"zero_optimization": section}}


def pseudo_spans(inputs: Path, out: Path) -> int:
    shapes = {"root": inputs / "shapes", "num_frames": 4, "image_size": 64}
    options = [f"datasets.lstp_shapes.{name}={value}" for name, value in shapes.items()]
    options += [f"datasets.lstp_shapes.generate.{name}={value}" for name, value in SHAPES.items()]
    options += [f"run.output_dir={out}", f"run.spans_out={out}/spans_{{split}}.json", "model.checkpoint=null"]
    options += ["run.batch_size_eval=3", "model.backbone.seed=3"]
    return evaluate.main(["--cfg-path", "projects/lstp/tiny_spans.yaml", "--options", *options])


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


SHAPES = {"train_videos": 2, "val_videos": 1, "test_videos": 1, "train_images": 0, "size": 32}
FEW = 60
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


def spans(out: Path) -> object:
    return [json.loads(path.read_text())["spans"] for path in sorted(out.glob("spans_*.json"))], contents(
        out / "result"
    )


def pages(out: Path) -> object:
    """What a chain's steps write; times and a data base's pages are others each time."""
    done = {path.parent.name for path in out.glob("*/done.json")}
    return done, {name: digest for name, digest in contents(out).items() if name in ("v.jsonl", "v.json", "r.html")}


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
    Command("flow, folder", lstp("flow", "{i}/videos", "{o}/f", "--size", "16", "--num-frames", "4"), videos),
    Command("convert", lstp("convert", "{i}/lstp.ckpt", "{o}/c"), published, new=True, slow=True),
    Command("export", lstp("export", str(EXAMPLE), "{o}/h"), new=True, slow=True),
    Command("spans", pseudo_spans, shapes, spans, slow=True),
    Command("chain", lstp("chain", "{i}/chain.yaml", "--out", "{o}"), steps, pages, slow=True),
    Command("train", toy_run(), result=trained),
    Command("train, DDP", toy_run(), result=trained, ranks=2),
    Command("train, ZeRO-2", toy_run(**zero(2)), result=trained, ranks=2, slow=True),
    Command("train, ZeRO-3", toy_run(**zero(3)), result=trained, ranks=2, slow=True),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=120, help="of each command; default: %(default)s")
    parser.add_argument("--commands", nargs="+", choices=[c.name for c in COMMANDS], help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    total, wrong = 0, 0
    lemma("dogs")  # loads the dictionary, half a second that no child is to spend again
    for command in COMMANDS:
        if command.name not in (args.commands or [one.name for one in COMMANDS if not one.slow or args.trials >= FEW]):
            continue
        started = time.perf_counter()
        trials = args.trials // 6 if command.slow and not args.commands else args.trials
        trials, failures = campaign([command], trials, args.seed)[command.name]
        total, wrong = total + trials, wrong + len(failures)
        print(
            f"{command.name:<14}{trials:>6} trials{len(failures):>5} failures {time.perf_counter() - started:>6.0f} s",
            flush=True,
        )
        for line in failures[:5]:
            print(f"    {line}", flush=True)
    print(f"{'in all':<14}{total:>6} trials{wrong:>5} failures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
