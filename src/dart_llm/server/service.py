"""Everything of the server but HTTP: the model's thread and its queue, watchers, metrics.

The only file that imports prometheus-client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm.engine.engine import Engine
from dart_llm.engine.requests import Done, Failed, GenerationRequest, Masked, Record, Token
from dart_llm.errors import ConfigError, MissingExtra
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length
from dart_llm.pruning.methods import listing
from dart_llm.pruning.registry import METHODS
from dart_llm.server.responses import APIError, internal, sse
from dart_llm.server.schemas import RequestReader, is_ready
from dart_llm.server.settings import ServeSettings

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
except ImportError:
    raise MissingExtra("prometheus-client", "serve") from None

logger = logging.getLogger("dart_llm.serve")

STOPPING = "the server is shutting down"
LONGEST_WAIT = 60  # seconds; Retry-After never names more

LAST_TOKEN_SECONDS = 10.0
"""How long a cancelled answer may take to release the model when the server ends."""

LARGEST_SHARE = 0.75
"""Share of the queue, or of the watchers, that one client may take."""

END_OF_STREAM = object()
"""The last item of a mailbox."""


def largest_share(places: int) -> int:
    """How many of ``places`` one client may take."""
    return max(1, int(places * LARGEST_SHARE))


class Mailbox:
    """Items from any thread to one coroutine; more than ``limit`` unread ones are dropped."""

    def __init__(self, limit: int = 0) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Any] = asyncio.Queue(limit)

    def put(self, item: Any) -> None:
        """From any thread.  Without effect once the event loop is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._put, item)

    def _put(self, item: Any) -> None:
        if item is END_OF_STREAM and self._items.full():
            self._items.get_nowait()
        with contextlib.suppress(asyncio.QueueFull):
            self._items.put_nowait(item)

    async def get(self) -> Any:
        """The next item; waits for it."""
        return await self._items.get()


class QueuedRequest:
    """A request in the queue and later on the model; its mailbox gets records of the engine.

    A mailbox ends with ``END_OF_STREAM``, or with the ``APIError`` that ended the request.
    ``prompts``: what the engine runs, one after the other.
    """

    def __init__(self, prompts: Sequence[GenerationRequest], client: str, request_id: str) -> None:
        self.prompts = deque(prompts)
        self.client = client
        self.request_id = request_id
        self.mail = Mailbox()
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.first_token: float | None = None
        self._cancelled = threading.Event()

    def cancelled(self) -> bool:
        """Whether the engine should stop; it asks after every token."""
        return self._cancelled.is_set()

    def cancel(self, reason: APIError | None = None) -> None:
        """From any thread: release the model at the next token; the client gets ``reason``."""
        if not self._cancelled.is_set():
            self._cancelled.set()
            self.mail.put(reason or END_OF_STREAM)


class FairQueue:
    """Waiting requests; the client whose last request is the longest ago comes first."""

    def __init__(self) -> None:
        self.waiting: list[QueuedRequest] = []
        self._last: dict[str, int] = {}
        """When each client's last request was taken, as a running number."""
        self._taken = 0

    def take(self) -> QueuedRequest | None:
        """The next request; of one client's requests the oldest."""
        if not self.waiting:
            self._last.clear()
            return None
        queued = min(self.waiting, key=lambda one: self._last.get(one.client, 0))
        self.waiting.remove(queued)
        self._taken += 1
        self._last[queued.client] = self._taken
        return queued


