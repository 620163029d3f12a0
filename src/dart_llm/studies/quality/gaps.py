"""Gap closed against GRIFFIN at equal sparsity and equal bytes.

How much of GRIFFIN's log-perplexity gap to dense a variant closes (docs/bench.md).

``gap`` = mean loss minus the untouched model's on the same tokens, nats: the logarithm of the
ratio of their perplexities.  ``gap closed`` = 1 - gap(variant) / gap(GRIFFIN).  Pooled: the gaps
of several sparsities, or of several models, are added up first; a mean of ratios is never taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dart_llm.evaluation.perplexity import perplexity
from dart_llm.evaluation.slices import LEAD
from dart_llm.experiments import stats
from dart_llm.experiments.comparison import read_traffic
from dart_llm.experiments.store import SCHEMA
from dart_llm.experiments.variants import DENSE, GRIFFIN
from dart_llm.reporting.table import grouped
from dart_llm.reporting.words import too_few
from dart_llm.studies.quality.settings import CELLS, TASKS, model_name

Line = Mapping[str, Any]
"""A line of results.jsonl: one model and method on one task."""

Row = dict[str, Any]

Array = NDArray[np.float64]

STEP = 3
"""Decimals to which GRIFFIN's sparsities are rounded."""

EQUAL_SPARSITY, EQUAL_BYTES = "equal_sparsity", "equal_bytes"

BASELINES = {
    EQUAL_SPARSITY: "GRIFFIN at the method's achieved sparsity, dense tokens counting 0",
    EQUAL_BYTES: "GRIFFIN at 1 - the method's share of the dense FFN bytes, if run compactly",
}
"""The two columns of a comparison."""

ALL = "all models"

KINDS = {task: cell for cell, task in TASKS.items()}


class Group:
    """The lines of one model and cell, by variant and sparsity."""

    def __init__(self, model: str, cell: str, lines: Iterable[Line]) -> None:
        self.model, self.cell = model, cell
        self._lines = {place_of(line): line for line in lines}

    def has(self, variant: str, sparsity: float) -> bool:
        """Whether the variant was measured at this sparsity."""
        return (variant, sparsity) in self._lines

    def at(self, variant: str, sparsity: float) -> Line:
        """The line of one variant and sparsity; raises ``KeyError`` if it is missing."""
        return self._lines[variant, sparsity]

    def griffin(self, sparsity: float) -> Line:
        """GRIFFIN at ``sparsity``; at 0 it is the untouched model."""
        return self.at(GRIFFIN if sparsity else DENSE, sparsity)

    def gaps(self, line: Line) -> Array:
        """Mean loss of each slice minus the untouched model's, nats; [slices]."""
        return losses(line) - losses(self.at(DENSE, 0.0))


def place_of(line: Line) -> tuple[str, float]:
    """Variant and sparsity of a line, by its label."""
    variant, _, sparsity = str(line["label"]).rpartition("@")
    return (variant, float(sparsity)) if variant else (str(line["label"]), 0.0)


def groups(lines: Iterable[Line]) -> list[Group]:
    """Measured lines in any order, by model and cell."""
    found = grouped(
        (line for line in lines if line["measurement"]),
        lambda line: (
            model_name(line["cell"]["model"]),
            KINDS[line["cell"]["task"].partition(":")[0]],
        ),
    )
    return [Group(model, cell, members) for (model, cell), members in found.items()]


def items(line: Line) -> list[dict[str, Any]]:
    """The slices of a line."""
    return list(line["measurement"]["items"])


def losses(line: Line) -> Array:
    """Mean loss of each slice; [slices]."""
    return np.array([item["mean_loss"] for item in items(line)], dtype=np.float64)


