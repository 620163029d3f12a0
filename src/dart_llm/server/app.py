"""FastAPI routes; streaming answers.  The only file that imports fastapi."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from dart_llm import __version__
from dart_llm.engine.host import trim_heap
from dart_llm.errors import MissingExtra
from dart_llm.server import window
from dart_llm.server.responses import (
    REFUSED,
    APIError,
    ChatFormat,
    ErrorBody,
    Format,
    RecordFormat,
    Shape,
    json_bytes,
    sse,
)
from dart_llm.server.schemas import ChatBody, Common, CompletionBody, is_ready, read
from dart_llm.server.security import Asgi, Guard, Receive, Scope, Send, parse
from dart_llm.server.service import Service, logger
from dart_llm.server.worker import END_OF_STREAM, QueuedRequest

try:
    from fastapi import APIRouter, Depends, FastAPI, Request, Response
    from fastapi.routing import APIRoute
except ImportError:
    raise MissingExtra("fastapi", "serve") from None

PING_SECONDS = 15.0
LAST_SECONDS = 5.0  # how long the last event of a stream that ran out of time may take to be sent

LONG_BODY = 16 << 10
"""Bytes above which a body is read into tokens beside the event loop, not on it."""

ALONE = {
    "content-security-policy": "sandbox allow-scripts; default-src 'none'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "unsafe-none",  # browsers refuse a sandbox with any other
}
"""Headers of a report: a page of no origin, whose scripts can ask this server nothing."""

ELSEWHERE = {
    "/v1/responses": "this server has no /v1/responses: use /v1/chat/completions (with "
    "@ai-sdk/openai: openai.chat(model) in place of openai(model))"
}
"""What is said of addresses that OpenAI has and this server has not."""

# From a queued request to bytes on its connection.
#
# EventSourceResponse (of fastapi or sse-starlette) sends its 200 before it asks for the first
# event, so what fails in the queue or in the engine could no longer be an HTTP status.

STREAM = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no"))

WHOLE = ((b"content-type", b"application/json"),)


class Delivery(Response):
    """Queues a request and sends what comes of it."""

    def __init__(self, service: Service, turn: QueuedRequest, shape: Shape) -> None:
        self.background = None
        self.worker = service.worker
        self.seconds = service.settings.request_timeout
        self.turn = turn
        self.shape = shape
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
            if self.shape.streams:
                with contextlib.suppress(TimeoutError):  # of a client that does not read
                    async with asyncio.timeout(LAST_SECONDS):
                        await self._send(send, self.shape.error(late), True)
        finally:
            self.worker.leave(self.turn)
            gone.cancel()

    async def _deliver(self, send: Send) -> None:
        over = False
        while not over:
            data = b""
            for item in await self.turn.mail.take():
                over = True
                if isinstance(item, APIError):
                    if not self._begun and not data:
                        raise item
                    data += self.shape.error(item)
                    break
                if item is END_OF_STREAM:
                    if self.turn.cancelled():  # nobody is there any more
                        return
                    data += self.shape.end()
                    break
                over = False
                data += self.shape.take(item)
            await self._send(send, data, over)

    async def _send(self, send: Send, data: bytes, last: bool) -> None:
        if not self._begun and (data or last):
            self._begun = True
            headers = list(STREAM if self.shape.streams else WHOLE)
            if not self.shape.streams:
                headers.append((b"content-length", str(len(data)).encode()))
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        if data or last:
            await send({"type": "http.response.body", "body": data, "more_body": not last})


class Watch(Response):
    """The records of running requests, until the client leaves or we end."""

    def __init__(self, service: Service, client: str) -> None:
        self.background = None
        self.service = service
        self.client = client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        box = self.service.live.watch(self.client)
        gone = asyncio.create_task(until_gone(receive, lambda: box.put(END_OF_STREAM)))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": list(STREAM)})
            data = sse({"kind": "hello", "model": self.service.facts.name})
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
            self.service.live.leave(box)
            gone.cancel()


async def until_gone(receive: Receive, then: Callable[[], None]) -> None:
    """Wait until the client closes its connection, then call ``then``.

    A body that comes where none belongs and is too large ends it too.
    """
    with contextlib.suppress(APIError):
        while (await receive())["type"] != "http.disconnect":
            pass
    then()


# Bodies: strict JSON, refused in OpenAI's words.


class StrictRoute(APIRoute):
    """Reads a typed body by our own rules, up to what the engine is asked: ``state.asks``.

    All of it is one piece of work, so that many long bodies that wait are held as bytes alone.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler
        kind: type[Common] = self.body_field.field_info.annotation  # type: ignore[assignment]

        async def strict(request: Request) -> Response:
            content = request.headers.get("content-type", "")
            if content.partition(";")[0].strip().lower() != "application/json":
                raise APIError(415, "send JSON, with Content-Type: application/json")
            raw = await request.body()
            service: Service = request.app.state.service
            own = request.scope["dart"]

            def understand() -> None:
                body = read(kind, parse(raw))
                request._json = body  # what the framework takes for its JSON
                request.state.asks = service.asker.asks(body, own["request_id"], own["client"])

            def understand_long() -> None:
                try:
                    understand()
                finally:
                    trim_heap()

            if len(raw) <= LONG_BODY:
                understand()
            else:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(service.bodies, understand_long)
            return await handler(request)

        return strict


