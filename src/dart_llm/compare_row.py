"""A row of a comparison, and how it is read from a cell of ``results.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dart_llm import compare_items
from dart_llm.compare_items import Scores
from dart_llm.results_view import mapping, number
from dart_llm.stats import Interval

DENSE, GRIFFIN = "dense", "griffin"

FEW = "few differ"

TOLERANCE = 0.01
"""Achieved sparsities, or byte shares, this close count as equal: one point."""


@dataclass(frozen=True)
class Equal:
    """GRIFFIN at a row's own achieved sparsity, or at its own FFN bytes.

    ``between``: what was interpolated between; one entry where GRIFFIN was measured there.
    """

    value: float | None
    interval: Interval | None
    """The row against it: a difference, or a ratio of perplexities."""
    between: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One method at one sparsity on one task; what is not known is None."""

    model: str
    dtype: str | None
    method: str
    label: str
    task: str
    protocol: str | None
    seed: int | None
    asked: float | None
    layers: str | None = None
    """The layer or layers that were pruned, where not all; ``keep``: the share kept there."""
    keep: float | None = None
    base_keep: float | None = None
    """What the other layers keep; None: everything."""
    status: str = "done"
    error: str | None = None
    metric: str = ""
    higher_is_better: bool = True
    value: float | None = None
    interval: Interval | None = None
    items: int = 0
    achieved: float | None = None
    while_pruned: float | None = None
    dense_share: float | None = None
    remasks: int | None = None
    decoded: int | None = None
    executor: str | None = None
    bytes_executed: float | None = None
    bytes_if_compact: float | None = None
    bytes_share: float | None = None
    """The one of the two above that the comparison at equal bytes uses."""
    weight_bytes: float | None = None
    to_dense: Interval | None = None
    to_griffin: Interval | None = None
    """At the same asked sparsity, whatever was achieved."""
    gap: float | None = None
    """Achieved sparsity minus GRIFFIN's at the same asked sparsity."""
    equal_sparsity: Equal | None = None
    equal_bytes: Equal | None = None
    notes: tuple[str, ...] = ()
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    scores: Scores = field(default=Scores({}, False), repr=False, compare=False)

    @property
    def group(self) -> tuple[str, str | None, str, str | None]:
        """What comparable rows share."""
        return self.model, self.dtype, self.task, self.protocol

    @property
    def perplexity(self) -> bool:
        """Whether differences are ratios, and the metric has a log axis."""
        return compare_items.is_perplexity(self.metric)

    @property
    def unequal(self) -> bool:
        """Whether GRIFFIN at the same asked sparsity removed more, or less, by over a point."""
        return self.gap is not None and abs(self.gap) > TOLERANCE + 1e-9

    @property
    def leaks(self) -> bool:
        """Whether the masks have seen the answers."""
        return self.protocol == "published" and not self.method.startswith(DENSE)

    def verdict(self, interval: Interval | None) -> str:
        """``better``, ``worse``, ``few differ`` where the interval excludes "no difference" but
        rests on too few unequal items, or nothing."""
        if interval is not None and interval.few:
            return FEW
        sign = 0 if interval is None else interval.sign
        return "" if not sign else "better" if (sign > 0) == self.higher_is_better else "worse"


def read_row(cell: Mapping[str, Any]) -> Row:
    """The row of one cell, not compared with anything yet; what is missing is None."""
    asked, known = mapping(cell.get("cell")), mapping(cell.get("checkpoint"))
    measured, facts = mapping(cell.get("measurement")), mapping(cell.get("facts"))
    options = mapping(asked.get("options"))
    method = _method(asked.get("method"), str(cell.get("label") or ""))
    metric = str(measured.get("metric") or "")
    value = number(mapping(measured.get("metrics")).get(metric))
    failed = cell.get("status") == "failed" or not measured or value is None
    counted = mapping(measured.get("accounting"))
    untouched = not counted and method.startswith(DENSE) and not failed
    sample = compare_items.scores(measured)
    layers, keep = _layers(asked)
    sparsity = number(asked.get("sparsity"))
    if sparsity is None and layers is None:
        sparsity = number(counted.get("requested_sparsity"))
    numbers = _of_untouched(method, facts) if untouched else _of_pruned(counted)
    return Row(
        model=_short(known.get("name") or asked.get("model")),
        dtype=_text(known.get("dtype") or asked.get("dtype")),
        method=method,
        label=str(cell.get("label") or (method if sparsity is None else f"{method}@{sparsity:g}")),
        task=str(measured.get("task") or asked.get("task") or "unknown task"),
        protocol=_text(
            measured.get("protocol") or asked.get("protocol") or options.get("protocol")
        ),
        seed=_whole(asked.get("seed")),
        asked=0.0 if method.startswith(DENSE) else sparsity,
        layers=layers,
        keep=keep,
        base_keep=number(asked.get("base_keep")),
        status="failed" if failed else "done",
        error=_error(cell, measured, metric) if failed else None,
        metric=metric,
        higher_is_better=bool(measured.get("higher_is_better", True)),
        value=None if failed else value,
        items=len(sample.sample),
        weight_bytes=number(facts.get("weight_bytes")),
        notes=_notes(measured.get("notes")),
        checkpoint=known,
        scores=sample,
        **numbers,
    )


def _of_pruned(counted: Mapping[str, Any]) -> dict[str, Any]:
    """What an accounting says; nothing is known where there is none."""
    return {
        "achieved": number(counted.get("achieved_sparsity")),
        "while_pruned": number(counted.get("sparsity_while_pruned")),
        "dense_share": number(counted.get("dense_token_share")),
        "remasks": _whole(counted.get("remasks")),
        "decoded": _whole(counted.get("decoded_tokens")),
        "executor": _text(counted.get("executor")),
        "bytes_executed": number(counted.get("ffn_bytes_share")),
        "bytes_if_compact": number(counted.get("ffn_bytes_share_if_compact")),
    }


def _of_untouched(method: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A model that is not pruned; rounded weights have fewer bytes all the same."""
    share = 1.0 if method == DENSE else number(facts.get("ffn_bytes_share"))
    known = {"achieved": 0.0, "dense_share": 1.0, "remasks": 0}
    return {**known, "bytes_executed": share, "bytes_if_compact": share}


def _method(given: Any, label: str) -> str:
    """``dense-8bit`` and the like may stand in the label alone."""
    named = label.partition("@")[0]
    if given in (None, "", DENSE) and named:
        return named
    return str(given or "unknown")


def _notes(value: Any) -> tuple[str, ...]:
    return tuple(str(note) for note in value) if isinstance(value, list | tuple) else ()


def _layers(cell: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """The layers that were pruned, and the share that they keep."""
    layers = cell.get("layers")
    if layers is None or layers in ("", "all", [], ()):
        return None, None
    if isinstance(layers, list | tuple):
        layers = ",".join(str(layer) for layer in layers)
    return str(layers), number(cell.get("keep"))


def _error(cell: Mapping[str, Any], measured: Mapping[str, Any], metric: str) -> str:
    if cell.get("error"):
        return str(cell["error"])
    if not measured:
        return "no measurement was written"
    return f"{metric or 'the metric'} is not a finite number"


def _short(name: Any) -> str:
    return str(name or "unknown model").rstrip("/").rsplit("/", 1)[-1]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _whole(value: Any) -> int | None:
    found = number(value)
    return None if found is None else round(found)
