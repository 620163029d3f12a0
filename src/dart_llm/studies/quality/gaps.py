"""Gap closed against GRIFFIN at equal sparsity and equal bytes.

How much of GRIFFIN's log-perplexity gap to dense a variant closes (docs/bench.md).

``gap`` = mean loss minus the untouched model's on the same tokens, nats: the logarithm of the
ratio of their perplexities.  ``gap closed`` = 1 - gap(variant) / gap(GRIFFIN).  Pooled: the gaps
of several sparsities, or of several models, are added up first; a mean of ratios is never taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dart_llm.evaluation.perplexity import perplexity
from dart_llm.experiments import stats
from dart_llm.experiments.store import SCHEMA
from dart_llm.experiments.variants import DENSE, GRIFFIN
from dart_llm.studies.quality.slices import CELLS

# The measured lines of ``dart-llm bench quality``, found by model, cell, variant and sparsity.


Line = Mapping[str, Any]
"""One line of results.jsonl: ``model``, ``cell``, ``variant``, ``sparsity``, ``slice``, ``source``,
``loss``, ``tokens``, ``accounting``."""

Place = tuple[str, str, str, float]
"""Model, cell, variant, sparsity."""

Array = NDArray[np.float64]

STEP = 3
"""Decimals to which GRIFFIN's sparsities are rounded."""

EQUAL_SPARSITY, EQUAL_BYTES = "equal_sparsity", "equal_bytes"

YARDSTICKS = {
    EQUAL_SPARSITY: "GRIFFIN at the method's achieved sparsity, dense tokens counting 0",
    EQUAL_BYTES: "GRIFFIN at 1 - the method's share of the dense FFN bytes, if run compactly",
}
"""The two columns of a comparison."""


@dataclass(frozen=True)
class Account:
    """What a variant cost over all slices of a cell; shares weighted by decoded tokens."""

    achieved_sparsity: float
    sparsity_while_pruned: float
    dense_token_share: float
    remasks: int
    ffn_bytes_share: float
    ffn_flops_share: float
    extra_memory_bytes: int

    @property
    def yardsticks(self) -> dict[str, float]:
        """GRIFFIN's sparsity in each column; never below 0, where GRIFFIN is dense."""
        wanted = {EQUAL_SPARSITY: self.achieved_sparsity, EQUAL_BYTES: 1 - self.ffn_bytes_share}
        return {name: matched_sparsity(value) for name, value in wanted.items()}


def matched_sparsity(value: float) -> float:
    """A sparsity that GRIFFIN can be run at, rounded."""
    return min(max(0.0, round(value, STEP)), round(1 - 10.0**-STEP, STEP))


def account(lines: Sequence[Line]) -> Account:
    """The account of one variant in one cell; its lines hold an ``accounting``."""
    parts = [line["accounting"] for line in lines]
    total = sum(part["decoded_tokens"] for part in parts)

    def mean(name: str) -> float:
        return float(sum(part[name] * part["decoded_tokens"] for part in parts) / total)

    achieved, dense = mean("achieved_sparsity"), mean("dense_token_share")
    return Account(
        achieved,
        achieved / (1 - dense) if dense < 1 else 0.0,
        dense,
        sum(part["remasks"] for part in parts),
        mean("ffn_bytes_share_if_compact"),
        mean("ffn_flops_share_if_compact"),
        max(part["extra_memory_bytes"] for part in parts),
    )


