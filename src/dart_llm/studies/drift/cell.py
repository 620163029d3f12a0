"""A cell of a drift study: one method on one source; its record, and the numbers of its losses.

Losses are in nats per token after the prompt; None for the first one, which nothing pruned
predicts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.records import DriftCheck
from dart_llm.studies.drift.settings import DENSE, FORCED, Candidate, DriftSettings
from dart_llm.studies.drift.sources import Source

LONGEST_FILE = 240
"""Bytes of a file's name; most disks hold 255, and a file is written under a longer one first."""

Record = Mapping[str, Any]

DONE, FAILED = "done", "failed"

MASKS = "masks"

EMPTY: Record = {
    "topics": [],
    "prompt_tokens": None,
    "decoded_tokens": None,
    "finish": None,
    "checks": [],
    "remasks": [],
    "spans": [],
    "accounting": None,
    "metrics": None,
}
"""What a line of results.jsonl takes from a record, as it is where the cell failed."""

SOURCES = {FORCED: "passage", "free": "prompt"}
"""What a source is called in each mode."""


@dataclass(frozen=True)
class DriftCell:
    """One candidate on one source.

    ``record``: what its run gave, empty before; the keys of ``EMPTY``, ``pieces`` and ``text`` or
    ``losses``.  ``spans``: first decode step, the one after the last, and the number of the mask
    in force (None: dense); ``accounting``: ``RunReport.to_dict()``, None for the untouched model.
    """

    mode: str
    source: Source
    candidate: Candidate
    seed: int
    record: Record = field(default_factory=dict, compare=False)

    @property
    def label(self) -> str:
        return self.candidate.label

    @property
    def dense(self) -> bool:
        return self.candidate.name == DENSE

    @property
    def key(self) -> str:
        return f"{self.mode}/{self.source.id}/{self.label}/{self.seed}"

    @property
    def dense_key(self) -> str:
        """Of the untouched model on the same source with the same seed."""
        return f"{self.mode}/{self.source.id}/{DENSE}/{self.seed}"

    @property
    def file(self) -> str:
        """The cell's file of masks in the results folder."""
        return f"{MASKS}/{self.key.replace('/', '-')}.safetensors"

    @property
    def config(self) -> PruneConfig | None:
        """How the model is pruned; None for the untouched one."""
        config = self.candidate.config
        return None if config is None else config.replace({"seed": self.seed})

    def facts(self, model: str, dtype: str | None) -> dict[str, Any]:
        """The identity of the cell, as config.json and results.jsonl have it."""
        return {
            "model": model,
            "dtype": dtype,
            "mode": self.mode,
            "source": self.source.id,
            "method": self.candidate.name,
            "sparsity": self.candidate.sparsity,
            "seed": self.seed,
        }

    @property
    def name(self) -> str:
        """For people: "passage 07, dart@0.5"."""
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{SOURCES[self.mode]} {self.source.id}, {self.label}{seed}"

    @property
    def source_name(self) -> str:
        """For people: "passage 07: tides, then banking"."""
        topics = ", then ".join(topic.name for topic in self.source.topics)
        name = f"{SOURCES[self.mode]} {self.source.id}"
        return f"{name}: {topics}" if topics else name

    @property
    def decoded(self) -> int:
        """Tokens after the prompt."""
        return int(self.record["decoded_tokens"])

    @property
    def topics(self) -> list[tuple[str, int, int]]:
        """Name, first decoded token, and the one after the last, where changes are known."""
        known = [topic for topic in self.record["topics"] if topic["start"] is not None]
        ends = [*(topic["start"] for topic in known[1:]), self.decoded]
        return [(t["name"], t["start"], end) for t, end in zip(known, ends, strict=False)]

    @property
    def checks(self) -> list[DriftCheck]:
        """The detector's windows; while it arms, the first has nothing to be compared with."""
        checks = [DriftCheck(**check) for check in self.record["checks"]]
        return [c for c in checks if c.state != "arming" or c.similarity != 0]

    @property
    def rebuilt(self) -> int:
        """Masks after the first ones."""
        return sum(mask["cause"] not in ("first", "fixed") for mask in self.record["remasks"])


