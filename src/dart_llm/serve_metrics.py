"""Numbers for ``/metrics``.  The only file that imports prometheus-client."""

from __future__ import annotations

from collections.abc import Callable

from dart_llm.errors import MissingExtra

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
