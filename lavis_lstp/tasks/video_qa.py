"""`run.task: video_qa` answers questions and scores the answers; `run.task: video_instruct` also learns to.

In: samples with text_input, text_output and question_id. Out: one record per question with the answer, the
prediction and, where the model says so, prompt, span, frames and log-probability; exact match, token F1 and ROUGE of a
split. Samples with options are multiple choice: the model generates an answer, of which one option is read, or the most
likely option is taken. Both tasks work with LAVIS's own models (blip2_t5 on `image`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from lavis.common.registry import registry

from lavis_lstp.batch import is_hidden
from lavis_lstp.config.run import GENERATION
from lavis_lstp.errors import ConfigError, unknown_name
from lavis_lstp.metrics.choice import LETTERS, choice_prompt, parse_choice
from lavis_lstp.metrics.coverage import join_by_id
from lavis_lstp.metrics.grounding import entropy_bits, evaluate_grounded_qa
from lavis_lstp.metrics.qa import accuracy, bleu_1, evaluate_answers, is_right, require_bleu, subtitles_shown
from lavis_lstp.models.answer.lavis_frames import several_frames
from lavis_lstp.schema import Batch, Prediction
from lavis_lstp.tasks.base import (
    MODELS,
    TIMINGS,
    LSTPTask,
    one_each,
    real_times,
    sample_ids,
    seconds_of,
    several_spans,
)

CHOOSE = ("generate", "likelihood")
OPTION_SCORES = ("mean", "sum")


@registry.register_task("video_qa")
class VideoQATask(LSTPTask):
    """Answers questions. Generation keys of the run section (num_beams, max_len, ...) override the model's own."""

    name = "video_qa"

    def __init__(self, run: Mapping[str, Any] | None = None):
        super().__init__(run)
        self.choose = self._one_of("choose", CHOOSE)
        self.option_score = self._one_of("option_score", OPTION_SCORES)
        self.with_bleu = self.run.get("metric") == "bleu1"
        if self.with_bleu:
            require_bleu()  # before the first epoch and not behind it

    def _one_of(self, key: str, known: tuple[str, ...]) -> str:
        value = self.run.get(key) or known[0]
        if value not in known:
            raise ConfigError(unknown_name(f"run.{key}", value, known))
        return value

    def valid_step(self, model: torch.nn.Module, samples: Batch) -> list[Prediction]:
        ids = sample_ids(samples)
        options = samples.get("options") or [[]] * len(ids)
        if self.choose == "likelihood" and any(options):
            predicted = self._likeliest(model, samples, options)
        else:
            predicted = self._answer(model, with_options(model, samples, options) if any(options) else samples)
        one_each(predicted, ids, model)
        seconds = {stage: value / len(ids) for stage, value in predicted.get(TIMINGS, {}).items()}
        records = []
        for row, question_id in enumerate(ids):
            record: Prediction = {"question_id": question_id}
            for key, source in (("video_id", "video_id"), ("category", "category"), ("question", "text_input")):
                if source in samples and samples[source][row] != "":
                    record[key] = samples[source][row]
            if samples.get("categories") and samples["categories"][row]:
                record["categories"] = samples["categories"][row]
            if samples.get("moments_s") and samples["moments_s"][row]:
                record["moments_s"] = samples["moments_s"][row]
            if "text_output" in samples:
                record["answer"] = None if is_hidden(samples, row) else samples["text_output"][row]
            record["prediction"] = predicted["prediction"][row]
            if options[row]:
                record.update(_choice(record, options[row], predicted, row))
            record.update(_evidence(predicted, samples, row))
            if seconds:
                record[TIMINGS] = {stage: round(value, 6) for stage, value in seconds.items()}
            records.append(record)
        return records

    def _likeliest(self, model: torch.nn.Module, samples: Batch, options: list[list[str]]) -> Mapping[str, Any]:
        """What `score_options` tells, and the best option as the prediction; of equal ones the first."""
        if not all(options):
            raise ConfigError("run.choose: likelihood needs options with every question; use generate")
        if not hasattr(model, "score_options"):
            raise ConfigError(
                f"run.choose: likelihood needs a model of LSTP, got {type(model).__name__}; use generate, or that "
                "model as the backbone (model.backbone.source: lavis)"
            )
        scored = dict(model.score_options(samples))
        scores = [[option[self.option_score] for option in row] for row in scored["option_log_prob"]]
        scored["chosen"] = [max(range(len(row)), key=lambda i, row=row: (row[i], -i)) for row in scores]
        scored["prediction"] = [row[i] for row, i in zip(options, scored["chosen"], strict=True)]
        scored["log_prob"] = [row[i] for row, i in zip(scored["option_log_prob"], scored["chosen"], strict=True)]
        return scored

    def _answer(self, model: torch.nn.Module, samples: Batch) -> Mapping[str, Any]:
        """{"prediction"} and whatever else the model tells of an answer."""
        given = {name: self.run[name] for name in GENERATION if self.run.get(name) is not None}
        if hasattr(model, "answer"):
            return model.answer(samples, **{GENERATION[name]: value for name, value in given.items()})
        with several_frames(model, samples.get("image")):
            return self._lavis_answer(model, samples, given)

    def _lavis_answer(self, model: torch.nn.Module, samples: Batch, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """{"prediction", "prompt"} of one of LAVIS's own models."""
        prompt = {"prompt": self.run["prompt"]} if self.run.get("prompt") else {}
        if hasattr(model, "predict_answers"):
            kept = _read_by(model.predict_answers, given)
            asked = [(self.run.get("prompt") or "{}").format(question) for question in samples["text_input"]]
            found = model.predict_answers(samples=samples, inference_method="generate", **kept, **prompt)
            return {"prediction": found, "prompt": asked}
        if hasattr(model, "generate"):
            names = {"max_len": "max_length", "min_len": "min_length"}
            template = self.run.get("prompt") or "{}"
            kept = _read_by(model.generate, given, names)
            answers, prompts = [], []
            for row, question in enumerate(samples["text_input"]):  # LAVIS's OPT takes one prompt for the whole batch
                asked = {name: value[row : row + 1] for name, value in samples.items() if _by_row(value)}
                prompts.append(template.format(question))
                answers += model.generate({**asked, "prompt": prompts[-1]}, **kept)
            return {"prediction": answers, "prompt": prompts}
        raise ConfigError(
            f"task {self.name} needs a model with predict_answers or generate, got {type(model).__name__}; {MODELS}"
        )

    def metrics(self, records: list[Prediction]) -> dict[str, Any]:
        scored = {r["question_id"]: r for r in records if r.get("answer") is not None}
        if not scored:
            note = "the data have no answers; nothing was scored"
            return {"agg_metrics": 0.0, "num_scored": 0, "note": note, **shown_of(records)}
        predictions = {name: record["prediction"] for name, record in scored.items()}
        answers = {name: record["answer"] for name, record in scored.items()}
        categories = {name: record.get("category", "") for name, record in scored.items()}
        axes = {name: record.get("categories") or {} for name, record in scored.items()}
        right = {name: is_right(record) for name, record in scored.items()}
        chosen = [record for record in scored.values() if "options" in record]
        if not chosen:
            scores = evaluate_answers(predictions, answers)
            if self.with_bleu:
                scores["bleu1"] = bleu_1(*([table[name] for name in scored] for table in (answers, predictions)))
            kinds = accuracy(right, categories).get("by_category")
            scores |= {**({"by_category": kinds} if kinds else {}), **_grounded(scored, right)}
            return {**scores, **shown_of(records), "agg_metrics": scores["exact_match"]}
        *_, coverage = join_by_id(predictions, answers)
        unparsable = [record["question_id"] for record in chosen if record["choice"] is None]
        found = {**accuracy(right, categories, axes), "chosen_by": self.choose, "num_unparsable": len(unparsable)}
        found |= {**_grounded(scored, right), "unparsable": unparsable, **coverage, **shown_of(records)}
        return {**found, "agg_metrics": found["accuracy"]}


def shown_of(records: Sequence[Prediction]) -> dict[str, Any]:
    """Return what the language model was shown beside the question, as far as it differs from the published setting.

    frames_per_answer: their mean number, where the selector decides it. subtitles: which lines, where there were any;
    subtitle_lines: their mean number; subtitle_lines_left_out: lines of all prompts that these had no room for.
    """
    found: dict[str, Any] = {}
    frames = [record["num_shown"] for record in records if "num_shown" in record]
    if frames:
        found["frames_per_answer"] = round(sum(frames) / len(frames), 4)
    lines = [record["subtitles"] for record in records if "subtitles" in record]
    if lines:
        found["subtitles"] = subtitles_shown(records)
        found["subtitle_lines"] = round(sum(one["lines"] for one in lines) / len(lines), 4)
        found["subtitle_lines_left_out"] = sum(one["left_out"] for one in lines)
    return found


def _grounded(scored: Mapping[str, Prediction], right: Mapping[str, bool]) -> dict[str, Any]:
    """NExT-GQA's scores below `grounded`, over the questions with gold moments, where the model gives spans."""
    golds = {name: record["moments_s"] for name, record in scored.items() if record.get("moments_s")}
    found = {name: scored[name].get("span_s") for name in golds}
    if not any(found.values()):
        return {}
    scores = evaluate_grounded_qa(found, golds, {name: right[name] for name in golds})
    names = ("num_questions", *(name for name in scores if name.startswith(("acc_", "miou", "miop", "iou_", "iop_"))))
    return {"grounded": {name: scores[name] for name in names}}


def with_options(model: torch.nn.Module, samples: Batch, options: list[list[str]]) -> dict[str, Any]:
    """Samples whose language model reads the options; the question that finds the frames stays as it is."""
    asked = [choice_prompt(q, o) if o else q for q, o in zip(samples["text_input"], options, strict=True)]
    if not hasattr(model, "prompts"):  # LAVIS's own: one text for everything
        return {**samples, "text_input": asked}
    given = samples.get("prompt") or [""] * len(asked)
    made = model.prompts({"text_input": asked})
    return {**samples, "prompt": [own or general for own, general in zip(given, made, strict=True)]}


def _choice(record: Prediction, options: list[str], predicted: Mapping[str, Any], row: int) -> Prediction:
    """options, choice (a letter, None = unparsable), correct (None = the answer is hidden), and how likely each is."""
    if "chosen" in predicted:
        number = predicted["chosen"][row]
    else:
        number = parse_choice(record["prediction"], options)
    answer = record.get("answer")
    found: Prediction = {"options": options, "choice": None if number is None else LETTERS[number]}
    found["correct"] = None if answer is None else number is not None and options[number] == answer
    if "option_log_prob" in predicted:
        found["option_log_prob"] = predicted["option_log_prob"][row]
    return found


@registry.register_task("video_instruct")
class VideoInstructTask(VideoQATask):
    """Learns to answer; validates by the loss, or by answering."""

    name = "video_instruct"

    def __init__(self, run: Mapping[str, Any] | None = None):
        super().__init__(run)
        self.valid_on = self._one_of("valid_on", ("loss", "answers"))

    def valid_step(self, model: torch.nn.Module, samples: Batch) -> list[Prediction]:
        if self.valid_on == "answers":
            return super().valid_step(model, samples)
        loss = self.train_step(model, samples)["loss"].item()  # the mean over the batch, so of each of its samples
        return [{"question_id": name, "loss": loss} for name in sample_ids(samples)]

    def metrics(self, records: list[Prediction]) -> dict[str, Any]:
        if self.valid_on == "answers":
            return super().metrics(records)
        loss = sum(record["loss"] for record in records) / max(1, len(records))
        return {"loss": loss, "agg_metrics": -loss}


def _read_by(function: Callable, given: Mapping[str, Any], names: Mapping[str, str] = MappingProxyType({})) -> dict:
    """Return the settings as arguments of a method of LAVIS's, which swallows in `**kwargs` what it does not read.

    Args:
        names: of settings that are called otherwise there.

    Raises:
        ConfigError: it does not read one of them.
    """
    known = inspect.signature(function).parameters
    of_lavis = function.__module__.startswith("lavis.")
    for name in given:
        if names.get(name, name) not in known and (of_lavis or not _takes_any(known)):
            raise ConfigError(f"run.{name} is not read by {function.__qualname__}, which answers here; leave it out")
    return {names.get(name, name): value for name, value in given.items()}


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def _by_row(value: Any) -> bool:
    return isinstance(value, list) or (torch.is_tensor(value) and value.ndim > 0)


def _evidence(predicted: Mapping[str, Any], samples: Batch, row: int) -> Prediction:
    """Prompt, log-probability, span and frames of one answer, as far as the model gave them."""
    found: Prediction = {}
    for key in ("prompt", "subtitles", "log_prob"):
        if predicted.get(key) is not None:
            found[key] = predicted[key][row]
    times = real_times(samples, row)
    if predicted.get("span") is not None:
        found["span"] = [int(edge) for edge in predicted["span"][row]]
        if times:
            found["num_frames"] = len(times)
            found["span_s"] = seconds_of(found["span"], samples, row)
    found.update(several_spans(predicted, samples, row))
    if predicted.get("start_logits") is not None and len(times) > 1:
        logits = {edge: predicted[f"{edge}_logits"][row] for edge in ("start", "end")}
        mask = samples.get("flow_mask")
        flows = int(mask[row].sum()) if mask is not None and len(mask[row]) == len(logits["start"]) else len(times)
        logits = {edge: value[:flows] for edge, value in logits.items()}
        found["entropy"] = {edge: round(entropy_bits(value.tolist()), 4) for edge, value in logits.items()}
    for key in ("num_filled", "num_scored"):
        if predicted.get(key) is not None:
            found[key] = int(predicted[key][row])
    if predicted.get("frame_index") is not None:
        index = [int(i) for i in predicted["frame_index"][row]]
        if predicted.get("num_shown") is not None:  # what stands behind depends on the batch
            found["num_shown"] = int(predicted["num_shown"][row])
            index = index[: found["num_shown"]]
        found["frame_index"] = index
        if "frame_times" in samples:
            times = samples["frame_times"][row]
            found["frame_times"] = [round(float(times[i]), 3) if i >= 0 else None for i in index]
    if "gold_span" in samples and int(samples["gold_span"][row][0]) >= 0:
        found["gold_span"] = [int(edge) for edge in samples["gold_span"][row]]
    return found
