"""What every request passes first: host, origin, API key, limits of the body; and every response's
headers.

An ASGI middleware that imports no framework.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from secrets import token_hex
from typing import Any

from dart_llm.server.responses import APIError, internal
from dart_llm.server.service import Metrics, log_fault
from dart_llm.server.settings import ServeSettings

logger = logging.getLogger("dart_llm.serve")

Scope = MutableMapping[str, Any]

Message = MutableMapping[str, Any]

Receive = Callable[[], Awaitable[Message]]

Send = Callable[[Message], Awaitable[None]]

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

HEADERS = {
    b"content-security-policy": CONTENT_POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}
"""Headers of every response, unless its route sets them."""

OPEN = ("/", "/healthz")
"""Paths that need no key, beside ``/static/``: they show nothing of the model or of a user."""

PROGRAMS = ("/api/", "/v1/", "/metrics")
"""Paths that pages of other sites may not even link to."""

BODY_SECONDS = 30.0  # how long a body may take to arrive

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+?)\.?(?::[0-9]{1,5})?")
"""A name or an address, maybe with the dot that ends a full name, and a port."""


class Guard:
    """Refuses what the settings do not allow, and turns every exception into a response."""

    def __init__(self, app: Any, settings: ServeSettings, metrics: Metrics) -> None:
        self.app = app
        self.hosts = settings.hosts
        self.keys = [_digest(key) for key in settings.keys]
        self.max_bytes = settings.max_body_kib << 10
        self.log_messages = settings.log_prompts
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD" and scope["path"] != "/api/events":  # uvicorn drops the body
            scope = {**scope, "method": "GET"}
        request_id, began = f"req_{token_hex(12)}", time.perf_counter()
        status: int | None = None

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = {**HEADERS, b"x-request-id": request_id.encode()}
                message["headers"] = list({**headers, **dict(message["headers"])}.items())
            await send(message)

        try:
            client = self.check(scope)
            scope["dart"] = {"request_id": request_id, "client": client}
            await self.app(scope, self._limited(receive), guarded)
        except APIError as error:
            if status is None:
                await _send_error(error, guarded)
        except Exception as error:
            log_fault(request_id, error, self.log_messages)
            if status is None:
                await _send_error(internal(request_id), guarded)
        finally:
            # the route's pattern: a path that a client makes up is not a label
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status or "none")).inc()
            took = time.perf_counter() - began
            logger.info("%s %s %s %s %.3f s", request_id, scope["method"], route, status, took)

    def check(self, scope: Scope) -> str:
        """The client's name: its key, else its address; raises ``APIError``."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
        hosts = headers.get("host", [])
        self._check_host(hosts)
        self._check_origin(scope["path"], headers, "".join(hosts).lower())
        key = self._check_key(scope["path"], headers.get("authorization", [""])[0])
        content = headers.get("content-type", [""])[0].partition(";")[0].strip().lower()
        if scope["method"] == "POST" and content != "application/json":  # forms send other types
            raise APIError(415, "send JSON, with Content-Type: application/json")
        length = headers.get("content-length", ["0"])[0]
        self._check_size(int(length) if length.isdigit() else 0)
        return key or str((scope.get("client") or ("unknown",))[0])

    def _check_host(self, hosts: list[str]) -> None:
        """DNS rebinding: a page whose name points to this address has that name as Host."""
        if self.hosts is None:
            return
        match = HOST.fullmatch(hosts[0].strip().lower()) if len(hosts) == 1 else None
        if match is None or match[1] not in self.hosts:
            raise APIError(
                403,
                "unknown Host header: connect via localhost, or add the name with --allow-host",
                code="host_not_allowed",
            )

    def _check_origin(self, path: str, headers: dict[str, list[str]], host: str) -> None:
        """Pages of other sites: a browser names the site that a request comes from."""
        origins = [one.lower().partition("://")[2] for one in headers.get("origin", [])]
        site = headers.get("sec-fetch-site", ["none"])[0]
        foreign = site in ("cross-site", "same-site") and path.startswith(PROGRAMS)
        if foreign or any(origin != host for origin in origins):
            raise APIError(403, "cross-origin requests are not allowed", code="origin_not_allowed")

    def _check_key(self, path: str, authorization: str) -> str:
        """The name of the key, "" without keys; takes as long for a wrong one."""
        if not self.keys or path in OPEN or path.startswith("/static/"):
            return ""
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, one) for one in self.keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise APIError(
                401,
                "this server needs an API key: send Authorization: Bearer KEY",
                code="invalid_api_key",
            )
        return f"key {matches.index(True)}"

    def _check_size(self, size: int) -> None:
        if size > self.max_bytes:
            message = f"the body is larger than {self.max_bytes} bytes: send less"
            raise APIError(413, message, code="request_too_large")

    def _limited(self, receive: Receive) -> Receive:
        """``receive`` within the limits of a body: its size, announced or not, and its time."""
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
                raise APIError(408, "the body took too long to arrive", code="timeout") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            self._check_size(size)
            return message

        return limited


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


async def _send_error(error: APIError, send: Send) -> None:
    body = json.dumps(error.to_dict()).encode()
    headers = [*error.headers(), (b"content-type", b"application/json")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
