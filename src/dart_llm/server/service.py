"""What is served, counted and watched: everything but HTTP.

The only file that imports prometheus-client.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm.engine.events import Done, Masked, Record, Token
from dart_llm.errors import MissingExtra
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length
from dart_llm.pruning.methods import listing
from dart_llm.pruning.registry import METHODS
from dart_llm.server.responses import APIError, sse
from dart_llm.server.schemas import Asker, is_ready
from dart_llm.server.settings import ServeSettings
from dart_llm.server.worker import (
    END_OF_STREAM,
    EngineLike,
    Mailbox,
    QueuedRequest,
    Worker,
    largest_share,
)

# the records of all requests for who watches, without any text or token

SHOWN: Mapping[str, tuple[str, ...]] = {
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
"""Fields of each kind of record that everybody may see; all others stay with their request."""

WATCHERS = 16  # at most; of one client at most three quarters of them
BEHIND = 2000  # records that a watcher may lag behind; the ones after that are left out for it


def public(record: Mapping[str, Any], request_id: str) -> dict[str, Any]:
    """``record`` without what a user wrote or was answered."""
    kind = str(record["kind"])
    shown = {name: record[name] for name in SHOWN.get(kind, ()) if name in record}
    return {"kind": kind, "request": request_id, **shown}


class Live:
    """Hands the records of running requests to those who watch ``/api/events``.

    ``private``: everybody sees the requests of their own client alone.  What a mask keeps and how
    a text drifts tells much of the text: who can guess a prompt can find out that it was asked.
    """

    def __init__(self, private: bool) -> None:
        self.private = private
        self._boxes: list[tuple[str, Mailbox]] = []

    def __len__(self) -> int:
        return len(self._boxes)

    def publish(self, turn: QueuedRequest, record: Record) -> None:
        """From the model's thread; costs nothing while nobody watches."""
        boxes = [
            box
            for client, box in self._boxes
            if len(box) < BEHIND and (client == turn.client or not self.private)
        ]
        if boxes and record.kind in SHOWN:
            line = sse(public(record.to_dict(), turn.request_id))
            for box in boxes:
                box.put(line)

    def watch(self, client: str) -> Mailbox:
        """A box that every further record is put into; raises ``APIError`` when too many watch."""
        own = sum(one == client for one, _ in self._boxes)
        if len(self._boxes) >= WATCHERS or own >= largest_share(WATCHERS):
            whose = "of yours " if len(self._boxes) < WATCHERS else ""
            said = f"too many {whose}watch already: end one, or try again later"
            raise APIError(429, said, code="rate_limit_exceeded", retry_after=10)
        box = Mailbox(asyncio.get_running_loop())
        # a new list: the model's thread may be at the old one
        self._boxes = [*self._boxes, (client, box)]
        return box

    def leave(self, box: Mailbox) -> None:
        """``box`` gets no more records."""
        self._boxes = [one for one in self._boxes if one[1] is not box]

    def close(self, end: Any) -> None:
        """Tell everybody who watches that this is the end."""
        for _, box in self._boxes:
            box.put(end)


# numbers for ``/metrics``

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
except ImportError:
    raise MissingExtra("prometheus-client", "serve") from None

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
"""Upper bounds of the histograms' buckets."""


class Metrics:
    """Every number that one server keeps."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests answered.", "route", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = self._counter(
            "cached_tokens", "Tokens of prompts that a conversation still held."
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

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Tell also what ``value`` gives whenever somebody asks."""
        Gauge(f"dart_llm_{name}", text, registry=self.registry).set_function(value)

    def text(self) -> str:
        """Everything, in the text format that Prometheus reads."""
        return generate_latest(self.registry).decode()


logger = logging.getLogger("dart_llm.serve")

LIMITS = ("max_tokens", "max_prompt_tokens", "max_prompts", "max_choices", "max_waiting")
"""Settings that ``/api/methods`` tells."""


