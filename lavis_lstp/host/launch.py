"""The one implementation behind `python -m lavis.train` and `python -m lavis.evaluate`.

In: `--cfg-path` and `--options` as in LAVIS, and torchrun's environment where there is one. Out: whatever the runner
writes, and an exit status: 0, or 2 after one line on stderr where the input is at fault. Works on CPU (gloo) and GPU
(nccl); LAVIS's own `init_distributed_mode` knows nccl only.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn

from lavis_lstp.errors import ConfigError, run_command

log = logging.getLogger(__name__)

NAMES = {False: "lavis.train", True: "lavis.evaluate"}
"""Names of LAVIS that files of ours are served under, by `evaluate_only`."""

RENDEZVOUS_TIMEOUT = timedelta(hours=2)
"""How long a process waits for the others, for instance while one of them reads a large checkpoint."""


_waiting_since: list[float] = []
"""When the import began that `check_first` has announced."""


def main(argv: Sequence[str] | None = None, evaluate_only: bool = False) -> int:
    """Run a configuration; 0 when done, 2 after an error of the user's, printed as one line."""
    args = parse_args(argv, NAMES[evaluate_only])
    return run_command(lambda: run(args, evaluate_only))


def check_first(argv: Sequence[str], name: str) -> None:
    """End the process with the error that `python -m NAME` would end with, as far as it is known without LAVIS.

    Called by the import hook while Python looks for the module, before it imports LAVIS for that.
    """
    from lavis_lstp.host import precheck

    args = parse_args(argv, name)
    status = run_command(lambda: precheck.check(args, name == NAMES[True]))
    if status:
        sys.exit(status)
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"{name}: the configuration can be used; importing PyTorch, transformers and LAVIS ...", file=sys.stderr)
        _waiting_since.append(time.perf_counter())


