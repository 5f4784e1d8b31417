"""Runners; importing this package registers them with LAVIS."""

from lavis_lstp.runners.runner_deepspeed import RunnerDeepSpeed
from lavis_lstp.runners.runner_lstp import RunnerLSTP

__all__ = ["RunnerDeepSpeed", "RunnerLSTP"]
