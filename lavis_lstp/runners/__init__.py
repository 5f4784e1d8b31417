"""Runners; importing this package registers them with LAVIS."""

from lavis_lstp.runners.runner_lstp import RunnerLSTP

__all__ = ["RunnerLSTP"]
