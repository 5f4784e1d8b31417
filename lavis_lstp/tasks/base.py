"""What all tasks of this package share.

A task turns a batch into losses (`train_step`) or into records, a `schema.Prediction` for each sample (`valid_step`),
and all records of a split into metrics and files (`after_evaluation`). It chooses no data and no device, opens no
video, and knows nothing of optimizers; the runner does the rest. Records go by question_id, never by position.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lavis.tasks.base_task import BaseTask
from torch.utils.data import Dataset

from lavis_lstp.errors import ConfigError
from lavis_lstp.files import write_json, write_jsonl
from lavis_lstp.metrics.coverage import join_by_id
from lavis_lstp.metrics.grounding import evaluate_moments, evaluate_spans
from lavis_lstp.schema import Batch, Prediction, Span

log = logging.getLogger(__name__)

TIMINGS = "seconds"
"""Key of a record under which times go to a file of their own: predictions must be equal in each run."""


class LSTPTask(BaseTask):
    """Base of the tasks.

    Args:
        run: the configuration's run section as a plain dict.
    """

    name = ""

    def __init__(self, run: Mapping[str, Any] | None = None):
        super().__init__()
        self.run = dict(run or {})

    @classmethod
    def setup_task(cls, cfg: Any = None, **kwargs: Any) -> LSTPTask:
        return cls(plain(cfg.run_cfg) if cfg is not None else None)

    def before_training(self, model: torch.nn.Module, dataset: Dataset, **kwargs: Any) -> None:
        """Refuses a span loss over data that bring no span: each batch would cost time and teach nothing.

        Raises:
            ConfigError: none of the training data sets has spans, and the model makes none itself (self-refinement).
        """
        if getattr(model, "refinement", None):
            return
        parts = getattr(dataset, "datasets", [dataset])
        known = [part for part in parts if hasattr(part, "spans")]
        if "span" in getattr(model, "losses", ()) and known and all(part.spans is None for part in known):
            raise ConfigError("model.losses has 'span', but no training data set has spans; set datasets.<name>.spans")

    def train_step(self, model: torch.nn.Module, samples: Batch) -> dict[str, torch.Tensor]:
        """All losses the model gives; "loss" is the one to follow."""
        return {name: value for name, value in model(samples).items() if "loss" in name and torch.is_tensor(value)}

    def before_evaluation(self, model: torch.nn.Module, dataset: Dataset, **kwargs: Any) -> None:
        if hasattr(model, "before_evaluation"):
            model.before_evaluation(dataset=dataset, task_type=type(self))

    def valid_step(self, model: torch.nn.Module, samples: Batch) -> list[Prediction]:
        """Records of a batch, one per sample, each with its question_id."""
        raise NotImplementedError

    def metrics(self, records: list[Prediction]) -> dict[str, Any]:
        """Metrics of a split; `agg_metrics` is the one by which checkpoints are compared, higher is better."""
        raise NotImplementedError

    def after_evaluation(
        self,
        val_result: list[Prediction],
        split_name: str,
        epoch: int | str,
        *,
        dataset: Dataset,
        result_dir: str | Path,
        allow_partial: bool = False,
        digests: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Write `<split>_<task>.jsonl` and `<split>_<task>_metrics.json`, and give the metrics. Rank 0 only.

        Questions without a record are listed in `<split>_<task>_missing.jsonl`, with the video they are about.

        Args:
            digests: of what the records depend on, for `<split>_<task>_digests.json`; not for the metrics, which are
                equal however the weights are divided among ranks.

        Raises:
            CoverageError: a question has no record, or two, and `allow_partial` is not set.
        """
        stem = Path(result_dir) / f"{split_name}_{self.name}"
        timings = [{"question_id": r["question_id"], **r[TIMINGS]} for r in val_result if TIMINGS in r]
        records = [{key: value for key, value in r.items() if key != TIMINGS} for r in val_result]
        ends = ("_metrics.json", "_timings.jsonl", "_missing.jsonl", "_digests.json")
        metrics_file, timings_file, missing_file, digests_file = (stem.with_name(stem.name + end) for end in ends)
        for path in (metrics_file, timings_file, missing_file, digests_file):
            path.unlink(missing_ok=True)  # of an earlier evaluation: they must not stand beside these predictions
        write_jsonl(stem.with_suffix(".jsonl"), records)
        if timings:
            write_jsonl(timings_file, timings)
        if digests:
            write_json(digests_file, dict(digests))
        expected = question_ids(dataset)
        missing = missing_questions(dataset, {record["question_id"] for record in records})
        lost = getattr(dataset, "unanswerable", ())
        missing += [{"question_id": name, "why": "no right option"} for name in lost]
        if missing:
            write_jsonl(missing_file, missing)
        pairs = [(record["question_id"], record) for record in records]
        *_, covered = join_by_id(pairs, [(name, None) for name in expected], allow_partial=allow_partial)
        found = self.metrics(records)
        scored, total = found.get("num_scored", covered["num_scored"]), len(expected) + len(lost)
        if 0 < scored < total:  # a score over part of the questions is told as one
            covered |= {"num_questions": total, "num_scored": scored, "coverage": scored / total, "partial": True}
            covered["num_missing"] = total - scored
        elif not scored:  # hidden answers: all predicted, none scored
            covered["num_scored"] = 0
        metrics = {**found, **covered}
        write_json(metrics_file, metrics)
        return metrics