class Lines:
    """Lines in any order; of each place the slices come in the order of the dense ones."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self._found: dict[Place, dict[str, Line]] = {}
        for line in lines:
            place = (line["model"], line["cell"], line["variant"], float(line["sparsity"]))
            self._found.setdefault(place, {})[line["slice"]] = line

    @property
    def groups(self) -> list[tuple[str, str]]:
        """Models and cells that were measured, in order."""
        return list(dict.fromkeys((model, cell) for model, cell, _, _ in self._found))

    def at(self, model: str, cell: str, variant: str, sparsity: float) -> list[Line]:
        """The lines of one place, one per slice; raises ``KeyError`` for one that is missing."""
        found = self._found[model, cell, variant, sparsity]
        return [found[name] for name in self._found[model, cell, DENSE, 0.0]]

    def griffin(self, model: str, cell: str, sparsity: float) -> list[Line]:
        """GRIFFIN at ``sparsity``; at 0 it is the untouched model."""
        return self.at(model, cell, GRIFFIN if sparsity else DENSE, sparsity)

    def has(self, model: str, cell: str, variant: str, sparsity: float) -> bool:
        """Whether the place was measured."""
        return (model, cell, variant, sparsity) in self._found

    def gaps(self, model: str, cell: str, lines: Sequence[Line]) -> Array:
        """Mean loss of each slice minus the untouched model's, nats; [slices]."""
        dense = self.at(model, cell, DENSE, 0.0)
        return losses(lines) - losses(dense)


def losses(lines: Sequence[Line]) -> Array:
    """Mean loss of each slice; [slices]."""
    return np.array([line["loss"] for line in lines], dtype=np.float64)


ALL = "all models"

Row = dict[str, Any]


def cell_rows(
    lines: Lines, variants: Sequence[str], sparsities: Sequence[float], seed: int
) -> list[Row]:
    """One row per model, cell, sparsity and variant that was measured."""
    return [
        _row(lines, model, cell, variant, sparsity, seed)
        for model, cell in lines.groups
        for sparsity in sparsities
        for variant in variants
        if lines.has(model, cell, variant, sparsity)
    ]


def _row(lines: Lines, model: str, cell: str, variant: str, sparsity: float, seed: int) -> Row:
    own, dense = lines.at(model, cell, variant, sparsity), lines.at(model, cell, DENSE, 0.0)
    spent = account(own)
    gaps = lines.gaps(model, cell, own)
    return {
        "model": model,
        "cell": cell,
        "sparsity": sparsity,
        "variant": variant,
        "slices": len(own),
        "kinds": list(dict.fromkeys(line["source"] for line in own)),
        "tokens": sum(line["tokens"] for line in own),
        "dense_perplexity": perplexity(float(losses(dense).mean())),
        "perplexity": perplexity(float(losses(own).mean())),
        "times_dense": perplexity(float(gaps.mean())),
        "gap": float(gaps.mean()),
        "achieved_sparsity": spent.achieved_sparsity,
        "sparsity_while_pruned": spent.sparsity_while_pruned,
        "dense_token_share": spent.dense_token_share,
        "remasks": spent.remasks,
        "remasks_per_slice": spent.remasks / len(own),
        "ffn_bytes_share": spent.ffn_bytes_share,
        "ffn_flops_share": spent.ffn_flops_share,
        "extra_memory_bytes": spent.extra_memory_bytes,
        **_columns(lines, model, cell, variant, own, spent, seed),
    }


def _columns(
    lines: Lines,
    model: str,
    cell: str,
    variant: str,
    own: Sequence[Line],
    spent: Account,
    seed: int,
) -> dict[str, Any]:
    """Both comparisons with GRIFFIN; None for GRIFFIN itself."""
    if variant == GRIFFIN:
        return dict.fromkeys(YARDSTICKS)
    gaps = lines.gaps(model, cell, own)
    found = {}
    for name, sparsity in spent.yardsticks.items():
        griffin = lines.griffin(model, cell, sparsity)
        others = lines.gaps(model, cell, griffin)
        found[name] = {
            "sparsity": sparsity,
            "perplexity": perplexity(float(losses(griffin).mean())),
            **compare([(gaps, others)], seed),
            "by_kind": _by_kind(own, gaps, others),
        }
    return found


def _by_kind(own: Sequence[Line], gaps: Array, others: Array) -> dict[str, float | None]:
    """Gap closed on each kind of text, without intervals."""
    kinds = list(dict.fromkeys(line["source"] for line in own))
    chosen = {kind: [line["source"] == kind for line in own] for kind in kinds}
    return {kind: stats.gap_closed([(gaps[at], others[at])]) for kind, at in chosen.items()}


