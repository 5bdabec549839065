"""The OpenAI-compatible application: completions, chat, models, health and metrics over one release.

Answers have the types of the ``openai`` package. What only this kind of model has to tell, drafts that were accepted
and stages that were used, stands in ``usage.poe``.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from cognica_poe.serving.answers import Answer, Piece
from cognica_poe.serving.choices import Choices, message_of
from cognica_poe.serving.engine import Answering, Prompt, Refused
from cognica_poe.serving.metrics import Metrics
from cognica_poe.serving.options import ServerOptions
from cognica_poe.serving.protocol import ChatRequest, CompletionRequest

LARGEST_BODY = 8 * 2**20
"""Bytes of a request."""
FAILED = "decoding failed; the server's log says why"
OPEN_PATHS = ("/health", "/metrics")


def make_app(answering: Answering, name: str, options: ServerOptions) -> FastAPI:
    """The application over a release that clients know as ``name``."""
    metrics, made = Metrics(answering.scheduler), int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        answering.scheduler.start()
        yield
        await asyncio.to_thread(answering.scheduler.close)

    app = FastAPI(title="cognica-poe", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _guard(app, options, metrics)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name, made, answering)]}

    @app.get("/v1/models/{model:path}")
    async def model_of(model: str) -> dict[str, Any]:
        _require_model(model, name)
        return _model(name, made, answering)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, http: Request) -> Response:
        _require_model(body.model, name)
        return await _respond(answering, body, name, http, metrics)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: Request) -> Response:
        _require_model(body.model, name)
        return await _respond(answering, body, name, http, metrics)

    return app


# ---- who may ask, and what mistakes are told -------------------------------------------------------------------------


def _guard(app: FastAPI, options: ServerOptions, metrics: Metrics) -> None:
    """Key, host and size of a request; every mistake as one sentence in OpenAI's form."""
    hosts = {"localhost", "127.0.0.1", "[::1]", options.host.lower(), *(host.lower() for host in options.allow_host)}

    @app.middleware("http")
    async def check(request: Request, call_next: Callable[..., Any]) -> Response:
        host = request.headers.get("host", "").lower()
        if "*" not in hosts and host.rsplit(":", 1)[0] not in hosts and host not in hosts:
            return _mistake(403, f"this server does not answer for host {host!r}: start it with --allow-host")
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        closed = options.api_key and request.url.path not in OPEN_PATHS
        if closed and not hmac.compare_digest(given.encode(), (options.api_key or "").encode()):
            return _mistake(401, "wrong or missing API key: send it as Authorization: Bearer KEY")
        length = request.headers.get("content-length", "0" if request.method == "GET" else "")
        if request.method == "POST" and not length.isdecimal():
            return _mistake(411, "send the length of the body (Content-Length)")
        if length.isdecimal() and int(length) > LARGEST_BODY:
            return _mistake(413, f"the body has {length} bytes, more than {LARGEST_BODY}")
        response: Response = await call_next(request)
        metrics.answered(request.url.path, response.status_code)
        return response

    @app.exception_handler(RequestValidationError)
    async def wrong_request(request: Request, error: RequestValidationError) -> Response:
        return _mistake(400, _sentence(error.errors()))

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> Response:
        sentences = {
            404: f"{request.url.path} is not served",
            405: f"{request.method} {request.url.path} is not served",
        }
        return _mistake(error.status_code, sentences.get(error.status_code, str(error.detail)))

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _mistake(404 if isinstance(error, _NoModel) else 400, str(error))


class _NoModel(Refused):
    """Another model than the one that was started."""


def _require_model(asked: str, name: str) -> None:
    if asked != name:
        raise _NoModel(f"model {asked!r} is not here: this server has {name!r}")


def _mistake(status: int, sentence: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"Retry-After": "1"} if status == 429 else None
    sentence = sentence.encode(errors="replace").decode()  # a client's half of a surrogate pair has no UTF-8
    error = {"message": sentence, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


def _sentence(errors: Any) -> str:
    """The first of pydantic's findings, with the field that it is about."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return "the body is no JSON"
    fields = [str(part) for part in first["loc"] if part != "body"]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{'.'.join(fields)} is not served: leave it out"
    return f"{'.'.join(fields)}: {message}" if fields else message


# ---- answers ---------------------------------------------------------------------------------------------------------


async def _respond(
    answering: Answering, body: CompletionRequest | ChatRequest, name: str, http: Request, metrics: Metrics
) -> Response:
    """Submit what a request asks for, and tell of it as it comes or at the end."""
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()
    prompts = await asyncio.to_thread(answering.prompts, body)
    answers: list[Answer] = []
    for prompt in prompts:
        for choice in range(body.n):
            number = len(answers)

            def emit(piece: Piece, number: int = number) -> None:
                loop.call_soon_threadsafe(pieces.put_nowait, (number, piece))

            answers.append(answering.answer(body, prompt, choice, emit))
    choices = await asyncio.to_thread(_begin, answering, body, prompts)
    choices.name, choices.id = name, f"{choices.prefix}-{uuid.uuid4().hex}"
    if not answering.scheduler.submit(answers):
        return _mistake(429, "too many requests wait already: try again in a moment")
    watched = metrics.watch(answers)
    if body.stream:
        return StreamingResponse(
            _stream(choices, answers, pieces, body.wants_usage, watched), media_type="text/event-stream"
        )
    gone = asyncio.create_task(_until_gone(http))
    try:
        while not choices.done:
            got = asyncio.create_task(pieces.get())
            await asyncio.wait({got, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not got.done():
                got.cancel()
                return _mistake(499, "the client is gone")
            number, piece = got.result()
            watched(number, piece)
            choices.add(number, piece)
            if piece.finish == "error":
                return _mistake(500, FAILED)
    finally:
        gone.cancel()
        for answer in answers:
            answer.cancelled = True
    return JSONResponse(choices.whole())


def _begin(answering: Answering, body: CompletionRequest | ChatRequest, prompts: list[Prompt]) -> Choices:
    """The choices of a request, with what ``echo`` repeats."""
    choices = Choices(body, prompts, answering.tokenizer, answering.mode)
    if isinstance(body, CompletionRequest) and body.echo:
        choices.echo([answering.echo(prompt, body.logprobs) for prompt in prompts])
    return choices


async def _until_gone(http: Request) -> None:
    """Return when the client has closed its connection."""
    while not await http.is_disconnected():
        await asyncio.sleep(0.1)


async def _stream(
    choices: Choices, answers: list[Answer], pieces: asyncio.Queue[tuple[int, Piece]], usage: bool, watched: Any
) -> AsyncIterator[str]:
    """Server-sent events, the last of them ``[DONE]``. A client that leaves frees its rows."""
    try:
        for chunk in choices.opening():
            yield f"data: {json.dumps(chunk)}\n\n"
        while not choices.done:
            number, piece = await pieces.get()
            watched(number, piece)
            choices.add(number, piece)
            if piece.finish == "error":
                failed = {"error": message_of(FAILED)}
                yield f"data: {json.dumps(failed)}\n\n"
                return
            if shown := choices.chunk(number, piece):
                yield f"data: {json.dumps(shown)}\n\n"
        if usage:
            yield f"data: {json.dumps(choices.usage_chunk())}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        for answer in answers:
            answer.cancelled = True


def _model(name: str, made: int, answering: Answering) -> dict[str, Any]:
    from openai.types import Model

    found = Model(id=name, created=made, object="model", owned_by="cognica-poe").model_dump()
    return {**found, "max_model_len": answering.context, "poe": {"mode": answering.mode}}
