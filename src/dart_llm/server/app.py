"""FastAPI routes; streaming answers.

The routes, as a FastAPI application: the only file that imports it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from dart_llm import __version__
from dart_llm.engine.host import trim_heap
from dart_llm.engine.requests import GenerationRequest, Sampling
from dart_llm.errors import MissingExtra
from dart_llm.server import window
from dart_llm.server.responses import TYPES, APIError, ChatFormat, Format, failed, json_bytes, sse
from dart_llm.server.schemas import ChatBody, Common, CompletionBody, read
from dart_llm.server.security import Asgi, Guard, Receive, Rules, Scope, Send, digest, parse
from dart_llm.server.service import Live, Service, logger
from dart_llm.server.window import ready_prompts, static_files
from dart_llm.server.worker import END_OF_STREAM, QueuedRequest, Worker

# From a queued request to bytes on its connection.  Plain ASGI; it imports no framework.


STREAM = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no"))

WHOLE = ((b"content-type", b"application/json"),)

PING_SECONDS = 15.0


class Writer(Protocol):
    """Turns records into what is sent."""

    streams: bool

    def take(self, record: Any) -> bytes:
        """What is sent for ``record``; empty: nothing."""
        ...

    def end(self) -> bytes:
        """What is sent after the last record."""
        ...

    def error(self, refusal: APIError) -> bytes:
        """What ends an answer that has begun and cannot go on."""
        ...


class ChunkWriter:
    """OpenAI's stream of chunks."""

    streams = True

    def __init__(self, shape: Format) -> None:
        self.take = shape.chunks

    def end(self) -> bytes:
        return b""

    def error(self, refusal: APIError) -> bytes:
        return failed(refusal)


class WholeWriter:
    """OpenAI's answer in one piece."""

    streams = False

    def __init__(self, shape: Format) -> None:
        self.shape = shape

    def take(self, record: Any) -> bytes:
        self.shape.keep(record)
        return b""

    def end(self) -> bytes:
        return self.shape.whole()

    def error(self, refusal: APIError) -> bytes:
        return b""  # never asked: nothing is sent before the end


class RecordWriter:
    """Every record of the request, as the library has it: ``POST /api/events``."""

    streams = True

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id

    def take(self, record: Any) -> bytes:
        return sse(record.to_dict())

    def end(self) -> bytes:
        return b""

    def error(self, refusal: APIError) -> bytes:
        return sse({"kind": "error", "message": refusal.message, "request": self.request_id})


LAST_SECONDS = 5.0
"""How long the last event of a stream that ran out of time may take to be sent."""


class Delivery:
    """An ASGI application that queues one turn and sends what comes of it."""

    def __init__(self, worker: Worker, turn: QueuedRequest, writer: Writer, seconds: float) -> None:
        """``seconds``: the longest that the request may take, its waiting included."""
        self.worker = worker
        self.turn = turn
        self.writer = writer
        self.seconds = seconds
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.worker.submit(self.turn)
        gone = asyncio.create_task(until_gone(receive, lambda: self.worker.leave(self.turn)))
        try:
            async with asyncio.timeout(self.seconds):
                await self._deliver(send)
        except TimeoutError:
            late = APIError(503, f"no answer within {self.seconds:g} s", code="timeout")
            if not self._begun:
                raise late from None
            if self.writer.streams:
                with contextlib.suppress(TimeoutError):  # of a client that does not read
                    async with asyncio.timeout(LAST_SECONDS):
                        await self._send(send, self.writer.error(late), True)
        finally:
            self.worker.leave(self.turn)
            gone.cancel()

    async def _deliver(self, send: Send) -> None:
        over = False
        while not over:
            data = b""
            for item in await self.turn.mail.take():
                if isinstance(item, APIError):
                    if not self._begun and not data:
                        raise item
                    data += self.writer.error(item)
                elif item is END_OF_STREAM:
                    if self.turn.cancelled():  # nobody is there any more
                        return
                    data += self.writer.end()
                else:
                    data += self.writer.take(item)
                    continue
                over = True
                break
            await self._send(send, data, over)

    async def _send(self, send: Send, data: bytes, last: bool) -> None:
        if not self._begun and (data or last):
            self._begun = True
            headers = list(STREAM if self.writer.streams else WHOLE)
            if not self.writer.streams:
                headers.append((b"content-length", str(len(data)).encode()))
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        if data or last:
            await send({"type": "http.response.body", "body": data, "more_body": not last})


