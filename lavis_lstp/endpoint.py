"""Asking a server that speaks OpenAI's chat completions: theirs, vLLM's, llama.cpp's, Ollama's.

In: requests, as arguments of `chat.completions.create`. Out: a reply to each, in the order of arrival. The address and
the key come from the environment (OPENAI_BASE_URL, OPENAI_API_KEY) and from nowhere else: what is written into a file
or a command line gets copied.

Rate limits, errors of the server, timeouts and cut connections are retried by the client; what still fails is no reply
and can be asked again. A refusal is a reply. What came is kept by `kept`, in one SQLite file, so that nothing is asked
twice. Judges (`judging/endpoint.py`) and served models (`models/answer/served.py`) use it.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from lavis_lstp.errors import ConfigError, LstpError
from lavis_lstp.files import expanded

KEY, ADDRESS = "OPENAI_API_KEY", "OPENAI_BASE_URL"
DEFAULT_ADDRESS = "https://api.openai.com/v1"
FAILURES_IN_A_ROW = 10
"""After so many failures with no reply between them the endpoint is taken to be down."""
CHARACTERS_PER_TOKEN = 4
"""Of English text, about: a preview's tokenizer, as an endpoint does not say which one is its own."""
_REFUSING_CODES = ("content_filter", "content_policy_violation")
_LOOKS_LIKE_A_KEY = re.compile(
    r"(^|\W)sk-[\w-]{16,}|^--?[\w-]*(key|secret|password|auth|bearer)|(api[-_]?key|token|secret)=|://[^/]*@", re.I
)

Item = TypeVar("Item")


class EndpointError(LstpError, RuntimeError):
    """A server cannot be asked at all: not installed, not allowed, not there."""


class Reply(NamedTuple):
    """What came back.

    body: the response, "" where there is none. refused: the server's words where it refuses to answer. failed: in one
    line why there is no reply.
    """

    body: str = ""
    refused: str | None = None
    failed: str | None = None


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