def account(line: Line) -> Row:
    """What a variant cost over all slices of a cell."""
    facts, counted = line["facts"], line["measurement"]["accounting"]
    if counted is None:  # a dense model, of which rounded weights may be fewer bytes
        share = facts.get("ffn_share_of_bfloat16", 1.0)
        traffic, context = read_traffic(facts), _mean_context(line)
        counted = {
            "achieved_sparsity": 0.0,
            "dense_token_share": 1.0,
            "remasks": 0,
            "ffn_bytes_share_if_compact": share,
            "token_bytes_share": None if traffic is None else traffic.share(context),
            "extra_memory_bytes": 0,
        }
    achieved, dense = counted["achieved_sparsity"], counted["dense_token_share"]
    return {
        "achieved_sparsity": achieved,
        "sparsity_while_pruned": achieved / (1 - dense) if dense < 1 else 0.0,
        "dense_token_share": dense,
        "remasks": counted["remasks"],
        "remasks_per_slice": counted["remasks"] / len(items(line)),
        "ffn_bytes_share": counted["ffn_bytes_share_if_compact"],
        "token_bytes_share": counted.get("token_bytes_share"),
        "extra_memory_bytes": counted["extra_memory_bytes"],
    }


def _mean_context(line: Line) -> float:
    """Positions of the cache that a decoded token of a dense model sees, on average."""
    options = line["cell"]["options"]
    lead = LEAD if line["cell"]["task"].startswith("shift") else 0
    return float(options["prompt_tokens"] - 1 + (lead + options["scored_tokens"] + 1) / 2)


def matched_sparsities(line: Line) -> dict[str, float]:
    """GRIFFIN's sparsity in each column; never below 0, where GRIFFIN is dense."""
    spent = account(line)
    wanted = {
        EQUAL_SPARSITY: spent["achieved_sparsity"],
        EQUAL_BYTES: 1 - spent["ffn_bytes_share"],
    }
    return {name: matched_sparsity(value) for name, value in wanted.items()}


def matched_sparsity(value: float) -> float:
    """A sparsity that GRIFFIN can be run at, rounded."""
    return min(max(0.0, round(value, STEP)), round(1 - 10.0**-STEP, STEP))


def cell_rows(
    found: Sequence[Group], variants: Sequence[str], sparsities: Sequence[float], seed: int
) -> list[Row]:
    """One row per model, cell, sparsity and variant that was measured.

    Those of sparsity 0, dense models in fewer bits, are not compared with GRIFFIN.
    """
    return [
        _row(group, variant, sparsity, seed)
        for group in found
        for sparsity in sparsities
        for variant in variants
        if group.has(variant, sparsity)
    ]


def _row(group: Group, variant: str, sparsity: float, seed: int) -> Row:
    line, dense = group.at(variant, sparsity), group.at(DENSE, 0.0)
    gap = float(group.gaps(line).mean())
    columns = {
        name: _column(group, line, equal, seed) if sparsity and variant != GRIFFIN else None
        for name, equal in matched_sparsities(line).items()
    }
    return {
        "model": group.model,
        "cell": group.cell,
        "sparsity": sparsity,
        "variant": variant,
        "slices": len(items(line)),
        "kinds": list(dict.fromkeys(item["source"] for item in items(line))),
        "tokens": sum(item["tokens"] for item in items(line)),
        "dense_perplexity": perplexity(float(losses(dense).mean())),
        "perplexity": perplexity(float(losses(line).mean())),
        "times_dense": perplexity(gap),
        "gap": gap,
        **account(line),
        **columns,
    }


def _column(group: Group, line: Line, sparsity: float, seed: int) -> Row:
    """A comparison with GRIFFIN at ``sparsity``."""
    griffin = group.griffin(sparsity)
    gaps, others = group.gaps(line), group.gaps(griffin)
    sources = [item["source"] for item in items(line)]
    kinds = {source: [one == source for one in sources] for source in sources}
    return {
        "sparsity": sparsity,
        "perplexity": perplexity(float(losses(griffin).mean())),
        **compare([(gaps, others)], seed),
        "by_kind": {kind: stats.gap_closed([(gaps[at], others[at])]) for kind, at in kinds.items()},
    }


