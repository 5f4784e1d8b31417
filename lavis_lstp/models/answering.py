"""From samples to answers, or to how likely given answers are, with the evidence and the seconds of each stage.

In: the model and a batch. Out: a dict of everything an answer is made of. Frames are looked at once for all questions
about a video, prompts are read once for all options of a question.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lavis_lstp.batch import in_pieces
from lavis_lstp.models.answer.answerer import Answers, GivenUp, Reading
from lavis_lstp.schema import Batch


@torch.no_grad()
def answer(
    model: nn.Module,
    samples: Batch,
    prompt: str | None,
    generation: Mapping,
    given_up: GivenUp | None = None,
    **chosen_by: Any,
) -> dict:
    """See `LSTP.answer`.

    Args:
        model: an LSTP.
        prompt: template to use instead of the config's.
        generation: transformers' generation arguments.
        given_up: rows that nobody waits for, see `Reading.answers`.
        chosen_by: selector and flow in place of the chooser's, see `Chooser`.
    """
    result, reading = look(model, samples, prompt, **chosen_by)
    with timed(model, result["seconds"], "language"):
        made = reading.answers(generators=_generators(model, samples, generation), given_up=given_up, **generation)
    return told(result, made)


def stream(
    model: nn.Module,
    samples: Batch,
    prompt: str | None,
    generation: Mapping,
    given_up: GivenUp | None = None,
    **chosen_by: Any,
) -> Generator[list[str], None, dict]:
    """See `LSTP.stream`; arguments as for `answer`."""
    with torch.no_grad():
        result, reading = look(model, samples, prompt, **chosen_by)
        pieces = reading.stream(generators=_generators(model, samples, generation), given_up=given_up, **generation)
    start = time.perf_counter()
    made = yield from pieces
    result["seconds"]["language"] = time.perf_counter() - start
    return told(result, made)


def _generators(model: nn.Module, samples: Batch, generation: Mapping) -> list[torch.Generator] | None:
    return model.chooser.generators(samples) if generation.get("do_sample") else None


def told(result: dict, made: Answers) -> dict:
    """The result with the answers in it."""
    return {**result, "prediction": made.texts, "log_prob": rounded(made.log_probs, made.counts)}


@torch.no_grad()
def score_options(model: nn.Module, samples: Batch, prompt: str | None) -> dict:
    """See `LSTP.score_options`; arguments as for `answer`."""
    result, reading = look(model, samples, prompt)
    options = samples["options"]
    pairs = [(row, option) for row, own in enumerate(options) for option in own]
    scored: dict[str, list[list]] = {key: [[] for _ in options] for key in ("option_log_prob", "option_greedy")}
    with timed(model, result["seconds"], "language"):
        # no more rows at once than questions: memory is that of answering
        for part in in_pieces(pairs, len(options), model):
            # one that does not count where the other ranks have more options to weigh than this one
            asked = part or [(0, "")]
            answers = [model.answer_template.replace("{answer}", option) for _, option in asked]
            sums, counts, greedy = (x[: len(part)] for x in reading.log_probs([row for row, _ in asked], answers))
            for (row, _), log_prob, said in zip(part, rounded(sums, counts), greedy.tolist(), strict=True):
                scored["option_log_prob"][row].append(log_prob)
                scored["option_greedy"][row].append(said)
    return {**result, **scored}


def look(model: nn.Module, samples: Batch, prompt: str | None, **chosen_by: Any) -> tuple[dict, Reading]:
    """Everything before the language model: the result so far, and the prompts with their frames as they were read."""
    seconds: dict[str, float] = {}
    result: dict = {"seconds": seconds}
    choice = model.chooser(samples, clock=lambda stage: timed(model, seconds, stage), **chosen_by)
    result |= {"frame_index": choice.frame_index, "span": choice.span, "num_filled": choice.num_filled}
    if choice.spans is not None:
        result["spans"] = choice.spans
    if choice.num_shown is not None:
        result["num_shown"] = choice.num_shown
    if choice.flow is not None:
        result["flow"] = choice.flow
    if choice.scores is not None:
        result |= {"scores": choice.scores, "num_scored": choice.num_scored}
    if choice.logits is not None:
        result["start_logits"] = choice.logits.start_logits.float().cpu()
        result["end_logits"] = choice.logits.end_logits.float().cpu()
    result["prompt"], shown = model.prompts_with_subtitles(samples, choice.frame_index, prompt)
    if shown is not None:
        result["subtitles"] = shown
    with timed(model, seconds, "vision"):
        return result, model.look(samples, choice.frame_index, result["prompt"])


@contextmanager
def timed(model: nn.Module, seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the seconds that something takes, without those of stages within it; a GPU's work is waited for."""
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda device: None
    wait(model.device)
    start = time.perf_counter() - sum(seconds.values())
    yield
    wait(model.device)
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start - sum(seconds.values())


DECIMALS = 4
"""Digits of a log-probability that do not depend on what else is in the batch, but for a last one at its edge."""


def rounded(sums: Tensor, counts: Tensor) -> list[dict[str, float | int]]:
    """The sum, the mean and the number of tokens of each row, of sums float [M] and counts int64 [M]."""
    pairs = zip(sums.tolist(), counts.tolist(), strict=True)
    return [{"sum": round(s, DECIMALS), "mean": round(s / max(1, n), DECIMALS), "tokens": n} for s, n in pairs]
