"""What every request passes first and every answer last: who may ask, how much, and the headers.

A plain ASGI application around another one; it imports no framework.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from dart_llm.serve_errors import Refusal, internal
from dart_llm.serve_metrics import Metrics
from dart_llm.serve_worker import log_fault

logger = logging.getLogger("dart_llm.serve")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = dict[str, list[str]]

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFETY = (
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
"""Headers of every answer."""

OPEN = ("/", "/healthz", "/favicon.ico")
"""Paths that need no key, beside ``/static/``: they hold nothing of the model or of a user."""

PROGRAMS = ("/api/", "/v1/", "/metrics")
"""Paths that no page of another site has business with."""


@dataclass(frozen=True)
class Rules:
    """``hosts``: names by which the server may be called, None: any.  ``keys``: sha256 of each.

    ``body_bytes``: the largest body; ``body_seconds``: how long it may take to arrive;
    ``at_once``: requests in flight; ``loud``: the log may quote texts.
    """

    hosts: frozenset[str] | None
    keys: tuple[bytes, ...] = ()
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    at_once: int = 512
    loud: bool = False


def digest(key: str) -> bytes:
    """What is kept and compared of an API key."""
    return hashlib.sha256(key.encode()).digest()


class Guard:
    """Refuses what ``rules`` do not allow, and turns every exception into an answer."""

    def __init__(self, rules: Rules, metrics: Metrics) -> None:
        self.rules = rules
        self.metrics = metrics
        self.in_flight = 0
        self.app: Asgi = _nothing

    def around(self, app: Asgi) -> Guard:
        """Stand in front of ``app``."""
        self.app = app
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no other kind is served
            await send({"type": "websocket.close", "code": 1008})
            return
        self.in_flight += 1
        try:
            await _Exchange(self, scope, receive, send).run()
        finally:
            self.in_flight -= 1

    def check(self, scope: Scope) -> str:
        """The client's name for the queue; raises ``Refusal``."""
        headers = _headers(scope)
        self._check_host(headers)
        self._check_origin(scope["path"], headers)
        if self.in_flight > self.rules.at_once:
            raise Refusal(429, "too many connections", code="rate_limit_exceeded", retry_after=1)
        key = self._check_key(scope["path"], headers)
        length = headers.get("content-length", ["0"])[0]
        if length.isdigit() and int(length) > self.rules.body_bytes:
            raise too_large(self.rules.body_bytes)
        address = (scope.get("client") or ("unknown",))[0]
        return key or str(address)

    def _check_host(self, headers: Headers) -> None:
        """DNS rebinding: a page of another name whose address is ours has that name as host."""
        if self.rules.hosts is None:
            return
        names = headers.get("host", [])
        if len(names) != 1 or _host(names[0]) not in self.rules.hosts:
            raise Refusal(
                403,
                "this server is not called that: use localhost, or name the host with --allow-host",
                code="host_not_allowed",
            )

    def _check_origin(self, path: str, headers: Headers) -> None:
        """Pages of other sites: a browser says where a request comes from."""
        origins = headers.get("origin", [])
        host = headers.get("host", [""])[0].lower()
        foreign = any(one.lower().partition("://")[2] != host for one in origins)
        site = headers.get("sec-fetch-site", ["none"])[0]
        if foreign or (site in ("cross-site", "same-site") and path.startswith(PROGRAMS)):
            raise Refusal(403, "pages of other sites are not served", code="origin_not_allowed")

    def _check_key(self, path: str, headers: Headers) -> str:
        """The name of the key that was given, "" without keys; takes as long for a wrong one."""
        if not self.rules.keys or path in OPEN or path.startswith("/static/"):
            return ""
        scheme, _, given = headers.get("authorization", [""])[0].partition(" ")
        offered = digest(given.strip())
        found = [hmac.compare_digest(offered, known) for known in self.rules.keys]
        if scheme.lower() != "bearer" or not any(found):
            raise Refusal(
                401,
                "this server needs an API key: send Authorization: Bearer KEY",
                code="invalid_api_key",
            )
        return f"key {found.index(True)}"


class _Exchange:
    """One request and its answer."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard = guard
        self.scope = scope
        self.receive = receive
        self.send = send
        self.id = f"req_{token_hex(12)}"
        self.status: int | None = None
        self.started = time.perf_counter()
        self.deadline = asyncio.get_running_loop().time() + guard.rules.body_seconds
        self.received = 0
        self.body_read = False

    async def run(self) -> None:
        rules = self.guard.rules
        try:
            client = self.guard.check(self.scope)
            self.scope["dart"] = {"request_id": self.id, "client": client}
            await self.guard.app(self.scope, self._receive, self._send)
        except Refusal as refusal:
            await self._refuse(refusal)
        except Exception as error:
            if type(error).__name__ != "ClientDisconnect":  # the framework's, for a cut-off body
                log_fault(self.id, error, rules.loud)
                await self._refuse(internal(self.id))
        finally:
            self._note()

    async def _receive(self) -> Message:
        """The body, counted while it arrives: it may come without a length."""
        if self.body_read:
            return await self.receive()
        try:
            async with asyncio.timeout_at(self.deadline):  # of the whole body, not of a piece
                message = await self.receive()
        except TimeoutError:
            raise Refusal(408, "the body took too long to arrive", code="timeout") from None
        self.received += len(message.get("body", b""))
        self.body_read = not message.get("more_body", False)
        if self.received > self.guard.rules.body_bytes:
            raise too_large(self.guard.rules.body_bytes)
        return message

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(name, value) for name, value in message.get("headers", ())]
            names = {name for name, _ in own}
            own += [(name, value) for name, value in SAFETY if name not in names]
            message["headers"] = [*own, (b"x-request-id", self.id.encode())]
        await self.send(message)

    async def _refuse(self, refusal: Refusal) -> None:
        if self.status is not None:  # too late to say anything: the answer has begun
            return
        body = refusal.body()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *refusal.headers(),
        ]
        await self._send(
            {"type": "http.response.start", "status": refusal.status, "headers": headers}
        )
        await self._send({"type": "http.response.body", "body": body})

    def _note(self) -> None:
        route = self.scope.get("route")
        path = getattr(route, "path", "other")  # the pattern: what a client makes up is no label
        status = str(self.status or "none")  # none: the client went away before its answer
        self.guard.metrics.requests.add(1, path, status)
        took = time.perf_counter() - self.started
        logger.info("%s %s %s %s %.3f s", self.id, self.scope["method"], path, status, took)


def too_large(limit: int) -> Refusal:
    """The refusal of a body of more than ``limit`` bytes."""
    return Refusal(
        413, f"the body is larger than {limit} bytes: send less", code="request_too_large"
    )


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("the guard stands in front of no application")


def _headers(scope: Scope) -> Headers:
    found: Headers = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _host(value: str) -> str:
    """The name in a Host header, without its port."""
    value = value.strip().lower()
    if value.startswith("["):
        return value.partition("]")[0] + "]"
    return value.partition(":")[0]
