"""From a queued request to bytes on its connection.  Plain ASGI; it imports no framework."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Protocol

from dart_llm.serve_errors import Refusal
from dart_llm.serve_format import Format, failed, sse
from dart_llm.serve_guard import Receive, Scope, Send
from dart_llm.serve_live import Live
from dart_llm.serve_turn import OVER, Turn
from dart_llm.serve_worker import Worker

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

    def error(self, refusal: Refusal) -> bytes:
        """What ends an answer that has begun and cannot go on."""
        ...


class ChunkWriter:
    """OpenAI's stream of chunks."""

    streams = True

    def __init__(self, shape: Format) -> None:
        self.take = shape.chunks

    def end(self) -> bytes:
        return b""

    def error(self, refusal: Refusal) -> bytes:
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

    def error(self, refusal: Refusal) -> bytes:
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

    def error(self, refusal: Refusal) -> bytes:
        return sse({"kind": "error", "message": refusal.message, "request": self.request_id})


LAST_SECONDS = 5.0
"""How long the last event of a stream that ran out of time may take to be sent."""


class Delivery:
    """An ASGI application that queues one turn and sends what comes of it."""

    def __init__(self, worker: Worker, turn: Turn, writer: Writer, seconds: float) -> None:
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
            late = Refusal(503, f"no answer within {self.seconds:g} s", code="timeout")
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
                if isinstance(item, Refusal):
                    if not self._begun and not data:
                        raise item
                    data += self.writer.error(item)
                elif item is OVER:
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
        gone = asyncio.create_task(until_gone(receive, lambda: box.put(OVER)))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": list(STREAM)})
            data = sse({"kind": "hello", "model": self.model})
            while True:
                await send({"type": "http.response.body", "body": data, "more_body": True})
                items: list[Any] = []
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PING_SECONDS):
                        items = await box.take()
                if any(item is OVER for item in items):
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
    with contextlib.suppress(Refusal):
        while (await receive())["type"] != "http.disconnect":
            pass
    then()
