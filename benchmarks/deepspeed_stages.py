"""What each ZeRO stage costs on this machine: python benchmarks/deepspeed_stages.py [--processes 2] [--out FILE]

Trains a recipe (by default the tiny one, on generated data) for some steps with runner_lstp, and with runner_deepspeed
at each stage. Prints JSON with the versions, and a table: samples a second; the parts of a step in ms (data, forward,
backward, update, which at stages 1 and 2 includes collecting the new weights); peak memory of a process; bytes and
seconds of a checkpoint. `--overhead` instead compares one process of the runner with a bare DeepSpeed loop over the
same model and samples, in processor time, the least of several runs taken in turn.

Not named deepspeed.py: Python would find it in the package's place.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lavis_lstp.host import plugin

KINDS = ("plain", "zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
GENERATE = {"train_videos": 8, "val_videos": 1, "test_videos": 1, "train_images": 4, "size": 64}
WARM_UP = 3
"""Steps that are not counted: the first ones allocate, and stage 3 learns the order of modules."""


def options(args: argparse.Namespace, folder: Path, kind: str) -> list[str]:
    run = {"max_steps": args.steps, "max_epoch": 99, "batch_size_train": args.batch, "test_splits": "[]", "log_freq": 1}
    if kind != "plain":
        name = f"projects/lstp/deepspeed/{kind}.json"
        run.update(runner="runner_deepspeed", deepspeed="{}" if kind == "zero0" else name)
    given = [] if args.recipe != "projects/lstp/tiny_ft.yaml" else [f"datasets.lstp_shapes.root={folder / 'data'}"]
    given += [f"datasets.lstp_shapes.generate.{key}={value}" for key, value in GENERATE.items() if given]
    return [*given, f"run.output_dir={folder / kind}", *(f"run.{k}={v}" for k, v in run.items()), *args.options]


def make_runner(args: argparse.Namespace, folder: Path, kind: str):
    """A runner ready to train, without LAVIS's printing of it."""
    import lavis.tasks as tasks
    from lavis.common.registry import registry

    from lavis_lstp import register
    from lavis_lstp.config import Config
    from lavis_lstp.host import launch

    register()
    config = Config(launch.parse_args(["--cfg-path", args.recipe, "--options", *options(args, folder, kind)], "bench"))
    launch.choose_device(config.run_cfg)
    if not torch.distributed.is_initialized():
        launch.init_processes(config.run_cfg)
    launch.seed_processes(config.run_cfg.seed)
    task = tasks.setup_task(config)
    data = task.build_datasets(config)
    runner_cls = registry.get_runner_class(config.run_cfg.runner)
    model = task.build_model(config)
    runner = runner_cls(cfg=config, task=task, model=model, datasets=data, job_id="bench")
    runner.manifest = runner._manifest("train")
    return runner


class Clock:
    """Seconds by part of a step, measured around the engine's methods."""

    def __init__(self, runner):
        self.cuda = runner.device.type == "cuda"
        self.steps: list[dict[str, float]] = []
        self.parts: dict[str, float] = {}
        engine = runner.engine
        accumulate, clip, step, train_step = engine.accumulate, engine.clip, engine.step, runner._train_step

        def timed_accumulate(compute: Callable, **more):
            def forward(model):
                return self.add("forward", lambda: compute(model))

            before = self.parts.get("forward", 0.0)
            found = self.add("backward", lambda: accumulate(forward, **more))
            self.parts["backward"] -= self.parts["forward"] - before
            return found

        def timed_train_step(*given):
            self.parts = {}
            losses = train_step(*given)
            self.steps.append({**self.parts, "data": losses.data_s, "step": losses.step_s, "samples": losses.samples})
            return losses

        engine.accumulate, runner._train_step = timed_accumulate, timed_train_step
        engine.clip, engine.step = (lambda: self.add("update", clip)), (lambda: self.add("update", step))

    def add(self, part: str, do: Callable):
        started = self.now()
        found = do()
        self.parts[part] = self.parts.get(part, 0.0) + self.now() - started
        return found

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def summary(self) -> dict[str, float]:
        counted = self.steps[WARM_UP:]
        total = sum(row["step"] for row in counted)
        means = {f"{name}_ms": 1000 * sum(row[name] for row in counted) / len(counted) for name in counted[0]}
        del means["samples_ms"]
        rounded = {name: round(value, 2) for name, value in means.items()}
        return {"samples_per_s": round(sum(row["samples"] for row in counted) / total, 1), **rounded}


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB; Python and LAVIS included