@dataclass(frozen=True)
class ModelFacts:
    """What the server tells of its model.  ``name``: the id under which it is asked for."""

    name: str
    aliases: tuple[str, ...]
    context: int | None
    vocabulary: int
    checkpoint: Mapping[str, Any]

    @classmethod
    def of(cls, model: Any, asked_as: str) -> ModelFacts:
        """``asked_as``: the value of ``--model``; a path is no name."""
        facts = dict(checkpoint_facts(model))
        name = str(facts.get("name") or "model")
        aliases = () if asked_as == name or asked_as.startswith(("/", ".", "~")) else (asked_as,)
        shown = ("name", "file_quantisation", "dtype", "weights", "parameters", "revision")
        return cls(
            name,
            aliases,
            context_length(model),
            int(model.get_input_embeddings().num_embeddings),
            {key: facts[key] for key in shown if key in facts},
        )


class Service:
    """One model behind one queue."""

    def __init__(
        self, engine: EngineLike, tokenizer: Any, facts: ModelFacts, settings: ServeSettings
    ) -> None:
        self.settings = settings
        self.results = Path(settings.results_dir)
        self.facts = facts
        self.metrics = Metrics()
        self.live = Live(private=bool(settings.keys))
        self.asker = Asker(
            tokenizer, settings, (facts.name, *facts.aliases), facts.context, facts.vocabulary
        )
        self.worker = Worker(engine, settings.max_waiting, self._note, settings.log_prompts)
        self.created = int(time.time())
        self.bodies = ThreadPoolExecutor(1, "bodies")
        """Reads long bodies: one at a time, so that many cost no more memory than one."""
        watch, worker = self.metrics.watch, self.worker
        watch("waiting_requests", "Requests that wait.", lambda: worker.waiting)
        watch(
            "running_requests", "Requests that the model runs.", lambda: worker.running is not None
        )
        watch("watchers", "Clients that watch /api/events.", lambda: len(self.live))

    def close(self) -> None:
        """End: see ``Worker.stop``; who watches is told."""
        self.bodies.shutdown(wait=False, cancel_futures=True)
        self.worker.stop(self.settings.grace)
        self.live.close(END_OF_STREAM)

    def _note(self, turn: QueuedRequest, record: Record) -> None:
        """Count a record; in the model's thread, so nothing slow."""
        self.live.publish(turn, record)
        metrics = self.metrics
        if isinstance(record, Token):
            metrics.tokens.labels(record.phase).inc()
            if turn.first_token is None and turn.started is not None:
                turn.first_token = time.perf_counter()
                metrics.queued.observe(turn.started - turn.submitted)
                metrics.first_token.observe(turn.first_token - turn.submitted)
        elif isinstance(record, Masked):
            metrics.remasks.labels(record.remask.cause).inc()
        elif isinstance(record, Done):
            metrics.prompt_tokens.inc(record.usage.prompt_tokens)
            metrics.cached_tokens.inc(record.usage.cached_tokens)
            for reason in record.finish:
                metrics.finished.labels(record.report.method, reason).inc()
            metrics.busy.inc(time.perf_counter() - (turn.started or turn.submitted))

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
        """What can be asked under ``dart``, and what holds when nothing is said."""
        config = self.asker.config(None)
        own = METHODS.get(self.settings.method)  # None: the method's own drift rule
        defaults = {
            "method": "dense" if config is None else config.method,
            "sparsity": 0.0 if config is None else config.target,
            "masking_step": None if config is None else config.masking_step,
            "drift": None if config is None or config.drift == own.drift else config.drift.rule,
            "temperature": self.settings.temperature,
        }
        limits = {name: getattr(self.settings, name) for name in LIMITS}
        found = listing()
        methods = [{**entry, **self._method(entry["name"])} for entry in found["methods"]]
        return {
            "model": self.facts.name,
            "defaults": defaults,
            "limits": {**limits, "context": self.facts.context},
            "methods": methods,
            "drift_rules": found["drift_rules"],
        }

    def _method(self, name: str) -> dict[str, Any]:
        config = METHODS.get(name)
        return {
            "ready": is_ready(name, self.settings),
            "sparsity": config.target,
            "masking_step": config.masking_step,
            "drift": config.drift.rule,
        }
