"""The routes, as a FastAPI application: the only file that imports it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from dart_llm import __version__, serve_runs
from dart_llm.engine_ask import Ask, Sampling
from dart_llm.errors import MissingExtra
from dart_llm.heap import give_back
from dart_llm.serve_answer import (
    ChunkWriter,
    Delivery,
    RecordWriter,
    Watch,
    WholeWriter,
    Writer,
)
from dart_llm.serve_errors import Refusal
from dart_llm.serve_format import ChatFormat, Format, json_bytes
from dart_llm.serve_guard import Asgi, Guard, Receive, Rules, Scope, Send, digest
from dart_llm.serve_json import parse
from dart_llm.serve_openapi import ROUTES, components, operation
from dart_llm.serve_schemas import ChatBody, Common, CompletionBody, read
from dart_llm.serve_service import Service, logger
from dart_llm.serve_site import ready_prompts, static_files
from dart_llm.serve_turn import Turn

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
            raise Refusal(
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
        return _json(await asyncio.to_thread(serve_runs.listing, self.results))

    async def run(self, name: str) -> Response:
        """One past run with its files' content; below its name, its report."""
        self._check_runs()
        run, _, file = name.rpartition("/")
        if file == serve_runs.REPORT:
            text = await asyncio.to_thread(serve_runs.report, self.results, run)
            return Response(text, media_type="text/html", headers=ALONE)
        return _json(await asyncio.to_thread(serve_runs.opened, self.results, name))

    async def health(self) -> Response:
        """200 while requests are taken, 503 otherwise."""
        if not self.service.worker.alive:
            raise Refusal(503, "the server does not take requests", code="not_ready")
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
            raise Refusal(404, "there is no such file", code="not_found")
        content, kind = self.site[name]
        return Response(content, media_type=kind)

    # help

    @property
    def _model(self) -> str:
        return self.service.facts.name

    def _check_runs(self) -> None:
        if not self.service.settings.shows_runs:
            raise Refusal(
                403,
                "past runs hold prompts, and this server has several keys: start it with "
                "--share-runs to show them to every key",
                code="runs_not_shared",
            )

    async def _read(self, request: Request, kind: type[Any]) -> tuple[Any, tuple[Ask, ...]]:
        content = request.headers.get("content-type", "")
        if content.partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "send JSON, with Content-Type: application/json")
        raw = await request.body()
        known = request.scope["dart"]

        def understood() -> tuple[Any, tuple[Ask, ...]]:
            body = read(kind, parse(raw))
            asker = self.service.asker
            of_kind = asker.completion if isinstance(body, CompletionBody) else asker.chat
            return body, of_kind(body, known["request_id"], known["client"])

        def understood_long() -> tuple[Any, tuple[Ask, ...]]:
            try:
                return understood()
            finally:
                give_back()

        if len(raw) <= LONG_BODY:
            return understood()
        return await asyncio.get_running_loop().run_in_executor(
            self.service.bodies, understood_long
        )

    def _deliver(
        self, request: Request, body: Common, asks: tuple[Ask, ...], writer: Writer
    ) -> Response:
        service, known = self.service, request.scope["dart"]
        if service.settings.log_prompts:
            for ask in asks:
                text = service.asker.tokenizer.decode(list(ask.ids))
                logger.warning("%s asks %r", ask.id, text)
        turn = Turn(asks, known["client"], body.user or "", known["request_id"])
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
        raise Refusal(404, message, code="not_found")

    async def other_method(request: Request, error: Exception) -> Response:
        pattern = request.scope["route"].path
        allow = [route.method for route in ROUTES if route.path == pattern]
        raise Refusal(405, f"this address takes {' and '.join(allow)} alone", allow=sorted(allow))

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
