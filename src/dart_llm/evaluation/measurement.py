"""The result of every evaluation: one method on one task, with its items and its accounting.

Accounting: how many tokens ran pruned, how many neurons were removed, and how many bytes were read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

PROTOCOLS: dict[str, str] = {
    "decode": "the prompt is dense and observed; continuation tokens run pruned",
    "full": "the context selects the masks, which apply to context and continuation",
    "published": "the whole scored text, including the answer, selects the masks (leaks)",
}
"""Protocols: which tokens select the masks, and which run pruned (docs/reference.md)."""

LEAK = "published protocol: the masks have seen the answers (leaking, not causal)"


@dataclass(frozen=True)
class Measurement:
    """One method on one task.

    ``metrics``: the headline numbers by name; a number that is not finite is None.  ``items``: for
    each document or slice, a mapping with its ``id`` and the numbers that the metrics average.  The
    ``id`` pairs the items of different methods.  ``samples``: raw data per item (texts,
    log-probabilities).  ``accounting``: ``RunReport.to_dict()`` without ``sequences``, or None for
    an untouched model.
    """

    task: str
    protocol: str
    metric: str
    """The metric that tables and plots show first."""
    higher_is_better: bool
    metrics: Mapping[str, float | None]
    items: tuple[Mapping[str, Any], ...]
    accounting: Mapping[str, Any] | None = None
    samples: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    subtasks: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Metrics of each task of a group; empty for a single task."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable data without ``samples``, which have their own file."""
        names = (item.name for item in fields(self) if item.name != "samples")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class MeasureOptions:
    """How a task is measured, independent of the method; None means the task's default.

    ``limit``: the number of items per task.  Items are the first of the task, or evenly spaced if
    they are slices, or a random sample if ``sample_seed`` is set.  ``oracle``: if True, select new
    masks at the known topic change of a ``shift`` task.
    """

    protocol: str = "decode"
    limit: int | None = None
    sample_seed: int | None = None
    num_fewshot: int | None = None
    include_path: str | None = None
    batch_size: int = 8
    apply_chat_template: bool | None = None
    prompt_tokens: int = 256
    scored_tokens: int = 256
    window: int = 2048
    stride: int | None = None
    max_output: int = 256
    oracle: bool = False
    seed: int = 0


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN for an empty sequence."""
    return math.fsum(values) / len(values) if values else math.nan
