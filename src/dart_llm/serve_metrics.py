"""Numbers for ``/metrics``, in the text format that Prometheus reads."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
"""Upper bounds of the histograms' buckets."""


class Counter:
    """A number that only rises, one per set of labels."""

    kind = "counter"

    def __init__(self, name: str, text: str, labels: tuple[str, ...] = ()) -> None:
        self.name = name
        self.text = text
        self.labels = labels
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}
        self._lock = threading.Lock()

    def add(self, amount: float = 1, *labels: str) -> None:
        """From any thread."""
        with self._lock:
            self._values[labels] = self._values.get(labels, 0.0) + amount

    def lines(self) -> Iterator[str]:
        with self._lock:
            values = sorted(self._values.items())
        for labels, value in values:
            yield f"{self.name}{_labels(dict(zip(self.labels, labels, strict=True)))} {value:g}"


class Histogram:
    """How long something took, in seconds."""

    kind = "histogram"

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, seconds: float) -> None:
        """From any thread."""
        place = sum(seconds > bound for bound in SECONDS)
        with self._lock:
            self._counts[place] += 1
            self._sum += seconds

    def lines(self) -> Iterator[str]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        below = 0
        for bound, count in zip((*SECONDS, "+Inf"), counts, strict=True):
            below += count
            yield f'{self.name}_bucket{{le="{bound}"}} {below}'
        yield f"{self.name}_sum {total:.6f}"
        yield f"{self.name}_count {below}"


class Metrics:
    """Every number that the server keeps."""

    def __init__(self) -> None:
        self.requests = Counter(
            "dart_llm_requests_total", "Requests answered.", ("route", "status")
        )
        self.prompt_tokens = Counter("dart_llm_prompt_tokens_total", "Tokens of prompts.")
        self.cached_tokens = Counter(
            "dart_llm_cached_tokens_total", "Tokens of prompts that a conversation still held."
        )
        self.tokens = Counter("dart_llm_generated_tokens_total", "Tokens generated.", ("phase",))
        self.remasks = Counter("dart_llm_masks_total", "Masks built.", ("cause",))
        self.finished = Counter(
            "dart_llm_finished_total", "Answers of the model.", ("method", "reason")
        )
        self.queued = Histogram("dart_llm_queue_seconds", "From arrival to the model.")
        self.first_token = Histogram(
            "dart_llm_first_token_seconds", "From arrival to the first token."
        )
        self.busy = Counter("dart_llm_busy_seconds_total", "Time that the model was in use.")

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Everything; ``gauges``: {name: (what it is, its value now)}."""
        lines: list[str] = []
        for metric in vars(self).values():
            lines += _block(metric.name, metric.text, metric.kind, metric.lines())
        for name, (text, value) in gauges.items():
            lines += _block(name, text, "gauge", [f"{name} {value:g}"])
        return "\n".join(lines) + "\n"


def _block(name: str, text: str, kind: str, lines: Iterable[str]) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *lines]


def _labels(values: Mapping[str, str]) -> str:
    if not values:
        return ""
    shown = (f'{name}="{_escaped(value)}"' for name, value in values.items())
    return f"{{{','.join(shown)}}}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
