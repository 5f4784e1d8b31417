"""The server: OpenAI's chat completions, models and files, health and metrics, and who may ask.

In: a predictor, a folder for uploads, limits, keys. Out: a FastAPI application, which uvicorn serves. FastAPI and not
LitServe: the page is a Gradio application, which is mounted in FastAPI and brings both packages along, so one process
serves both from one model; LitServe starts worker processes, each with a model of its own, and batches inside of them
where a page in another process has no part. FastAPI also bounds bodies and writes the OpenAPI document that the tests
take hostile requests from.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lavis_lstp import __version__
from lavis_lstp.data.subtitles import form_of, parse_subtitles
from lavis_lstp.errors import LstpError
from lavis_lstp.inference.prediction import Cancelled, Prediction
from lavis_lstp.inference.predictor import Predictor
from lavis_lstp.serving.files import FileStore, NoSuchFile, TooLarge
from lavis_lstp.serving.limits import Limits
from lavis_lstp.serving.line import Full, Line, Stopping, Ticket
from lavis_lstp.serving.media import MediaReader
from lavis_lstp.serving.metrics import Metrics
from lavis_lstp.serving.protocol import ChatRequest, Question, cut, error_body, evidence, head, read_request, usage

logger = logging.getLogger(__name__)

CLIENT_GONE = 499  # nginx's status for a client that went away; nobody reads it
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1", "[")
MORE_BYTES = 1 << 20  # of a body, beside the file in it
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
"""No page of this server loads anything from elsewhere, whatever an answer or a file's name contains."""


