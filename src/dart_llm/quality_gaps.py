"""How much of GRIFFIN's log-perplexity gap to dense a variant closes (docs/quality.md).

``gap`` = mean loss minus the untouched model's on the same tokens, nats: the logarithm of the
ratio of their perplexities.  ``gap closed`` = 1 - gap(variant) / gap(GRIFFIN).  Pooled: the gaps
of several sparsities, or of several models, are added up first; a mean of ratios is never taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dart_llm import stats
from dart_llm.errors import MissingExtra
from dart_llm.perplexity import perplexity
from dart_llm.quality_lines import YARDSTICKS, Account, Array, Line, Lines, account, losses
from dart_llm.quality_variants import DENSE, GRIFFIN

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
    return {kind: stats.closed([(gaps[at], others[at])]) for kind, at in chosen.items()}


def compare(groups: Sequence[tuple[Array, Array]], seed: int) -> dict[str, Any]:
    """``gap`` and ``griffin_gap``, summed over groups of [slices], what is closed, its interval.

    ``gap_closed`` is None where GRIFFIN's gap is not positive; ``interval`` is None there, with
    fewer than two slices, and without scipy.
    """
    try:
        found = stats.closed_interval(groups, seed)
    except MissingExtra:
        found = None
    gap, griffin = (
        sum(float(part.mean()) for part in parts) for parts in zip(*groups, strict=True)
    )
    return {
        "gap": gap,
        "griffin_gap": griffin,
        "gap_closed": stats.closed(groups),
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