class Worker:
    """Runs requests one after the other; ``on_record`` gets every record, in the model's thread."""

    def __init__(
        self,
        engine: Engine,
        max_waiting: int,
        on_record: Callable[[QueuedRequest, Record], None],
        log_messages: bool = False,
    ) -> None:
        """``log_messages``: log messages of exceptions too, which may quote prompts."""
        self.engine = engine
        self.max_waiting = max_waiting
        self.on_record = on_record
        self.log_messages = log_messages
        self.running: QueuedRequest | None = None
        self._queue = FairQueue()
        self._changed = threading.Condition()
        self._stopping = False
        self._mean_seconds = 1.0
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._loop, name="model", daemon=True)

    def start(self, warm_up: Callable[[], None] = lambda: None) -> None:
        """Run ``warm_up`` in the model's thread, then take requests; raises what it raises."""
        self._warm_up = warm_up
        self._thread.start()
        self._ready.result()

    @property
    def waiting(self) -> int:
        return len(self._queue.waiting)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def submit(self, queued: QueuedRequest) -> None:
        """Queue a request; raises ``APIError``: 429 when the queue is full, 503 at the end."""
        with self._changed:
            if self._stopping:
                raise _shutting_down(LONGEST_WAIT)
            waiting = self._queue.waiting
            of_client = sum(one.client == queued.client for one in waiting)
            if len(waiting) >= self.max_waiting or of_client >= largest_share(self.max_waiting):
                seconds = min(LONGEST_WAIT, max(1, math.ceil(self._mean_seconds * len(waiting))))
                message = f"too many requests are waiting: try again in {seconds} s"
                raise APIError(429, message, code="rate_limit_exceeded", retry_after=seconds)
            waiting.append(queued)
            self._changed.notify_all()

    def leave(self, queued: QueuedRequest) -> None:
        """Drop a request: out of the queue, or off the model at its next token."""
        queued.cancel()
        with self._changed:
            if queued in self._queue.waiting:
                self._queue.waiting.remove(queued)

    def stop(self, grace: float) -> None:
        """Refuse waiting requests, let the running one finish for ``grace`` seconds, cancel it.

        Returns within ``grace + LAST_TOKEN_SECONDS`` seconds.
        """
        with self._changed:
            self._stopping = True
            for queued in self._queue.waiting:
                queued.cancel(_shutting_down(LONGEST_WAIT))
            self._queue.waiting.clear()
            self._changed.notify_all()
        if self._thread.ident is None:
            return
        self._thread.join(grace)
        self.hurry()
        self._thread.join(LAST_TOKEN_SECONDS)

    def hurry(self) -> None:
        """Cancel the running answer, because the server ends."""
        if running := self.running:
            running.cancel(_shutting_down())

    def _loop(self) -> None:
        try:
            self._warm_up()
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        while (queued := self._next()) is not None:
            if not queued.cancelled():
                self._serve(queued)
            del queued  # its records are not kept until the next request arrives

    def _next(self) -> QueuedRequest | None:
        """Wait for the next request; None at the end."""
        with self._changed:
            if self.running is not None and self.running.prompts:
                self._put_back(self.running)
            self.running = None
            while not self.waiting and not self._stopping:
                self._changed.wait()
            self.running = self._queue.take()
            return self.running

    def _put_back(self, queued: QueuedRequest) -> None:
        """The remaining prompts of a request wait again, so that others come in between."""
        if self._stopping:
            queued.cancel(_shutting_down())
        if not queued.cancelled():
            self._queue.waiting.append(queued)

    def _serve(self, queued: QueuedRequest) -> None:
        """Answer the request's next prompt; a fault ends the request."""
        queued.started = time.perf_counter()

        def emit(record: Record) -> None:
            if not isinstance(record, Failed):  # the exception itself is handled below
                queued.mail.put(record)
            self.on_record(queued, record)

        try:
            self.engine.run(queued.prompts.popleft(), emit, queued.cancelled)
            if not queued.prompts or queued.cancelled():
                queued.mail.put(END_OF_STREAM)
        except ConfigError as error:
            queued.cancel(APIError(400, str(error), code="invalid_value"))
        except Exception as error:
            log_fault(queued.request_id, error, self.log_messages)
            queued.cancel(internal(queued.request_id))
        self._mean_seconds += 0.2 * (time.perf_counter() - queued.started - self._mean_seconds)


def _shutting_down(retry_after: int | None = None) -> APIError:
    return APIError(503, STOPPING, code="shutting_down", retry_after=retry_after)


def log_fault(request_id: str, error: BaseException, with_message: bool) -> None:
    """Log where a fault happened; its message only if asked, for it may quote a text."""
    message = f": {error}" if with_message else ""
    logger.error("%s failed with %s%s", request_id, type(error).__name__, message)
    for frame in traceback.extract_tb(error.__traceback__):
        logger.error("  %s:%s in %s", frame.filename, frame.lineno, frame.name)


# watchers of /api/events