def leave(status: int) -> NoReturn:
    """End this process with `status`; after DeepSpeed without taking the interpreter apart.

    DeepSpeed keeps its process groups, so nobody joins gloo's threads. One of them may still be releasing tensors of
    the last collective, and before Python 3.14 a thread that asks for the interpreter's lock at its end aborts the
    process: a run that went well exited with -6. Output is flushed, and what `atexit` knows is done, all the same.
    """
    if "deepspeed" not in sys.modules:
        sys.exit(status)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def parse_args(argv: Sequence[str] | None, name: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description="Run a LAVIS configuration.")
    parser.add_argument("--cfg-path", required=True, help="YAML file, or a recipe such as projects/lstp/tiny_ft.yaml")
    parser.add_argument(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="A.B=C",
        help="override settings, for instance run.max_epoch=2 model.model_type=default",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher
    return parser.parse_args(argv)


def run(args: argparse.Namespace, evaluate_only: bool = False) -> None:
    """Build task, data, model and runner, and let the runner train or evaluate.

    Raises:
        LstpError: the configuration, the data or the weights cannot be used.
    """
    cfg = configured(args, evaluate_only)
    from lavis.common.dist_utils import get_rank
    from lavis.common.logger import setup_logger

    from lavis_lstp.untrusted import guard_log

    choose_device(cfg.run_cfg)
    init_processes(cfg.run_cfg, args.local_rank)
    try:
        seed_processes(cfg.run_cfg.seed + get_rank())
        setup_logger()  # after the group exists: rank 0 logs, the others warn
        guard_log()
        if _waiting_since:
            log.info("imported in %.1f s; reading data, then weights", time.perf_counter() - _waiting_since.pop())
        runner_cls, task, datasets = prepared(cfg, evaluate_only)
        warn_of_unused_flow(cfg)
        with alone(runner_cls, cfg.run_cfg):  # a second start need not read 14 GB to be refused
            model = task.build_model(cfg)
            if cfg.run_cfg.evaluate:
                warn_of_random_weights(model, cfg)
            runner = runner_cls(cfg=cfg, job_id=shared_job_id(), task=task, model=model, datasets=datasets)
            if evaluate_only:
                runner.evaluate(skip_reload=True)
            else:
                runner.train()
    finally:
        destroy_processes()


def configured(args: argparse.Namespace, evaluate_only: bool = False) -> Any:
    """The complete configuration.

    Raises:
        LstpError: it cannot be used.
    """
    from lavis_lstp.host import precheck

    precheck.check(args, evaluate_only)  # before LAVIS is imported
    from lavis_lstp import register
    from lavis_lstp.config import Config

    register()
    cfg = Config(args)
    if evaluate_only:
        cfg.run_cfg.evaluate = True
    return cfg


def built(cfg: Any, evaluate_only: bool = False) -> tuple[type, Any, Any, Any]:
    """Runner class, task, data sets and model.

    Raises:
        LstpError: settings, data or weights cannot be used.
    """
    runner_cls, task, datasets = prepared(cfg, evaluate_only)
    return runner_cls, task, datasets, task.build_model(cfg)


def alone(runner_cls: type, run: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Own the output folder where the runner knows how to; LAVIS's own ones make a new folder for each job."""
    return runner_cls.alone(run["output_dir"]) if hasattr(runner_cls, "alone") else contextlib.nullcontext()


def prepared(cfg: Any, evaluate_only: bool = False) -> tuple[type, Any, Any]:
    """Runner class, task and data sets; what costs little is looked at first.

    Raises:
        LstpError: settings, data or weights cannot be used.
    """
    import lavis.tasks as tasks
    from lavis.common.registry import registry

    from lavis_lstp.config.model import leave_unused_flow_out
    from lavis_lstp.config.other_keys import is_ours
    from lavis_lstp.tasks.base import plain

    run, runner_cls = plain(cfg.run_cfg), registry.get_runner_class(cfg.run_cfg.runner)
    own_runner = hasattr(runner_cls, "check_run")
    if own_runner:
        runner_cls.check_run(run)
    check_model(plain(cfg.model_cfg))
    if is_ours(registry.get_model_class(cfg.model_cfg.arch)):
        for name in leave_unused_flow_out(plain(cfg.model_cfg), cfg.datasets_cfg):
            log.info("datasets.%s.flow is left out: the model looks at no flow", name)
    task = tasks.setup_task(cfg)
    datasets = task.build_datasets(cfg)
    if own_runner:
        runner_cls.check_splits(datasets, run, evaluate_only)
    return runner_cls, task, datasets


def check_model(model: Mapping[str, Any]) -> None:
    """Raise ConfigError for what the model's parts alone know of its settings, before data and weights are read."""
    from lavis.common.registry import registry

    from lavis_lstp.config.other_keys import is_ours
    from lavis_lstp.models.where.frame_selector import build_selector

    if is_ours(registry.get_model_class(model["arch"])):
        build_selector(**model["selector"], mask_padding=model["mask_padding"])


def warn_of_unused_flow(cfg) -> None:
    """One warning for each data set that brings flow which the model computes itself or does without."""
    from lavis_lstp.models.where.flow import GIVEN

    used = (cfg.model_cfg.get("flow") or {}).get("name")
    for name, section in cfg.datasets_cfg.items():
        if used not in GIVEN and section.get("flow") in GIVEN:
            log.warning(
                "datasets.%s.flow is %s: it is read and not used, as model.flow.name is %s; set datasets.%s.flow=none",
                *(name, section.flow, used, name),
            )


def warn_of_random_weights(model, cfg) -> None:
    """One warning where a model of this package is evaluated and nothing in the configuration brings weights."""
    from lavis_lstp.config.other_keys import is_ours

    settings = cfg.model_cfg
    weights = (settings.get("backbone") or {}).get("weights")
    if is_ours(type(model)) and not (settings.get("checkpoint") or weights or cfg.run_cfg.get("resume_ckpt_path")):
        log.warning(
            "the weights of %s are random, so its answers mean nothing; set model.checkpoint to a run's folder or "
            "model.backbone.weights",
            settings.arch,
        )


def choose_device(run_cfg) -> None:
    """Set `run.device` where it is absent.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """
    import torch

    has_cuda = torch.cuda.is_available()
    device = run_cfg.get("device") or "auto"
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"unknown run.device '{device}'; known: auto, cpu, cuda")
    if device.startswith("cuda") and not has_cuda:
        raise ConfigError(f"run.device is {device}, but torch finds no CUDA device; use --options run.device=cpu")
    run_cfg.device = device


def init_processes(run_cfg, local_rank: int | None = None) -> None:
    """Join the process group that torchrun, deepspeed or srun describes in the environment, if any.

    Sets `rank`, `world_size`, `gpu`, `distributed` and `dist_backend`, as LAVIS's runner expects them.
    """
    import torch
    import torch.distributed as dist
    from lavis.common.dist_utils import setup_for_distributed

    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        run_cfg.gpu = int(env.get("LOCAL_RANK", local_rank or 0))
    elif int(env.get("SLURM_NTASKS", 1)) > 1 and "MASTER_ADDR" in env:
        rank, world_size = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
        run_cfg.gpu = int(env.get("SLURM_LOCALID", 0))
        env.update(
            RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(run_cfg.gpu)
        )  # runners and DeepSpeed look
    else:
        run_cfg.rank, run_cfg.world_size, run_cfg.gpu, run_cfg.distributed = 0, 1, 0, False
        return
    run_cfg.rank, run_cfg.world_size, run_cfg.distributed = rank, world_size, True
    on_gpu = run_cfg.device.startswith("cuda")
    run_cfg.dist_backend = "nccl" if on_gpu else "gloo"
    if on_gpu:
        torch.cuda.set_device(run_cfg.gpu)
    dist.init_process_group(
        backend=run_cfg.dist_backend,
        init_method=run_cfg.dist_url,
        rank=rank,
        world_size=world_size,
        timeout=RENDEZVOUS_TIMEOUT,
    )
    dist.barrier()
    setup_for_distributed(rank == 0)


def destroy_processes() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def seed_processes(seed: int) -> None:
    """Seed all generators, and ask for repeatable kernels.

    On a GPU the backward pass of fused fp32 attention adds up in any order otherwise, so that two runs of the same seed
    differ. Operations that have no repeatable kernel warn once.
    """
    import torch

    from lavis_lstp.runners.randomness import seed_everything

    seed_everything(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory


def shared_job_id() -> str:
    """Name of this run, to the second and the same in all processes (LAVIS's changes every ten minutes only)."""
    import torch.distributed as dist

    job_id = [time.strftime("%Y%m%d%H%M%S")]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(job_id, src=0)
    return job_id[0]
