"""Lines of subtitles in a prompt: before the question, as many as there is room for, and never a mark.

In: a finished prompt, the question in it, and lines, the most important first. Out: the prompt with the lines in the
order of time. An answerer cuts a prompt at its end, where the question stands; so lines are left out before that, and
counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lavis_lstp.errors import ConfigError

HEAD = "Subtitles:"


def shown_in(
    prompt: str, question: str, lines: Sequence[tuple[float, float, str]], answerer: Any
) -> tuple[str, dict[str, int]]:
    """The prompt with the lines that fit.

    Args:
        lines: (start_s, end_s, text), those first that are left out last.
        answerer: an `Answerer` with a tokenizer; its `max_text_tokens` is the room.

    Returns:
        The prompt, and the number of lines that it has, and that it had no room for (`left_out`).

    Raises:
        ConfigError: the prompt does not contain the question as it is.
    """
    if not lines:
        return prompt, {"lines": 0, "left_out": 0}
    before, found, behind = prompt.rpartition(question)
    if not (question and found):
        raise ConfigError(f"subtitles stand before the question, and the prompt {prompt[:80]!r} does not contain it")
    tokenizer, marks = answerer.tokenizer, _marks(answerer)
    texts = []
    for *_, text in lines:
        for mark in marks:
            text = text.replace(mark, " ")
        texts.append(" ".join(text.split()))

    def with_first(count: int) -> str:
        kept = sorted(range(count), key=lambda i: lines[i])
        return "\n".join([before + HEAD, *(texts[i] for i in kept), found + behind]) if count else prompt

    def length(text: str) -> int:
        return len(tokenizer(text, verbose=False)["input_ids"])

    low, high = 0, len(texts)  # the largest number of lines that fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if length(with_first(middle)) <= answerer.max_text_tokens else (low, middle - 1)
    return with_first(low), {"lines": low, "left_out": len(texts) - low}


def _marks(answerer: Any) -> list[str]:
    """Texts that the tokenizer, or the model, takes for something else than text; the longest first."""
    found = set(getattr(answerer, "_marks", ()))
    for tokenizer in (answerer.tokenizer, getattr(answerer, "qformer_tokenizer", None)):
        if tokenizer is not None:
            added = getattr(tokenizer, "added_tokens_decoder", {}).values()
            found |= {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    return sorted((mark for mark in found if mark.strip()), key=len, reverse=True)
