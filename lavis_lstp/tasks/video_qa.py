"""`run.task: video_qa` answers questions and scores the answers; `run.task: video_instruct` also learns to.

In: samples with text_input, text_output and question_id. Out: one record per question with the answer, the
prediction and, where the model says so, the span and frames it looked at; exact match, token F1 and ROUGE of a split.
Both work with LAVIS's own models (blip2_t5 on `image`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lavis.common.registry import registry

from lavis_lstp.errors import ConfigError, unknown_name
from lavis_lstp.metrics.qa import evaluate_answers
from lavis_lstp.tasks.base import TIMINGS, LSTPTask, sample_ids

GENERATION = (
    "num_beams",
    "max_len",
    "min_len",
    "length_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
)
TO_TRANSFORMERS = {"max_len": "max_new_tokens", "min_len": "min_new_tokens"}


@registry.register_task("video_qa")
class VideoQATask(LSTPTask):
    """Answers questions. Generation keys of the run section (num_beams, max_len, ...) override the model's own."""

    name = "video_qa"

    def valid_step(self, model: torch.nn.Module, samples: dict[str, Any]) -> list[dict[str, Any]]:
        predicted = self._answer(model, samples)
        seconds = {stage: value / len(predicted["prediction"]) for stage, value in predicted.get(TIMINGS, {}).items()}
        records = []
        for row, question_id in enumerate(sample_ids(samples)):
            record: dict[str, Any] = {"question_id": question_id}
            for key, source in (("video_id", "video_id"), ("question", "text_input"), ("answer", "text_output")):
                if source in samples:
                    record[key] = samples[source][row]
            record["prediction"] = predicted["prediction"][row]
            record.update(_frames_of(predicted, samples, row))
            if seconds:
                record[TIMINGS] = {stage: round(value, 6) for stage, value in seconds.items()}
            records.append(record)
        return records

    def _answer(self, model: torch.nn.Module, samples: dict[str, Any]) -> Mapping[str, Any]:
        """{"prediction"} and whatever else the model tells of an answer."""
        given = {name: self.run[name] for name in GENERATION if self.run.get(name) is not None}
        if hasattr(model, "answer"):
            return model.answer(samples, **{TO_TRANSFORMERS.get(name, name): value for name, value in given.items()})
        prompt = {"prompt": self.run["prompt"]} if self.run.get("prompt") else {}
        if hasattr(model, "predict_answers"):
            lavis_keys = ("num_beams", "max_len", "min_len", "length_penalty")
            kept = {name: given[name] for name in lavis_keys if name in given}
            return {"prediction": model.predict_answers(samples=samples, inference_method="generate", **kept, **prompt)}
        if hasattr(model, "generate"):
            names = {"max_len": "max_length", "min_len": "min_length"}
            template = self.run.get("prompt") or "{}"
            kept = {names.get(name, name): value for name, value in given.items()}
            answers = []
            for row, question in enumerate(samples["text_input"]):  # LAVIS's OPT takes one prompt for the whole batch
                asked = {name: value[row : row + 1] for name, value in samples.items() if _by_row(value)}
                answers += model.generate({**asked, "prompt": template.format(question)}, **kept)
            return {"prediction": answers}
        raise ConfigError(
            f"task {self.name} needs a model with predict_answers or generate, got {type(model).__name__}"
        )

    def metrics(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        scored = {r["question_id"]: r for r in records if r.get("answer") is not None}
        if not scored:
            return {"agg_metrics": 0.0, "note": "the data have no answers; nothing was scored"}
        predictions = {name: record["prediction"] for name, record in scored.items()}
        answers = {name: record["answer"] for name, record in scored.items()}
        scores = evaluate_answers(predictions, answers)
        return {**scores, "agg_metrics": scores["exact_match"]}


@registry.register_task("video_instruct")
class VideoInstructTask(VideoQATask):
    """Learns to answer; validates by the loss, or by answering."""

    name = "video_instruct"
    RUN_KEYS = {"valid_on": "loss (default): validate by the mean loss; answers: answer the questions and score them"}

    def __init__(self, run: Mapping[str, Any] | None = None):
        super().__init__(run)
        self.valid_on = self.run.get("valid_on") or "loss"
        if self.valid_on not in ("loss", "answers"):
            raise ConfigError(unknown_name("run.valid_on", self.valid_on, ("loss", "answers")))

    def valid_step(self, model: torch.nn.Module, samples: dict[str, Any]) -> list[dict[str, Any]]:
        if self.valid_on == "answers":
            return super().valid_step(model, samples)
        loss = float(self.train_step(model, samples)["loss"])  # the mean over the batch, so of each of its samples
        return [{"question_id": name, "loss": loss} for name in sample_ids(samples)]

    def metrics(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        if self.valid_on == "answers":
            return super().metrics(records)
        loss = sum(record["loss"] for record in records) / max(1, len(records))
        return {"loss": loss, "agg_metrics": -loss}


def _by_row(value: Any) -> bool:
    return isinstance(value, list) or (torch.is_tensor(value) and value.ndim > 0)


def _frames_of(predicted: Mapping[str, Any], samples: Mapping[str, Any], row: int) -> dict[str, Any]:
    """Span and frames of one answer, as far as the model gave them."""
    found: dict[str, Any] = {}
    if predicted.get("prompt") is not None:
        found["prompt"] = predicted["prompt"][row]
    if predicted.get("span") is not None:
        found["span"] = [int(edge) for edge in predicted["span"][row]]
    if predicted.get("frame_index") is not None:
        index = [int(i) for i in predicted["frame_index"][row]]
        found["frame_index"] = index
        if "frame_times" in samples:
            times = samples["frame_times"][row]
            found["frame_times"] = [round(float(times[i]), 3) if i >= 0 else None for i in index]
    if "gold_span" in samples and int(samples["gold_span"][row][0]) >= 0:
        found["gold_span"] = [int(edge) for edge in samples["gold_span"][row]]
    return found
