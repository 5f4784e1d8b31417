"""Several processes of a run, started in milliseconds, for tests that need many of them.

LAVIS, transformers and DeepSpeed take ten seconds to import. A server imports them once and forks the processes of each
job: `Ranks().run(2, "toy", {...})` gives their exit statuses. As with torchrun, the death of one ends the others; one
that waits for ever is ended too, and that is told apart. As a script, it is that server.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDERS = [HERE.parent, HERE, *(path for path in sorted(HERE.iterdir()) if path.is_dir())]
"""Where a test's process looks for modules: a job lies in the module of its test."""
HUNG = "hung"


class Ranks:
    """The server, from the test's side."""

    def __init__(self):
        env = {**os.environ, "PYTHONPATH": ":".join(map(str, FOLDERS)), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen([sys.executable, __file__], env=env, **pipes)

    def run(self, world_size: int, job: str, options: dict, *, timeout_s: float = 300) -> list:
        """Exit statuses by rank, negative for a signal; `HUNG` for one that had to be ended.

        Args:
            job: name of a function in this module that is given `options`, or "module:function" of a test's.
        """
        row = {"world_size": world_size, "job": job, "options": options, "timeout_s": timeout_s}
        self.server.stdin.write(json.dumps(row) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, "the server of tests/ranks.py ended"
        return json.loads(answer)

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=30)


# ---- jobs -------------------------------------------------------------------------------------------------------


def toy(options: dict) -> None:
    """One run of tests/toy.py, or with a list several, one after the other."""
    import toy as toy_module

    for group in options if isinstance(options, list) else [options]:
        toy_module.run([f"{key}={json.dumps(value)}" for key, value in group.items()])


def lavis_run(options: dict) -> None:
    """Runs of a configuration file, as the launcher does them but for the process group: {"cfg", "runs": [options]}.

    `kill_at` ends rank 1 before that optimizer step.
    """
    import lavis.tasks as tasks
    from lavis.common.registry import registry

    from lavis_lstp.config import Config
    from lavis_lstp.host import launch

    for words in options["runs"]:
        config = Config(launch.parse_args(["--cfg-path", options["cfg"], "--options", *words], "test"))
        launch.seed_processes(config.run_cfg.seed)
        task = tasks.setup_task(config)
        data, model = task.build_datasets(config), task.build_model(config)
        runner_cls = registry.get_runner_class(config.run_cfg.runner)
        runner = runner_cls(cfg=config, task=task, model=model, datasets=data, job_id="job")
        plain_step = runner._train_step

        def step(*args, runner=runner, plain_step=plain_step):
            if runner.position.step == options.get("kill_at") and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            return plain_step(*args)

        runner._train_step = step
        runner.train()


def launched(options: dict) -> None:
    """`lavis.train` of one rank, told where it is by nothing but what its launcher gives: {"folder", "given"}.

    `given` is [variables, words] of each rank. `killed` is [file, count, seconds]: another process ends this one so
    many seconds after the file holds so many rows of training.
    """
    from lavis_lstp.host import launch

    variables, words = options["given"][int(os.environ["RANK"])]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    os.environ.update(variables)
    os.chdir(options["folder"])
    if "killed" in options:
        kill_later(*options["killed"])
    raise SystemExit(launch.main(words))


def kill_later(log: str, count: int, seconds: float) -> None:
    """Fork a process that kills this one, at whatever it does then."""
    mine = os.getpid()
    if os.fork():
        return
    while os.getppid() == mine:
        if os.path.exists(log) and Path(log).read_text(encoding="utf-8").count('"kind": "train"') >= count:
            time.sleep(seconds)
            os.kill(mine, signal.SIGKILL)
            break
        time.sleep(0.002)
    os._exit(0)


def draws(options: dict) -> None:
    """Steps and answers in which each rank has drawn another kind of batch; losses and answers go to a file.

    Args:
        options: family, language, stage, config (overrides of the model's), output; `model`: a whole section instead,
            whose rows are all shown the same number of frames.
    """
    import torch
    from test_lstp import model_config
    from test_mixed_batches import ALL_PARTS, mixed

    from lavis_lstp import distributed
    from lavis_lstp.config.run import RunSettings
    from lavis_lstp.models.lstp import LSTP
    from lavis_lstp.runners.deepspeed import config as deepspeed_config
    from lavis_lstp.runners.deepspeed.engine import DeepSpeedEngine

    rank = distributed.rank()
    given = {"zero_optimization": {"stage": options["stage"], "stage3_param_persistence_threshold": 0}}
    settings = RunSettings.from_config({"output_dir": "x", "init_lr": 1e-3, "max_grad_norm": 1.0})
    config = deepspeed_config.complete(given, settings, distributed.world_size())
    overrides = {"train": ALL_PARTS, "losses": ["lm", "span"], **options.get("config", {})}
    whole = options.get("model") or model_config(options["family"], options["language"], **overrides)
    model = LSTP.from_config(whole)
    engine = DeepSpeedEngine(model, config, device=torch.device("cpu"), lr=1e-3, max_grad_norm=1.0)
    text, image, video, all_kinds = (0, 0), (1, 1), (8, 2), (8, 1, 0, 2)
    kinds = [(text, video), (video, text), (image, text), (text, text), (video, image), (all_kinds, text)]
    if options.get("model"):
        kinds = [kinds[i] for i in options["kinds"]]
    found = []
    engine.train_mode()
    for pair in kinds:
        losses = engine.accumulate(lambda m, pair=pair: m(mixed(pair[rank])), weight=1.0, last=True)
        found.append([float(losses["lm_loss"]), float(losses["span_loss"]), float(engine.clip())])
    engine.model.eval()
    with torch.no_grad():
        lengths = {"max_new_tokens": 2 if rank else 6, "num_beams": 2}  # one rank's answers end sooner
        for pair in kinds:
            found.append(engine.apply(lambda m, pair=pair: m.answer(mixed(pair[rank]), **lengths)["prediction"]))
        for pair in kinds:
            offered = {"options": [["red", "a star"] * (2 if rank else 1)] + [["red"]] * (len(pair[rank]) - 1)}
            scored = engine.apply(lambda m, pair=pair, offered=offered: m.score_options(mixed(pair[rank]) | offered))
            found.append([option["mean"] for row in scored["option_log_prob"] for option in row])
    Path(f"{options['output']}.{rank}").write_text(json.dumps(found), encoding="utf-8")


def memory(options: dict) -> None:
    """Allocate as a run does, and write the bytes that were alive at the fullest moment of its steps.

    Args:
        kind, size: of `test_estimate.KINDS` and `SIZES`; world_size, output.
    """
    import torch
    from test_estimate import KINDS, prepared
    from torch.profiler import ProfilerActivity, profile, record_function

    from lavis_lstp.commands.estimate import Alive
    from lavis_lstp.runners.deepspeed.engine import DeepSpeedEngine
    from lavis_lstp.runners.engine import TorchEngine

    device, (precision, accumulate, _) = torch.device("cpu"), KINDS[options["kind"]]
    wanted = (options["kind"], options["size"], options["world_size"])
    prepared("cpu", *wanted)  # what is allocated once, by whichever comes first
    # gloo frees tensors in threads of its own, which the profiler does not see: there storages are counted instead
    alive = Alive(torch.nn.Module())
    profiled = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with profiled if options["world_size"] == 1 else alive:
        model, deepspeed, samples = prepared("cpu", *wanted)
        common = {"device": device, "precision": precision, "lr": 1e-3, "max_grad_norm": 1.0}
        engine = DeepSpeedEngine(model, deepspeed, **common) if deepspeed else TorchEngine(model, **common)
        engine.train_mode()
        for name in ("first step", "step"):  # the first one makes the optimizer's state
            gc.collect()
            alive.peak = 0
            with record_function(name):
                for micro in range(accumulate):
                    engine.accumulate(lambda m: m(samples), weight=1.0, last=micro == accumulate - 1)
                engine.clip()
                engine.step()
    peak = alive.peak if options["world_size"] > 1 else peak_of(profiled, "step")
    Path(f"{options['output']}.{os.environ['RANK']}").write_text(str(peak), encoding="utf-8")


def peak_of(profiled, part: str) -> int:
    """Most bytes that were allocated at once during a part of what was profiled."""
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begun = next(event.start_ns() for event in events if event.name() == part)
    now, peak = 0, 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now) if event.start_ns() >= begun else peak
    return peak


