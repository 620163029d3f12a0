"""The summary of a drift study as the cells that lists of results are made of: one per method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dart_llm.drift_methods import DENSE

ACCOUNTING = (
    "achieved_sparsity",
    "sparsity_while_pruned",
    "dense_token_share",
    "remasks",
    "ffn_bytes_share",
)
"""Of the reports of a method's cells, merged; ``remasks`` are those of all cells."""

CLOSEST = ("document_similarity", "rougeL")
"""Metrics that may stand for a study in mode free, the first that it has."""


def cells(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One cell per row of summary.json, in the form of results.jsonl of an evaluation.

    The metric is the mean loss after the changes (mode forced), the closeness to the dense text,
    or the mean length where nothing was compared.
    """
    for line in summary.get("rows") or ():
        name, value, higher = _headline(line)
        asked = {key: line.get(key) for key in ("method", "sparsity")}
        failed = not line.get("cells")
        yield {
            "label": line.get("label"),
            "status": "failed" if failed else "done",
            "error": f"all {line.get('failed')} cells failed: results.jsonl says why"
            if failed
            else None,
            "cell": {**asked, "model": summary.get("model"), "dtype": summary.get("dtype")},
            "measurement": {
                "task": f"drift:{summary.get('mode')}",
                "metric": name,
                "higher_is_better": higher,
                "metrics": {name: value},
                "items": [],
                "accounting": None
                if line.get("method") == DENSE
                else {key: line.get(key) for key in ACCOUNTING},
            },
        }


def _headline(line: Mapping[str, Any]) -> tuple[str, float | None, bool]:
    """Name, value, and whether more is better."""
    if line.get("loss"):
        after = line["loss"].get("after") or {}
        return "loss_after", after.get("mean"), False
    for name in CLOSEST:
        found = (line.get("metrics") or {}).get(name)
        if found:
            return name, found["mean"], True
    return "tokens", line.get("mean_tokens"), True
