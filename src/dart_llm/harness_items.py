"""From lm-eval's results to a ``Measurement``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dart_llm.harness_score import Scorer
from dart_llm.likelihood import SHORT
from dart_llm.measurement import LEAK, Measurement, MeasureOptions, mean

HEADLINES = ("acc", "exact_match", "em", "f1", "word_perplexity")
"""Metrics that come first in tables, in this order."""


def collect(
    name: str, results: Mapping[str, Any], scorer: Scorer, options: MeasureOptions
) -> Measurement:
    """One measurement of a task, or of a group with its tasks as ``subtasks``."""
    leaves = list(results["samples"])
    items = [item for leaf in leaves for item in _items(leaf, results["samples"][leaf])]
    subtasks = {leaf: _metrics(results["results"][leaf]) for leaf in leaves}
    if len(leaves) == 1:
        metrics, subtasks = subtasks[leaves[0]], {}
    else:
        metrics = _overall(items)
    metric = next((m for m in HEADLINES if m in metrics), next(iter(metrics), ""))
    better = results["higher_is_better"].get(leaves[0], {})
    return Measurement(
        task=name,
        protocol=options.protocol,
        metric=metric,
        higher_is_better=bool(better.get(metric, better.get(metric.partition(",")[0], True))),
        metrics=metrics,
        items=tuple(items),
        accounting=scorer.accounting(),
        samples=tuple(s for leaf in leaves for s in _samples(leaf, results["samples"][leaf])),
        notes=_notes(scorer, options),
        counts=scorer.counts.counts,
        masks=scorer.counts.masks,
        subtasks=subtasks,
    )


def _notes(scorer: Scorer, options: MeasureOptions) -> tuple[str, ...]:
    config = scorer.candidate.config
    notes = list(scorer.candidate.notes)
    if config is None:
        return tuple(notes)
    if options.protocol == "published":
        notes.append(LEAK)
    slow = config.drift.rule != "never" or config.min_evidence or config.masking_step
    if slow and scorer.at_once:
        notes.append(
            "likelihood tasks: masks at once and no re-mask (masking_step 0, min_evidence 0, "
            "drift never)"
        )
    if scorer.short:
        what = "context was" if scorer.short == 1 else "contexts were"
        notes.append(f"{scorer.short} {what} scored dense: fewer than {SHORT} tokens")
    return tuple(notes)


def _metrics(row: Mapping[str, Any]) -> dict[str, float | None]:
    """``acc,none`` becomes ``acc``; other filters stay in the name unless they are the only one."""
    found: dict[str, float | None] = {}
    filters = {key.partition(",")[2] for key in row if "," in key}
    for key, value in row.items():
        name, _, which = key.partition(",")
        if not which or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        finite = float(value) if math.isfinite(value) else None
        found[name if which == "none" or len(filters) == 1 else f"{name},{which}"] = finite
    return found


def _items(task: str, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``{"id", metric: number}`` per document; filters of one document are joined."""
    found: dict[str, dict[str, Any]] = {}
    filters = {sample["filter"] for sample in samples}
    for sample in samples:
        item = found.setdefault(str(sample["doc_id"]), {"id": f"{task}/{sample['doc_id']}"})
        for metric in sample["metrics"]:
            plain = len(filters) == 1 or sample["filter"] == "none"
            name = metric if plain else f"{metric},{sample['filter']}"
            _add(item, name, sample.get(metric))
    return list(found.values())


def _add(item: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(value, bool | int | float):
        item[name] = float(value)
    elif isinstance(value, tuple | list) and len(value) == 2 and name == "word_perplexity":
        loss, words = value  # log-likelihood of the document and its weight
        item.update(mean_loss=-float(loss) / max(1, words), tokens=int(words))


def _overall(items: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Means over all documents of a group, of what all of them have."""
    names = [key for key in items[0] if key != "id"] if items else []
    shared = [name for name in names if all(name in item for item in items)]
    return {name: mean([float(item[name]) for item in items]) for name in shared}


def _samples(task: str, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Raw material: the requests, their answers, the document and its target."""
    return [
        {
            "id": f"{task}/{sample['doc_id']}",
            "filter": sample["filter"],
            "target": sample["target"],
            "arguments": [list(arguments) for arguments in sample["arguments"]],
            "answers": sample["resps"],
            "filtered": sample["filtered_resps"],
            **{metric: sample.get(metric) for metric in sample["metrics"]},
        }
        for sample in samples
    ]
