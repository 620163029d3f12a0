"""The server behind the HTTP routes: the model's thread, its queue of requests, and metrics.

A record is an event that the engine emits while it answers, such as a token or a new mask.  This is
the only file that imports prometheus-client.
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
from dart_llm.server.schemas import APIError, RequestReader, is_ready
from dart_llm.server.settings import ServeSettings

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
except ImportError:
    raise MissingExtra("prometheus-client", "serve") from None

logger = logging.getLogger("dart_llm.serve")

LONGEST_WAIT = 60  # seconds; largest value of the Retry-After header
LAST_TOKEN_SECONDS = 10.0  # maximum time that a cancelled answer gets to end at shutdown
LARGEST_SHARE = 0.75  # largest fraction of the queue that one client may occupy

END_OF_STREAM = object()
"""The last item in the mailbox of a request that ends without an error."""


class QueuedRequest:
    """A waiting or running request.  ``mail`` is its mailbox, which receives the engine's records.

    The last item in the mailbox is ``END_OF_STREAM``, or the ``APIError`` that ended the request.
    The engine runs the ``prompts`` one after the other.
    """

    def __init__(self, prompts: Sequence[GenerationRequest], client: str) -> None:
        self.prompts, self.client = deque(prompts), client
        self.id = prompts[0].id
        self.mail: asyncio.Queue[Any] = asyncio.Queue()
        self.submitted = self.started = time.perf_counter()
        self.answering = False
        """True once the first token was generated."""
        self._loop = asyncio.get_running_loop()
        self._cancelled = threading.Event()

    def put(self, item: Any) -> None:
        """Add ``item`` to the mailbox, from any thread; do nothing if the event loop is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.mail.put_nowait, item)

    def cancelled(self) -> bool:
        """True if the request was cancelled; the engine checks this after every token."""
        return self._cancelled.is_set()

    def cancel(self, reason: APIError | None = None) -> None:
        """Make the engine stop at the next token of the request.  Thread-safe.

        The client gets the error ``reason`` or, if that is None, the end of the stream.
        """
        if not self._cancelled.is_set():
            self._cancelled.set()
            self.put(reason or END_OF_STREAM)


class Worker:
    """Runs requests in order of arrival, in its own thread.

    That thread calls ``on_record`` for every record.  If ``log_messages`` is true, the messages of
    exceptions, which may quote prompts, are logged too.
    """

    def __init__(
        self,
        engine: Engine,
        max_waiting: int,
        on_record: Callable[[QueuedRequest, Record], None],
        log_messages: bool = False,
    ) -> None:
        self.engine = engine
        self.max_waiting = max_waiting
        self.on_record = on_record
        self.log_messages = log_messages
        self.running: QueuedRequest | None = None
        self._queue = deque[QueuedRequest]()
        self._changed = threading.Condition()
        self._stopping = False
        self._mean_seconds = 1.0
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._loop, name="model", daemon=True)

    def start(self, warm_up: Callable[[], None] = lambda: None) -> None:
        """Start the thread and wait until it has run ``warm_up``; raise any error of that call."""
        self._warm_up = warm_up
        self._thread.start()
        self._ready.result()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def submit(self, queued: QueuedRequest) -> None:
        """Queue a request.

        Raises ``APIError`` with status 429 if the queue is full or the client occupies its largest
        share of the queue, and with status 503 at shutdown.
        """
        with self._changed:
            if self._stopping:
                raise _shutting_down()
            of_client = sum(other.client == queued.client for other in self._queue)
            client_limit = max(1, int(self.max_waiting * LARGEST_SHARE))
            if self.waiting >= self.max_waiting or of_client >= client_limit:
                seconds = min(LONGEST_WAIT, max(1, math.ceil(self._mean_seconds * self.waiting)))
                message = f"too many requests are waiting: try again in {seconds} s"
                headers = {"retry-after": str(seconds)}
                raise APIError(429, message, code="rate_limit_exceeded", headers=headers)
            self._queue.append(queued)
            self._changed.notify_all()

    def leave(self, queued: QueuedRequest) -> None:
        """Drop a request: remove it from the queue, or stop its answer at the next token."""
        queued.cancel()
        with self._changed:
            if queued in self._queue:
                self._queue.remove(queued)

    def stop(self, grace: float) -> None:
        """Refuse waiting requests; after ``grace`` seconds, cancel the request that still runs.

        Returns within ``grace + LAST_TOKEN_SECONDS`` seconds.
        """
        with self._changed:
            self._stopping = True
            for queued in self._queue:
                queued.cancel(_shutting_down())
            self._queue.clear()
            self._changed.notify_all()
        if self._thread.ident is None:
            return
        self._thread.join(grace)
        if running := self.running:
            running.cancel(_shutting_down())
        self._thread.join(LAST_TOKEN_SECONDS)

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
            del queued  # frees its records before the next request arrives

    def _next(self) -> QueuedRequest | None:
        """Wait for the next request and return it; return None if the worker stops instead."""
        with self._changed:
            last, self.running = self.running, None
            if last and last.prompts and self._stopping:
                last.cancel(_shutting_down())
            if last and last.prompts and not last.cancelled():
                self._queue.append(last)  # so that other requests run between its prompts
            while not self._queue and not self._stopping:
                self._changed.wait()
            self.running = self._queue.popleft() if self._queue else None
            return self.running

    def _serve(self, queued: QueuedRequest) -> None:
        """Answer the next prompt of a request; an error ends the request."""
        queued.started = time.perf_counter()

        def emit(record: Record) -> None:
            if not isinstance(record, Failed):  # the exception itself is handled below
                queued.put(record)
            self.on_record(queued, record)

        try:
            self.engine.run(queued.prompts.popleft(), emit, queued.cancelled)
            if not queued.prompts:
                queued.put(END_OF_STREAM)
        except ConfigError as error:
            queued.cancel(APIError(400, str(error)))
        except Exception as error:
            queued.cancel(internal_error(queued.id, error, self.log_messages))
        self._mean_seconds += 0.2 * (time.perf_counter() - queued.started - self._mean_seconds)


