"""`lavis.train` and `lavis.evaluate` from outside, on generated data: alone and under torchrun, on the CPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_lstp.host import launch

CONFIG = """
model: {arch: lstp_tiny, selector: {name: uniform}, flow: {name: none}, losses: [lm]}
datasets:
  lstp_shapes:
    root: data
    generate: {train_videos: 4, val_videos: 2, test_videos: 2, train_images: 4}
    num_frames: 8
    flow: none
run:
  task: video_instruct
  runner: runner_lstp
  output_dir: results
  device: cpu
  batch_size_train: 2
  batch_size_eval: 2
  init_lr: 1e-3
  max_steps: 2
  train_splits: [train]
"""
EVALUATE = ("run.task=video_qa", "run.test_splits=[test]", "model.checkpoint=results", "run.output_dir=answers")


def python(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A folder in which two gloo ranks have trained for two steps."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.yaml").write_text(CONFIG)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lavis.train")
    return folder, python(*torchrun, "--cfg-path", "run.yaml", cwd=folder)


def test_torchrun_trains_into_the_current_folder(trained):
    folder, done = trained
    rows = [json.loads(line) for line in (folder / "results" / "log.jsonl").read_text().splitlines()]
    steps = {row["step"] for row in rows if "step" in row}
    assert max(steps) == 2
    assert "Traceback" not in done.stderr


def zero3(out: Path) -> list[str]:
    deepspeed = ("run.runner=runner_deepspeed", "run.deepspeed=projects/lstp/deepspeed/zero3.json")
    return ["--cfg-path", "run.yaml", "--options", *deepspeed, f"run.output_dir={out}"]


def uncompiled(out: Path) -> dict[str, str]:
    return {"CC": "/nowhere/cc", "CXX": "/nowhere/c++", "TORCH_EXTENSIONS_DIR": str(out / "built")}


def check_zero3(out: Path, world_size: int) -> None:
    manifest = json.loads((out / "run_manifest.json").read_text())
    assert manifest["status"] == "finished" and manifest["world_size"] == world_size
    assert (out / "checkpoints" / "last" / "model.safetensors").is_file()
    assert not (out / "built").exists(), "nothing was compiled"


def meeting() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}


@pytest.mark.parametrize("launcher", ["alone", "torchrun", "deepspeed", "slurm"])
def test_deepspeed_from_what_every_launcher_says(trained, ranks, tmp_path, launcher):
    """Stage 3 of ZeRO from the variables and words of a launcher; no compiler is asked for."""
    folder, _ = trained
    world_size = 1 if launcher == "alone" else 2
    given = [[uncompiled(tmp_path), zero3(tmp_path)] for _ in range(world_size)]
    place = meeting()
    for rank, (variables, words) in enumerate(given):
        if launcher in ("torchrun", "deepspeed"):
            variables |= {**place, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        if launcher == "deepspeed":
            words.insert(0, f"--local_rank={rank}")
        if launcher == "slurm":
            variables |= {**place, "SLURM_NTASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    assert ranks.run(world_size, "launched", {"folder": str(folder), "given": given}) == [0] * world_size
    check_zero3(tmp_path, world_size)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["alone", "torchrun", "deepspeed", "slurm"])
def test_deepspeed_by_every_launcher(trained, tmp_path, launcher):
    """The same in one process of its own, and in two by each launcher."""
    folder, _ = trained
    module = ("-m", "lavis.train", *zero3(tmp_path))
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHONPATH", "SLURM_", "RANK"))}
    env.update(OMP_NUM_THREADS="1", **uncompiled(tmp_path))
    commands = [[sys.executable, *module]]
    if launcher == "torchrun":
        commands = [[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *module]]
    if launcher == "deepspeed":
        program = "from deepspeed.launcher.runner import main; main()"
        commands = [[sys.executable, "-c", program, "--num_gpus=2", "--module", *module[1:]]]
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    envs = [env]
    if launcher == "slurm":
        commands *= 2
        meet = meeting() | {"SLURM_NTASKS": "2"}
        envs = [{**env, **meet, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(c, cwd=folder, env=e, **pipes) for c, e in zip(commands, envs, strict=True)]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(said)[-4000:]
    check_zero3(tmp_path, 1 if launcher == "alone" else 2)


SLOW_RELEASE = """
import atexit, sys, threading, time
from pathlib import Path
import torch, torch.distributed as dist
from lavis_lstp.host import launch