class Endpoint:
    """A model of a server.

    Args:
        model: as the server calls it.
        asker: what asks, as a user names it, for messages.
        concurrency: requests under way at a time.
        retries: by the client, for each request, waiting as long as the server says.
        timeout_s: for one attempt.
        error: raised where the server cannot be asked.

    Raises:
        ConfigError: an address with a key in it.
        EndpointError: the openai package is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        asker: str,
        concurrency: int = 8,
        retries: int = 6,
        timeout_s: float = 60.0,
        error: type[Exception] = EndpointError,
    ):
        try:
            import openai  # noqa: F401
        except ImportError:
            raise error(f"{asker} needs the openai package: pip install 'lavis_lstp[judge]'") from None
        self.address = address()
        self.model, self.asker, self.error = model, asker, error
        self.concurrency, self.retries, self.timeout_s = concurrency, retries, timeout_s

    def ask(
        self,
        items: Iterable[Item],
        request: Callable[[Item], Mapping[str, Any]],
        on_reply: Callable[[Item, Reply], str | None],
        refused_at_all: Callable[[str], str] = str,
        on_piece: Callable[[Item, str], bool] | None = None,
    ) -> None:
        """Ask all, calling `on_reply` for each as it is answered, in this thread.

        Args:
            request: arguments of `chat.completions.create`, without the model.
            on_reply: keeps the reply; returns in one line why it is none after all, else None.
            refused_at_all: turns the server's words into those of the error where it refuses the request itself.
            on_piece: asks the server for answers in pieces, and is called with each piece of text; where it returns
                False, the rest of that answer is not waited for, and its reply is empty.

        Raises:
            ConfigError: no key in the environment.
            EndpointError: or `error`: the server does not know the key or the model, does not take such requests, or
                gives no reply any more. Replies that came before have been handed over.
        """
        if not os.environ.get(KEY):
            raise ConfigError(
                f"{self.asker} takes the key from the environment, and {KEY} is not set; for an endpoint that wants "
                "none set it to any word"
            )
        asyncio.run(self._ask(iter(items), request, on_reply, refused_at_all, on_piece))

    async def _ask(
        self,
        waiting: Iterator[Item],
        request: Callable[[Item], Mapping[str, Any]],
        on_reply: Callable[[Item, Reply], str | None],
        refused_at_all: Callable[[str], str],
        on_piece: Callable[[Item, str], bool] | None,
    ) -> None:
        import openai

        failures = 0

        async def work(client: openai.AsyncOpenAI) -> None:
            nonlocal failures
            for item in waiting:  # shared by the workers: each is taken once
                piece = None if on_piece is None else partial(on_piece, item)
                failed = on_reply(item, await self._reply(client, request(item), refused_at_all, piece))
                failures = failures + 1 if failed else 0
                if failures >= FAILURES_IN_A_ROW:
                    raise self.error(
                        f"{self.address} failed {failures} times in a row, last: {failed}; what it has said so far is "
                        "in the cache, call again to go on"
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

    async def _reply(
        self,
        client: Any,
        request: Mapping[str, Any],
        refused_at_all: Callable[[str], str],
        on_piece: Callable[[str], bool] | None,
    ) -> Reply:
        import openai

        try:
            if on_piece is not None:
                return await self._in_pieces(client, request, on_piece)
            raw = await client.chat.completions.with_raw_response.create(model=self.model, **request)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise self.error(f"{self.address} refuses {refused_at_all(said(error))}") from None
        except openai.APIError as error:
            if getattr(error, "code", None) in _REFUSING_CODES:
                return Reply(refused=said(error))
            return Reply(failed=said(error))
        return Reply(raw.text)

    async def _in_pieces(self, client: Any, request: Mapping[str, Any], on_piece: Callable[[str], bool]) -> Reply:
        """The reply as one response, of an answer that was sent as a stream of events."""
        message: dict[str, str | None] = {"content": None, "refusal": None}
        more: dict[str, Any] = {}
        told = {"stream": True, "stream_options": {"include_usage": True}}

        async def read(events: Any) -> bool:
            async for event in events:
                more.update({"usage": event.usage.model_dump()} if event.usage else {})
                for choice in event.choices[:1]:
                    more.update({"finish_reason": choice.finish_reason} if choice.finish_reason else {})
                    for name in message:
                        if text := getattr(choice.delta, name, None):
                            message[name] = (message[name] or "") + text
                    if choice.delta.content and not on_piece(choice.delta.content):
                        return False
            return True

        try:
            async with await client.chat.completions.create(model=self.model, **told, **request) as events:
                if not await asyncio.wait_for(read(events), self.timeout_s):
                    return Reply()
        except (asyncio.TimeoutError, ValueError, AttributeError, _http().HTTPError) as error:
            # what was handed out cannot be taken back, so the client does not ask again
            return Reply(failed=f"the stream broke off ({said(error)})")
        if "finish_reason" not in more:
            return Reply(failed="the stream ended before the answer did")
        choice = {"message": message, "finish_reason": more.pop("finish_reason")}
        return Reply(json.dumps({"choices": [choice], **more}))


def message_of(body: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The response of the documented form, and its first choice; its message has text or null, and a refusal or null.

    Raises:
        ValueError: it is not of that form, half of one for example; the text begins what came.
    """
    try:
        response = json.loads(body)
        choice = response["choices"][0]
        message = choice["message"]
        if not isinstance(message.get("content"), str | None) or not isinstance(message.get("refusal"), str | None):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        text = " ".join(body.split())[:200]
        raise ValueError(f"no complete chat completion came back: {text}") from None
    return response, choice


def cost_line(tokens_in: int, tokens_out: int, price_in: float | None, price_out: float | None) -> str:
    """Return a few words on tokens and cost; prices are of a million tokens."""
    cost = "cost unknown without --price-in and --price-out"
    if price_in is not None and price_out is not None:
        money = (tokens_in * price_in + tokens_out * price_out) / 1e6
        cost = f"about {money:{',.2f' if money >= 1 else '.2g'}} at these prices"
    return f"about {tokens_in:,} tokens in and {tokens_out:,} out; {cost}"