async def _service(request: Request) -> Service:  # async: others go to a pool of threads
    service: Service = request.app.state.service
    return service


async def _shown_runs(request: Request) -> Service:
    """The service, where past runs may be shown."""
    service = await _service(request)
    if not service.settings.shows_runs:
        raise APIError(
            403,
            "past runs hold prompts, and this server has several keys: start it with "
            "--share-runs to show them to every key",
            code="runs_not_shared",
        )
    return service


Serving = Annotated[Service, Depends(_service)]

Runs = Annotated[Service, Depends(_shown_runs)]

JSON, EVENTS = "application/json", "text/event-stream"


def _described(*media: str) -> dict[str, Any]:
    """What the description says of a route's answers."""
    answers: dict[int | str, dict[str, Any]] = {
        200: {"description": "OK", "content": {kind: {} for kind in media}},
        **{status: {"description": text, "model": ErrorBody} for status, text in REFUSED.items()},
        "default": {"description": "any other refusal", "model": ErrorBody},
    }
    return {"responses": answers, "response_class": Response, "response_model": None}


router = APIRouter(route_class=StrictRoute)

# OpenAI's addresses


@router.get("/v1/models", **_described(JSON))
async def models(service: Serving) -> Response:
    """The model that is served."""
    return _json({"object": "list", "data": service.models()})


@router.get("/v1/models/{name:path}", **_described(JSON))
async def model(name: str, service: Serving) -> Response:
    """The model that is served, by its name."""
    if name not in service.asker.names:
        raise APIError(404, "there is no such model: /v1/models lists it", code="model_not_found")
    return _json(service.models()[0])


@router.post("/v1/chat/completions", **_described(JSON, EVENTS))
async def chat(body: ChatBody, request: Request, service: Serving) -> Response:
    """A chat completion: whole, or with ``stream: true`` as server-sent chunks."""
    return _answer(service, request, body, ChatFormat)


@router.post("/v1/completions", **_described(JSON, EVENTS))
async def completion(body: CompletionBody, request: Request, service: Serving) -> Response:
    """A completion of texts or of token ids."""
    return _answer(service, request, body, Format, echo=bool(body.echo))


# our own addresses


@router.post("/api/events", **_described(EVENTS))
async def ask_events(body: ChatBody, request: Request, service: Serving) -> Response:
    """A chat completion as the engine's own records, one server-sent event each."""
    return _deliver(service, request, body, RecordFormat(request.state.asks[0].id))


@router.get("/api/events", **_described(EVENTS), include_in_schema=False)
async def watch_events(request: Request, service: Serving) -> Response:
    """The records of requests while they run, without texts and tokens."""
    return Watch(service, request.scope["dart"]["client"])