# ---- the server -------------------------------------------------------------------------------------------------


def child(row: dict, rank: int, store: str) -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(row["world_size"]))
    status = 0
    try:
        if row["world_size"] > 1 and row["job"] != "launched":
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=row["world_size"]
            )
        module, _, name = row["job"].rpartition(":")
        getattr(importlib.import_module(module), name)(row["options"]) if module else globals()[name](row["options"])
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stderr.flush()
        os._exit(status)  # nothing of the server's may be cleaned up


def serve(row: dict) -> list:
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(row["world_size"]):
            pid = os.fork()
            if pid == 0:
                sys.stdin.close()
                os.dup2(2, 1)
                child(row, rank, f"{folder}/store")
            pids.append(pid)
        return wait(pids, row["timeout_s"])


def wait(pids: list[int], timeout_s: float) -> list:
    statuses, deadline = dict.fromkeys(pids), time.monotonic() + timeout_s
    while None in statuses.values():
        for pid in [pid for pid, status in statuses.items() if status is None]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        left = [pid for pid, status in statuses.items() if status is None]
        failed = any(status for status in statuses.values())
        if failed:  # as torchrun: some time to notice, then the end
            deadline = min(deadline, time.monotonic() + 2)
        if left and time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                statuses[pid] = -signal.SIGKILL if failed else HUNG
        time.sleep(0.01)
    return list(statuses.values())


def main() -> None:
    import torch
    import toy  # noqa: F401

    from lavis_lstp import register
    from lavis_lstp.runners.deepspeed.engine import import_deepspeed

    register()
    import_deepspeed(torch.device("cpu"))
    import deepspeed.runtime.superoffload.superoffload_stage3
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401, 3 s of a first engine
    import pandas  # noqa: F401
    from test_lstp import model_config

    from lavis_lstp.config import Config
    from lavis_lstp.host import launch
    from lavis_lstp.models.lstp import LSTP

    torch.set_num_threads(1)  # no thread may run where a process is forked
    Config(launch.parse_args(["--cfg-path", "projects/lstp/tiny_ft.yaml"], "test"))  # reads sources for their keys
    for kind in (("instructblip", "llama"), ("blip2", "t5")):  # imports transformers' models
        LSTP.from_config(model_config(*kind))
    gc.freeze()  # DeepSpeed collects garbage when it makes an engine: 0.4 s over all that is imported
    for line in sys.stdin:
        answer = serve(json.loads(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
