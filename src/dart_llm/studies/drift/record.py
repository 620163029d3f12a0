"""What is kept of a drift study's cells: masks, losses; what is finished survives any interruption.

A finished cell is a part of the folder beside its file of masks.  The files that people read are
made from the parts alone: the same cells give the same bytes, however often the study was
interrupted.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dart_llm.experiments.artifacts import MaskRecorder
from dart_llm.experiments.store import ResultsFolder
from dart_llm.files import write_csv, write_lines
from dart_llm.pruning.records import DriftCheck, Remask
from dart_llm.pruning.sequence import SequenceState
from dart_llm.session.run import Run
from dart_llm.studies.drift.cells import DriftCell
from dart_llm.studies.drift.settings import FORCED

BIN = 16
"""Tokens of one mean in ``first``."""

WINDOW, BEFORE, MARGIN = 32, 64, 0.1
"""A loss has recovered where its mean excess over dense in a window of ``WINDOW`` tokens is at most
that of the ``BEFORE`` tokens before the change plus ``MARGIN`` nats."""

Losses = Sequence[float | None]
"""Nats per token after the prompt; None for the first one, which nothing pruned predicts."""


def topics(losses: Losses, starts: Sequence[int], moment: int) -> list[dict[str, Any]]:
    """Per topic its mean loss, and of consecutive whole bins of ``BIN`` tokens from its start on.

    ``starts``: index of each topic's first token.  ``later``: the same mean from ``moment`` tokens
    after the start on, None where the topic is shorter.
    """
    found = []
    for number, (start, end) in enumerate(spans(losses, starts)):
        own = _known(losses, start, end)
        bins = range(start, end - BIN + 1, BIN)
        later = _known(losses, start + moment, end)
        found.append(
            {
                "topic": number,
                "start": start,
                "tokens": len(own),
                "mean_loss": mean(own),
                "first": [mean(_known(losses, begin, begin + BIN)) for begin in bins],
                "later": {"from": moment, "tokens": len(later), "mean_loss": mean(later)}
                if later
                else None,
            }
        )
    return found


def spans(losses: Losses, starts: Sequence[int]) -> list[tuple[int, int]]:
    """First index of every topic, and the one after its last."""
    return list(zip(starts, [*starts[1:], len(losses)], strict=True))


def recovery(losses: Losses, dense: Losses, starts: Sequence[int]) -> list[dict[str, Any]]:
    """Per change: tokens after it until the loss has recovered, None when it does not.

    The smallest t such that the mean excess over dense of the tokens t to t + 31 after the change
    is at most that of the (up to) 64 tokens before it plus 0.1 nat.  All of them lie before the
    next change; ``within``: tokens up to there.
    """
    excess = [
        None if own is None or other is None else own - other
        for own, other in zip(losses, dense, strict=True)
    ]
    found = []
    for number, (start, end) in list(enumerate(spans(losses, starts)))[1:]:
        before = mean(_known(excess, max(0, start - BEFORE), start))
        windows = range(start, end - WINDOW + 1) if before is not None else ()
        bound = (before or 0.0) + MARGIN
        later = (t for t in windows if (mean(_known(excess, t, t + WINDOW)) or 0.0) <= bound)
        first = next(later, None)
        tokens = None if first is None else first - start
        found.append({"topic": number, "tokens": tokens, "within": end - start})
    return found


def mean(values: Sequence[float]) -> float | None:
    """The arithmetic mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def _known(losses: Losses, start: int, end: int) -> list[float]:
    return [loss for loss in losses[start:end] if loss is not None]


class DriftRecorder(MaskRecorder):
    """Also keeps how many dense tokens came right before each mask, and where pruning ended."""

    def __init__(self) -> None:
        super().__init__()
        self.observed: list[int] = []
        self._life: SequenceState | None = None

    def __call__(self, remask: Remask, life: SequenceState) -> None:
        super().__call__(remask, life)
        self.observed.append(life.observed)
        self._life = life

    def dense_from(self) -> int | None:
        """The decode step from which all ran dense to the end; None where the last was pruned.

        Released, or the text ended while tokens were observed for masks that never came.
        """
        if self._life is None:
            return None
        ends = itertools.takewhile(lambda one: one.kept is None, reversed(self._life.mask_spans))
        dense = sum(one.length for one in ends)
        return self._life.decoded - dense if dense else None