def worker(args: argparse.Namespace) -> None:
    """One process of one kind; rank 0 writes what was measured."""
    from lavis_lstp import distributed
    from lavis_lstp.host import launch

    runner = make_runner(args, args.folder, args.worker)
    runner._prepare_training()
    clock = Clock(runner)
    runner._end_of_epoch = lambda: None
    while not runner._finished():
        runner.train_epoch(runner.position.epoch)
        runner.position.epoch, runner.position.consumed = runner.position.epoch + 1, 0
    peaks = distributed.gather(peak_bytes(runner.device))
    started = time.perf_counter()
    runner.save_checkpoint()
    seconds = time.perf_counter() - started
    if distributed.is_main():
        size = sum(path.stat().st_size for path in runner.store.path(runner.position.step).rglob("*"))
        saved = {"checkpoint_bytes": size, "checkpoint_s": round(seconds, 3)}
        row = {"kind": args.worker, **clock.summary(), "peak_mib": [round(p / 2**20) for p in peaks], **saved}
        (args.folder / f"{args.worker}.json").write_text(json.dumps(row))
    distributed.barrier()
    launch.destroy_processes()


def stages(args: argparse.Namespace) -> dict:
    from lavis_lstp.runners.record import versions

    rows = []
    for kind in args.kinds:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
        command = [sys.executable, *(torchrun if args.processes > 1 else []), __file__, *sys.argv[1:]]
        subprocess.run([*command, "--worker", kind, "--folder", str(args.folder)], check=True, stdout=sys.stderr)
        rows.append(json.loads((args.folder / f"{kind}.json").read_text()))
    about = {"recipe": args.recipe, "processes": args.processes, "batch": args.batch, "steps": args.steps}
    return {**about, "rows": rows, "versions": versions(), "date": time.strftime("%Y-%m-%d")}


def table(result: dict) -> str:
    columns = ("samples_per_s", "data_ms", "forward_ms", "backward_ms", "update_ms", "step_ms")
    lines = [f"| | {' | '.join(columns)} | peak MiB | checkpoint KiB | s |", "|---" * (len(columns) + 4) + "|"]
    for row in result["rows"]:
        cells = [row["kind"], *(str(row[name]) for name in columns), str(max(row["peak_mib"]))]
        lines.append(f"| {' | '.join(cells)} | {row['checkpoint_bytes'] // 1024} | {row['checkpoint_s']} |")
    return "\n".join(lines)


# ---- overhead -----------------------------------------------------------------------------------------------------


def overhead(args: argparse.Namespace) -> dict:
    """Processor seconds of the same steps by the runner and by a bare loop, alone in this process."""
    from lavis_lstp.runners.record import versions

    best: dict[str, float] = {}
    for repeat in range(args.repeats):
        for name, measure in (("bare", bare), ("runner", with_runner)):
            seconds = measure(args, args.folder / f"{repeat}")
            best[name] = min(seconds, best.get(name, seconds))
    share = round(best["runner"] / best["bare"] - 1, 4)
    ms = {name: round(1000 * seconds / args.steps, 2) for name, seconds in best.items()}
    return {
        "recipe": args.recipe,
        "kind": args.kinds[0],
        "cpu_ms_per_step": ms,
        "overhead": share,
        "versions": versions(),
    }


def with_runner(args: argparse.Namespace, folder: Path) -> float:
    runner = make_runner(args, folder, args.kinds[0])
    runner._prepare_training()
    runner._end_of_epoch = lambda: None
    started = time.process_time()
    while not runner._finished():
        runner.train_epoch(runner.position.epoch)
        runner.position.epoch, runner.position.consumed = runner.position.epoch + 1, 0
    return time.process_time() - started


def bare(args: argparse.Namespace, folder: Path) -> float:
    """What a DeepSpeed script does: initialize, forward, backward, step, read the loss."""
    import deepspeed

    from lavis_lstp import distributed
    from lavis_lstp.runners.engine import parameter_groups

    runner = make_runner(args, folder / "unused", args.kinds[0])
    settings, data = runner.settings, next(iter(runner.datasets.values()))["train"]
    optimizer = torch.optim.AdamW(parameter_groups(runner.bare_model, settings.weight_decay)[1], lr=settings.init_lr)
    distributed.ensure_group(runner.device)
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False)
    engine, *_ = deepspeed.initialize(model=runner.bare_model, optimizer=optimizer, config=dict(runner.deepspeed))
    engine.train()
    done, started = 0, time.process_time()
    while done < args.steps:
        loader = torch.utils.data.DataLoader(data, args.batch, shuffle=True, collate_fn=data.collater)
        for samples in loader:
            loss = engine(samples)["loss"]
            engine.backward(loss)
            engine.step()
            loss.item()
            done += 1
            if done == args.steps:
                break
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="projects/lstp/tiny_ft.yaml")
    parser.add_argument("--options", nargs="+", default=[], help="settings, as for lavis.train")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--overhead", action="store_true", help="against a bare loop, at the first of --kinds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    plugin.before_lavis()
    if args.worker:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        result = overhead(args) if args.overhead else stages(args)
    text = json.dumps(result, indent=2)
    print(text if args.overhead else f"{text}\n\n{table(result)}")
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
