"""From lm-eval's results to a ``Measurement``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dart_llm.harness_score import Scorer
from dart_llm.likelihood import SHORT
from dart_llm.measurement import LEAK, Measurement, MeasureOptions, mean
from dart_llm.mmlu import LOCAL_MMLU, MMLU_SUBJECTS
from dart_llm.perplexity import perplexity

PERPLEXITIES = ("word_perplexity", "byte_perplexity")
"""Metrics of a log-likelihood and a weight per document; items hold the first that all have."""

HEADLINES = ("acc", "exact_match", "em", "f1", *PERPLEXITIES)
"""Metrics that come first in tables, in this order."""

Items = list[dict[str, Any]]


def collect(
    name: str, results: Mapping[str, Any], scorer: Scorer, options: MeasureOptions
) -> Measurement:
    """One measurement of a task, or of a group with its tasks as ``subtasks``."""
    leaves = list(results["samples"])
    known = [set(sample["metrics"]) for leaf in leaves for sample in results["samples"][leaf]]
    weighed = next((m for m in PERPLEXITIES if all(m in metrics for metrics in known)), "")
    items = {leaf: _items(leaf, results["samples"][leaf], weighed) for leaf in leaves}
    subtasks = {leaf: _metrics(results["results"][leaf]) for leaf in leaves}
    if len(leaves) == 1:
        metrics, subtasks = subtasks[leaves[0]], {}
    else:
        metrics = _overall(items, subtasks, weighed)
    metric = next((m for m in HEADLINES if m in metrics), next(iter(metrics), ""))
    better = results["higher_is_better"].get(leaves[0], {})
    return Measurement(
        task=name,
        protocol=options.protocol,
        metric=metric,
        higher_is_better=bool(better.get(metric, better.get(metric.partition(",")[0], True))),
        metrics=metrics,
        items=tuple(item for leaf in leaves for item in items[leaf]),
        accounting=scorer.accounting(),
        samples=tuple(s for leaf in leaves for s in _samples(leaf, results["samples"][leaf])),
        notes=(*_notes(scorer, options), *_subjects(name, len(leaves))),
        counts=scorer.counts.counts,
        masks=scorer.counts.masks,
        subtasks=subtasks,
    )


def _subjects(name: str, tasks: int) -> tuple[str, ...]:
    """MMLU over a local folder may be a part of it, and says so."""
    if name != "mmlu" or tasks >= len(MMLU_SUBJECTS):
        return ()
    return (
        f"mmlu: {tasks} of its {len(MMLU_SUBJECTS)} subjects, those in {LOCAL_MMLU.as_posix()}",
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


def _items(task: str, samples: Sequence[Mapping[str, Any]], weighed: str) -> Items:
    """``{"id", metric: number}`` per document; filters of one document are joined.

    ``weighed``: the metric whose log-likelihood and weight become a mean loss and ``tokens``.
    """
    found: dict[str, dict[str, Any]] = {}
    filters = {sample["filter"] for sample in samples}
    for sample in samples:
        item = found.setdefault(str(sample["doc_id"]), {"id": f"{task}/{sample['doc_id']}"})
        for metric in sample["metrics"]:
            plain = len(filters) == 1 or sample["filter"] == "none"
            name = metric if plain else f"{metric},{sample['filter']}"
            value = sample.get(metric)
            if isinstance(value, bool | int | float):
                item[name] = float(value)
            elif name == weighed and isinstance(value, tuple | list) and len(value) == 2:
                loss, weight = value
                item.update(mean_loss=-float(loss) / max(1, weight), tokens=int(weight))
    return list(found.values())


def _overall(
    items: Mapping[str, Items], subtasks: Mapping[str, Mapping[str, float | None]], weighed: str
) -> dict[str, float | None]:
    """Metrics of a group over all its documents, each document once.

    Only those that every task averages over its documents, and the perplexity of all documents
    together: aggregates of another kind cannot be put together from those of the tasks.
    """
    every = [item for own in items.values() for item in own]
    found: dict[str, float | None] = {}
    if weighed and every:
        loss = math.fsum(item["mean_loss"] * item["tokens"] for item in every)
        found[weighed] = perplexity(loss / max(1, sum(item["tokens"] for item in every)))
    for name in every[0] if every else ():
        if all(_averages(own, name, subtasks[leaf].get(name)) for leaf, own in items.items()):
            found[name] = mean([float(item[name]) for item in every])
    return found


def _averages(items: Items, name: str, value: float | None) -> bool:
    """Whether ``value`` is the mean of what the items hold under ``name``."""
    if value is None or not all(name in item for item in items):
        return False
    return math.isclose(mean([item[name] for item in items]), value, rel_tol=1e-6, abs_tol=1e-9)


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