def expand(
    settings: DriftSettings, sources: Sequence[Source], candidates: Sequence[Candidate]
) -> tuple[DriftCell, ...]:
    """Every source with every seed and every candidate, in that order.

    Raises ``ConfigError`` when an id cannot name a file, or two cells would share one.
    """
    cells = tuple(
        DriftCell(settings.kind, source, candidate, seed)
        for source in sources
        for seed in settings.seeds
        for candidate in candidates
    )
    files: dict[str, DriftCell] = {}
    for cell in cells:
        if "\0" in cell.file or len(cell.file.encode()) > LONGEST_FILE:
            raise ConfigError(
                f'no file can be named after the id "{cell.source.id[:40]}...": give a shorter '
                "one, without NUL"
            )
        other = files.setdefault(cell.file.lower(), cell)
        if other is not cell:
            raise ConfigError(
                f'the ids "{other.source.id}" and "{cell.source.id}" would give two cells one '
                "file: rename one"
            )
    return cells


# The numbers of a passage's losses: means per topic, and how soon they recover after a change.

BIN = 16
"""Tokens of one mean in ``first``."""

WINDOW, BEFORE, MARGIN = 32, 64, 0.1
"""A loss has recovered where its mean excess over dense in a window of ``WINDOW`` tokens is at most
that of the ``BEFORE`` tokens before the change plus ``MARGIN`` nats."""

Losses = Sequence[float | None]


def topic_losses(losses: Losses, starts: Sequence[int], moment: int) -> list[dict[str, Any]]:
    """Per topic its mean loss, and of consecutive whole bins of ``BIN`` tokens from its start on.

    ``starts``: index of each topic's first token.  ``later``: the same mean from ``moment`` tokens
    after the start on, None where the topic is shorter.
    """
    rows = []
    for number, (start, end) in enumerate(_spans(losses, starts)):
        topic, later = _known(losses, start, end), _known(losses, start + moment, end)
        bins = range(start, end - BIN + 1, BIN)
        rows.append(
            {
                "topic": number,
                "start": start,
                "tokens": len(topic),
                "mean_loss": _mean(topic),
                "first": [_mean(_known(losses, begin, begin + BIN)) for begin in bins],
                "later": {"from": moment, "tokens": len(later), "mean_loss": _mean(later)}
                if later
                else None,
            }
        )
    return rows


def recovery(losses: Losses, dense: Losses, starts: Sequence[int]) -> list[dict[str, Any]]:
    """Per change: tokens after it until the loss has recovered, None when it does not.

    The smallest t such that the mean excess over dense of the tokens t to t + 31 after the change
    is at most that of the (up to) 64 tokens before it plus 0.1 nat.  All of them lie before the
    next change; ``within``: tokens up to there.
    """
    pairs = zip(losses, dense, strict=True)
    excess = [None if a is None or b is None else a - b for a, b in pairs]
    rows = []
    for number, (start, end) in list(enumerate(_spans(losses, starts)))[1:]:
        before = _mean(_known(excess, max(0, start - BEFORE), start))
        windows = range(start, end - WINDOW + 1) if before is not None else ()
        bound = (before or 0.0) + MARGIN
        later = (t for t in windows if (_mean(_known(excess, t, t + WINDOW)) or 0.0) <= bound)
        first = next(later, None)
        tokens = None if first is None else first - start
        rows.append({"topic": number, "tokens": tokens, "within": end - start})
    return rows


def _spans(losses: Losses, starts: Sequence[int]) -> list[tuple[int, int]]:
    """First index of every topic, and the one after its last."""
    return list(zip(starts, [*starts[1:], len(losses)], strict=True))


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _known(losses: Losses, start: int, end: int) -> list[float]:
    return [loss for loss in losses[start:end] if loss is not None]