def record(run: Run, recorder: DriftRecorder, widths: Sequence[int]) -> dict[str, Any]:
    """``checks``, ``remasks``, ``dense_from`` and ``accounting`` of a run of one sequence.

    ``widths``: neurons per layer.
    """
    accounting = run.report().to_dict()
    accounting.pop("sequences")
    return {
        "checks": [asdict(check) for check in run.drift_checks],
        "remasks": remasks(recorder, widths),
        "dense_from": recorder.dense_from(),
        "accounting": accounting,
    }


def remasks(recorder: DriftRecorder, widths: Sequence[int]) -> list[dict[str, Any]]:
    """One entry per mask; per layer the Jaccard overlap with the mask before, |A & B| / |A | B|,
    and how many neurons left and joined.  ``observed``: dense tokens right before it."""
    found: list[dict[str, Any]] = []
    before: list[Tensor] | None = None
    for number, remask in enumerate(recorder.remasks):
        masks = [_kept(recorder, number, layer, width) for layer, width in enumerate(widths)]
        moves = None
        if before is not None and not recorder.per_token:
            moves = [_moves(*two) for two in zip(before, masks, strict=True)]
        entry: dict[str, Any] = {
            "step": remask.step,
            "cause": remask.cause,
            "kept": list(remask.kept),
            "evidence_tokens": remask.evidence_tokens,
            "observed": recorder.observed[number],
        }
        for place, name in enumerate(("jaccard", "left", "joined")):
            entry[name] = None if moves is None else [move[place] for move in moves]
        found.append(entry)
        before = masks
    return found


def _kept(recorder: DriftRecorder, number: int, layer: int, width: int) -> Tensor:
    """[width] bool; a layer without ids is dense."""
    ids = recorder.tensors.get(f"remask{number}.layer{layer}.ids")
    if ids is None:
        return torch.ones(width, dtype=torch.bool)
    mask = torch.zeros(width, dtype=torch.bool)
    mask[ids.long()] = True
    return mask


def _moves(old: Tensor, new: Tensor) -> tuple[float, int, int]:
    both, either = int((old & new).sum()), int((old | new).sum())
    return both / either if either else 1.0, int(old.sum()) - both, int(new.sum()) - both


Part = dict[str, Any]
"""``topics``, ``prompt_tokens``, ``decoded_tokens``, ``finish``, ``checks``, ``remasks``,
``dense_from``, ``accounting``, ``text``, ``pieces``, ``losses`` and ``seconds``; JSON-able."""


NOTHING: Mapping[str, Any] = {
    "topics": [],
    "prompt_tokens": None,
    "decoded_tokens": None,
    "finish": None,
    "checks": [],
    "remasks": [],
    "dense_from": None,
    "accounting": None,
}
"""What a line of results.jsonl takes from a part, as it stands where the cell failed."""

DONE, FAILED = "done", "failed"

MASKS = "masks"

EVERY = 20.0
"""Seconds between two times that the growing files are written: each is written whole."""

_CHECK = tuple(column.name for column in fields(DriftCheck))


