"""FastAPI routes; streaming answers.  The only file that imports fastapi."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Annotated, Any, NoReturn

from pydantic_core import from_json

from dart_llm import __version__
from dart_llm.errors import MissingExtra
from dart_llm.server import window
from dart_llm.server.responses import (
    APIError,
    ChatFormat,
    Format,
    RecordFormat,
    json_bytes,
    sse,
)
from dart_llm.server.schemas import ChatBody, Common, CompletionBody, is_ready, refusal
from dart_llm.server.security import Guard, Receive, Scope, Send
from dart_llm.server.service import END_OF_STREAM, QueuedRequest, Service, logger

try:
    from fastapi import APIRouter, Depends, FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse
    from fastapi.routing import APIRoute
    from fastapi.staticfiles import StaticFiles
    from starlette.exceptions import HTTPException
except ImportError:
    raise MissingExtra("fastapi", "serve") from None

PING_SECONDS = 15.0

REPORT_HEADERS = {
    "content-security-policy": "sandbox allow-scripts; default-src 'none'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "unsafe-none",  # browsers refuse a sandbox with any other
}
"""Headers of a report: a page without an origin, whose scripts cannot send requests here."""

MISSING = {
    "/v1/responses": "this server has no /v1/responses: use /v1/chat/completions (with "
    "@ai-sdk/openai: openai.chat(model) instead of openai(model))"
}
"""Messages for OpenAI's addresses that this server does not have."""


