"""The counters of a server, in Prometheus's form and by Prometheus's own client."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lavis_lstp.errors import LstpError
from lavis_lstp.inference.prediction import Cancelled, Prediction

STAGES_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server; several servers of one process do not share any."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.questions = Counter("lstp_questions", "Questions by outcome", ["outcome"], registry=self.registry)
        self.refused = Counter("lstp_refused", "Questions refused because the line was full", registry=self.registry)
        self.batch = Histogram("lstp_batch_size", "Questions of a batch", buckets=BATCHES, registry=self.registry)
        self.stages = Histogram(
            "lstp_stage_seconds", "Seconds of a stage of an answer", ["stage"], buckets=STAGES_S, registry=self.registry
        )

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a number that is looked up when the metrics are read."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def answered(self, outcome: Prediction | Exception) -> None:
        if isinstance(outcome, Prediction):
            self.questions.labels("answered").inc()
            for stage, seconds in outcome.seconds.items():
                self.stages.labels(stage).observe(seconds)
            return
        kind = (
            "given up" if isinstance(outcome, Cancelled) else "refused" if isinstance(outcome, LstpError) else "failed"
        )
        self.questions.labels(kind).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
