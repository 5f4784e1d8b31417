"""Runs jobs, one a shard or a question: in this process, in processes of this machine, or on a Ray cluster.

In: a function and its jobs. Out: their results, the same wherever they were made. A job is a module-level function and
one picklable argument. It writes complete files or none and finds out itself what is done already, so it may run twice:
after a kill, or when a node of the cluster is lost.
"""

from __future__ import annotations

import argparse
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any

from lavis_lstp.errors import ConfigError, ShardError

ENGINES = ("local", "ray")


def how(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the command line -> those of `run_jobs`."""
    return {"engine": args.engine, "workers": args.workers, "address": args.ray_address}


def run_jobs(function: Callable[[Any], Any], jobs: Sequence[Any], **how: Any) -> list[Any]:
    """Results in the order of the jobs; arguments and errors as for `done_jobs`."""
    results = dict(done_jobs(function, jobs, **how))
    return [results[number] for number in range(len(jobs))]


def done_jobs(
    function: Callable[[Any], Any],
    jobs: Sequence[Any],
    *,
    engine: str = "local",
    workers: int = 1,
    address: str = "auto",
    desc: str = "",
    unit: str = "shard",
) -> Iterator[tuple[int, Any]]:
    """Number and result of each job as it is done, in any order; the first error of a job ends the run.

    Args:
        workers: processes of this machine; 1 = none but this. Ray decides itself.
        address: of the Ray cluster.
        desc: in front of the progress bar; unit: what it counts.
    """
    from tqdm import tqdm

    if engine == "ray":
        running = _ray(function, jobs, address)
    elif workers > 1 and len(jobs) > 1:
        running = _processes(function, jobs, min(workers, len(jobs)))
    else:
        running = ((number, function(job)) for number, job in enumerate(jobs))
    with tqdm(total=len(jobs), desc=desc, unit=unit, disable=None) as bar:
        for found in running:
            bar.update()
            yield found


def _processes(function: Callable, jobs: Sequence[Any], workers: int) -> Iterator[tuple[int, Any]]:
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
        futures = {pool.submit(function, job): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise ShardError(
                "a worker process was killed (out of memory?); run the command again to continue, with fewer --workers",
                "killed",
            ) from None
        finally:
            for future in futures:
                future.cancel()


def _end_with_parent() -> None:
    """Lets a worker end when the command does, also by SIGKILL; else it would wait for jobs, and keep its memory."""
    parent = parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _from_folder(folder: str, function: Callable, job: Any) -> Any:
    """A job as from where the command was called: a node's processes stand elsewhere, and paths may be relative."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(
            f"--engine ray: a node cannot enter {folder} ({error.strerror}); all nodes must see the folders of a set"
        ) from None
    return function(job)


def _ray(function: Callable, jobs: Sequence[Any], address: str) -> Iterator[tuple[int, Any]]:
    try:
        import ray
    except ImportError:
        raise ConfigError("--engine ray needs Ray; pip install ray") from None
    if not ray.is_initialized():
        try:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            if host and port.isdigit():  # Ray itself would try an address where nobody listens for ten minutes
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--engine ray: no cluster at '{address}' ({error}); start one with `ray start`"
            ) from None
    # A lost node's jobs run again elsewhere, however often nodes are lost; errors of the job itself come at once.
    remote = ray.remote(max_retries=-1)(_from_folder)
    waiting = {remote.remote(os.getcwd(), function, job): number for number, job in enumerate(jobs)}
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1)
        number = waiting.pop(done[0])
        try:
            yield number, ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