begun = threading.Event()

class Slow(torch.Tensor):  # is still being released, by gloo's thread, when the interpreter comes to its end
    def __del__(self):
        begun.set()
        while not sys.is_finalizing():
            time.sleep(0.001)

sys.modules["deepspeed"] = None  # whose groups outlive destroy_process_group, as this one does
atexit.register(print, "registered")
dist.init_process_group("gloo")
group = dist.group.WORLD
if dist.get_rank():
    while not Path("gloo's").exists():
        time.sleep(0.01)
    dist.all_reduce(torch.ones(4))
else:
    dist.all_reduce(torch.ones(4).as_subclass(Slow), async_op=True)
    Path("gloo's").touch()  # nobody else holds the tensor now
    begun.wait()
launch.destroy_processes()
launch.leave(0)
"""


def test_a_tensor_that_gloo_releases_late_does_not_abort_a_finished_run(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_RELEASE)
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "slow.py", cwd=tmp_path)
    assert done.stdout.count("registered") == 2  # two processes may write into one line


def test_only_rank_0_logs(trained):
    _, done = trained
    assert done.stderr.count("checkpoints/step_00000002 in ") == 1


def test_evaluate_answers_every_question_of_the_split(trained):
    folder, _ = trained
    flow = "datasets.lstp_shapes.flow=motion_vectors"
    done = python("-m", "lavis.evaluate", "--cfg-path", "run.yaml", "--options", *EVALUATE, flow, cwd=folder)
    assert "random" not in done.stderr
    assert "datasets.lstp_shapes.flow is left out: the model looks at no flow" in done.stderr
    questions = json.loads((folder / "data" / "test.json").read_text())
    (written,) = (folder / "answers").rglob("test_video_qa.jsonl")
    answered = [json.loads(line)["question_id"] for line in written.read_text().splitlines()]
    assert sorted(answered) == sorted(question["question_id"] for question in questions)


def test_flow_that_is_read_for_nothing_is_said(caplog):
    def warned(used: str | None, *read: str) -> list[str]:
        caplog.clear()
        datasets = {f"data{i}": {"flow": flow} for i, flow in enumerate(read)} | {"of_lavis": {}}
        model = {"flow": {"name": used}} if used else {}
        launch.warn_of_unused_flow(
            SimpleNamespace(model_cfg=OmegaConf.create(model), datasets_cfg=OmegaConf.create(datasets))
        )
        return [record.getMessage().split(":")[0] for record in caplog.records]

    assert warned("dis", "none", "motion_vectors") == ["datasets.data1.flow is motion_vectors"]
    assert len(warned("none", "precomputed", "motion_vectors")) == len(warned(None, "precomputed", "precomputed")) == 2
    assert not warned("precomputed", "precomputed") and not warned("motion_vectors", "motion_vectors", "none")


def test_evaluating_random_weights_is_said(caplog):
    def warned(model, **settings) -> bool:
        caplog.clear()
        model_cfg = {"arch": "lstp_tiny", "checkpoint": None, "backbone": {"weights": None}}
        run_cfg = {"resume_ckpt_path": settings.pop("resume_ckpt_path", None)}
        cfg = SimpleNamespace(model_cfg=OmegaConf.create(model_cfg | settings), run_cfg=OmegaConf.create(run_cfg))
        launch.warn_of_random_weights(model, cfg)
        return "the weights of lstp_tiny are random" in caplog.text

    ours = registry.get_model_class("lstp_tiny").__new__(registry.get_model_class("lstp_tiny"))
    assert warned(ours)
    assert not warned(ours, checkpoint="run") and not warned(ours, backbone={"weights": "folder"})
    assert not warned(ours, resume_ckpt_path="auto") and not warned(object())
