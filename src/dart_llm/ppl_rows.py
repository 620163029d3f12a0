"""Perplexity of several methods on the same slices, resumable slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dart_llm.config import PruneConfig
from dart_llm.errors import ConfigError
from dart_llm.merge import merge_reports
from dart_llm.perplexity import Scored, ratio_interval, score_slice
from dart_llm.results import ResultsFolder
from dart_llm.session import Run

PROTOCOL = "decode"


@dataclass(frozen=True)
class Row:
    """One method's perplexity; ``scored`` without a report, which is a plain dict here."""

    label: str
    config: PruneConfig | None
    scored: Scored
    report: dict[str, Any] | None


def label(config: PruneConfig | None) -> str:
    """``dense``, or method and sparsity as in ``dart@0.5``."""
    if config is None:
        return "dense"
    fixed = config.budget.table is not None or config.score.strategy == "auto"
    return (
        f"{config.method}@{'table' if fixed and config.sparsity is None else f'{config.target:g}'}"
    )


def score_row(
    model: Any,
    config: PruneConfig | None,
    windows: Sequence[Tensor],
    prompt: int,
    folder: ResultsFolder,
    text: str,
    advance: Callable[[int], None],
    masks: dict[int, Tensor] | None = None,
) -> Row:
    """Score all slices, keeping each as a finished part of the folder."""
    losses, reports = [], []
    run = None if config is None else Run(model, config, masks)
    name = label(config) if masks is None else "given masks"
    for index, window in enumerate(windows):
        key = f"ppl/{text}/{name}/{index}"
        part = folder.part(key)
        if part is None:
            part = _score_one(model, run, window, prompt)
            folder.save_part(key, part)
        losses.append(tuple(part["losses"]))
        if part["report"]:
            reports.append(part["report"])
        advance(1)
    merged = merge_reports(reports) if reports else None
    return Row(name, config, Scored(tuple(losses), None), merged)


def _score_one(model: Any, run: Run | None, window: Tensor, prompt: int) -> dict[str, Any]:
    if run is None:
        return {"losses": score_slice(model, None, window, prompt), "report": None}
    run.reset()
    with run:
        losses = score_slice(model, run, window, prompt)
        report = run.report()
    if report.dense_token_share == 1 and run.asks_for_pruning:
        raise ConfigError(
            f"perplexity of {label(run.config)}: all {report.decoded_tokens} scored tokens of a "
            "slice ran dense, so this would measure the untouched model; give more "
            "--ppl-prompt-tokens or --ppl-scored-tokens, or a smaller --min-evidence or "
            "--masking-step"
        )
    return {"losses": losses, "report": report.to_dict()}


def rows_to_dict(rows: Sequence[Row], text: str, prompt: int, scored: int) -> dict[str, Any]:
    """The document of one text in perplexity.json; the first row is dense."""
    dense = rows[0].scored
    return {
        "protocol": PROTOCOL,
        "text": text,
        "slices": len(dense.losses),
        "prompt_tokens": prompt,
        "scored_tokens": scored,
        "rows": [
            {
                "method": row.report["method"] if row.report else "dense",
                "label": row.label,
                "sparsity": row.report["requested_sparsity"] if row.report else 0.0,
                "perplexity": row.scored.perplexity,
                "mean_loss": row.scored.mean_loss,
                "ratio_to_dense": row.scored.perplexity / dense.perplexity,
                "interval": ratio_interval(row.scored, dense) if row.config else None,
                "accounting": row.report,
            }
            for row in rows
        ],
        "losses": {row.label: [list(losses) for losses in row.scored.losses] for row in rows},
    }
