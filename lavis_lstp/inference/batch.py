"""The one place where questions meet the model: a batch of prepared questions in, predictions out.

Flow that was kept stands in for the chooser's, the selector of the call for the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lavis_lstp.inference.prediction import Asked, Prediction
from lavis_lstp.models.where.chooser import Choice
from lavis_lstp.schema import Span

END_OF_TURN = "</s>"
"""End mark that the published demo writes behind each earlier answer, whatever the language model."""
MEDIA_TOKENS = {"video": "<video>", "image": "<image>"}


def answer_batch(model: Any, asked: Sequence[Asked]) -> list[Prediction]:
    """Predictions of questions with equal settings; the caller sees to it that nobody else uses the model.

    Text is handed out as it comes. Rows that are given up while the language model writes are cut short there.
    """
    settings = asked[0].settings
    samples = _samples(model, asked)
    how = {
        **settings.generation,
        "selector": settings.selector,
        "flow": _kept_flow(model, asked),
        "given_up": lambda row: asked[row].cancel.is_set(),
    }
    beams = {**model.generation, **settings.generation}.get("num_beams") or 1
    waiting = any(one.on_text is not None for one in asked)
    if waiting and beams == 1:
        found = _handed_out(model.stream(samples, **how), asked)
    else:  # the best beam is known at the end
        found = model.answer(samples, **how)
        for one, text in zip(asked, found["prediction"], strict=True):
            _hand_out(one, text)
    return [_prediction(one, row, found) for row, one in enumerate(asked)]


def choose(model: Any, asked: Asked) -> Choice:
    """The frames that would be shown for one question, without the answer."""
    with torch.no_grad():
        return model.chooser(
            _samples(model, [asked]), selector=asked.settings.selector, flow=_kept_flow(model, [asked])
        )


def _handed_out(pieces: Iterator[list[str]], asked: Sequence[Asked]) -> dict[str, Any]:
    """Return what a stream returns, after its pieces were handed out."""
    while True:
        try:
            new = next(pieces)
        except StopIteration as end:
            return end.value
        for one, text in zip(asked, new, strict=True):
            _hand_out(one, text)


def _hand_out(one: Asked, text: str) -> None:
    if text and one.on_text is not None and not one.cancel.is_set():
        one.on_text(text)


def _samples(model: Any, asked: Sequence[Asked]) -> dict[str, Any]:
    """A batch; shorter videos are padded, which the masks tell the model."""
    longest = max(len(one.candidates.frames) for one in asked)
    samples: dict[str, Any] = {
        "frames": torch.stack([_padded(one.candidates.frames, longest) for one in asked]),
        "frame_mask": torch.stack(
            [_padded(torch.ones(len(one.candidates.frames), dtype=torch.long), longest) for one in asked]
        ),
        "text_input": [one.question for one in asked],
        "prompt": [prompt_of(model, one) for one in asked],
        "frame_times": torch.stack(
            [_padded(torch.as_tensor(one.candidates.times_s, dtype=torch.float32), longest) for one in asked]
        ),
        "media": [one.candidates.media for one in asked],
        # what is drawn for a question depends on its seed and its text, and on no other row
        "question_id": [f"{one.settings.seed} {one.question}" for one in asked],
    }
    if figure := asked[0].settings.selector.figure:
        samples[figure] = torch.stack([_padded(torch.as_tensor(one.candidates.figure), longest) for one in asked])
    if any(one.subtitles is not None for one in asked):
        samples["subtitles"] = [list(one.subtitles or ()) for one in asked]
        samples["subtitles_window_s"] = [one.settings.subtitles_window_s for one in asked]
    return samples


def _padded(value: Tensor, length: int) -> Tensor:
    return torch.cat([value, value.new_zeros(length - len(value), *value.shape[1:])])


def _kept_flow(model: Any, asked: Sequence[Asked]) -> Tensor | None:
    """[B,T,2,h,w], zeros for rows that do not move; None where nothing moves, or nobody looks at flow."""
    fields = [one.candidates.flow for one in asked]
    grid = next((one.shape[1:] for one in fields if one is not None), None)
    if grid is None or not model.chooser.asks_sampler(asked[0].settings.selector):
        return None
    longest = max(len(one.candidates.frames) for one in asked)
    rows = [_padded(torch.zeros(0, *grid) if one is None else one, longest) for one in fields]
    return torch.stack(rows).to(model.device)


def prompt_of(model: Any, asked: Asked) -> str:
    """Return what the language model reads, with as many of the last turns as it has room for.

    The published demo writes each turn with the whole template, its medium included, and ends an answer with `</s>`.
    """
    token = MEDIA_TOKENS.get(asked.candidates.kind)
    template = model.prompt if token else model.prompt.replace("<video>\n", "").replace("<video>", "")
    template = template.replace("<video>", token or "")

    def turn(question: str) -> str:
        return model.prompts({"text_input": [question]}, template)[0]

    prompt = turn(f"{asked.instructions}\n{asked.question}" if asked.instructions else asked.question)
    room = model.backbone.max_text_tokens
    for question, answer in reversed(asked.history):
        longer = f"{turn(question)}{answer}{END_OF_TURN}{prompt}"
        if len(model.backbone.tokenizer(longer)["input_ids"]) > room:
            break
        prompt = longer
    return prompt


def _prediction(one: Asked, row: int, found: dict[str, Any]) -> Prediction:
    media, count = one.candidates, len(one.candidates.frames)
    times = [round(float(t), 3) for t in media.times_s]
    chosen = [i for i in found["frame_index"][row].tolist() if i >= 0]
    scored = found["scores"][row, :count].tolist() if "scores" in found and count > 1 else None
    logits = {name: found[name][row, :count] for name in ("start_logits", "end_logits") if name in found and count > 1}
    span = Span(*found["span"][row].tolist()) if media.kind == "video" else None
    edges = span.to_seconds(media.times_s, media.duration_s) if span else ()
    seconds = {**one.seconds, **found["seconds"]}
    several = [Span(*s).to_seconds(media.times_s, media.duration_s) for s in found.get("spans", {row: ()})[row]]
    return Prediction(
        question=one.question,
        prediction=found["prediction"][row],
        span=tuple(span) if span else None,
        span_s=tuple(round(edge, 3) for edge in edges) or None,
        frame_index=chosen,
        frame_times_s=[times[i] for i in chosen],
        candidate_times_s=times,
        scores=scored and [None if math.isnan(score) else round(score, 4) for score in scored],
        log_prob=found["log_prob"][row],
        prompt=found["prompt"][row],
        seconds={stage: round(value, 4) for stage, value in seconds.items()},
        spans_s=[(round(start, 3), round(end, 3)) for start, end in several] or None,
        subtitles=found["subtitles"][row] if one.subtitles is not None else None,
        flow=None if media.flow is None else media.flow.numpy(),
        **{name: value.tolist() for name, value in logits.items()},
    )
