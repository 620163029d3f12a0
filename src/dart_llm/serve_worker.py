"""The one thread that runs the model, and the fair queue in front of it."""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from dart_llm.engine_ask import Ask
from dart_llm.engine_records import Failed, Record
from dart_llm.errors import ConfigError
from dart_llm.serve_errors import Refusal, internal
from dart_llm.serve_fair import FairQueue, Full
from dart_llm.serve_turn import OVER, Turn

logger = logging.getLogger("dart_llm.serve")

STOPPING = "the server is shutting down"
LONGEST_WAIT = 60
"""Seconds; ``Retry-After`` never names more."""
LAST_TOKEN_SECONDS = 10.0
"""How long a cancelled answer may take to let go of the model when the server ends."""


class Runs(Protocol):
    """What the worker needs of an engine."""

    def run(
        self, ask: Ask, emit: Callable[[Record], None], cancelled: Callable[[], bool] = ...
    ) -> Any:
        """Answer ``ask``; every record goes to ``emit``, ``cancelled`` is asked at every token."""
        ...


OnRecord = Callable[[Turn, Record], None]


class Worker:
    """Runs turns one after the other; ``on_record`` sees every record, in the model's thread."""

    def __init__(self, engine: Runs, places: int, on_record: OnRecord, loud: bool = False) -> None:
        """``loud``: the log may hold messages of exceptions, which may quote prompts."""
        self.engine = engine
        self.on_record = on_record
        self.loud = loud
        self.running: Turn | None = None
        self._queue: FairQueue[Turn] = FairQueue(places)
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

    def submit(self, turn: Turn) -> None:
        """Queue a turn; raises ``Refusal``: 429 when no place is left, 503 at the end."""
        with self._changed:
            if self._stopping:
                raise Refusal(503, STOPPING, code="shutting_down", retry_after=LONGEST_WAIT)
            try:
                self._queue.put(turn.client, turn.user, turn)
            except Full as full:
                raise self._busy(full) from None
            self._changed.notify_all()

    def _busy(self, full: Full) -> Refusal:
        whose = "of yours " if full.own else ""
        seconds = min(LONGEST_WAIT, max(1, math.ceil(self._seconds * full.waiting)))
        return Refusal(
            429,
            f"too many requests {whose}wait already: try again in {seconds} s",
            code="rate_limit_exceeded",
            retry_after=seconds,
        )

    def leave(self, turn: Turn, why: Refusal | None = None) -> None:
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
            turn.cancel(Refusal(503, STOPPING, code="shutting_down", retry_after=LONGEST_WAIT))
        if self._thread.ident is None:
            return
        self._thread.join(grace)
        self.hurry()
        self._thread.join(LAST_TOKEN_SECONDS)

    def hurry(self) -> None:
        """Cancel the running answer, because the server ends."""
        running = self.running
        if running is not None:
            running.cancel(Refusal(503, STOPPING, code="shutting_down"))

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

    def _next(self) -> Turn | None:
        """The next turn, when there is one; None at the end."""
        with self._changed:
            while not len(self._queue) and not self._stopping:
                self._changed.wait()
            self.running = self._queue.take()
            return self.running

    def _again(self, turn: Turn) -> None:
        """What is left of a turn waits behind the others, unless nobody wants it any more."""
        with self._changed:
            if self._stopping:
                turn.cancel(Refusal(503, STOPPING, code="shutting_down"))
            if not turn.cancelled():
                self._queue.put(turn.client, turn.user, turn, again=True)

    def _serve(self, turn: Turn) -> None:
        """Answer the next of the turn's asks; a fault ends the turn."""
        turn.started = time.perf_counter()

        def emit(record: Record) -> None:
            if not isinstance(record, Failed):  # its message is the exception's, see below
                turn.mail.put(record)
            self.on_record(turn, record)

        try:
            self.engine.run(turn.left.popleft(), emit, turn.cancelled)
            if not turn.left or turn.cancelled():
                turn.mail.put(OVER)
        except ConfigError as error:
            turn.cancel(Refusal(400, str(error), code="invalid_value"))
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
