"""`run.task: pseudo_span` with `run.evaluate: true`: label questions with the frames that answer them.

In: samples with the answer; a model with `pseudo_scores(samples) -> float [B,T]`, how well each frame alone answers, or
with `run.label: scores` the scores of `model.scorer`, which need no answer. Out: one file per split in the form that
`datasets.<name>.spans` reads. What does not move (an image, a text, a video of one frame) has the span null there.
Where the data have gold spans, the metrics say how good the labels are. It is an offline step in eval mode, and like
any evaluation it goes on where it was killed. (Source: paper, temporal refinement; the published code labels inside the
training forward, in train mode.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from torch.utils.data import Dataset

from lavis_lstp.batch import moves
from lavis_lstp.data.spans import SPANS_FORMAT, SPANS_VERSION
from lavis_lstp.errors import ConfigError
from lavis_lstp.files import expanded, write_json
from lavis_lstp.models.where.pseudo_span import pseudo_span
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
    span_scores,
)


@registry.register_task("pseudo_span")
class PseudoSpanTask(LSTPTask):
    name = "pseudo_span"

    def __init__(self, run: Mapping[str, Any] | None = None):
        super().__init__(run)
        self.subtract_min = bool(self.run.get("subtract_min", True))
        self.smooth = int(self.run.get("smooth") or 1)
        self.by_scores = self.run.get("label") == "scores"
        self.spans_out = spans_template(self.run)

    def valid_step(self, model: torch.nn.Module, samples: Batch) -> list[Prediction]:
        if not hasattr(model, "pseudo_scores"):
            raise ConfigError(
                f"task {self.name} needs a model with pseudo_scores(samples), got {type(model).__name__}; {MODELS}"
            )
        ids = sample_ids(samples)
        hidden = [name for name, answer in zip(ids, samples.get("answer", ids), strict=True) if answer is None]
        if hidden and not self.by_scores:
            raise ConfigError(
                f"question {hidden[0]!r} has no answer, which its frames could be labelled by; set run.label=scores, "
                "and a scorer (model.scorer.name) with a selector that takes scores, such as topk"
            )
        scores = (model.label_scores if self.by_scores else model.pseudo_scores)(samples).float().cpu()  # [B,T]
        one_each({"scores": scores}, ids, model)
        frames = samples["frame_mask"].sum(1).tolist()  # real ones, of each sample
        records = []
        for row, (question_id, moving) in enumerate(zip(ids, moves(samples).tolist(), strict=True)):
            own = scores[row, : frames[row]].tolist() if moving else []
            span = list(pseudo_span(own, self.subtract_min, smooth=self.smooth)) if moving else None
            record: Prediction = {"question_id": question_id, "span": span, "scores": [round(s, 4) for s in own]}
            gold, times = gold_of(samples, row), real_times(samples, row)
            if gold and times and span and span[0] < span[1]:
                record["span_s"] = seconds_of(span, samples, row)
            records.append({**record, **gold})
        return records

    def metrics(self, records: list[Prediction]) -> dict[str, Any]:
        labelled = [record for record in records if record["span"] is not None]
        answered = [max(record["scores"], default=0.0) > 0 for record in labelled]
        length = [record["span"][1] - record["span"][0] for record in labelled]
        count = max(1, len(labelled))
        return {
            "labelled": len(labelled),
            "without_span": len(records) - len(labelled),
            "answered_by_some_frame": sum(answered) / count,
            "mean_span_frames": sum(length) / count,
            **self._against_gold(records),
            "agg_metrics": sum(answered) / count,
        }

    def _against_gold(self, records: list[Prediction]) -> dict[str, Any]:
        """Scores of the labels, as of any spans, and the IoU of those who label each video from end to end."""
        scores = span_scores(records)
        if scores:
            whole = [{**record, "span": [0, len(record["scores"])]} for record in records]
            scores["iou_of_whole_video"] = span_scores(whole)["iou"]
        return {**scores, **moment_scores(records)}

    def after_evaluation(
        self, val_result: list[Prediction], split_name: str, epoch: int | str, **kwargs: Any
    ) -> dict[str, Any]:
        metrics = super().after_evaluation(val_result, split_name, epoch, **kwargs)
        template = self.spans_out or str(Path(kwargs["output_dir"]) / "spans_{split}.json")
        made_by = {"subtract_min": self.subtract_min, "smooth": self.smooth}
        made_by |= {"label": "scores"} if self.by_scores else {}
        return {**metrics, "spans_file": str(save_spans(template, split_name, val_result, made_by, **kwargs))}


def spans_template(run: Mapping[str, Any]) -> str | None:
    """`run.spans_out`.

    Raises:
        ConfigError: several splits would be written to one file.
    """
    splits, template = run.get("test_splits") or [], run.get("spans_out")
    if template and len(splits) > 1 and "{split}" not in template:
        raise ConfigError(f"run.spans_out must contain {{split}} to label {len(splits)} splits, got {template}")
    return template


def save_spans(
    template: str,
    split_name: str,
    records: list[Prediction],
    made_by: Mapping[str, Any],
    *,
    dataset: Dataset,
    output_dir: str | Path = ".",
    limited: bool = False,
    model_config: Mapping[str, Any] | None = None,
    **unused: Any,
) -> Path:
    """Write a span file of a split's records, each with question_id, span or None, and maybe scores.

    Args:
        template: the file's path; {split} is replaced.
        made_by: noted in the file, with the model and its checkpoint.
        limited: the records are those of a trial over a part of the split (`run.limit_batches`): the file is written
            into `output_dir`, so that it never replaces one of the whole split.
    """
    path = expanded(template.replace("{split}", split_name))
    path = Path(output_dir) / f"partial_{path.name}" if limited else path
    model = model_config or {}
    settings = getattr(dataset, "settings", dataset)
    num_frames = getattr(settings, "num_frames", None)  # the setting: every video may be shorter
    if num_frames is None:
        num_frames = max((len(record.get("scores", ())) for record in records), default=0)
    kept = ("span", "scores")
    content = {
        "format": SPANS_FORMAT,
        "version": SPANS_VERSION,
        "unit": "frames",
        "num_frames": num_frames,
        "fps": getattr(settings, "fps", None),
        "short_videos": getattr(settings, "short_videos", "keep"),
        "made_by": {"arch": model.get("arch"), "checkpoint": model.get("checkpoint"), **made_by},
        "spans": {r["question_id"]: {key: r[key] for key in kept if key in r} for r in records},
    }
    write_json(path, content, indent=None)
    return path