def _shutting_down() -> APIError:
    headers = {"retry-after": str(LONGEST_WAIT)}
    return APIError(503, "the server is shutting down", code="shutting_down", headers=headers)


def internal_error(request_id: str, error: BaseException, with_message: bool) -> APIError:
    """Log ``error`` with its traceback; return the ``APIError`` that the client gets.

    ``with_message``: if True, the error's message, which may quote prompts, is logged too.
    """
    message = f": {error}" if with_message else ""
    logger.error("%s failed with %s%s", request_id, type(error).__name__, message)
    for frame in traceback.extract_tb(error.__traceback__):
        logger.error("  %s:%s in %s", frame.filename, frame.lineno, frame.name)
    text = f"the server failed on this request; see {request_id} in the server's log"
    return APIError(500, text, code="internal_error")


COUNTERS = {
    "requests": ("Requests answered.", "route", "status"),
    "prompt_tokens": ("Prompt tokens.",),
    "cached_tokens": ("Prompt tokens taken from a conversation's cache.",),
    "generated_tokens": ("Generated tokens.", "phase"),
    "masks": ("Masks built.", "cause"),
    "finished": ("Finished answers.", "method", "reason"),
    "busy_seconds": ("Seconds in which the model was in use.",),
}
"""Maps a counter's name to its help text, followed by the names of its labels."""

HISTOGRAMS = {
    "queue_seconds": "Seconds from arrival to start.",
    "first_token_seconds": "Seconds from arrival to the first token.",
}

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
"""Upper bounds of the histograms' buckets."""