@router.get("/api/methods", **_described(JSON))
async def methods(service: Serving) -> Response:
    """Methods and drift rules that a request may name, the defaults and the limits."""
    return _json(service.methods())


@router.get("/api/prompts", **_described(JSON))
async def prompts(request: Request, service: Serving) -> Response:
    """The ready prompts."""
    settings = service.settings
    return _json(window.ready_prompts(request.app.state.site, lambda one: is_ready(one, settings)))


@router.get("/api/runs", **_described(JSON))
async def runs(service: Runs) -> Response:
    """Past runs in the configured results folder."""
    return _json(await asyncio.to_thread(window.listing, service.results))


@router.get("/api/runs/{name:path}", **_described(JSON))
async def run(name: str, service: Runs) -> Response:
    """One past run with its files' content; below its name, its report."""
    folder, _, file = name.rpartition("/")
    if file == window.REPORT:
        text = await asyncio.to_thread(window.report, service.results, folder)
        return Response(text, media_type="text/html", headers=ALONE)
    return _json(await asyncio.to_thread(window.opened, service.results, name))


@router.get("/healthz", **_described(JSON))
async def health(service: Serving) -> Response:
    """200 while requests are taken, 503 otherwise."""
    if not service.worker.alive:
        raise APIError(503, "the server does not take requests", code="not_ready")
    name = {} if service.settings.keys else {"model": service.facts.name}
    return _json({"status": "ok", **name, "version": __version__})


@router.get("/metrics", **_described("text/plain"))
async def metrics(service: Serving) -> Response:
    """Counters for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", **_described("text/html"), include_in_schema=False)
async def page(request: Request) -> Response:
    """The window."""
    return await static("index.html", request)


@router.get("/static/{name:path}", **_described("*/*"), include_in_schema=False)
async def static(name: str, request: Request) -> Response:
    """A file of the page."""
    site: window.Site = request.app.state.site
    if name not in site:
        raise APIError(404, "there is no such file", code="not_found")
    content, kind = site[name]
    return Response(content, media_type=kind)


def _json(data: Any) -> Response:
    return Response(json_bytes(data), media_type=JSON)


def _answer(
    service: Service, request: Request, body: Common, kind: type[Format], echo: bool = False
) -> Response:
    asks = request.state.asks
    given = service.facts.name, asks[0].sampling, len(asks)
    shape = kind(*given, bool(body.stream), body.usage_wanted, echo)
    return _deliver(service, request, body, shape)


def _deliver(service: Service, request: Request, body: Common, shape: Shape) -> Response:
    asks, own = request.state.asks, request.scope["dart"]
    if service.settings.log_prompts:
        for ask in asks:
            text = service.asker.tokenizer.decode(list(ask.ids))
            logger.warning("%s asks %r", ask.id, text)
    turn = QueuedRequest(asks, own["client"], body.user or "", own["request_id"])
    return Delivery(service, turn, shape)


async def _unknown(request: Request, error: Exception) -> Response:
    path = request.url.path.rstrip("/")
    message = ELSEWHERE.get(path, "there is no such address: /openapi.json lists all")
    raise APIError(404, message, code="not_found")


async def _other_method(request: Request, error: Exception) -> Response:
    pattern = request.scope["route"].path
    same = [one for one in router.routes if isinstance(one, APIRoute) and one.path == pattern]
    allow = sorted(method for route in same for method in route.methods or ())
    raise APIError(405, f"this address takes {' and '.join(allow)} alone", allow=allow)


def build(service: Service) -> Asgi:
    """The whole application: the routes, behind the guard."""
    app = FastAPI(
        title="dart-llm",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        exception_handlers={404: _unknown, 405: _other_method},
        redirect_slashes=False,
    )
    app.state.service, app.state.site = service, window.static_files()
    guard = Guard(service.settings, service.metrics)
    service.metrics.watch("http_requests", "Requests in flight.", lambda: guard.in_flight)
    app.add_middleware(guard.around)
    app.include_router(router)
    return app