class Watch:
    """An ASGI application: the records of running requests, until the client leaves or we end."""

    def __init__(self, live: Live, client: str, model: str) -> None:
        self.live = live
        self.client = client
        self.model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        box = self.live.watch(self.client)
        gone = asyncio.create_task(until_gone(receive, lambda: box.put(END_OF_STREAM)))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": list(STREAM)})
            data = sse({"kind": "hello", "model": self.model})
            while True:
                await send({"type": "http.response.body", "body": data, "more_body": True})
                items: list[Any] = []
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PING_SECONDS):
                        items = await box.take()
                if any(item is END_OF_STREAM for item in items):
                    break
                data = b"".join(items) or b": ping\n\n"
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.live.leave(box)
            gone.cancel()


async def until_gone(receive: Receive, then: Callable[[], None]) -> None:
    """Wait until the client closes its connection, then call ``then``.

    A body that comes where none belongs and is too large ends it too.
    """
    with contextlib.suppress(APIError):
        while (await receive())["type"] != "http.disconnect":
            pass
    then()


# Every route of the server, and how ``/openapi.json`` describes it.


REFERENCE = "#/components/schemas/{model}"


@dataclass(frozen=True)
class Route:
    """One address.  ``body``: what it is sent; ``answers``: media type of the 200."""

    method: str
    path: str
    handler: str
    body: type[BaseModel] | None = None
    answers: tuple[str, ...] = ("application/json",)
    described: bool = True


JSON, EVENTS = "application/json", "text/event-stream"

ROUTES = (
    Route("GET", "/v1/models", "models"),
    Route("GET", "/v1/models/{name:path}", "model"),
    Route("POST", "/v1/chat/completions", "chat", ChatBody, (JSON, EVENTS)),
    Route("POST", "/v1/completions", "completion", CompletionBody, (JSON, EVENTS)),
    Route("POST", "/api/events", "ask_events", ChatBody, (EVENTS,)),
    Route("GET", "/api/events", "watch_events", answers=(EVENTS,), described=False),
    Route("GET", "/api/methods", "methods"),
    Route("GET", "/api/prompts", "prompts"),
    Route("GET", "/api/runs", "runs"),
    Route("GET", "/api/runs/{name:path}", "run"),
    Route("GET", "/healthz", "health"),
    Route("GET", "/metrics", "metrics", answers=("text/plain",)),
    Route("GET", "/", "page", answers=("text/html",), described=False),
    Route("GET", "/static/{name:path}", "static", answers=("*/*",), described=False),
)
"""All of them; ``/openapi.json`` is the framework's own."""

REFUSALS = {
    "GET": (403, 404, 429, 503),
    "POST": (400, 403, 404, 408, 413, 415, 429, 503),
}


