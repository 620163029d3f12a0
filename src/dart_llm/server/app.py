"""The FastAPI application: its routes, the checks of every request, and streamed answers.

``Guard`` checks each request's host, origin and API key, limits the body's size and the time to
receive it, and sets the headers of the response.  Only this file imports fastapi.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
import time
from collections.abc import AsyncGenerator
from secrets import token_hex
from typing import Annotated, Any, NoReturn

from dart_llm import __version__
from dart_llm.errors import MissingExtra
from dart_llm.server import window
from dart_llm.server.schemas import (
    APIError,
    ChatBody,
    Common,
    CompletionBody,
    Format,
    RecordFormat,
    is_ready,
    json_bytes,
    refusal,
)
from dart_llm.server.service import END_OF_STREAM, QueuedRequest, Service, internal_error, logger

try:
    from fastapi import APIRouter, Depends, FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
    from fastapi.staticfiles import StaticFiles
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError:
    raise MissingExtra("fastapi", "serve") from None

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Headers of every response; a route can set other values for these headers."""

REPORT_HEADERS = {
    "content-security-policy": "sandbox allow-scripts; default-src 'none'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "unsafe-none",  # in a sandbox, browsers refuse other values
}
"""Headers of a report page; the sandbox prevents the page's scripts from calling this server."""

PUBLIC_PATHS = ("/", "/healthz")
"""Paths besides ``/static/`` that need no key: they reveal nothing about the model or users."""

API_PATHS = ("/api/", "/v1/", "/metrics")
"""Requests to these paths are refused if a page of another site causes them, even by a link."""

BODY_SECONDS = 30.0  # time limit for receiving the body of a request

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+?)\.?(?::[0-9]{1,5})?")
"""A Host header: a host name (with an optional final dot) or an address, and an optional port."""


