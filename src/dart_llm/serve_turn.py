"""One request between the event loop, which owns its connection, and the thread of the model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from dart_llm.engine_ask import Ask
from dart_llm.serve_errors import Refusal


class Over:
    """Ends a turn's mail: nothing comes after it."""


OVER = Over()
Item = Any
"""A record of the engine, a ``Refusal`` that ends the request, or ``OVER``."""


class Mailbox:
    """What one thread puts in, the event loop takes out, several at a time when it is late."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[Item] = deque()
        self._woken = False
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item) -> None:
        """From any thread.  Without effect once the event loop is closed."""
        self._items.append(item)
        if self._woken:  # the loop has not looked since it was called: it will see this item too
            return
        self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._filled.set)
        except RuntimeError:
            self._items.clear()

    async def take(self) -> list[Item]:
        """Everything that arrived, in order; waits for the first."""
        await self._filled.wait()
        self._filled.clear()
        self._woken = False
        found = []
        while self._items:
            found.append(self._items.popleft())
        return found


class Turn:
    """One request's place in the queue, and later on the model.

    ``asks``: what the engine is given, one after the other.  ``client`` and ``user`` decide whose
    turn it is.
    """

    def __init__(self, asks: Sequence[Ask], client: str, user: str, request_id: str) -> None:
        self.left = deque(asks)
        self.client = client
        self.user = user
        self.request_id = request_id
        self.mail = Mailbox(asyncio.get_running_loop())
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.first_token: float | None = None
        self._cancelled = threading.Event()

    def cancelled(self) -> bool:
        """Asked by the engine at every token."""
        return self._cancelled.is_set()

    def cancel(self, why: Refusal | None = None) -> None:
        """From any thread: let the model go at the next token; ``why`` is told to the client."""
        if not self._cancelled.is_set():
            self._cancelled.set()
            self.mail.put(why or OVER)
