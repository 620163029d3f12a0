"""Hosts, origins, keys, body limits, headers; strict JSON.

What every request passes first and every answer last: a plain ASGI application around another one.
It imports no framework.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from secrets import token_hex
from typing import Any

from dart_llm.server.responses import APIError, internal
from dart_llm.server.service import Metrics
from dart_llm.server.settings import ServeSettings
from dart_llm.server.worker import largest_share, log_fault

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

ALIVE = "/healthz"
"""Never refused for lack of places: who asks it restarts a server that does not answer."""

STREAMS = ("/api/events",)
"""Paths whose GET does not end by itself, so that there is no HEAD of it."""

PROGRAMS = ("/api/", "/v1/", "/metrics")
"""Paths that no page of another site has business with."""

HEAD_BYTES = 64 << 10  # of the largest head of a request
BODY_SECONDS = 30.0  # how long a body may take to arrive
AT_ONCE = 512  # requests in flight, of one client at most three quarters of them


class Guard:
    """Refuses what the settings do not allow, and turns every exception into an answer."""

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        self.hosts = settings.hosts
        self.keys = [_digest(key) for key in settings.keys]
        self.body_bytes = settings.max_body_kib << 10
        self.loud = settings.log_prompts
        self.metrics = metrics
        self.clients: Counter[str] = Counter()
        """Requests in flight of each client."""
        self.app: Asgi

    @property
    def in_flight(self) -> int:
        return self.clients.total()

    def around(self, app: Asgi) -> Guard:
        self.app = app
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no other kind is served
            await send({"type": "websocket.close", "code": 1008})
            return
        await _Exchange(self, scope, receive, send).run()

    def check(self, scope: Scope) -> str:
        """The client's name for the queue; raises ``APIError``."""
        headers = _headers(scope)
        if _head_bytes(scope) > HEAD_BYTES:
            said = f"the head of the request is larger than {HEAD_BYTES} bytes"
            raise APIError(400, said, code="head_too_large")
        self._check_host(headers)
        self._check_origin(scope["path"], headers)
        key = self._check_key(scope["path"], headers)
        length = headers.get("content-length", ["0"])[0]
        self.check_size(int(length) if length.isdigit() else 0)
        return key or str((scope.get("client") or ("unknown",))[0])

    def check_size(self, size: int) -> None:
        """Raises ``APIError`` for a body of more bytes than are read."""
        if size > self.body_bytes:
            said = f"the body is larger than {self.body_bytes} bytes: send less"
            raise APIError(413, said, code="request_too_large")

    @contextlib.contextmanager
    def place(self, client: str, path: str) -> Iterator[None]:
        """One of the places for requests in flight; raises ``APIError`` when none is left."""
        full = self.in_flight >= AT_ONCE or self.clients[client] >= largest_share(AT_ONCE)
        if full and path != ALIVE:
            raise APIError(429, "too many connections", code="rate_limit_exceeded", retry_after=1)
        self.clients[client] += 1
        try:
            yield
        finally:
            self.clients[client] -= 1
            if not self.clients[client]:
                del self.clients[client]

    def _check_host(self, headers: Headers) -> None:
        """DNS rebinding: a page of another name whose address is ours has that name as host."""
        if self.hosts is None:
            return
        names = headers.get("host", [])
        if len(names) != 1 or host_name(names[0]) not in self.hosts:
            raise APIError(
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
            raise APIError(403, "pages of other sites are not served", code="origin_not_allowed")

    def _check_key(self, path: str, headers: Headers) -> str:
        """The name of the key that was given, "" without keys; takes as long for a wrong one."""
        if not self.keys or path in OPEN or path.startswith("/static/"):
            return ""
        scheme, _, given = headers.get("authorization", [""])[0].partition(" ")
        offered = _digest(given.strip())
        found = [hmac.compare_digest(offered, known) for known in self.keys]
        if scheme.lower() != "bearer" or not any(found):
            raise APIError(
                401,
                "this server needs an API key: send Authorization: Bearer KEY",
                code="invalid_api_key",
            )
        return f"key {found.index(True)}"


class _Exchange:
    """One request and its answer."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard = guard
        # HEAD is GET without the body, which is left out where the answer is written
        head = scope["method"] == "HEAD" and scope["path"] not in STREAMS
        self.scope = {**scope, "method": "GET"} if head else scope
        self.receive = receive
        self.send = send
        self.id = f"req_{token_hex(12)}"
        self.status: int | None = None
        self.started = time.perf_counter()
        self.deadline = asyncio.get_running_loop().time() + BODY_SECONDS
        self.received = 0
        self.body_read = False

    async def run(self) -> None:
        try:
            client = self.guard.check(self.scope)
            self.scope["dart"] = {"request_id": self.id, "client": client}
            with self.guard.place(client, self.scope["path"]):
                await self.guard.app(self.scope, self._receive, self._send)
        except APIError as refusal:
            await self._refuse(refusal)
        except Exception as error:
            if type(error).__name__ != "ClientDisconnect":  # the framework's, for a cut-off body
                log_fault(self.id, error, self.guard.loud)
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
            raise APIError(408, "the body took too long to arrive", code="timeout") from None
        self.received += len(message.get("body", b""))
        self.body_read = not message.get("more_body", False)
        self.guard.check_size(self.received)
        return message

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = list(message.get("headers", ()))
            names = {name for name, _ in own}
            own += [one for one in SAFETY if one[0] not in names]
            message["headers"] = [*own, (b"x-request-id", self.id.encode())]
        await self.send(message)

    async def _refuse(self, refusal: APIError) -> None:
        if self.status is not None:  # too late to say anything: the answer has begun
            return
        body = json.dumps(refusal.to_dict()).encode()
        headers = [(b"content-type", b"application/json"), *refusal.headers()]
        headers.append((b"content-length", str(len(body)).encode()))
        start = {"type": "http.response.start", "status": refusal.status, "headers": headers}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})

    def _note(self) -> None:
        route = self.scope.get("route")
        path = getattr(route, "path", "other")  # the pattern: what a client makes up is no label
        status = str(self.status or "none")  # none: the client went away before its answer
        self.guard.metrics.requests.labels(path, status).inc()
        took = time.perf_counter() - self.started
        logger.info("%s %s %s %s %.3f s", self.id, self.scope["method"], path, status, took)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _headers(scope: Scope) -> Headers:
    found: Headers = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _head_bytes(scope: Scope) -> int:
    """About what was sent before the body."""
    lines = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    return lines + len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))


HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+?)\.?(?::[0-9]{1,5})?")
"""A name or an address, maybe with the dot that ends a full name, and a port."""


def host_name(value: str) -> str:
    """The name in a Host header, without its port; "" for what is none."""
    found = HOST.fullmatch(value.strip().lower())
    return found[1] if found else ""


# JSON from strangers: bounded in depth, without NaN, doubled keys or halves of characters.


DEEPEST = 32  # objects and lists inside one another
LONGEST_NUMBER = 64  # characters of a number


SURROGATE = re.compile(r"[\ud800-\udfff]")
TOO_DEEP = f"the body nests more than {DEEPEST} objects and lists: make it flatter"


def parse(body: bytes) -> dict[str, Any]:
    """The object in ``body``; raises ``APIError`` (400) with what is wrong with it."""
    try:
        data = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_int,
        )
    except UnicodeDecodeError as error:
        raise _bad(f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise _bad(f"the body is not JSON: {error.msg} ({place})") from None
    except RecursionError:
        raise _bad(TOO_DEEP) from None
    if not isinstance(data, dict):
        raise _bad('the body must be a JSON object, as in {"messages": [...]}')
    _check(data)
    return data


def _bad(message: str) -> APIError:
    return APIError(400, message, code="invalid_json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _bad(f"the key {_shown(twice)} stands twice in one object: leave one out")
    return found


def _constant(name: str) -> float:
    raise _bad(f"the body holds {name}, which is not JSON: give a finite number")


def _float(text: str) -> float:
    value = float(text) if len(text) <= LONGEST_NUMBER else math.inf
    if math.isinf(value):
        raise _bad(f"the number {text[:LONGEST_NUMBER]} is too large or too long")
    return value


def _int(text: str) -> int:
    _float(text)
    return int(text)


def _check(data: dict[str, Any]) -> None:
    """Depth, and that every text can be written as UTF-8; without recursion."""
    level: list[Any] = [data]
    for _ in range(DEEPEST):
        inside: list[Any] = []
        for value in level:
            if isinstance(value, str) and SURROGATE.search(value):
                half = f"the text {_shown(value)} holds half of a character (a lone surrogate)"
                raise _bad(half)
            if isinstance(value, dict):
                inside += [*value, *value.values()]
            elif isinstance(value, list):
                inside += value
        level = inside
        if not level:
            return
    raise _bad(TOO_DEEP)


def _shown(text: str) -> str:
    return json.dumps(text if len(text) <= 40 else text[:40] + "...")
