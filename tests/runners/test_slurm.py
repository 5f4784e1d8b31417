"""projects/lstp/slurm/run.sbatch, with stand-ins for Slurm's commands on PATH: what it runs, and that it goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lavis_lstp.files import read_jsonl

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "projects" / "lstp" / "slurm" / "run.sbatch"
SRUN = """#!/bin/bash
echo "srun $*" >> calls
exec "$@"
"""
TWO_TASKS = """#!/bin/bash
export SLURM_NTASKS=2
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks="${tasks-} $!"; done
trap 'kill -TERM $tasks' TERM
worst=0
for task in $tasks; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; status=$?; done
    [ "$status" -gt "$worst" ] && worst=$status
done
exit "$worst"
"""
"""srun as Slurm's: it passes signals on to its tasks, and ends with their highest status."""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> calls
case "$1" in show) printf 'node3\\nnode4\\n' ;; requeue) exit "${REQUEUE_STATUS:-0}" ;; esac
"""
PYTHON = f"""#!{sys.executable}
import os, pathlib, signal, sys, time
with open("calls", "a") as calls:
    print("python", *sys.argv[1:], file=calls)
    names = "MASTER_ADDR MASTER_PORT OMP_NUM_THREADS SRUN_CPUS_PER_TASK".split()
    print(*map(os.environ.get, names), file=calls)
state = pathlib.Path("state")
if state.exists():
    sys.exit(int(state.read_text()))

def save(*unused):
    time.sleep(0.3)  # longer than the script takes to look
    state.write_text(os.environ.get("THEN", "0"))
    sys.exit(int(os.environ.get("LEAVES_WITH", "143")))