class Guard:
    """ASGI middleware that refuses requests which the settings do not allow.

    It also turns every exception into an error response.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.settings, self.metrics = service.settings, service.metrics
        self.keys = [_digest(key) for key in self.settings.keys]
        self.max_bytes = self.settings.max_body_kib << 10

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id, began = f"req_{token_hex(12)}", time.perf_counter()
        status: int | None = None

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message["headers"])
                for name, value in {**HEADERS, "x-request-id": request_id}.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            client = self._check(scope["path"], scope["method"], Headers(scope=scope))
            address = (scope.get("client") or ("unknown",))[0]
            scope["dart"] = {"request_id": request_id, "client": client or address}
            await self.app(scope, self._limited(receive), guarded)
        except Exception as error:
            if not isinstance(error, APIError):
                error = internal_error(request_id, error, self.settings.log_prompts)
            if status is None:
                response = JSONResponse(error.to_dict(), error.status, error.headers)
                await response(scope, receive, guarded)
        finally:
            # the label is the route's pattern: clients could make up any number of paths
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.counters["requests"].labels(route, str(status or "none")).inc()
            seconds = time.perf_counter() - began
            logger.info("%s %s %s %s %.3f s", request_id, scope["method"], route, status, seconds)

    def _check(self, path: str, method: str, headers: Headers) -> str:
        """Check a request; return the name of the client's key, or "" if no key is needed."""
        hosts = headers.getlist("host")
        self._check_host(hosts)
        self._check_origin(path, headers, "".join(hosts).lower())
        key = self._check_key(path, headers.get("authorization", ""))
        content = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and content != "application/json":  # refuses HTML forms
            raise APIError(415, "send JSON, with Content-Type: application/json")
        length = headers.get("content-length", "0")
        self._check_size(int(length) if length.isdigit() else 0)
        return key

    def _check_host(self, hosts: list[str]) -> None:
        """Prevent DNS rebinding, in which a foreign host name resolves to this server's address."""
        if self.settings.hosts is None:
            return
        match = HOST.fullmatch(hosts[0].strip().lower()) if len(hosts) == 1 else None
        if match is None or match[1] not in self.settings.hosts:
            text = "unknown Host header: connect via localhost, or add the name with --allow-host"
            raise APIError(403, text, code="host_not_allowed")

    def _check_origin(self, path: str, headers: Headers, host: str) -> None:
        """Refuse requests from pages of other sites; browsers name the site in the headers."""
        origins = [origin.lower().partition("://")[2] for origin in headers.getlist("origin")]
        site = headers.get("sec-fetch-site", "none")
        foreign = site in ("cross-site", "same-site") and path.startswith(API_PATHS)
        if foreign or any(origin != host for origin in origins):
            raise APIError(403, "cross-origin requests are not allowed", code="origin_not_allowed")

    def _check_key(self, path: str, authorization: str) -> str:
        """Check the API key; return the key's name ("key 0"), or "" if no key is needed.

        The comparison takes the same time for every key.
        """
        if not self.keys or path in PUBLIC_PATHS or path.startswith("/static/"):
            return ""
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, other) for other in self.keys]
        if scheme.lower() != "bearer" or not any(matches):
            text = "this server needs an API key: send Authorization: Bearer KEY"
            headers = {"www-authenticate": "Bearer"}
            raise APIError(401, text, code="invalid_api_key", headers=headers)
        return f"key {matches.index(True)}"

    def _check_size(self, size: int) -> None:
        if size > self.max_bytes:  # the rest of the body is not read
            text = f"the body is larger than {self.max_bytes} bytes: send less"
            headers = {"connection": "close"}
            raise APIError(413, text, code="request_too_large", headers=headers)

    def _limited(self, receive: Receive) -> Receive:
        """Wrap ``receive`` to limit the bytes received and the time until the body is complete."""
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS
        size, complete = 0, False

        async def limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                text, headers = "the body took too long to arrive", {"connection": "close"}
                raise APIError(408, text, code="timeout", headers=headers) from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            self._check_size(size)
            return message

        return limited


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Streamed(StreamingResponse):
    """Sends the status with the first bytes, so that an earlier failure becomes an HTTP error."""

    body_iterator: AsyncGenerator[bytes, None]

    async def stream_response(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with contextlib.aclosing(self.body_iterator) as chunks:
            async for data in chunks:
                if start:
                    await send(start)
                    start = {}
                await send({"type": "http.response.body", "body": data, "more_body": True})
        if not start:
            await send({"type": "http.response.body", "body": b""})


async def _answer_bytes(
    service: Service, queued: QueuedRequest, shape: Format | RecordFormat
) -> AsyncGenerator[bytes, None]:
    """Queue a request and yield its answer as bytes, in the format ``shape``.

    An error before the first bytes is raised; a later error becomes part of the stream.
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
            if isinstance(item, APIError) and not begun:
                raise item
            if isinstance(item, APIError):
                yield shape.error(item)
                return
            if item is END_OF_STREAM:
                yield shape.end()
                return
            if data := shape.on_record(item):
                begun = True
                yield data
    finally:
        service.worker.leave(queued)


async def _service(request: Request) -> Service:  # FastAPI would run a plain def in a thread pool
    service: Service = request.app.state.service
    return service


async def _with_runs(request: Request) -> Service:
    """Return the service; raise ``APIError`` if clients must not see the prompts of past runs."""
    service = await _service(request)
    if len(service.settings.keys) > 1:
        text = "a server with several keys does not show past runs, because they contain prompts"
        raise APIError(403, text, code="runs_not_shared")
    return service


Serving = Annotated[Service, Depends(_service)]

Runs = Annotated[Service, Depends(_with_runs)]

router = APIRouter(
    default_response_class=Response, responses={"4XX": {"description": "an error in OpenAI's form"}}
)


@router.get("/v1/models")
async def models(service: Serving) -> Response:
    """The served model."""
    return _json({"object": "list", "data": [service.model()]})


@router.get("/v1/models/{name:path}")
async def model(name: str, service: Serving) -> Response:
    """The served model, if ``name`` is its ID or an alias."""
    if name not in service.reader.names:
        raise APIError(404, "there is no such model: see /v1/models", code="model_not_found")
    return _json(service.model())


@router.post("/v1/chat/completions")
async def chat(body: ChatBody, request: Request, service: Serving) -> Response:
    """A chat completion: complete, or with ``stream: true`` as server-sent chunks."""
    return await _answer(service, request, body)


@router.post("/v1/completions")
async def completion(body: CompletionBody, request: Request, service: Serving) -> Response:
    """A completion of texts or of token IDs."""
    return await _answer(service, request, body)


@router.post("/api/events")
async def events(body: ChatBody, request: Request, service: Serving) -> Response:
    """A chat completion as the engine's records, one server-sent event per record."""
    return await _answer(service, request, body, RecordFormat())


@router.get("/api/methods")
async def methods(service: Serving) -> Response:
    """Methods and drift rules that requests can use, with the defaults and the limits."""
    return _json(service.methods())


@router.get("/api/prompts")
async def prompts(service: Serving) -> Response:
    """The example prompts."""
    return _json(window.ready_prompts(lambda method: is_ready(method, service.settings)))


@router.get("/api/runs")
async def runs(service: Runs) -> Response:
    """The past runs in the results folder."""
    return _json(await asyncio.to_thread(window.list_runs, service.results))


@router.get("/api/runs/{name:path}")
async def run(name: str, service: Runs) -> Response:
    """A past run with the content of its files, or its report."""
    folder, _, file = name.rpartition("/")
    if file == window.REPORT:
        text = await asyncio.to_thread(window.read_report, service.results, folder)
        return Response(text, media_type="text/html", headers=REPORT_HEADERS)
    return _json(await asyncio.to_thread(window.read_run, service.results, name))


@router.get("/healthz")
async def health(service: Serving) -> Response:
    """200 while requests are accepted, 503 otherwise."""
    if not service.worker.alive:
        raise APIError(503, "the server does not accept requests", code="not_ready")
    name = {} if service.settings.keys else {"model": service.facts.name}
    return _json({"status": "ok", **name, "version": __version__})


@router.get("/metrics")
async def metrics(service: Serving) -> Response:
    """Counters for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The web page."""
    return FileResponse(window.STATIC / "index.html")


def _json(data: Any) -> Response:
    return Response(json_bytes(data), media_type="application/json")


async def _answer(
    service: Service, request: Request, body: Common, shape: RecordFormat | Format | None = None
) -> Response:
    """Answer a request in the format ``shape``; None means OpenAI's format."""
    client, request_id = request.scope["dart"]["client"], request.scope["dart"]["request_id"]
    async with service.reading:
        requests = await asyncio.to_thread(service.reader.requests, body, request_id, client)
    for item in requests if service.settings.log_prompts else ():
        logger.warning("%s asks %r", item.id, service.reader.tokenizer.decode(list(item.ids)))
    shape = shape or Format(body, service.facts.name, requests[0].sampling, len(requests))
    chunks = _answer_bytes(service, QueuedRequest(requests, client), shape)
    kind = "text/event-stream" if shape.streams else "application/json"
    # the header keeps proxies such as nginx from buffering a stream
    return Streamed(chunks, media_type=kind, headers={"x-accel-buffering": "no"})


async def _on_http_error(request: Request, error: HTTPException) -> NoReturn:
    """Raise ``error`` as an ``APIError``; if a body limit caused it, raise that limit's error."""
    if isinstance(error.__cause__, APIError):
        raise error.__cause__
    if error.status_code == 404:
        text = "there is no such address: GET /openapi.json lists all, such as /v1/chat/completions"
        raise APIError(404, text, code="not_found")
    if error.status_code == 405:
        allow = dict(error.headers or {}).get("Allow", "")
        raise APIError(405, f"this address only accepts {allow}", headers={"allow": allow})
    raise APIError(400, "the body is not valid JSON in UTF-8", code="invalid_json")


async def _on_invalid_body(request: Request, error: RequestValidationError) -> NoReturn:
    raise refusal(error.errors())


def build(service: Service) -> FastAPI:
    """The ASGI application with all routes."""
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
    app.add_middleware(Guard, service=service)
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=window.STATIC))
    return app
