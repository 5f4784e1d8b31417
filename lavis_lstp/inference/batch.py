"""The one place where questions meet the model: a batch of prepared questions in, predictions out.

Flow that was kept stands in for the chooser's, the selector of the call for the model's own, and a stopping criterion
sees each new token of each row: it hands out text as it comes, and ends the rows that nobody waits for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lavis_lstp.inference.prediction import Asked, Prediction
from lavis_lstp.models.where.chooser import Choice
from lavis_lstp.schema import Span

END_OF_TURN = "</s>"
"""What the published demo puts behind each earlier answer, whatever the language model."""
MEDIA_TOKENS = {"video": "<video>", "image": "<image>"}


def answer_batch(model: Any, asked: Sequence[Asked]) -> list[Prediction]:
    """Predictions of questions with equal settings; the caller sees to it that nobody else uses the model.

    Rows that are given up while the language model writes are cut short there.
    """
    settings = asked[0].settings
    samples = _samples(model, asked)
    watch = _Watch(model, asked)
    flow = partial(_kept_flow, asked, device=model.device)
    with _replaced(model.chooser, selector=settings.selector, flow=flow):
        found = model.answer(samples, watched_by={"stopping_criteria": [watch]}, **settings.generation)
    rows = [_prediction(one, row, found) for row, one in enumerate(asked)]
    for row, prediction in enumerate(rows):
        watch.finish(row, prediction.prediction)
    return rows


def choose(model: Any, asked: Asked, rule_settings: Mapping[str, Any]) -> Choice:
    """The frames that would be shown for one question, without the answer; see `answer_batch`.

    Args:
        rule_settings: of a selector over scores.
    """
    selector = asked.settings.selector.with_settings(rule_settings) if rule_settings else asked.settings.selector
    with _replaced(model.chooser, selector=selector, flow=partial(_kept_flow, [asked])), torch.no_grad():
        return model.chooser(_samples(model, [asked]))


@contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Other attributes for a while."""
    before = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)


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
        "media": [one.candidates.media for one in asked],
        # what is drawn for a question depends on its seed and its text, and on no other row
        "question_id": [f"{one.settings.seed} {one.question}" for one in asked],
    }
    if any(one.candidates.codec_flow is not None for one in asked):
        samples["flow"] = _kept_flow(asked, samples, name="codec_flow")
    return samples


def _padded(value: Tensor, length: int) -> Tensor:
    return torch.cat([value, value.new_zeros(length - len(value), *value.shape[1:])])


def _kept_flow(asked: Sequence[Asked], samples: Any, *, name: str = "flow", device: Any = None) -> Tensor:
    """[B,T,2,h,w]; zeros for rows that do not move."""
    fields = [getattr(one.candidates, name) for one in asked]
    grid = next(one.shape[1:] for one in fields if one is not None)
    longest = samples["frames"].shape[1]
    rows = [_padded(torch.zeros(0, *grid) if one is None else one, longest) for one in fields]
    return torch.stack(rows).to(device)


def prompt_of(model: Any, asked: Asked) -> str:
    """What the language model reads, with as many of the last turns as it has room for.

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
    logits = {name: found[name][row, :count] for name in ("start_logits", "end_logits") if name in found and count > 1}
    span = Span(*found["span"][row].tolist()) if media.kind == "video" else None
    edges = span.to_seconds(media.times_s, media.duration_s) if span else ()
    # the model's own "flow" is the look at what was kept
    seconds = {**one.seconds, **{stage: value for stage, value in found["seconds"].items() if stage != "flow"}}
    return Prediction(
        question=one.question,
        prediction=found["prediction"][row],
        span=tuple(span) if span else None,
        span_s=tuple(round(edge, 3) for edge in edges) or None,
        frame_index=chosen,
        frame_times_s=[times[i] for i in chosen],
        candidate_times_s=times,
        scores=[round(score, 4) for score in found["scores"][row, :count].tolist()] if logits else None,
        log_prob=found["log_prob"][row],
        prompt=found["prompt"][row],
        seconds={stage: round(value, 4) for stage, value in seconds.items()},
        flow=None if media.flow is None else media.flow.numpy(),
        **{name: value.tolist() for name, value in logits.items()},
    )


class _Watch:
    """A stopping criterion of transformers: text as it comes, row by row, and an end to rows that were given up."""

    def __init__(self, model: Any, asked: Sequence[Asked]):
        self.tokenizer, self.asked = model.backbone.tokenizer, asked
        self.said = [""] * len(asked)

    def __call__(self, input_ids: Tensor, scores: Any = None, **_: Any) -> Tensor:
        """ids of the answers so far [B,S], or [B * beams,S] -> bool, True where a row is to end."""
        beams = len(input_ids) // len(self.asked)
        if beams == 1:
            for row, one in enumerate(self.asked):
                if one.on_text is not None:
                    text = self.tokenizer.decode(input_ids[row], skip_special_tokens=True)
                    self._say(row, text.lstrip(), whole_words=True)
        ended = [one.cancel.is_set() for one in self.asked for _ in range(beams)]
        return torch.tensor(ended, device=input_ids.device)

    def finish(self, row: int, text: str) -> None:
        if self.asked[row].on_text is not None and not self.asked[row].cancel.is_set():
            self._say(row, text, whole_words=False)

    def _say(self, row: int, text: str, *, whole_words: bool) -> None:
        """What is new in a row. The last word is held back until its end: later tokens may still change it."""
        text = text[: text.rfind(" ") + 1] if whole_words else text
        text = text.rstrip() if whole_words else text
        if len(text) > len(self.said[row]) and text.startswith(self.said[row]):
            self.asked[row].on_text(text[len(self.said[row]) :])
            self.said[row] = text