@dataclass
class StudyFiles:
    """The cells of a study in a results folder.  ``failed``: sentences, by key.

    ``moment``: tokens after a change from which ``later`` means are taken.
    """

    folder: ResultsFolder
    cells: Sequence[DriftCell]
    model: str
    moment: int
    dtype: str | None = None
    failed: dict[str, str] = field(default_factory=dict)
    written: float = 0.0

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def masks(self) -> Path:
        return self.path / MASKS

    def part(self, cell: DriftCell) -> Part | None:
        """What was computed of ``cell``, masks included; None otherwise."""
        found: Part | None = self.folder.part(cell.key)
        whole = found is not None and (
            found["accounting"] is None or (self.masks / cell.file).exists()
        )
        return found if whole else None

    def metrics(self, cell: DriftCell) -> dict[str, Any] | None:
        """``values`` and ``seconds`` of the comparison of a cell's text with the dense one."""
        found: dict[str, Any] | None = self.folder.part(f"metrics/{cell.key}")
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Lines of results.jsonl: the finished and the failed cells, in grid order."""
        parts = [(cell, self.part(cell)) for cell in self.cells]
        return [
            self._row(cell, part)
            for cell, part in parts
            if part is not None or cell.key in self.failed
        ]

    def _row(self, cell: DriftCell, part: Part | None) -> dict[str, Any]:
        found = {
            "key": cell.key,
            "status": FAILED if part is None else DONE,
            "error": self.failed[cell.key] if part is None else None,
            "label": cell.method.label,
            "cell": cell.facts(self.model, self.dtype),
        }
        known = {**NOTHING, "loss": None, "metrics": None}
        if part is not None:
            known |= {name: part[name] for name in NOTHING}
            known["loss"] = self._loss(cell, part)
            known["metrics"] = (self.metrics(cell) or {}).get("values")
        return {**found, **known}

    def _loss(self, cell: DriftCell, part: Part) -> dict[str, Any] | None:
        if cell.mode != FORCED:
            return None
        starts, losses = [topic["start"] for topic in part["topics"]], part["losses"]
        dense = self.folder.part(cell.dense_key)
        regained = None
        if dense is not None:
            regained = recovery(losses, dense["losses"], starts)
        return {"topics": topics(losses, starts, self.moment), "recovery": regained}

    def grow(self) -> None:
        """Write the files when the last time is a while ago."""
        if time.monotonic() - self.written >= EVERY:
            self.write()

    def write(self) -> list[dict[str, Any]]:
        """results.jsonl, texts.jsonl, tokens.jsonl and drift.csv; returns the rows."""
        rows = self.rows()
        write_lines(self.path / "results.jsonl", rows)
        write_lines(self.path / "tokens.jsonl", self._tokens())
        if any(cell.mode != FORCED for cell in self.cells):
            write_lines(self.path / "texts.jsonl", self._texts())
        write_csv(self.path / "drift.csv", ("key", *_CHECK), _checks(rows))
        self.written = time.monotonic()
        return rows

    def times(self, timing: Mapping[str, Any]) -> dict[str, Any]:
        """Seconds of every phase, method and cell, earlier runs of the study included.

        ``timing``: what this run knows, such as ``load_s``.
        """
        cells = {cell.key: part["seconds"] for cell, part in self._parts()}
        compared = [(cell.key, self.metrics(cell)) for cell in self.cells]
        metrics = {key: found["seconds"] for key, found in compared if found is not None}
        methods = Counter[str]()
        for cell, part in self._parts():
            methods[cell.method.label] += part["seconds"]
        phases = {
            "load": timing.get("load_s"),
            "cells": sum(cells.values()),
            "metrics": sum(metrics.values()),
            "pictures": timing.get("pictures_s"),
        }
        return {"phases_s": phases, "methods_s": dict(methods), "cells": cells, "metrics": metrics}

    def _parts(self) -> Iterator[tuple[DriftCell, Part]]:
        for cell in self.cells:
            part = self.part(cell)
            if part is not None:
                yield cell, part

    def _texts(self) -> Iterator[dict[str, Any]]:
        for cell, part in self._parts():
            name = {"id": cell.source.id, "method": cell.method.label, "seed": cell.seed}
            yield {"key": cell.key, **name, "text": part["text"]}

    def _tokens(self) -> Iterator[dict[str, Any]]:
        for cell, part in self._parts():
            losses = {} if part["losses"] is None else {"losses": part["losses"]}
            yield {"key": cell.key, "pieces": part["pieces"], **losses}


def _checks(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Any]]:
    for row in rows:
        for check in row["checks"]:
            values = (check[name] for name in _CHECK)
            yield [row["key"], *(int(v) if isinstance(v, bool) else v for v in values)]