def operation(route: Route) -> dict[str, Any]:
    """What the framework cannot know of a route: its body, and its answers."""
    refusal = {"application/json": {"schema": {"$ref": REFERENCE.format(model="Error")}}}
    found: dict[str, Any] = {
        "responses": {
            "200": {"description": "OK", "content": {kind: {} for kind in route.answers}},
            "401": {"description": "no API key, or a wrong one", "content": refusal},
            **{
                str(status): {"description": TYPES[status], "content": refusal}
                for status in REFUSALS[route.method]
            },
        }
    }
    if route.body is not None:
        schema = {"$ref": REFERENCE.format(model=route.body.__name__)}
        found["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    return found


def components() -> dict[str, Any]:
    """The schemas that ``operation`` refers to."""
    _, bodies = models_json_schema(
        [(ChatBody, "validation"), (CompletionBody, "validation")], ref_template=REFERENCE
    )
    text = {"type": ["string", "null"]}
    error = {
        "type": "object",
        "required": ["message", "type", "param", "code"],
        "properties": {
            "message": {"type": "string"},
            "type": {"enum": sorted(set(TYPES.values()))},
            "param": text,
            "code": text,
        },
    }
    return {
        **bodies["$defs"],
        "Error": {"type": "object", "required": ["error"], "properties": {"error": error}},
    }


try:
    from fastapi import FastAPI, Request, Response
except ImportError:
    raise MissingExtra("fastapi", "serve") from None

ALONE = {
    "content-security-policy": "sandbox allow-scripts; default-src 'none'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "unsafe-none",  # browsers refuse a sandbox with any other
}
"""Headers of a report: a page of no origin, whose scripts can ask this server nothing."""

LONG_BODY = 16 << 10
"""Bytes above which a body is read into tokens beside the event loop, not on it."""

ELSEWHERE = {
    "/v1/responses": "this server has no /v1/responses: use /v1/chat/completions (with "
    "@ai-sdk/openai: openai.chat(model) in place of openai(model))"
}
"""What is said of addresses that OpenAI has and this server has not."""


class Application(Response):
    """Lets a route answer by a plain ASGI application."""

    def __init__(self, answer: Asgi) -> None:
        self.answer = answer
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.answer(scope, receive, send)


class Routes:
    """One method per route."""

    def __init__(self, service: Service, guard: Guard) -> None:
        self.service = service
        self.guard = guard
        self.site = static_files()
        self.results = Path(service.settings.results_dir)

    # OpenAI's

    async def chat(self, request: Request) -> Response:
        """A chat completion: whole, or with ``stream: true`` as server-sent chunks."""
        body, asks = await self._read(request, ChatBody)
        sampling = asks[0].sampling
        shape = ChatFormat(self._model, sampling.n, _scored(sampling), body.usage_wanted)
        return self._deliver(request, body, asks, _writer(body, shape))

    async def completion(self, request: Request) -> Response:
        """A completion of texts or of token ids."""
        body, asks = await self._read(request, CompletionBody)
        sampling, echo = asks[0].sampling, bool(body.echo)
        shape = Format(
            self._model, sampling.n, _scored(sampling), body.usage_wanted, len(asks), echo
        )
        return self._deliver(request, body, asks, _writer(body, shape))

    async def models(self) -> Response:
        """The model that is served."""
        return _json({"object": "list", "data": self.service.models()})

    async def model(self, name: str) -> Response:
        """The model that is served, by its name."""
        if name not in self.service.asker.names:
            raise APIError(
                404, "there is no such model: /v1/models lists it", code="model_not_found"
            )
        return _json(self.service.models()[0])

    # ours

    async def ask_events(self, request: Request) -> Response:
        """A chat completion as the engine's own records, one server-sent event each."""
        body, asks = await self._read(request, ChatBody)
        return self._deliver(request, body, asks, RecordWriter(asks[0].id))

    async def watch_events(self, request: Request) -> Response:
        """The records of requests while they run, without texts and tokens."""
        return Application(Watch(self.service.live, request.scope["dart"]["client"], self._model))

    async def methods(self) -> Response:
        """Methods and drift rules that a request may name, the defaults and the limits."""
        return _json(self.service.methods())

    async def prompts(self) -> Response:
        """The ready prompts."""
        return _json(ready_prompts(self.site))

    async def runs(self) -> Response:
        """Past runs in the configured results folder."""
        self._check_runs()
        return _json(await asyncio.to_thread(window.listing, self.results))

    async def run(self, name: str) -> Response:
        """One past run with its files' content; below its name, its report."""
        self._check_runs()
        run, _, file = name.rpartition("/")
        if file == window.REPORT:
            text = await asyncio.to_thread(window.report, self.results, run)
            return Response(text, media_type="text/html", headers=ALONE)
        return _json(await asyncio.to_thread(window.opened, self.results, name))

    async def health(self) -> Response:
        """200 while requests are taken, 503 otherwise."""
        if not self.service.worker.alive:
            raise APIError(503, "the server does not take requests", code="not_ready")
        model = {} if self.service.settings.keys else {"model": self._model}
        return _json({"status": "ok", **model, "version": __version__})

    async def metrics(self) -> Response:
        """Counters for Prometheus."""
        text = self.service.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self) -> Response:
        """The window."""
        return await self.static("index.html")

    async def static(self, name: str) -> Response:
        """A file of the page."""
        if name not in self.site:
            raise APIError(404, "there is no such file", code="not_found")
        content, kind = self.site[name]
        return Response(content, media_type=kind)

    # help

    @property
    def _model(self) -> str:
        return self.service.facts.name

    def _check_runs(self) -> None:
        if not self.service.settings.shows_runs:
            raise APIError(
                403,
                "past runs hold prompts, and this server has several keys: start it with "
                "--share-runs to show them to every key",
                code="runs_not_shared",
            )

    async def _read(
        self, request: Request, kind: type[Any]
    ) -> tuple[Any, tuple[GenerationRequest, ...]]:
        content = request.headers.get("content-type", "")
        if content.partition(";")[0].strip().lower() != "application/json":
            raise APIError(415, "send JSON, with Content-Type: application/json")
        raw = await request.body()
        known = request.scope["dart"]

        def understood() -> tuple[Any, tuple[GenerationRequest, ...]]:
            body = read(kind, parse(raw))
            asker = self.service.asker
            of_kind = asker.completion if isinstance(body, CompletionBody) else asker.chat
            return body, of_kind(body, known["request_id"], known["client"])

        def understood_long() -> tuple[Any, tuple[GenerationRequest, ...]]:
            try:
                return understood()
            finally:
                trim_heap()

        if len(raw) <= LONG_BODY:
            return understood()
        return await asyncio.get_running_loop().run_in_executor(
            self.service.bodies, understood_long
        )

    def _deliver(
        self, request: Request, body: Common, asks: tuple[GenerationRequest, ...], writer: Writer
    ) -> Response:
        service, known = self.service, request.scope["dart"]
        if service.settings.log_prompts:
            for ask in asks:
                text = service.asker.tokenizer.decode(list(ask.ids))
                logger.warning("%s asks %r", ask.id, text)
        turn = QueuedRequest(asks, known["client"], body.user or "", known["request_id"])
        limit = service.settings.request_timeout
        return Application(Delivery(service.worker, turn, writer, limit))


