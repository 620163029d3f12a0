"""Perplexity of several methods on the same slices: the document in perplexity.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dart_llm.candidate import Candidate, Parts
from dart_llm.config import PruneConfig
from dart_llm.measurement import Measurement
from dart_llm.perplexity import Scored, perplexity, ratio_interval
from dart_llm.ppl_measure import measure_windows
from dart_llm.ppl_parts import ran_pruned, score_part
from dart_llm.ppl_windows import Window

PROTOCOL = "decode"

_score_one = score_part


@dataclass(frozen=True)
class Row:
    """One method's perplexity; ``config`` None: dense."""

    label: str
    config: PruneConfig | None
    measurement: Measurement


def score_row(
    candidate: Candidate,
    windows: Sequence[Tensor],
    prompt: int,
    folder: Parts,
    text: str,
    advance: Callable[[int], None],
) -> Row:
    """Score all slices ([P + C] each), keeping each as a finished part of the folder."""
    cut = [Window(ids, prompt, number) for number, ids in enumerate(windows)]
    found = measure_windows(candidate, text, cut, PROTOCOL, folder, advance, score=_score_one)
    return Row(candidate.label, candidate.config, found)


def rows_to_dict(rows: Sequence[Row], text: str, prompt: int, scored: int) -> dict[str, Any]:
    """The document of one text in perplexity.json; the first row is dense."""
    found = [(row.label, row.measurement) for row in rows]
    return document(found, text, {"prompt_tokens": prompt, "scored_tokens": scored})


def document(
    rows: Sequence[tuple[str, Measurement]], text: str, shape: Mapping[str, int]
) -> dict[str, Any]:
    """Labelled measurements of the same windows as one document; the first is dense.

    ``shape``: ``prompt_tokens`` and ``scored_tokens``, or ``window`` and ``stride``.
    """
    dense = rows[0][1]
    return {
        "protocol": dense.protocol,
        "text": text,
        "slices": len(dense.items),
        **shape,
        "rows": [_row(label, measurement, dense) for label, measurement in rows],
        "losses": {label: [s["losses"] for s in found.samples] for label, found in rows},
    }


def _row(label: str, found: Measurement, dense: Measurement) -> dict[str, Any]:
    """One row; ``..._pruned_tokens`` speaks of the tokens that ran pruned, dense over the same."""
    report, own, base = found.accounting, _scored(found), _scored(dense)
    return {
        "method": report["method"] if report else label,
        "label": label,
        "sparsity": report["requested_sparsity"] if report else 0.0,
        "perplexity": own.perplexity,
        "mean_loss": own.mean_loss,
        "ratio_to_dense": own.perplexity / base.perplexity,
        "interval": None if found is dense else ratio_interval(own, base),
        "tokens": found.metrics["tokens"],
        "pruned_tokens": found.metrics["pruned_tokens"],
        "perplexity_pruned_tokens": found.metrics.get("perplexity_pruned_tokens"),
        "dense_perplexity_pruned_tokens": dense_where_pruned(found, dense),
        "accounting": report,
        "notes": list(found.notes),
    }


def _scored(found: Measurement) -> Scored:
    return Scored(tuple(tuple(sample["losses"]) for sample in found.samples), None)


def dense_where_pruned(found: Measurement, dense: Measurement) -> float | None:
    """Perplexity of ``dense`` over the tokens that ran pruned in ``found``; None of nothing."""
    losses = [
        loss
        for own, base in zip(found.samples, dense.samples, strict=True)
        for loss, pruned in zip(base["losses"], ran_pruned(own), strict=True)
        if pruned
    ]
    return perplexity(sum(losses) / len(losses)) if losses else None