class Metrics:
    """The counters, gauges and histograms that ``/metrics`` returns."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"namespace": "dart_llm", "registry": self.registry}
        self.counters = {
            name: Counter(name, text, labels, **options)
            for name, (text, *labels) in COUNTERS.items()
        }
        self.histograms = {
            name: Histogram(name, text, buckets=SECONDS, **options)
            for name, text in HISTOGRAMS.items()
        }
        waiting = Gauge("waiting_requests", "Requests in the queue.", **options)
        waiting.set_function(lambda: worker.waiting)
        running = Gauge("running_requests", "Requests that the model runs.", **options)
        running.set_function(lambda: worker.running is not None)

    def count(self, queued: QueuedRequest, record: Record) -> None:
        """Count a record; must be fast, because it runs in the model's thread."""
        counters = self.counters
        if isinstance(record, Token):
            counters["generated_tokens"].labels(record.phase).inc()
            if not queued.answering:
                queued.answering, now = True, time.perf_counter()
                self.histograms["queue_seconds"].observe(queued.started - queued.submitted)
                self.histograms["first_token_seconds"].observe(now - queued.submitted)
        elif isinstance(record, Masked):
            counters["masks"].labels(record.remask.cause).inc()
        elif isinstance(record, Done):
            counters["prompt_tokens"].inc(record.usage.prompt_tokens)
            counters["cached_tokens"].inc(record.usage.cached_tokens)
            for reason in record.finish:
                counters["finished"].labels(record.report.method, reason).inc()
            counters["busy_seconds"].inc(time.perf_counter() - queued.started)

    def text(self) -> str:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self.registry).decode()


LIMITS = ("max_tokens", "max_prompt_tokens", "max_prompts", "max_choices", "max_waiting")
"""Settings that ``/api/methods`` lists as limits."""


@dataclass(frozen=True)
class ModelFacts:
    """Metadata of the served model; ``name`` is its ID in requests."""

    name: str
    aliases: tuple[str, ...]
    context: int | None
    vocabulary: int
    checkpoint: Mapping[str, Any]

    @classmethod
    def from_model(cls, model: Any, requested: str) -> ModelFacts:
        """Metadata of ``model``; ``requested`` (``--model``) is an alias unless it is a path."""
        facts = dict(checkpoint_facts(model))
        name = str(facts.get("name") or "model")
        is_alias = requested != name and not requested.startswith(("/", ".", "~"))
        listed = ("name", "file_quantisation", "dtype", "weights", "parameters", "revision")
        return cls(
            name,
            (requested,) if is_alias else (),
            context_length(model),
            int(model.get_input_embeddings().num_embeddings),
            {key: facts[key] for key in listed if key in facts},
        )


class Service:
    """The served model: its metadata, its worker, the reader of request bodies, and the metrics."""

    def __init__(
        self, engine: Engine, tokenizer: Any, facts: ModelFacts, settings: ServeSettings
    ) -> None:
        self.settings, self.facts = settings, facts
        self.results = Path(settings.results_dir)
        self.reader = RequestReader(
            tokenizer, settings, (facts.name, *facts.aliases), facts.context, facts.vocabulary
        )
        self.reading = asyncio.Lock()
        """Held during tokenisation: requests are tokenised one at a time, to limit memory."""
        self.worker = Worker(
            engine,
            settings.max_waiting,
            lambda queued, record: self.metrics.count(queued, record),
            settings.log_prompts,
        )
        self.metrics = Metrics(self.worker)
        self.created = int(time.time())

    def close(self) -> None:
        """Stop the worker as ``Worker.stop`` describes."""
        self.worker.stop(self.settings.grace)

    def model(self) -> dict[str, Any]:
        """The model's entry in ``/v1/models``."""
        return {
            "id": self.facts.name,
            "object": "model",
            "created": self.created,
            "owned_by": "dart-llm",
            "aliases": list(self.facts.aliases),
            "context_length": self.facts.context,
            "checkpoint": dict(self.facts.checkpoint),
        }

    def methods(self) -> dict[str, Any]:
        """The answer of ``/api/methods``: methods and drift rules, defaults and limits."""
        config = self.reader.config(None)
        preset = METHODS.get(self.settings.method)
        defaults = {
            "method": "dense" if config is None else config.method,
            "sparsity": 0.0 if config is None else config.target,
            "masking_step": None if config is None else config.masking_step,
            # None means that requests use their method's default drift rule
            "drift": None if config is None or config.drift == preset.drift else config.drift.rule,
            "temperature": self.settings.temperature,
        }
        limits = {name: getattr(self.settings, name) for name in LIMITS}
        catalogue = listing()
        return {
            "model": self.facts.name,
            "defaults": defaults,
            "limits": {**limits, "context": self.facts.context},
            "methods": [{**row, **self._preset(row["name"])} for row in catalogue["methods"]],
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