def _scored(sampling: Sampling) -> bool:
    return sampling.logprobs is not None


def _writer(body: Common, shape: Format) -> Writer:
    return ChunkWriter(shape) if body.stream else WholeWriter(shape)


def _json(data: Any) -> Response:
    return Response(json_bytes(data), media_type="application/json")


def build(service: Service) -> Asgi:
    """The whole application: the routes, behind the guard."""
    settings = service.settings

    async def unknown(request: Request, error: Exception) -> Response:
        path = request.url.path.rstrip("/")
        message = ELSEWHERE.get(path, "there is no such address: /openapi.json lists all")
        raise APIError(404, message, code="not_found")

    async def other_method(request: Request, error: Exception) -> Response:
        pattern = request.scope["route"].path
        allow = [route.method for route in ROUTES if route.path == pattern]
        raise APIError(405, f"this address takes {' and '.join(allow)} alone", allow=sorted(allow))

    app = FastAPI(
        title="dart-llm",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        exception_handlers={404: unknown, 405: other_method},
        redirect_slashes=False,
    )
    rules = Rules(
        settings.hosts,
        tuple(digest(key) for key in settings.keys),
        settings.max_body_kib << 10,
        loud=settings.log_prompts,
    )
    guard = Guard(rules, service.metrics)
    service.metrics.watch("http_requests", "Requests in flight.", lambda: guard.in_flight)
    app.add_middleware(guard.around)
    routes = Routes(service, guard)
    for route in ROUTES:
        app.add_api_route(
            route.path,
            getattr(routes, route.handler),
            methods=[route.method],
            include_in_schema=route.described,
            openapi_extra=operation(route),
            response_class=Response,
            response_model=None,
        )
    _describe(app)
    return app


def _describe(app: FastAPI) -> None:
    """Put the bodies' schemas where ``$ref`` looks for them."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        found = plain()
        found.setdefault("components", {}).setdefault("schemas", {}).update(components())
        return found

    app.openapi = openapi  # type: ignore[method-assign]
