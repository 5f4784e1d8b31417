"""A judge behind an endpoint that speaks OpenAI's chat completions: theirs, vLLM's, llama.cpp's, Ollama's.

In: cases. Out: a verdict for each, in the order of arrival. The address and the key come from the environment
(OPENAI_BASE_URL, OPENAI_API_KEY) and from nowhere else: what is written into a file or a command line gets copied.

Rate limits, errors of the server, timeouts and cut connections are retried by the client; what still fails is no
verdict ("failed") and is asked again at the next call. A refusal or a text that is not exactly the JSON asked for is an
answer, although no verdict: kept, counted as wrong and never asked again.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from lavis_lstp.errors import ConfigError, LstpError
from lavis_lstp.judging.prompts import Prompt
from lavis_lstp.judging.verdict import FAILED, REFUSED, SCHEMA, Case, Verdict, identity, parse_verdict, storable

KEY, ADDRESS = "OPENAI_API_KEY", "OPENAI_BASE_URL"
DEFAULT_ADDRESS = "https://api.openai.com/v1"
MAX_ANSWER_TOKENS = 256
"""Ten times what a verdict takes; bounds what a model that rambles can cost."""
TOKENS_OF_A_VERDICT = 16
CHARACTERS_PER_TOKEN = 4
"""Of English text, about: the preview's tokenizer, as an endpoint does not say which one is its own."""
FAILURES_IN_A_ROW = 10
"""After so many failures with no verdict between them the endpoint is taken to be down."""
_TOKENS = ("prompt_tokens", "completion_tokens")
_REFUSING_CODES = ("content_filter", "content_policy_violation")
_LOOKS_LIKE_A_KEY = re.compile(
    r"(^|\W)sk-[\w-]{16,}|^--?[\w-]*(key|secret|password|auth|bearer)|(api[-_]?key|token|secret)=|://[^/]*@", re.I
)

OnVerdict = Callable[[Case, Verdict], None]


class JudgeError(LstpError, RuntimeError):
    """A judge cannot be asked at all: not installed, not allowed, not there."""


def refuse_keys(words: Sequence[str]) -> None:
    """Keys belong into the environment.

    Raises:
        ConfigError: a word of a command line is one or names one; the message does not repeat it.
    """
    key = os.environ.get(KEY, "")
    for position, word in enumerate(words, 1):
        if _LOOKS_LIKE_A_KEY.search(word) or (len(key) >= 8 and key in word):
            raise ConfigError(
                f"word {position} of the command line looks like a key; a key is taken from the environment variable "
                f"{KEY} only. If that was a real one, it is in your shell's history now: replace it"
            )


class EndpointJudge:
    """Asks a model of an OpenAI-compatible endpoint.

    Args:
        model: as the endpoint calls it.
        prompt: what is asked.
        seed: given to the endpoint, at temperature 0.
        concurrency: requests under way at a time.
        retries: by the client, for each request, waiting as long as the server says.
        timeout_s: for one attempt.

    Raises:
        ConfigError: an address with a key in it.
        JudgeError: the openai package is not installed.
    """

    def __init__(
        self,
        model: str,
        prompt: Prompt,
        *,
        seed: int = 0,
        concurrency: int = 8,
        retries: int = 6,
        timeout_s: float = 60.0,
    ):
        try:
            import openai  # noqa: F401
        except ImportError:
            raise JudgeError("--judge openai needs the openai package: pip install 'lavis_lstp[judge]'") from None
        self.address = _address()
        self.model, self.prompt, self.seed = model, prompt, seed
        self.concurrency, self.retries, self.timeout_s = concurrency, retries, timeout_s
        self.identity = identity(
            "openai",
            model=model,
            endpoint=self.address,
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
        if not os.environ.get(KEY):
            raise ConfigError(
                f"--judge openai takes the key from the environment, and {KEY} is not set; for an endpoint that wants "
                "none set it to any word"
            )
        asyncio.run(self._judge(iter(cases), on_verdict))

    async def _judge(self, waiting: Iterator[Case], on_verdict: OnVerdict) -> None:
        import openai

        failures = 0

        async def work(client: openai.AsyncOpenAI) -> None:
            nonlocal failures
            for case in waiting:  # shared by the workers: each case is taken once
                verdict = await self._ask(client, case)
                on_verdict(case, verdict)
                failures = failures + 1 if verdict.status == FAILED else 0
                if failures >= FAILURES_IN_A_ROW:
                    raise JudgeError(
                        f"{self.address} failed {failures} times in a row, last: {verdict.note['error']}; verdicts so "
                        "far are in the cache, call again to go on"
                    )

        # Environment proxies and certificates are the client's business; so is the key, which it reads itself.
        async with openai.AsyncOpenAI(
            base_url=self.address,
            max_retries=self.retries,
            timeout=self.timeout_s,
            http_client=_http_client(self.timeout_s),
        ) as client:
            workers = [asyncio.create_task(work(client)) for _ in range(self.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _ask(self, client: Any, case: Case) -> Verdict:
        import openai

        system, user = self.prompt.render(case)
        try:
            raw = await client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=[{"role": "system", "content": system}, {"role": "user", "content": user}],
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA},
                },
                temperature=0,
                seed=self.seed,
                max_completion_tokens=MAX_ANSWER_TOKENS,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise JudgeError(f"{self.address} refuses to judge with '{self.model}': {_said(error)}") from None
        except openai.APIError as error:
            if getattr(error, "code", None) in _REFUSING_CODES:
                return Verdict(self.identity, REFUSED, note={"text": _said(error)})
            return Verdict(self.identity, FAILED, note={"error": _said(error)})
        return self._read(raw.text)

    def _read(self, body: str) -> Verdict:
        """The verdict in a response of the documented form; any other, half of one too, is the endpoint's failure."""
        try:
            response = json.loads(body)
            choice = response["choices"][0]
            message = choice["message"]
            content, refusal = message.get("content"), message.get("refusal")
            if not isinstance(content, str | None) or not isinstance(refusal, str | None):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            text = " ".join(body.split())[:200]
            return Verdict(self.identity, FAILED, note={"error": f"no complete chat completion came back: {text}"})
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


def _http_client(timeout_s: float) -> Any:
    """The openai package's own, but an attempt ends: its timeout begins anew with each byte that comes."""
    import openai

    own = openai.DefaultAsyncHttpxClient
    http = importlib.import_module(own.__bases__[0].__module__.partition(".")[0])  # httpx, or httpx2 from openai 3 on

    class Client(own):
        async def send(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return await asyncio.wait_for(super().send(*args, **kwargs), timeout_s)
            except asyncio.TimeoutError:
                raise http.ReadTimeout(f"no whole answer in {timeout_s:g} s") from None

    # A redirect would take the key, or at least the questions, to an address that nobody named.
    return Client(timeout=timeout_s, follow_redirects=False)


def _address() -> str:
    address = os.environ.get(ADDRESS) or DEFAULT_ADDRESS
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.username or parts.password or parts.query or parts.fragment or "sk-" in parts.path:
        raise ConfigError(
            f"{ADDRESS} must be an address like {DEFAULT_ADDRESS}, with no user, key, '?' or '#' in it; the key is "
            f"taken from {KEY}"
        )
    return address.rstrip("/")


def _said(error: Exception) -> str:
    """An error in one line, without the key, which some servers repeat in full or in part."""
    text = " ".join(str(error).split())
    if key := os.environ.get(KEY):
        text = text.replace(key, "[key]")
    text = re.sub(r"sk-[\w*.-]+", "[key]", text)
    return f"{type(error).__name__}: {storable(text[:300])}"