class Streamed(Response):
    """Sends what ``chunks`` yields, and closes it when the client goes away.

    The status waits for the first bytes, so that what fails before them is an HTTP error (a
    StreamingResponse sends its status first).
    """

    def __init__(self, chunks: AsyncGenerator[bytes, None], media_type: str = "") -> None:
        # proxies such as nginx would collect a stream before they send it
        super().__init__(media_type=media_type or EVENTS, headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            gone.cancel()
            sending.cancel()

    async def _send(self, send: Send) -> None:
        started = False
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with contextlib.aclosing(self.chunks):
            async for data in self.chunks:
                if not started:
                    await send(start)
                started = True
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


Shape = Format | RecordFormat


async def _answer_bytes(
    service: Service, queued: QueuedRequest, shape: Shape
) -> AsyncGenerator[bytes, None]:
    """Queues a request and yields its answer; an error is raised before the first bytes, and part
    of the stream after them.
    """
    seconds = service.settings.request_timeout
    deadline = asyncio.get_running_loop().time() + seconds
    begun = False
    service.worker.submit(queued)
    try:
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    item = await queued.mail.get()
            except TimeoutError:
                item = APIError(503, f"no answer within {seconds:g} s", code="timeout")
            if isinstance(item, APIError):
                if not begun:
                    raise item
                yield shape.error(item)
                return
            if item is END_OF_STREAM:
                if data := shape.end():
                    yield data
                return
            if data := shape.on_record(item):
                begun = True
                yield data
    finally:
        service.worker.leave(queued)


async def _live_bytes(service: Service, client: str) -> AsyncGenerator[bytes, None]:
    """The records of running requests, until the client leaves or the server ends."""
    box = service.live.watch(client)
    try:
        yield sse({"kind": "hello", "model": service.facts.name})
        while True:
            try:
                async with asyncio.timeout(PING_SECONDS):
                    item = await box.get()
            except TimeoutError:
                item = b": ping\n\n"
            if item is END_OF_STREAM:
                return
            yield item
    finally:
        service.live.leave(box)


async def _service(request: Request) -> Service:  # async: others go to a pool of threads
    service: Service = request.app.state.service
    return service


async def _with_runs(request: Request) -> Service:
    """The service, where past runs may be shown."""
    service = await _service(request)
    if not service.settings.shows_runs:
        raise APIError(
            403,
            "past runs contain prompts, and this server has several keys: start it with "
            "--share-runs to show them to every key",
            code="runs_not_shared",
        )
    return service


Serving = Annotated[Service, Depends(_service)]

Runs = Annotated[Service, Depends(_with_runs)]

JSON, EVENTS = "application/json", "text/event-stream"


class JsonRequest(Request):
    """Reads its body by pydantic's parser.

    It refuses what the standard library's accepts: deep nesting, NaN, halves of characters.
    """

    async def json(self) -> Any:
        return from_json(await self.body(), allow_inf_nan=False)


class JsonRoute(APIRoute):
    """A route whose body is read as in ``JsonRequest``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return handle


router = APIRouter(
    route_class=JsonRoute,
    default_response_class=Response,
    responses={"4XX": {"description": "an error in OpenAI's form"}},
)

# OpenAI's addresses


@router.get("/v1/models")
async def models(service: Serving) -> Response:
    """The model that is served."""
    return _json({"object": "list", "data": service.models()})


@router.get("/v1/models/{name:path}")
async def model(name: str, service: Serving) -> Response:
    """The model that is served, by its name."""
    if name not in service.reader.names:
        raise APIError(404, "there is no such model: /v1/models lists it", code="model_not_found")
    return _json(service.models()[0])


@router.post("/v1/chat/completions")
async def chat(body: ChatBody, request: Request, service: Serving) -> Response:
    """A chat completion: whole, or with ``stream: true`` as server-sent chunks."""
    return await _answer(service, request, body, ChatFormat)


@router.post("/v1/completions")
async def completion(body: CompletionBody, request: Request, service: Serving) -> Response:
    """A completion of texts or of token ids."""
    return await _answer(service, request, body, Format)


# dart-llm's addresses


@router.post("/api/events")
async def ask_events(body: ChatBody, request: Request, service: Serving) -> Response:
    """A chat completion as the engine's own records, one server-sent event each."""
    return await _answer(service, request, body, None)


@router.get("/api/events", include_in_schema=False)
async def watch_events(request: Request, service: Serving) -> Response:
    """The records of requests while they run, without texts and tokens."""
    return Streamed(_live_bytes(service, request.scope["dart"]["client"]))


@router.get("/api/methods")
async def methods(service: Serving) -> Response:
    """Methods and drift rules that a request may name, the defaults and the limits."""
    return _json(service.methods())


@router.get("/api/prompts")
async def prompts(service: Serving) -> Response:
    """The ready prompts."""
    return _json(window.ready_prompts(lambda method: is_ready(method, service.settings)))


@router.get("/api/runs")
async def runs(service: Runs) -> Response:
    """Past runs in the configured results folder."""
    return _json(await asyncio.to_thread(window.list_runs, service.results))


@router.get("/api/runs/{name:path}")
async def run(name: str, service: Runs) -> Response:
    """One past run with its files' content; below its name, its report."""
    folder, _, file = name.rpartition("/")
    if file == window.REPORT:
        text = await asyncio.to_thread(window.read_report, service.results, folder)
        return Response(text, media_type="text/html", headers=REPORT_HEADERS)
    return _json(await asyncio.to_thread(window.read_run, service.results, name))


@router.get("/healthz")
async def health(service: Serving) -> Response:
    """200 while requests are taken, 503 otherwise."""
    if not service.worker.alive:
        raise APIError(503, "the server does not take requests", code="not_ready")
    name = {} if service.settings.keys else {"model": service.facts.name}
    return _json({"status": "ok", **name, "version": __version__})


@router.get("/metrics")
async def metrics(service: Serving) -> Response:
    """Counters for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The window."""
    return FileResponse(window.STATIC / "index.html")


def _json(data: Any) -> Response:
    return Response(json_bytes(data), media_type=JSON)


async def _answer(
    service: Service, request: Request, body: Common, kind: type[Format] | None
) -> Response:
    """The answer in OpenAI's form ``kind``; None: as records."""
    own = request.scope["dart"]
    async with service.reading:
        asks = await asyncio.to_thread(
            service.reader.requests, body, own["request_id"], own["client"]
        )
    if service.settings.log_prompts:
        for ask in asks:
            logger.warning("%s asks %r", ask.id, service.reader.tokenizer.decode(list(ask.ids)))
    shape: Shape
    if kind is None:
        shape = RecordFormat(asks[0].id)
    else:
        echo = isinstance(body, CompletionBody) and bool(body.echo)
        name, sampling = service.facts.name, asks[0].sampling
        shape = kind(name, sampling, len(asks), bool(body.stream), body.with_usage, echo)
    queued = QueuedRequest(asks, own["client"], own["request_id"])
    chunks = _answer_bytes(service, queued, shape)
    return Streamed(chunks, EVENTS if shape.streams else JSON)


async def _on_http_error(request: Request, error: HTTPException) -> NoReturn:
    """In OpenAI's form; limits of the body are raised where the framework reads it."""
    if isinstance(error.__cause__, APIError):
        raise error.__cause__
    if error.status_code == 404:
        path = request.url.path.rstrip("/")
        message = MISSING.get(path, "there is no such address: /openapi.json lists all")
        raise APIError(404, message, code="not_found")
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow")
        raise APIError(405, f"this address only takes {allow}", allow=allow)
    raise APIError(400, "the body is not valid JSON in UTF-8", code="invalid_json")


async def _on_invalid_body(request: Request, error: RequestValidationError) -> NoReturn:
    raise refusal(error.errors())


def build(service: Service) -> FastAPI:
    """The whole application."""
    app = FastAPI(
        title="dart-llm",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        exception_handlers={
            HTTPException: _on_http_error,
            RequestValidationError: _on_invalid_body,
        },
        redirect_slashes=False,
    )
    app.state.service = service
    app.add_middleware(Guard, settings=service.settings, metrics=service.metrics)
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=window.STATIC))
    return app