class Guard:
    """Refuses what another web page sends through a user's browser, and sets the headers of every answer."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1")).netloc.encode("latin-1") != headers.get(b"host"):
            refused = JSONResponse(error_body("requests from other web pages are refused", "permission_error"), 403)
            return await refused(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        return await self.app(scope, receive, with_headers)


class Server:
    """The state that all endpoints share.

    Args:
        predictor: what answers.
        name: of the model, in answers and in /v1/models.
        files: a folder for uploads.
        keys: of clients; without any, everybody who reaches the server may ask.
        hosts: whose addresses are fetched.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        name: str,
        files: Path,
        keys: Sequence[str] = (),
        hosts: Sequence[str] = (),
        limits: Limits | None = None,
    ):
        self.predictor, self.name, self.keys = predictor, name, tuple(keys)
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.line = Line(predictor, self.limits, self.metrics)
        self.files = FileStore(files, self.limits)
        self.media = MediaReader(self.files, hosts, self.limits)
        self.started = int(time.time())
        kept = predictor.reader.kept
        self.metrics.watch("lstp_waiting", "Questions that wait or are answered", lambda: len(self.line))
        self.metrics.watch("lstp_cache_bytes", "Bytes of candidates and flow that are kept", lambda: kept.num_bytes)
        self.metrics.watch("lstp_cache_hits", "Look-ups that found what was kept", lambda: kept.hits)
        self.metrics.watch("lstp_cache_misses", "Look-ups that had to read", lambda: kept.misses)

    def has_key(self, given: str) -> bool:
        """Return whether a key is one of the server's, in a time that does not depend on where it differs."""
        same = [hmac.compare_digest(given.encode(), key.encode()) for key in self.keys]
        return any(same)

    def owner(self, request: Request, given: str | None) -> str:
        """Return a digest that stands for a client: of its key, or of its address where no keys are set.

        Raises:
            HTTPException: 401, the key is missing or wrong.
        """
        if not self.keys:
            return _digest(f"address {request.client.host if request.client else ''}")
        if given is None or not self.has_key(given):
            raise HTTPException(401, "the API key is missing or wrong (Authorization: Bearer KEY)")
        return _digest(f"key {given}")

    async def join(self, owner: str, asked: Question, stream: bool) -> Ticket:
        """Read the media that a question names, and return its place in the line."""
        settings = self.predictor.settings(**asked.settings)
        medium = await self.media.read_all(owner, asked.media, "the video or picture")
        how = {"history": asked.history, "instructions": asked.instructions, "settings": settings, "stream": stream}
        if asked.subtitles:  # a text, and never the name of a file
            given = (asked.subtitles, form_of(asked.subtitles), "subtitles")
            how["subtitles"] = await asyncio.to_thread(parse_subtitles, *given)
        return self.line.join(medium, asked.question, name="the video or picture", **how)

    def prompt_tokens(self, prompt: str) -> int:
        return len(self.predictor.model.backbone.tokenizer(prompt)["input_ids"])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def build_app(server: Server, *, loopback: bool = True, with_page: Callable[[FastAPI], FastAPI] | None = None):
    """The application.

    Args:
        loopback: only this machine is served, so requests to another host name are refused: a web page may otherwise
            reach the server under a name of its own (DNS rebinding).
        with_page: mounts the page.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.line.start()
        sweeping = asyncio.create_task(_delete_old(server.files))
        yield
        sweeping.cancel()
        await server.line.stop()

    app = FastAPI(
        title="lavis_lstp",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        max_body_size=server.limits.upload_bytes + MORE_BYTES,
    )
    app.state.server = server
    app.add_middleware(Guard)
    if loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK), www_redirect=False)
    _handle_errors(app)
    _add_chat(app, server)
    _add_files(app, server)
    _add_facts(app, server)
    return with_page(app) if with_page else app


async def _delete_old(files: FileStore) -> None:
    while True:
        await asyncio.to_thread(files.delete_old)
        await asyncio.sleep(600)


# ---- errors ---------------------------------------------------------------------------------------------------------


def _answer(error: Exception) -> JSONResponse:
    """Return an error as one line in OpenAI's form; the details of our own faults go to the log alone."""
    if isinstance(error, Full):
        headers = {"Retry-After": str(error.retry_after_s)}
        return JSONResponse(error_body(str(error), "rate_limit_error", "queue_full"), 429, headers)
    for kind, status in ((Stopping, 503), (NoSuchFile, 404), (TooLarge, 413), (Cancelled, CLIENT_GONE)):
        if isinstance(error, kind):
            return JSONResponse(error_body(str(error), "invalid_request_error"), status)
    if isinstance(error, LstpError):
        return JSONResponse(error_body(str(error), "invalid_request_error"), 400)
    logger.error("a request failed", exc_info=error)
    return JSONResponse(error_body("internal error; the server's log has more", "server_error"), 500)


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(LstpError)
    async def known(_: Request, error: LstpError) -> JSONResponse:
        return _answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(error_body(f"{place[:200]}: {first['msg']}", "invalid_request_error"), 400)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        kind = "authentication_error" if error.status_code == 401 else "invalid_request_error"
        return JSONResponse(error_body(str(error.detail), kind), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        return _answer(error)


# ---- endpoints ------------------------------------------------------------------------------------------------------

_bearer = HTTPBearer(auto_error=False)
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
FAILS = {status: {"description": text} for status, text in (
    (400, "cannot be used; one line on why"), (401, "no key"), (403, "from another web page"), (404, "no such thing"),
    (413, "too large"), (429, "the line is full; Retry-After says when to ask again"), (503, "the server is stopping"),
)}  # fmt: skip


def _owner(request: Request, bearer: Bearer) -> str:
    return request.app.state.server.owner(request, bearer.credentials if bearer else None)


Owner = Annotated[str, Depends(_owner)]


def _add_chat(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions", responses=FAILS, max_body_size=server.limits.inline_bytes)
    async def chat_completions(body: ChatRequest, request: Request, owner: Owner) -> Response:
        """Answer a question about a video, a picture or nothing; streams server-sent events with `stream: true`."""
        asked = read_request(body, server.limits)
        ticket = await server.join(owner, asked, bool(body.stream) and not asked.stops)
        await _or_gone(request, ticket.ready, lambda: server.line.give_up(ticket))
        answer_id = f"chatcmpl-{secrets.token_hex(12)}"
        if body.stream:
            chunks = _chunks(server, ticket, request, body, asked, answer_id)
            return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        found = await _or_gone(request, ticket.result, lambda: server.line.give_up(ticket))
        message = {"role": "assistant", "content": cut(found.prediction, asked.stops), "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": _reason(server, found, ticket), "logprobs": None}
        return JSONResponse(
            {
                **head("chat.completion", answer_id, server.name),
                "choices": [choice],
                "usage": usage(server.prompt_tokens(found.prompt), found),
                "lstp": evidence(found),
            }
        )


async def _or_gone(request: Request, future: asyncio.Future, give_up: Callable[[], None]) -> Any:
    """Return the result of `future`; where the client goes away before, its place is freed."""
    leaving = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait([future, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            give_up()
        return await future
    except asyncio.CancelledError:
        give_up()
        raise
    finally:
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _reason(server: Server, found: Prediction, ticket: Ticket) -> str:
    most = {**server.predictor.model.generation, **ticket.asked.settings.generation}.get("max_new_tokens")
    return "length" if most is not None and found.log_prob["tokens"] >= most else "stop"


async def _chunks(
    server: Server, ticket: Ticket, request: Request, body: ChatRequest, asked: Question, answer_id: str
) -> AsyncIterator[str]:
    """Server-sent events: pieces of the answer, its evidence, and [DONE]; an error is an event, too."""

    def event(value: Any) -> str:
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return event({**head("chat.completion.chunk", answer_id, server.name), "choices": [choice], **more})

    leaving = asyncio.create_task(_gone(request))
    leaving.add_done_callback(lambda task: task.cancelled() or server.line.give_up(ticket))
    try:
        yield chunk({"role": "assistant", "content": ""})
        async for piece in ticket.pieces():
            if not asked.stops:
                yield chunk({"content": piece})
        try:
            found = await ticket.result
        except Exception as error:  # the status has been sent: what an answer would carry is an event
            yield f"data: {_answer(error).body.decode()}\n\n"
            return
        if asked.stops:
            yield chunk({"content": cut(found.prediction, asked.stops)})
        yield chunk({}, _reason(server, found, ticket), lstp=evidence(found))
        if (body.stream_options or {}).get("include_usage"):
            last = {"choices": [], "usage": usage(server.prompt_tokens(found.prompt), found)}
            yield event({**head("chat.completion.chunk", answer_id, server.name), **last})
        yield "data: [DONE]\n\n"
    finally:
        leaving.cancel()
        server.line.give_up(ticket)


def _add_files(app: FastAPI, server: Server) -> None:
    files = server.files

    @app.post("/v1/files", responses=FAILS)
    async def upload(
        owner: Owner, file: Annotated[UploadFile, File()], purpose: Annotated[str, Form(max_length=64)] = "user_data"
    ) -> dict[str, Any]:
        """Keep a video or picture, which later requests name by its id."""
        name = (file.filename or "upload").encode("utf-8", "replace").decode()
        stored = await asyncio.to_thread(files.add, owner, file.file, filename=name, purpose=purpose)
        return stored.public()

    @app.get("/v1/files", responses=FAILS)
    async def list_files(owner: Owner) -> dict[str, Any]:
        """List the client's own files."""
        found = await asyncio.to_thread(lambda: [stored.public() for stored in files.of(owner)])
        return {"object": "list", "data": found, "has_more": False}

    @app.get("/v1/files/{file_id}", responses=FAILS)
    async def get_file(file_id: str, owner: Owner) -> dict[str, Any]:
        return (await asyncio.to_thread(files.get, owner, file_id)).public()

    @app.delete("/v1/files/{file_id}", responses=FAILS)
    async def delete_file(file_id: str, owner: Owner) -> dict[str, Any]:
        await asyncio.to_thread(files.delete, owner, file_id)
        return {"id": file_id, "object": "file", "deleted": True}


def _add_facts(app: FastAPI, server: Server) -> None:
    model = {"id": server.name, "object": "model", "created": server.started, "owned_by": "lavis_lstp"}

    @app.get("/v1/models", responses=FAILS)
    async def list_models(owner: Owner) -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", responses=FAILS)
    async def get_model(name: str, owner: Owner) -> dict[str, Any]:
        if name != server.name:
            raise HTTPException(404, f"there is no such model; this server has '{server.name}'")
        return model

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": len(server.line), "notes": server.predictor.notes}

    @app.get("/metrics", response_class=PlainTextResponse, responses=FAILS)
    async def metrics(owner: Owner) -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)