def compare(pairs: Sequence[tuple[Array, Array]], seed: int) -> Row:
    """``gap`` and ``griffin_gap``, summed over pairs of [slices], what is closed, its interval.

    ``gap_closed`` is None where GRIFFIN's gap is not positive; ``interval`` is None there and with
    too few slices, as ``no_interval`` says.
    """
    found = stats.gap_closed_interval(pairs, seed)
    gap, griffin = (sum(float(one.mean()) for one in parts) for parts in zip(*pairs, strict=True))
    return {
        "gap": gap,
        "griffin_gap": griffin,
        "gap_closed": stats.gap_closed(pairs),
        "interval": list(found.ends) if found and found.ends else None,
        "no_interval": too_few(min(len(gaps) for gaps, _ in pairs)),
    }


def pooled_rows(
    found: Sequence[Group], variants: Sequence[str], pool: Sequence[float], seed: int
) -> list[Row]:
    """One row per model, cell and variant over the sparsities ``pool``, and one over all models.

    Only what was measured at every sparsity of the pool; GRIFFIN has no row.
    """
    rows: list[Row] = []
    for cell in dict.fromkeys(group.cell for group in found):
        for variant in variants:
            if variant == GRIFFIN or not pool:
                continue
            sums = {
                group.model: [_sums(group, variant, pool)]
                for group in found
                if group.cell == cell and all(group.has(variant, one) for one in pool)
            }
            if len(sums) > 1:
                sums[ALL] = [pairs for (pairs,) in sums.values()]
            head = {"cell": cell, "variant": variant, "sparsities": list(pool)}
            rows += [{"model": m, **head, **_pooled(pairs, seed)} for m, pairs in sums.items()]
    return rows


def _sums(group: Group, variant: str, pool: Sequence[float]) -> dict[str, Array]:
    """Per column the gaps of every slice, summed over ``pool``: the variant's, GRIFFIN's [2, n]."""
    found: dict[str, Array] = {}
    for sparsity in pool:
        line = group.at(variant, sparsity)
        for name, equal in matched_sparsities(line).items():
            pair = np.stack([group.gaps(line), group.gaps(group.griffin(equal))])
            found[name] = found.get(name, 0.0) + pair
    return found


def _pooled(sums: Sequence[dict[str, Array]], seed: int) -> Row:
    columns = {name: [(each[name][0], each[name][1]) for each in sums] for name in BASELINES}
    slices = sum(len(gaps) for gaps, _ in columns[EQUAL_BYTES])
    return {"slices": slices, **{name: compare(pairs, seed) for name, pairs in columns.items()}}


# quality.json: made from the measured lines and from what was requested, of one run or of several.

DEFINITIONS = {
    "gap": "mean loss minus the untouched model's on the same scored tokens, nats",
    "gap_closed": "1 - gap / griffin_gap; null where GRIFFIN loses nothing",
    "interval": "95 %, bootstrap over slices, the variant and GRIFFIN on the same ones",
    "token_bytes_share": "bytes that a decoded token reads (FFN, attention, head, cache, "
    "selection) over those of the dense model at bfloat16, if run compactly; weights in blocks as "
    "stored",
    **BASELINES,
    **CELLS,
}
"""What the names in quality.json mean."""


def summarise(lines: Iterable[Line], requested: Mapping[str, Any]) -> dict[str, Any]:
    """The document; nothing in it depends on when or how often a run was started.

    ``requested``: ``set``, ``seed``, ``sparsities``, ``pool`` (of the measured ones), ``variants``
    (configurations by label, GRIFFIN's first), ``roundings``, ``texts``, ``checkpoints`` by model,
    tokens of a slice.
    """
    found, seed = groups(lines), requested["seed"]
    labels = list(requested["variants"])
    none = "note: nothing is pooled, because no sparsity of --pool was measured"
    return {
        "schema": SCHEMA,
        **requested,
        "slices": {one.model: len(items(one.at(DENSE, 0.0))) for one in found},
        "cells": [
            *cell_rows(found, labels, requested["sparsities"], seed),
            *cell_rows(found, requested.get("roundings", ()), [0.0], seed),
        ],
        "pooled": pooled_rows(found, labels, requested["pool"], seed),
        "notes": [] if requested["pool"] else [none],
        "definitions": DEFINITIONS,
    }
