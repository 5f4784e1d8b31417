"""The few collectives a run needs, as no-ops where there is one process.

Both runners and no other part use these; `torch.distributed` is initialised by the entry point
(`lavis.train`), or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lavis_lstp.errors import LstpError


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if active() else 0


def world_size() -> int:
    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    return rank() == 0


def ensure_group(device: torch.device) -> None:
    """A process group, of this process alone where there is none: LAVIS's contrastive losses ask for their rank."""
    if dist.is_available() and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def broadcast(value: Any) -> Any:
    """Rank 0's picklable value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(compute: Callable[[], Any]) -> Any:
    """What `compute` gives on rank 0, on every rank; an error of the user's or the system's is raised on each of them.

    Without the latter the others would wait for rank 0 until the collective times out.
    """
    value, error = None, None
    if is_main():
        try:
            value = compute()
        except (LstpError, OSError) as caught:
            error = caught
    value, error = broadcast((value, error))
    if error is not None:
        raise error
    return value


def gather(value: Any) -> list[Any]:
    """Every rank's picklable value, by rank, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor of any shape over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