def compare(groups: Sequence[tuple[Array, Array]], seed: int) -> dict[str, Any]:
    """``gap`` and ``griffin_gap``, summed over groups of [slices], what is closed, its interval.

    ``gap_closed`` is None where GRIFFIN's gap is not positive; ``interval`` is None there and with
    fewer than two slices.
    """
    found = stats.gap_closed_interval(groups, seed)
    gap, griffin = (
        sum(float(part.mean()) for part in parts) for parts in zip(*groups, strict=True)
    )
    return {
        "gap": gap,
        "griffin_gap": griffin,
        "gap_closed": stats.gap_closed(groups),
        "interval": None if found is None else [found.low, found.high],
    }


def pooled_rows(
    lines: Lines, variants: Sequence[str], pool: Sequence[float], seed: int
) -> list[Row]:
    """One row per model, cell and variant over the sparsities ``pool``, and one over all models.

    Only what was measured at every sparsity of the pool; GRIFFIN has no row.
    """
    found: list[Row] = []
    for cell in dict.fromkeys(cell for _, cell in lines.groups):
        models = [model for model, other in lines.groups if other == cell]
        for variant in variants:
            if variant == GRIFFIN or not pool:
                continue
            whole = [m for m in models if all(lines.has(m, cell, variant, s) for s in pool)]
            sums = {model: _sums(lines, model, cell, variant, pool) for model in whole}
            head = {"cell": cell, "variant": variant, "sparsities": list(pool)}
            for model, own in sums.items():
                found.append({"model": model, **head, **_pooled([own], seed)})
            if len(sums) > 1:
                found.append({"model": ALL, **head, **_pooled(list(sums.values()), seed)})
    return found


def _sums(
    lines: Lines, model: str, cell: str, variant: str, pool: Sequence[float]
) -> dict[str, tuple[Array, Array]]:
    """Per column the gaps of every slice, summed over the sparsities: the variant's, GRIFFIN's."""
    found: dict[str, tuple[Array, Array]] = {}
    for sparsity in pool:
        own = lines.at(model, cell, variant, sparsity)
        gaps = lines.gaps(model, cell, own)
        for name, equal in account(own).yardsticks.items():
            others = lines.gaps(model, cell, lines.griffin(model, cell, equal))
            before = found.get(name)
            found[name] = (
                (gaps, others) if before is None else (before[0] + gaps, before[1] + others)
            )
    return found


def _pooled(sums: Sequence[dict[str, tuple[Array, Array]]], seed: int) -> dict[str, Any]:
    groups = {name: [own[name] for own in sums] for name in YARDSTICKS}
    slices = sum(len(gaps) for gaps, _ in groups[next(iter(groups))])
    return {"slices": slices, **{name: compare(own, seed) for name, own in groups.items()}}


# quality.json: made from the measured lines and from what was asked, of one run or of several.


DEFINITIONS = {
    "gap": "mean loss minus the untouched model's on the same scored tokens, nats",
    "gap_closed": "1 - gap / griffin_gap; null where GRIFFIN loses nothing",
    "interval": "95 %, bootstrap over slices, the variant and GRIFFIN on the same ones",
    **YARDSTICKS,
    **CELLS,
}
"""What the words of quality.json mean."""


def summarise(lines: Iterable[Line], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The document; nothing in it depends on when or how often a run was started.

    ``asked``: ``set``, ``seed``, ``sparsities``, ``pool`` (of the measured ones), ``variants``
    (configurations by label, GRIFFIN's first), ``texts``, ``checkpoints`` and ``slices`` (by
    model), tokens of a slice.
    """
    found, labels, seed = Lines(lines), list(asked["variants"]), asked["seed"]
    return {
        "schema": SCHEMA,
        **asked,
        "cells": cell_rows(found, labels, asked["sparsities"], seed),
        "pooled": pooled_rows(found, labels, asked["pool"], seed),
        "notes": _notes(asked),
        "definitions": DEFINITIONS,
    }


def _notes(asked: Mapping[str, Any]) -> list[str]:
    if asked["pool"]:
        return []
    return ["note: nothing is pooled, for no sparsity of --pool was measured"]
