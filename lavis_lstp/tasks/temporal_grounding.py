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
from lavis_lstp.metrics.grounding import IOUS, evaluate_moments, evaluate_spans
from lavis_lstp.schema import Batch, Prediction, Span
from lavis_lstp.tasks.base import LSTPTask, one_each, real_times, sample_ids, several_spans
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
            raise ConfigError(f"task {self.name} needs a model with locate(samples), got {type(model).__name__}")
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
                record["span_s"] = [round(edge, 3) for edge in Span(*record["span"]).to_seconds(times)]
            record.update(several_spans(found, row, times))
            if samples.get("moments_s") and samples["moments_s"][row]:
                record["moments_s"] = samples["moments_s"][row]
            for name, key in (("gold_span", "gold_span"), ("pseudo_span", "span")):
                if key in samples and int(samples[key][row][0]) >= 0:
                    record[name] = [int(edge) for edge in samples[key][row]]
            records.append(record)
        return records

    def metrics(self, records: list[Prediction]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for target, prefix in (("gold_span", ""), ("pseudo_span", "pseudo_")):
            scored = {r["question_id"]: r for r in records if target in r}
            if scored:
                spans = {name: record["span"] for name, record in scored.items()}
                targets = {name: record[target] for name, record in scored.items()}
                scores = evaluate_spans(spans, targets, iou=self.iou)
                kept = {name: value for name, value in scores.items() if name.startswith(("iou", "recall"))}
                result.update({f"{prefix}{name}": value for name, value in kept.items()})
                result[f"num_{target}s"] = len(scored)
        moments = {r["question_id"]: r["moments_s"] for r in records if "moments_s" in r}
        if moments:
            located = (r for r in records if r["question_id"] in moments)
            found = {r["question_id"]: r.get("spans_s", [r["span_s"]] if "span_s" in r else []) for r in located}
            scores = evaluate_moments(found, moments)
            result["moments"] = {
                name: value for name, value in scores.items() if name.startswith(("r1_", "miou", "map"))
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
