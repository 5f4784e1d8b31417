"""`run.task: temporal_grounding`: the sampler learns spans, and is measured on them.

In: samples with `span` (a pseudo span, to learn from) and, for evaluation alone, `gold_span`; a model with
`locate(samples) -> {"span": int64 [B,2] half-open}`. Out: one record per question, IoU, R@0.3 and R@0.5 against
the gold spans, and the same against the pseudo spans as `pseudo_iou`, ...: `run.metric: pseudo_iou` chooses a
checkpoint without looking at a gold span. With `run.spans_out` the spans found are also written in the form that
`datasets.<name>.spans` reads, also of data that have no spans to compare with: the published image and video recipes
learn from frames of such spans.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lavis.common.registry import registry

from lavis_lstp.errors import ConfigError, unknown_name
from lavis_lstp.metrics.grounding import IOUS
from lavis_lstp.schema import Batch, Prediction
from lavis_lstp.tasks.base import (
    MODELS,
    LSTPTask,
    gold_of,
    moment_scores,
    one_each,
    real_times,
    sample_ids,
    seconds_of,
    several_spans,
    span_scores,
)
from lavis_lstp.tasks.pseudo_span import save_spans, spans_template


@registry.register_task("temporal_grounding")
class TemporalGroundingTask(LSTPTask):
    name = "temporal_grounding"

    def __init__(self, run: Mapping[str, Any] | None = None):
        super().__init__(run)
        self.spans_out = spans_template(self.run)
        self.iou = self.run.get("iou") or IOUS[0]
        if self.iou not in IOUS:
            raise ConfigError(unknown_name("run.iou", self.iou, IOUS))

    def valid_step(self, model: torch.nn.Module, samples: Batch) -> list[Prediction]:
        if not hasattr(model, "locate"):
            raise ConfigError(
                f"task {self.name} needs a model with locate(samples), got {type(model).__name__}; {MODELS}"
            )
        found = model.locate(samples)
        ids = sample_ids(samples)
        one_each(found, ids, model)
        records = []
        for row, question_id in enumerate(ids):
            record: Prediction = {"question_id": question_id}
            if "video_id" in samples:
                record["video_id"] = samples["video_id"][row]
            record["span"] = [int(edge) for edge in found["span"][row]]
            times = real_times(samples, row)
            if times and 0 <= record["span"][0] < record["span"][1] <= len(times):
                record["span_s"] = seconds_of(record["span"], samples, row)
            record.update(several_spans(found, samples, row))
            record.update(gold_of(samples, row))
            if "span" in samples and int(samples["span"][row][0]) >= 0:
                record["pseudo_span"] = [int(edge) for edge in samples["span"][row]]
            records.append(record)
        return records

    def metrics(self, records: list[Prediction]) -> dict[str, Any]:
        pseudo = span_scores(records, "pseudo_span", self.iou)
        result = {
            **span_scores(records, iou=self.iou),
            **{name if name.startswith("num_") else f"pseudo_{name}": value for name, value in pseudo.items()},
            **moment_scores(records),
        }
        if not result and self.spans_out:
            return {"located": len(records), "agg_metrics": 0.0}
        if not result:
            raise ConfigError(f"task {self.name} has nothing to measure: no sample has a gold_span or a span")
        return {**result, "agg_metrics": result.get("iou", result.get("pseudo_iou"))}

    def after_evaluation(
        self, val_result: list[Prediction], split_name: str, epoch: int | str, **kwargs: Any
    ) -> dict[str, Any]:
        metrics = super().after_evaluation(val_result, split_name, epoch, **kwargs)
        if not self.spans_out:
            return metrics
        found = [{**r, "span": r["span"] if r["span"][0] < r["span"][1] else None} for r in val_result]
        path = save_spans(self.spans_out, split_name, found, {"task": self.name}, **kwargs)
        return {**metrics, "spans_file": str(path)}