PUBLIC: Mapping[str, tuple[str, ...]] = {
    "start": ("id", "model", "method", "sparsity", "config", "executor", "layers", "neurons"),
    "token": ("choice", "index", "phase", "logprob", "seconds"),
    "check": (
        *("sequence", "row", "step", "layer", "window"),
        *("similarity", "threshold", "counter", "trigger", "state"),
    ),
    "remask": ("sequence", "row", "step", "cause", "evidence_tokens", "kept", "overlap"),
    "mask": ("number", "token", "kept_share", "raster"),
    "done": ("finish", "usage", "timings", "report"),
    "error": (),
}
"""Fields of each kind of record for ``GET /api/events``: none with a text or a token."""

WATCHERS = 16  # at most; of one client at most three quarters of them
BEHIND = 2000  # records that a watcher may lag behind; it misses further ones


def public(record: Mapping[str, Any], request_id: str) -> dict[str, Any]:
    """``record`` without what a user wrote or the model answered."""
    kind = str(record["kind"])
    shown = {name: record[name] for name in PUBLIC.get(kind, ()) if name in record}
    return {"kind": kind, "request": request_id, **shown}


class Live:
    """Hands the records of running requests to the watchers of ``/api/events``.

    ``private``: each client sees its own requests only.  Masks and drift reveal much of a text:
    whoever can guess a prompt could find out whether it was asked.
    """

    def __init__(self, private: bool) -> None:
        self.private = private
        self._watchers: list[tuple[str, Mailbox]] = []

    def __len__(self) -> int:
        return len(self._watchers)

    def publish(self, queued: QueuedRequest, record: Record) -> None:
        """From the model's thread; costs nothing without watchers."""
        boxes = [
            box for client, box in self._watchers if client == queued.client or not self.private
        ]
        if boxes and record.kind in PUBLIC:
            event = sse(public(record.to_dict(), queued.request_id))
            for box in boxes:
                box.put(event)

    def watch(self, client: str) -> Mailbox:
        """A mailbox that gets every further record; raises ``APIError`` at too many watchers."""
        of_client = sum(name == client for name, _ in self._watchers)
        if len(self) >= WATCHERS or of_client >= largest_share(WATCHERS):
            message = "too many watchers: close one, or try again later"
            raise APIError(429, message, code="rate_limit_exceeded", retry_after=10)
        box = Mailbox(BEHIND)
        # a new list: the model's thread may be iterating over the old one
        self._watchers = [*self._watchers, (client, box)]
        return box

    def leave(self, box: Mailbox) -> None:
        """``box`` gets no more records."""
        self._watchers = [one for one in self._watchers if one[1] is not box]

    def close(self) -> None:
        """End the streams of all watchers."""
        for _, box in self._watchers:
            box.put(END_OF_STREAM)


SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
"""Upper bounds of the histograms' buckets."""


class Metrics:
    """The numbers of ``/metrics``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests answered.", "route", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = self._counter(
            "cached_tokens", "Tokens of prompts that a conversation had in its cache."
        )
        self.tokens = self._counter("generated_tokens", "Tokens generated.", "phase")
        self.remasks = self._counter("masks", "Masks built.", "cause")
        self.finished = self._counter("finished", "Answers of the model.", "method", "reason")
        self.queued = self._histogram("queue_seconds", "From arrival to the model.")
        self.first_token = self._histogram(
            "first_token_seconds", "From arrival to the first token."
        )
        self.busy = self._counter("busy_seconds", "Time that the model was in use.")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"dart_llm_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"dart_llm_{name}", text, buckets=SECONDS, registry=self.registry)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a number that is read whenever the metrics are."""
        Gauge(f"dart_llm_{name}", text, registry=self.registry).set_function(value)

    def count(self, queued: QueuedRequest, record: Record) -> None:
        """Count a record; in the model's thread, so nothing slow."""
        if isinstance(record, Token):
            self.tokens.labels(record.phase).inc()
            if queued.first_token is None and queued.started is not None:
                queued.first_token = time.perf_counter()
                self.queued.observe(queued.started - queued.submitted)
                self.first_token.observe(queued.first_token - queued.submitted)
        elif isinstance(record, Masked):
            self.remasks.labels(record.remask.cause).inc()
        elif isinstance(record, Done):
            self.prompt_tokens.inc(record.usage.prompt_tokens)
            self.cached_tokens.inc(record.usage.cached_tokens)
            for reason in record.finish:
                self.finished.labels(record.report.method, reason).inc()
            self.busy.inc(time.perf_counter() - (queued.started or queued.submitted))

    def text(self) -> str:
        """Everything, in the text format of Prometheus."""
        return generate_latest(self.registry).decode()