signal.signal(signal.SIGTERM, save)
pathlib.Path("up").touch()
time.sleep(60)
"""
"""Stands for training: waits for SIGTERM, saves, and is done when called again."""


@pytest.fixture
def work(tmp_path) -> Path:
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON, "lavis-lstp": PYTHON}.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return tmp_path


def submit(work: Path, *words: str, **env: str) -> subprocess.Popen:
    """What Slurm does with `sbatch run.sbatch WORDS` when the job's turn has come."""
    slurm = {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_CPUS_PER_TASK": "6"}
    clean = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    path = f"{work / 'bin'}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", str(SCRIPT), *words],
        cwd=work,
        env={**clean, **slurm, "PATH": path, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, "nothing happened for two minutes"
        time.sleep(0.01)


def stop(job: subprocess.Popen, work: Path) -> int:
    wait_for((work / "up").exists)
    job.send_signal(signal.SIGTERM)
    return job.wait(timeout=300)


def calls(work: Path) -> list[str]:
    return (work / "calls").read_text().splitlines()


RECIPE = ("--cfg-path", "projects/lstp/vicuna_ft.yaml", "--options", "run.num_workers=4")


def test_a_job_that_is_stopped_saves_is_queued_again_and_goes_on(work):
    job = submit(work, "lavis.train", *RECIPE)
    assert stop(job, work) == 143
    command = f"python -m lavis.train {' '.join(RECIPE)} --options run.resume_ckpt_path=auto"
    first = ["scontrol show hostnames node[3-4]", f"srun {command}", command, "node3 20007 6 6"]
    assert calls(work) == [*first, "scontrol requeue 20007"]
    assert submit(work, "lavis.train", *RECIPE).wait(timeout=300) == 0
    assert calls(work)[5:] == first


def test_a_task_that_slurm_stops_itself_is_queued_again_too(work):
    """On preemption Slurm signals the tasks; the script sees no more than their exit status."""
    (work / "state").write_text("143")
    assert submit(work, "lavis.train", *RECIPE, REQUEUE_STATUS="1").wait(timeout=300) == 143
    assert calls(work)[-1] == "scontrol requeue 20007"


def test_a_chain_whose_task_slurm_stops_itself_is_queued_again_too(work):
    (work / "state").write_text("143")
    (work / "c.yaml").write_text("steps: {one: {train: projects/lstp/tiny_ft.yaml}}")
    (work / "bin" / "lavis-lstp").write_text(f'#!/bin/bash\nexec {sys.executable} -m lavis_lstp "$@"\n')
    job = submit(work, "chain", "c.yaml", "--out", "o")
    assert job.wait(timeout=300) == 143, job.stdout.read()
    task = "python -m lavis.train --cfg-path projects/lstp/tiny_ft.yaml --options"
    assert any(line.startswith(f"srun {task}") for line in calls(work))
    assert calls(work)[-1] == "scontrol requeue 20007"


@pytest.mark.parametrize("status", [0, 1, 2])
def test_what_ends_by_itself_is_not_queued_again(work, status):
    (work / "state").write_text(str(status))
    assert submit(work, "lavis.train", *RECIPE).wait(timeout=300) == status
    assert "requeue" not in "".join(calls(work))


def test_another_status_after_sigterm_is_a_stop_and_success_is_not(work):
    assert stop(submit(work, "lavis.train", *RECIPE, LEAVES_WITH="15"), work) == 15
    assert calls(work)[-1] == "scontrol requeue 20007"
    for name in ("state", "up", "calls"):
        (work / name).unlink()
    assert stop(submit(work, "lavis.train", *RECIPE, LEAVES_WITH="0"), work) == 0
    assert "requeue" not in "".join(calls(work))


def test_evaluations_and_chains_run_too_and_anything_else_is_an_error(work):
    (work / "state").write_text("0")
    assert submit(work, "lavis.evaluate", *RECIPE).wait(timeout=300) == 0
    assert calls(work)[2] == f"python -m lavis.evaluate {' '.join(RECIPE)}"  # "auto" would mean other weights there
    (work / "calls").unlink()
    assert submit(work, "chain", "c.yaml", "--out", "o").wait(timeout=300) == 0
    assert calls(work)[1] == "python chain c.yaml --out o --launcher srun python"
    job = submit(work, "train.py")
    assert job.wait(timeout=300) == 2
    assert (
        job.stdout.read() == "error: expected lavis.train, lavis.evaluate or chain and its arguments, got 'train.py'\n"
    )


@pytest.mark.slow
def test_training_goes_on_after_a_stop(work):
    """The same with the real program, two tasks on the CPU: the second call ends what the first began."""
    (work / "bin" / "srun").write_text(TWO_TASKS)
    (work / "bin" / "scontrol").write_text(SCONTROL.replace("node3", "localhost"))
    (work / "bin" / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    sizes = {"train_videos": 4, "val_videos": 0, "test_videos": 1, "train_images": 0}
    options = [f"datasets.lstp_shapes.generate.{name}={value}" for name, value in sizes.items()]
    steps_in_all = 40
    options += ["run.test_splits=[]", "run.max_epoch=500", f"run.max_steps={steps_in_all}", "run.batch_size_train=2"]
    options += ["run.log_freq=1", "run.output_dir=out"]
    command = ("lavis.train", "--cfg-path", "projects/lstp/tiny_ft.yaml", "--options", *options)
    log = work / "out" / "log.jsonl"

    def steps() -> list[int]:
        rows = read_jsonl(log) if log.exists() else ()
        return [row["step"] for row in rows if row["kind"] == "train"]

    job = submit(work, *command, SLURM_CPUS_PER_TASK="1")
    wait_for(lambda: len(steps()) > 2 or job.poll() is not None)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=300) == 143, job.stdout.read()
    assert calls(work)[-1] == "scontrol requeue 20007"
    before = len(steps())
    assert 2 < before < steps_in_all
    job = submit(work, *command, SLURM_CPUS_PER_TASK="1")
    assert job.wait(timeout=300) == 0, job.stdout.read()
    assert steps() == list(range(1, steps_in_all + 1))  # none twice, none left out


def test_the_script_is_clean_shell():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; bash -n found nothing")
    found = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
