"""`run.profile=true`: where each second of a run went.

In: the named stretches of a run (`span`) and the parts of its model. Out, in `<output_dir>/profile`: `seconds.json`,
the wall time of each stretch without those inside it, which is also logged as a table, and `trace_rank0.json`, what
`torch.profiler` saw of the first steps, for chrome://tracing or https://ui.perfetto.dev.

Like `torch.profiler.record_function`, a stretch is known to the whole process and is not handed from one function to
the next; where nothing is profiled it costs a look at a list. On CUDA a stretch ends when its kernels have ended, so a
profiled run is slower than others. What loader processes do is seen as waiting for them.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from lavis_lstp import distributed
from lavis_lstp.files import whole_file, write_json

log = logging.getLogger(__name__)

TRACED_STEPS = 20
"""Optimizer steps or evaluation batches in the trace; each is some MB."""
REST = "everything else"
_DEEPEST = 3
"""Names of a module with so many parts, such as backbone.model.vision_model, have a row of their own."""

_active: list[Profile] = []


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """A stretch of the run, in the table and in the trace; it may lie inside another."""
    if not _active:
        yield
        return
    running = _active[-1]
    running.enter(name)
    try:
        yield
    finally:
        running.leave()


def waiting(iterable: Iterable[Any], name: str) -> Iterator[Any]:
    """The same items; the time until each comes is a stretch."""
    items = iter(iterable)
    while True:
        with span(name):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def step() -> None:
    """An optimizer step or evaluation batch is done."""
    if _active:
        _active[-1].trace.step()


@contextlib.contextmanager
def profiled(folder: Path, model: torch.nn.Module) -> Iterator[None]:
    """Profile the block; files come into `folder` and the table into the log, also when the block raises."""
    running = Profile(folder / f"trace_rank{distributed.rank()}.json")
    hooks = running.watch(model)
    _active.append(running)
    try:
        with running.trace:
            running.enter(REST)
            try:
                yield
            finally:
                running.leave()
    finally:
        _active.remove(running)
        for hook in hooks:
            hook.remove()
        if distributed.is_main():
            write_json(folder / "seconds.json", running.seconds())
            log.info("where the time went (%s):\n%s", folder, running.table())


class Profile:
    """Seconds by name, and torch's trace.

    Args:
        file: where the trace is written.
    """

    def __init__(self, file: Path):
        self.file = file
        self._open: list[tuple[str, record_function]] = []
        self._since = 0.0
        self._spent: dict[str, tuple[float, int]] = {}
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        with warnings.catch_warnings():  # of a first step without warm-up: a run may have no other
            warnings.filterwarnings("ignore", "Profiler won't be using warmup")
            when = schedule(wait=0, warmup=0, active=TRACED_STEPS, repeat=1)
        self.trace = profile(activities=[ProfilerActivity.CPU, *cuda], schedule=when, on_trace_ready=self._write)

    def _write(self, trace: profile) -> None:
        with whole_file(self.file) as partial:
            trace.export_chrome_trace(str(partial))

    def _book(self, calls: int = 0) -> None:
        """What passed since the last look is the innermost stretch's."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            seconds, count = self._spent.get(self._open[-1][0], (0.0, 0))
            self._spent[self._open[-1][0]] = seconds + now - self._since, count + calls
        self._since = now

    def enter(self, name: str) -> None:
        self._book()
        record = record_function(name)
        record.__enter__()
        self._open.append((name, record))

    def leave(self) -> None:
        self._book(calls=1)
        self._open.pop()[1].__exit__(None, None, None)

    def watch(self, model: torch.nn.Module) -> list[Any]:
        """Make a stretch of each call of the model's larger parts; returns handles to take the hooks off."""
        hooks = []
        for name, module in model.named_modules():
            parts = name.split(".")
            if (
                name
                and len(parts) <= _DEEPEST
                and not any(part.isdigit() for part in parts)
                and list(module.children())
            ):
                hooks.append(module.register_forward_pre_hook(self._entering(f"model: {name}")))
                hooks.append(module.register_forward_hook(self._leaving, always_call=True))
        return hooks

    def _entering(self, name: str) -> Callable[..., None]:
        return lambda module, given: self.enter(name)

    def _leaving(self, module: torch.nn.Module, given: Any, found: Any) -> None:
        self.leave()

    def seconds(self) -> dict[str, dict[str, float]]:
        """{stretch: {seconds, calls}}, the longest first."""
        rows = sorted(self._spent.items(), key=lambda row: -row[1][0])
        return {name: {"seconds": round(seconds, 6), "calls": calls} for name, (seconds, calls) in rows}

    def table(self) -> str:
        rows = self.seconds()
        total = sum(row["seconds"] for row in rows.values())
        lines = [
            f"{row['seconds']:10.3f} s {100 * row['seconds'] / max(total, 1e-9):5.1f} % {row['calls']:8d} x  {name}"
            for name, row in rows.items()
        ]
        return "\n".join([*lines, f"{total:10.3f} s in all"])
