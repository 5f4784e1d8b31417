"""A judge behind a server that speaks OpenAI's chat completions; `lavis_lstp.endpoint` asks it.

In: cases. Out: a verdict for each, in the order of arrival. A request that fails is no verdict ("failed") and is asked
again at the next call. A refusal or a text that is not exactly the JSON asked for is an answer, although no verdict:
kept, counted as wrong and never asked again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from lavis_lstp.endpoint import (
    CHARACTERS_PER_TOKEN,
    FAILURES_IN_A_ROW,
    Endpoint,
    Reply,
    message_of,
    refuse_keys,
    storable,
)
from lavis_lstp.errors import LstpError
from lavis_lstp.judging.prompts import Prompt
from lavis_lstp.judging.verdict import FAILED, REFUSED, SCHEMA, Case, Verdict, identity, parse_verdict

__all__ = ["FAILURES_IN_A_ROW", "EndpointJudge", "JudgeError", "OnVerdict", "refuse_keys"]

MAX_ANSWER_TOKENS = 256
"""Ten times what a verdict takes; bounds what a model that rambles can cost."""
TOKENS_OF_A_VERDICT = 16
_TOKENS = ("prompt_tokens", "completion_tokens")

OnVerdict = Callable[[Case, Verdict], None]


class JudgeError(LstpError, RuntimeError):
    """A judge cannot be asked at all: not installed, not allowed, not there."""


class EndpointJudge:
    """Asks a model of an OpenAI-compatible endpoint.

    Args:
        model: as the endpoint calls it.
        prompt: what is asked.
        seed: given to the endpoint, at temperature 0.
        how: concurrency, retries and timeout_s of `Endpoint`.

    Raises:
        ConfigError: an address with a key in it.
        JudgeError: the openai package is not installed.
    """

    def __init__(self, model: str, prompt: Prompt, *, seed: int = 0, **how: Any):
        self.endpoint = Endpoint(model, asker="--judge openai", error=JudgeError, **how)
        self.prompt, self.seed = prompt, seed
        self.identity = identity(
            "openai",
            model=model,
            endpoint=self.endpoint.address,
            prompt=f"{prompt.name}:{prompt.digest}",
            temperature=0,
            seed=seed,
            max_tokens=MAX_ANSWER_TOKENS,
        )

    def tokens(self, cases: Sequence[Case]) -> tuple[int, int]:
        """About how many tokens asking takes, in and out, retries aside."""
        overhead = len(json.dumps(SCHEMA))
        characters = sum(overhead + sum(map(len, self.prompt.render(case))) for case in cases)
        return characters // CHARACTERS_PER_TOKEN, TOKENS_OF_A_VERDICT * len(cases)

    def judge(self, cases: Sequence[Case], on_verdict: OnVerdict) -> None:
        """Ask all, calling `on_verdict` for each as it is answered, in this thread.

        Raises:
            ConfigError: no key in the environment.
            JudgeError: the endpoint does not know the key or the model, or gives no answer any more. Verdicts that
                came before have been handed over.
        """

        def kept(case: Case, reply: Reply) -> str | None:
            verdict = self._verdict(reply)
            on_verdict(case, verdict)
            return verdict.note["error"] if verdict.status == FAILED else None

        self.endpoint.ask(cases, self._request, kept, lambda said: f"to judge with '{self.endpoint.model}': {said}")

    def _request(self, case: Case) -> dict[str, Any]:
        system, user = self.prompt.render(case)
        return {
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA},
            },
            "temperature": 0,
            "seed": self.seed,
            "max_completion_tokens": MAX_ANSWER_TOKENS,
        }

    def _verdict(self, reply: Reply) -> Verdict:
        if reply.refused is not None:
            return Verdict(self.identity, REFUSED, note={"text": reply.refused})
        if reply.failed is not None:
            return Verdict(self.identity, FAILED, note={"error": reply.failed})
        return self._read(reply.body)

    def _read(self, body: str) -> Verdict:
        """The verdict in a response of the documented form; any other, half of one too, is the endpoint's failure."""
        try:
            response, choice = message_of(body)
        except ValueError as error:
            return Verdict(self.identity, FAILED, note={"error": str(error)})
        content, refusal = choice["message"].get("content"), choice["message"].get("refusal")
        note: dict[str, Any] = {}
        for name, key in (("model", "model"), ("fingerprint", "system_fingerprint")):
            if isinstance(response.get(key), str):
                note[name] = storable(response[key])
        usage = response.get("usage")
        if isinstance(usage, dict) and all(isinstance(usage.get(key), int) for key in _TOKENS):
            note["tokens"] = [usage[key] for key in _TOKENS]
        if refusal or choice.get("finish_reason") == "content_filter":
            return Verdict(self.identity, REFUSED, note={**note, "text": storable(refusal or content)})
        return parse_verdict(content, self.identity, note)