def question_ids(dataset: Dataset) -> list[str]:
    """Ids of all questions of a data set, in its order."""
    if hasattr(dataset, "question_ids"):
        ids = dataset.question_ids
        return [str(name) for name in (ids() if callable(ids) else ids)]
    annotation = getattr(dataset, "annotation", None)
    if annotation is None:
        return [str(i) for i in range(len(dataset))]
    return [record_id(entry, i) for i, entry in enumerate(annotation)]


def missing_questions(dataset: Dataset, answered: set[str]) -> list[dict[str, Any]]:
    """question_id, and the video where the data set tells it, of questions without a record."""
    rows = getattr(dataset, "annotation", None)
    found = []
    for i, name in enumerate(question_ids(dataset)):
        if name not in answered:
            row = rows[i] if rows is not None else {}
            found.append(
                {"question_id": name, **{key: row[key] for key in ("video_id", "video", "image") if key in row}}
            )
    return found


def record_id(entry: Mapping[str, Any], position: int) -> str:
    """question_id where there is one, else LAVIS's instance_id, else the position."""
    return str(entry.get("question_id", entry.get("instance_id", position)))


def sample_ids(samples: Batch) -> list[str]:
    """The batch's question_ids, as `question_ids` of the data set gives them."""
    ids = samples.get("question_id", samples.get("instance_id"))
    assert ids is not None, "a batch needs question_id or instance_id"
    return [str(item) for item in (ids.tolist() if torch.is_tensor(ids) else ids)]


MODELS = "take another run.task, or another model.arch, such as lstp_vicuna7b"


def one_each(found: Mapping[str, Any], ids: list[str], model: torch.nn.Module) -> None:
    """Refuses what a model says of a batch if it is not of one row for each question.

    Raises:
        ConfigError: more rows than questions, or fewer: no row could be told whose it is.
    """
    for key, value in found.items():
        by_row = isinstance(value, list) or (torch.is_tensor(value) and value.ndim)
        if by_row and len(value) != len(ids):
            raise ConfigError(
                f"{type(model).__name__} gave {len(value)} of '{key}' for {len(ids)} questions, the first "
                f"'{ids[0]}'; expected one for each (a setting such as num_return_sequences gives several)"
            )


def real_times(samples: Batch, row: int) -> list[float]:
    """Seconds of the frames of a sample that are no padding."""
    if "frame_times" not in samples or "frame_mask" not in samples:
        return []
    return [round(time, 6) for time in samples["frame_times"][row][: int(samples["frame_mask"][row].sum())].tolist()]


def seconds_of(span: Sequence[int], samples: Batch, row: int) -> list[float]:
    """Return start and end in seconds, to 1 ms, of a half-open span of a sample's frames, which have times."""
    end_s = samples["end_s"][row] if "end_s" in samples else None
    return [round(edge, 3) for edge in Span(*span).to_seconds(real_times(samples, row), end_s)]


def gold_of(samples: Batch, row: int) -> dict[str, Any]:
    """gold_span and moments_s of a sample, where the data have them."""
    found: dict[str, Any] = {}
    if samples.get("moments_s") and samples["moments_s"][row]:
        found["moments_s"] = samples["moments_s"][row]
    if "gold_span" in samples and int(samples["gold_span"][row][0]) >= 0:
        found["gold_span"] = [int(edge) for edge in samples["gold_span"][row]]
    return found


def span_scores(records: list[Prediction], target: str = "gold_span", iou: str = "frames") -> dict[str, Any]:
    """IoU in frames with the `target` of the records that have one, and how many have; no span is a miss."""
    scored = {r["question_id"]: r for r in records if target in r}
    if not scored:
        return {}
    spans = {name: record["span"] or (0, 0) for name, record in scored.items()}
    scores = evaluate_spans(spans, {name: record[target] for name, record in scored.items()}, iou=iou)
    kept = {name: value for name, value in scores.items() if name.startswith(("iou", "recall"))}
    return {**kept, f"num_{target}s": len(scored)}


def moment_scores(records: list[Prediction]) -> dict[str, Any]:
    """`moments`: R@1, mean IoU and mAP in seconds, over the records with gold moments; no span is a miss."""
    gold = {r["question_id"]: r["moments_s"] for r in records if "moments_s" in r}
    if not gold:
        return {}
    located = (r for r in records if r["question_id"] in gold)
    found = {r["question_id"]: r.get("spans_s", [r["span_s"]] if "span_s" in r else []) for r in located}
    scores = evaluate_moments(found, gold)
    return {"moments": {name: value for name, value in scores.items() if name.startswith(("r1_", "miou", "map"))}}


def several_spans(found: Mapping[str, Any], samples: Batch, row: int) -> dict[str, Any]:
    """spans in frames and spans_s in seconds of a sample, the likeliest first, where the model gives several."""
    if not found.get("spans"):
        return {}
    spans = [list(span) for span in found["spans"][row]]
    timed = spans if real_times(samples, row) else []
    return {"spans": spans, "spans_s": [seconds_of(span, samples, row) for span in timed]}


def plain(value: Any) -> Any:
    """OmegaConf nodes as plain containers."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
