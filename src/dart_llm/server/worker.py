"""The one thread that runs the model, the fair queue before it, the hand-over to the event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

from dart_llm.engine.events import Failed, Record
from dart_llm.engine.requests import GenerationRequest
from dart_llm.errors import ConfigError
from dart_llm.server.responses import APIError, internal

# Who is next: round robin over clients, and over the users of each client.  No threads and no
# clock in here; ``Worker`` adds them.

T = TypeVar("T")

LARGEST_SHARE = 0.75
"""Of some places one client may take at most this share, so that others find one."""


def largest_share(places: int) -> int:
    """How many of ``places`` one client may take."""
    return max(1, int(places * LARGEST_SHARE))


class Full(Exception):
    """No place is left; ``waiting``: how many wait already (all, or those of this client)."""

    def __init__(self, waiting: int, own: bool) -> None:
        super().__init__(waiting)
        self.waiting = waiting
        self.own = own


class FairQueue(Generic[T]):
    """At most ``places`` items wait.  One client's many items do not delay another's first."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.own_places = largest_share(places)
        self._clients: OrderedDict[str, OrderedDict[str, deque[T]]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def put(self, client: str, user: str, item: T, again: bool = False) -> None:
        """Add ``item`` behind those of the same client and user; raises ``Full``.

        ``again``: it has had a turn and is not done; it keeps a place whoever waits.
        """
        users = self._clients.get(client, OrderedDict())
        own = sum(map(len, users.values()))
        if not again and (self._length >= self.places or own >= self.own_places):
            raise Full(self._length, self._length < self.places)
        self._clients.setdefault(client, users).setdefault(user, deque()).append(item)
        self._length += 1

    def take(self) -> T | None:
        """The next item, or None: the longest not served client's longest not served user's."""
        if not self._clients:
            return None
        client, users = next(iter(self._clients.items()))
        user, items = next(iter(users.items()))
        item = items.popleft()
        self._length -= 1
        users.move_to_end(user)  # who was served goes to the end
        self._clients.move_to_end(client)
        self._tidy(client, user)
        return item

    def _tidy(self, client: str, user: str) -> None:
        """Who has nothing waiting leaves."""
        users = self._clients[client]
        if not users[user]:
            del users[user]
        if not users:
            del self._clients[client]

    def remove(self, item: T) -> bool:
        """Take ``item`` out, whose client went away; False when it does not wait (any more)."""
        for client, users in self._clients.items():
            for user, items in users.items():
                if item in items:
                    items.remove(item)
                    self._length -= 1
                    self._tidy(client, user)
                    return True
        return False

    def clear(self) -> list[T]:
        """Take everything out."""
        return list(iter(self.take, None))


# One request between the event loop, which owns its connection, and the thread of the model.


END_OF_STREAM = object()  # ends a turn's mail: nothing comes after it

Item = Any  # A record of the engine, a APIError that ends the request, or END_OF_STREAM


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


class QueuedRequest:
    """One request's place in the queue, and later on the model.

    ``asks``: what the engine is given, one after the other.  ``client`` and ``user`` decide whose
    turn it is.
    """

    def __init__(
        self, asks: Sequence[GenerationRequest], client: str, user: str, request_id: str
    ) -> None:
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

    def cancel(self, why: APIError | None = None) -> None:
        """From any thread: let the model go at the next token; ``why`` is told to the client."""
        if not self._cancelled.is_set():
            self._cancelled.set()
            self.mail.put(why or END_OF_STREAM)


logger = logging.getLogger("dart_llm.serve")

STOPPING = "the server is shutting down"
LONGEST_WAIT = 60  # seconds; Retry-After never names more

LAST_TOKEN_SECONDS = 10.0
"""How long a cancelled answer may take to let go of the model when the server ends."""


class EngineLike(Protocol):
    """What the worker needs of an engine."""

    def run(
        self,
        ask: GenerationRequest,
        emit: Callable[[Record], None],
        cancelled: Callable[[], bool] = ...,
    ) -> Any:
        """Answer ``ask``; every record goes to ``emit``, ``cancelled`` is asked at every token."""
        ...


OnRecord = Callable[[QueuedRequest, Record], None]


class Worker:
    """Runs turns one after the other; ``on_record`` sees every record, in the model's thread."""

    def __init__(
        self, engine: EngineLike, places: int, on_record: OnRecord, loud: bool = False
    ) -> None:
        """``loud``: the log may hold messages of exceptions, which may quote prompts."""
        self.engine = engine
        self.on_record = on_record
        self.loud = loud
        self.running: QueuedRequest | None = None
        self._queue: FairQueue[QueuedRequest] = FairQueue(places)
        self._changed = threading.Condition()
        self._stopping = False
        self._seconds = 1.0
        self._first: Callable[[], None] = lambda: None
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._loop, name="model", daemon=True)

    def start(self, first: Callable[[], None] = lambda: None) -> None:
        """Do ``first`` in the model's thread, then begin to take turns; raises what it raises."""
        self._first = first
        self._thread.start()
        self._ready.result()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def submit(self, turn: QueuedRequest) -> None:
        """Queue a turn; raises ``APIError``: 429 when no place is left, 503 at the end."""
        with self._changed:
            if self._stopping:
                raise APIError(503, STOPPING, code="shutting_down", retry_after=LONGEST_WAIT)
            try:
                self._queue.put(turn.client, turn.user, turn)
            except Full as full:
                raise self._busy(full) from None
            self._changed.notify_all()

    def _busy(self, full: Full) -> APIError:
        whose = "of yours " if full.own else ""
        seconds = min(LONGEST_WAIT, max(1, math.ceil(self._seconds * full.waiting)))
        said = f"too many requests {whose}wait already: try again in {seconds} s"
        return APIError(429, said, code="rate_limit_exceeded", retry_after=seconds)

    def leave(self, turn: QueuedRequest, why: APIError | None = None) -> None:
        """The turn is not wanted any more: out of the queue, or off the model at its next token."""
        turn.cancel(why)
        with self._changed:
            self._queue.remove(turn)

    def stop(self, grace: float) -> None:
        """Send away who waits, let who runs finish for ``grace`` seconds, then cancel it.

        Returns within ``grace + LAST_TOKEN_SECONDS`` seconds.
        """
        with self._changed:
            self._stopping = True
            sent_away = self._queue.clear()
            self._changed.notify_all()
        for turn in sent_away:
            turn.cancel(APIError(503, STOPPING, code="shutting_down", retry_after=LONGEST_WAIT))
        if self._thread.ident is None:
            return
        self._thread.join(grace)
        self.hurry()
        self._thread.join(LAST_TOKEN_SECONDS)

    def hurry(self) -> None:
        """Cancel the running answer, because the server ends."""
        running = self.running
        if running is not None:
            running.cancel(APIError(503, STOPPING, code="shutting_down"))

    def _loop(self) -> None:
        try:
            self._first()
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        while (turn := self._next()) is not None:
            if not turn.cancelled():
                self._serve(turn)
            self.running = None
            if turn.left:
                self._again(turn)
            del turn  # its records are not kept until the next one comes

    def _next(self) -> QueuedRequest | None:
        """The next turn, when there is one; None at the end."""
        with self._changed:
            while not len(self._queue) and not self._stopping:
                self._changed.wait()
            self.running = self._queue.take()
            return self.running

    def _again(self, turn: QueuedRequest) -> None:
        """What is left of a turn waits behind the others, unless nobody wants it any more."""
        with self._changed:
            if self._stopping:
                turn.cancel(APIError(503, STOPPING, code="shutting_down"))
            if not turn.cancelled():
                self._queue.put(turn.client, turn.user, turn, again=True)

    def _serve(self, turn: QueuedRequest) -> None:
        """Answer the next of the turn's asks; a fault ends the turn."""
        turn.started = time.perf_counter()

        def emit(record: Record) -> None:
            if not isinstance(record, Failed):  # its message is the exception's, see below
                turn.mail.put(record)
            self.on_record(turn, record)

        try:
            self.engine.run(turn.left.popleft(), emit, turn.cancelled)
            if not turn.left or turn.cancelled():
                turn.mail.put(END_OF_STREAM)
        except ConfigError as error:
            turn.cancel(APIError(400, str(error), code="invalid_value"))
        except Exception as error:
            log_fault(turn.request_id, error, self.loud)
            turn.cancel(internal(turn.request_id))
        self._seconds += 0.2 * (time.perf_counter() - turn.started - self._seconds)


def log_fault(request_id: str, error: BaseException, loud: bool) -> None:
    """Where it happened; the message of the exception only if ``loud``, for it may quote a text."""
    said = f": {error}" if loud else ""
    logger.error("%s failed with %s%s", request_id, type(error).__name__, said)
    for frame in traceback.extract_tb(error.__traceback__):
        logger.error("  %s:%s in %s", frame.filename, frame.lineno, frame.name)