LIMITS = ("max_tokens", "max_prompt_tokens", "max_prompts", "max_choices", "max_waiting")
"""Settings in ``/api/methods``."""


@dataclass(frozen=True)
class ModelFacts:
    """Facts of the served model.  ``name``: its id in requests."""

    name: str
    aliases: tuple[str, ...]
    context: int | None
    vocabulary: int
    checkpoint: Mapping[str, Any]

    @classmethod
    def from_model(cls, model: Any, requested: str) -> ModelFacts:
        """``requested``: the value of ``--model``; a path does not become an alias."""
        facts = dict(checkpoint_facts(model))
        name = str(facts.get("name") or "model")
        is_alias = requested != name and not requested.startswith(("/", ".", "~"))
        shown = ("name", "file_quantisation", "dtype", "weights", "parameters", "revision")
        return cls(
            name,
            (requested,) if is_alias else (),
            context_length(model),
            int(model.get_input_embeddings().num_embeddings),
            {key: facts[key] for key in shown if key in facts},
        )


class Service:
    """One model behind one queue."""

    def __init__(
        self, engine: Engine, tokenizer: Any, facts: ModelFacts, settings: ServeSettings
    ) -> None:
        self.settings, self.facts = settings, facts
        self.results = Path(settings.results_dir)
        self.metrics = Metrics()
        self.live = Live(private=bool(settings.keys))
        self.reader = RequestReader(
            tokenizer, settings, (facts.name, *facts.aliases), facts.context, facts.vocabulary
        )
        self.reading = asyncio.Lock()
        """Prompts become tokens one request at a time, so that many cost no more memory."""
        self.worker = Worker(engine, settings.max_waiting, self._on_record, settings.log_prompts)
        self.created = int(time.time())
        gauge, worker = self.metrics.gauge, self.worker
        gauge("waiting_requests", "Requests in the queue.", lambda: worker.waiting)
        gauge("running_requests", "Requests on the model.", lambda: worker.running is not None)
        gauge("watchers", "Clients that watch /api/events.", lambda: len(self.live))

    def close(self) -> None:
        """End: see ``Worker.stop``; the streams of watchers end too."""
        self.worker.stop(self.settings.grace)
        self.live.close()

    def _on_record(self, queued: QueuedRequest, record: Record) -> None:
        self.live.publish(queued, record)
        self.metrics.count(queued, record)

    def models(self) -> list[dict[str, Any]]:
        """The one model, as ``/v1/models`` lists it."""
        return [
            {
                "id": self.facts.name,
                "object": "model",
                "created": self.created,
                "owned_by": "dart-llm",
                "aliases": list(self.facts.aliases),
                "context_length": self.facts.context,
                "checkpoint": dict(self.facts.checkpoint),
            }
        ]

    def methods(self) -> dict[str, Any]:
        """What requests can set under ``dart``, and the defaults."""
        config = self.reader.config(None)
        preset = METHODS.get(self.settings.method)  # drift None: the method's own rule
        defaults = {
            "method": "dense" if config is None else config.method,
            "sparsity": 0.0 if config is None else config.target,
            "masking_step": None if config is None else config.masking_step,
            "drift": None if config is None or config.drift == preset.drift else config.drift.rule,
            "temperature": self.settings.temperature,
        }
        limits = {name: getattr(self.settings, name) for name in LIMITS}
        catalogue = listing()
        return {
            "model": self.facts.name,
            "defaults": defaults,
            "limits": {**limits, "context": self.facts.context},
            "methods": [{**one, **self._preset(one["name"])} for one in catalogue["methods"]],
            "drift_rules": catalogue["drift_rules"],
        }

    def _preset(self, name: str) -> dict[str, Any]:
        config = METHODS.get(name)
        return {
            "ready": is_ready(name, self.settings),
            "sparsity": config.target,
            "masking_step": config.masking_step,
            "drift": config.drift.rule,
        }