def _http() -> Any:
    """The package that the openai package speaks HTTP by: httpx, or httpx2 from openai 3 on."""
    import openai

    return importlib.import_module(openai.DefaultAsyncHttpxClient.__bases__[0].__module__.partition(".")[0])


def _http_client(timeout_s: float) -> Any:
    """The openai package's own, but an attempt ends: its timeout begins anew with each byte that comes."""
    import openai

    http = _http()

    class Client(openai.DefaultAsyncHttpxClient):
        async def send(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return await asyncio.wait_for(super().send(*args, **kwargs), timeout_s)
            except asyncio.TimeoutError:
                raise http.ReadTimeout(f"no whole answer in {timeout_s:g} s") from None

    # A redirect would take the key, or at least the questions, to an address that nobody named.
    return Client(timeout=timeout_s, follow_redirects=False)


def address() -> str:
    """The server's, from the environment.

    Raises:
        ConfigError: it is none, or has something in it that is no part of an address.
    """
    given = os.environ.get(ADDRESS) or DEFAULT_ADDRESS
    try:
        parts = urlsplit(given)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.username or parts.password or parts.query or parts.fragment or "sk-" in parts.path:
        raise ConfigError(
            f"{ADDRESS} must be an address like {DEFAULT_ADDRESS}, with no user, key, '?' or '#' in it; the key is "
            f"taken from {KEY}"
        )
    return given.rstrip("/")


def said(error: Exception) -> str:
    """An error in one line, without the key, which some servers repeat in full or in part."""
    text = " ".join(str(error).split())
    if key := os.environ.get(KEY):
        text = text.replace(key, "[key]")
    text = re.sub(r"sk-[\w*.-]+", "[key]", text)
    return f"{type(error).__name__}: {storable(text[:300])}"


def storable(text: str | None) -> str:
    """As much of what a server said as is kept; of half a character, which JSON may hold, '?' stays."""
    return (text or "")[:1000].encode("utf-8", "replace").decode()


# ---- what is kept ---------------------------------------------------------------------------------------------------


def kept(path: str | os.PathLike, table: str, version: int, what: str, timeout_s: float = 60.0) -> sqlite3.Connection:
    """An SQLite file that several processes write to at once; each row is on disk before the next question is put.

    Args:
        path: made where there is none. On a local disk: SQLite's log does not work over a network.
        table: the statement that makes its table.
        what: of what it is a cache, for messages.
        timeout_s: how long to wait for another process that writes.

    Raises:
        ConfigError: the file is no cache of this version.
    """
    path = expanded(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, timeout=timeout_s, isolation_level=None, check_same_thread=False)
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, version):
            raise ConfigError(f"{path}: cache of version {found}, expected {version}; name another --cache")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute(table)
        db.execute(f"PRAGMA user_version={version}")
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"{path}: cannot be used as a cache of {what} ({error}); name another") from None
    return db


class KeptTexts:
    """Texts by key, in a file; of two on one key the first stays."""

    VERSION = 1
    TABLE = "CREATE TABLE IF NOT EXISTS texts (key TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID"

    def __init__(self, path: str | os.PathLike, what: str):
        self.path, self._lock = path, threading.Lock()
        self._db = kept(path, self.TABLE, self.VERSION, what)

    def get(self, key: str) -> str | None:
        with self._lock:
            row = self._db.execute("SELECT text FROM texts WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def put(self, key: str, text: str) -> None:
        try:
            with self._lock, self._db:
                self._db.execute("INSERT OR IGNORE INTO texts VALUES (?, ?)", (key, text))
        except sqlite3.Error as error:
            raise ConfigError(f"{self.path}: cannot keep an answer ({error}); mend that and call again") from None
