"""Adding up the reports of several runs of the same configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dart_llm.records import bytes_limit

_WEIGHTED = (
    "achieved_sparsity",
    "dense_token_share",
    "ffn_flops_share",
    "ffn_bytes_share",
    "ffn_flops_share_if_compact",
    "ffn_bytes_share_if_compact",
    "proxy_flops_share",
    "proxy_bytes_share",
)
_NONE_WHEN_DENSE = ("achieved_sparsity", "proxy_flops_share", "proxy_bytes_share")
_ADDED = ("prompt_tokens", "decoded_tokens", "remasks")


def merge_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report (as ``RunReport.to_dict``) over all; means are weighted by decoded tokens.

    ``layers`` keeps the last run's counts with the mean sparsity; ``sequences`` are joined.
    """
    total = sum(report["decoded_tokens"] for report in reports)
    merged = dict(reports[-1])

    def mean(key: str) -> float:
        return float(sum(r[key] * r["decoded_tokens"] for r in reports) / max(1, total))

    merged.update({key: mean(key) for key in _WEIGHTED})
    merged.update({key: sum(report[key] for report in reports) for key in _ADDED})
    pruned = 1 - merged["dense_token_share"]
    merged["sparsity_while_pruned"] = merged["achieved_sparsity"] / pruned if pruned else 0.0
    merged["extra_memory_bytes"] = max(report["extra_memory_bytes"] for report in reports)
    causes: dict[str, int] = {}
    for report in reports:
        for cause, count in report["remask_causes"].items():
            causes[cause] = causes.get(cause, 0) + count
    merged["remask_causes"] = causes
    merged["layers"] = [
        {
            **layer,
            "sparsity_decoded": sum(
                report["layers"][index]["sparsity_decoded"] * report["decoded_tokens"]
                for report in reports
            )
            / max(1, total),
        }
        for index, layer in enumerate(reports[-1]["layers"])
    ]
    merged["sequences"] = [
        {**sequence, "sequence": number}
        for number, sequence in enumerate(s for r in reports for s in r["sequences"])
    ]
    merged["bytes_limit"] = _limit(merged)
    return merged


def _limit(report: dict[str, Any]) -> float:
    proxy = report["proxy_bytes_share"]
    return bytes_limit(report["ffn_share_of_bytes"], report["achieved_sparsity"], proxy)


def slim(report: dict[str, Any]) -> dict[str, Any]:
    """The report without its list of sequences, for keeping one per item."""
    return {**report, "sequences": []}


def add_dense(report: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The report with ``tokens`` decoded tokens more that ran dense, outside any run."""
    if not tokens:
        return report
    before = report["decoded_tokens"]
    total = before + tokens

    def mixed(value: float, dense: float) -> float:
        return float((value * before + dense * tokens) / total)

    merged = dict(report)
    for key in _WEIGHTED:
        merged[key] = mixed(report[key], 0.0 if key in _NONE_WHEN_DENSE else 1.0)
    merged["decoded_tokens"] = total
    merged["layers"] = [
        {**layer, "sparsity_decoded": mixed(layer["sparsity_decoded"], 0.0)}
        for layer in report["layers"]
    ]
    merged["bytes_limit"] = _limit(merged)
    return merged
