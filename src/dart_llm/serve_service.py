"""Everything that serves but HTTP: the model's thread, what it is asked, what is counted."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dart_llm.arch import context_length
from dart_llm.checkpoint import checkpoint_facts
from dart_llm.engine_records import Done, Masked, Record, Token
from dart_llm.listing import listing
from dart_llm.registry import METHODS
from dart_llm.serve_ask import Asker
from dart_llm.serve_live import Live
from dart_llm.serve_metrics import Metrics
from dart_llm.serve_turn import OVER, Turn
from dart_llm.serve_worker import Runs, Worker
from dart_llm.settings_serve import ServeSettings

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
        shown = ("name", "file_quantisation", "dtype", "parameters", "revision")
        return cls(
            name,
            aliases,
            context_length(model),
            int(model.get_input_embeddings().num_embeddings),
            {key: facts.get(key) for key in shown},
        )


class Service:
    """One model behind one queue."""

    def __init__(
        self, engine: Runs, tokenizer: Any, facts: ModelFacts, settings: ServeSettings
    ) -> None:
        self.settings = settings
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
        self.live.close(OVER)

    def _note(self, turn: Turn, record: Record) -> None:
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
        learns = config.prior is not None or config.calibration is not None
        return {
            "ready": config.weight_bits is None and (not learns or name in self.settings.ready),
            "sparsity": config.target,
            "masking_step": config.masking_step,
            "drift": config.drift.rule,
        }
