"""Cell results of a comparison with known numbers, as a sweep writes them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dart_llm.files import write_json, write_lines
from fake_results import accounting, config

MODEL = "SmolLM2-135M-Instruct"
ACC, PPL, ROUGE = "arc_easy_local", "perplexity:wikitext2", "summarize:xsum"
METHODS = ("static", "griffin", "flap", "published", "dart")
SPARSITIES = (0.3, 0.5, 0.7)
LOSS = {"dense": 0.0, "static": 5.0, "griffin": 1.0, "flap": 1.5, "published": 0.9, "dart": 0.7}
"""How much a method costs, in units that grow with the sparsity."""


def cell(
    method: str,
    sparsity: float | None,
    task: str,
    measurement: Mapping[str, Any] | None,
    **more: Any,
) -> dict[str, Any]:
    """One finished cell; ``more`` overrides entries of the cell's own settings."""
    label = method if sparsity is None or method == "dense" else f"{method}@{sparsity:g}"
    if more.get("layers"):
        label = f"{method} layers {more['layers']} keep {more['keep']:g}"
    own = {
        "model": "smollm2-135m",
        "dtype": "float32",
        "method": method,
        "sparsity": sparsity,
        "task": task,
        "protocol": "decode",
        "seed": 0,
        "layers": "",
        **more,
    }
    return {
        "key": f"{label}/{task}/{own['protocol']}/{own['seed']}/{own['layers']}/{own.get('keep')}",
        "status": "done",
        "error": None,
        "cell": own,
        "measurement": measurement,
        "checkpoint": {
            "name": MODEL,
            "file_quantisation": "Q4_K_M",
            "dtype": own["dtype"],
            "sha256": "ab12" * 16,
        },
        "facts": {"weight_bytes": 538_060_032},
        "label": label,
    }


def measurement(
    task: str,
    metric: str,
    items: Sequence[Mapping[str, Any]],
    value: float | None,
    report: Mapping[str, Any] | None,
    **more: Any,
) -> dict[str, Any]:
    """``Measurement.to_dict()``."""
    return {
        "task": task,
        "protocol": "decode",
        "metric": metric,
        "higher_is_better": "perplexity" not in metric,
        "metrics": {metric: value},
        "subtasks": {},
        "items": list(items),
        "accounting": report,
        "notes": [],
        "masks": 0,
        **more,
    }


def report(method: str, sparsity: float, achieved: float | None = None) -> dict[str, Any] | None:
    """Accounting; None for the untouched model.  dart runs an eighth of its tokens dense."""
    if method.startswith("dense"):
        return None
    dense = 0.0 if achieved is None else 1 - achieved / sparsity
    found = accounting(method, sparsity, sparsity if achieved is None else achieved, dense)
    found.pop("sequences")
    return found


def accuracy(task: str, flags: Sequence[float], **more: Any) -> dict[str, Any]:
    """Items ``{"id", "acc"}``."""
    items = [{"id": f"{task}/{i}", "acc": float(flag)} for i, flag in enumerate(flags)]
    return measurement(
        task, "acc", items, sum(flags) / len(flags), more.pop("report", None), **more
    )


def perplexity(task: str, losses: Sequence[float], **more: Any) -> dict[str, Any]:
    """Slices of 256 tokens each."""
    items = [{"id": str(i), "mean_loss": loss, "tokens": 256} for i, loss in enumerate(losses)]
    value = math.exp(sum(losses) / len(losses))
    return measurement(task, "perplexity", items, value, more.pop("report", None), **more)


def rouge(task: str, values: Sequence[float], **more: Any) -> dict[str, Any]:
    items = [{"id": f"doc-{i}", "rougeL": value} for i, value in enumerate(values)]
    value = sum(values) / len(values)
    return measurement(task, "rougeL", items, value, more.pop("report", None), **more)


def measured(task: str, method: str, sparsity: float, **more: Any) -> dict[str, Any]:
    """What ``method`` scores: noise shared by all methods, damage that grows with the sparsity."""
    shared = random.Random(task)
    own = random.Random(f"{task}/{method}/{sparsity}")
    damage = LOSS.get(method, 1.2) * sparsity**2
    if task.startswith("perplexity"):
        slices = [2.9 + shared.gauss(0, 0.25) for _ in range(16)]
        losses = [s + 3.6 * damage + damage * own.gauss(0, 0.15) for s in slices]
        return perplexity(task, losses, **more)
    if task.startswith("summarize"):
        base = [shared.uniform(0.1, 0.35) for _ in range(10)]
        return rouge(task, [max(0, b - 0.2 * damage + own.gauss(0, 0.02)) for b in base], **more)
    chances = [shared.random() for _ in range(150)]
    flags = [c < 0.55 - 0.3 * min(1, damage) + own.gauss(0, 0.03) for c in chances]
    return accuracy(task, [float(flag) for flag in flags], **more)


def grid(
    tasks: Iterable[str] = (ACC, "mmlu_local", PPL, ROUGE),
    methods: Iterable[str] = METHODS,
    sparsities: Iterable[float] = SPARSITIES,
    **more: Any,
) -> list[dict[str, Any]]:
    """Dense and every method at every sparsity on every task."""
    cells = []
    for task in tasks:
        cells.append(cell("dense", 0.0, task, measured(task, "dense", 0.0), **more))
        for method in methods:
            for sparsity in sparsities:
                achieved = 0.875 * sparsity if (method, task) == ("dart", ROUGE) else None
                found = report(method, sparsity, achieved)
                result = measured(task, method, sparsity, report=found)
                cells.append(cell(method, sparsity, task, result, **more))
    return cells


def layer_curve(task: str = PPL, count: int = 30) -> list[dict[str, Any]]:
    """One layer pruned at a time, keeping 50 and 25 %: the first and the last layer matter."""
    cells = [cell("dense", 0.0, task, measured(task, "dense", 0.0))]
    for keep in (0.5, 0.25):
        for layer in range(count):
            weight = (1 - keep) * (0.2 + 1.5 * math.exp(-layer) + 0.5 * math.exp(layer - 29))
            base = measured(task, "dense", 0.0)["items"]
            losses = [item["mean_loss"] + 0.1 * weight for item in base]
            found = accounting("griffin", (1 - keep) / count, (1 - keep) / count, 0.0)
            found.pop("sequences")
            result = perplexity(task, losses, report=found)
            cells.append(cell("griffin", None, task, result, layers=str(layer), keep=keep))
    return cells


def failed(method: str, sparsity: float, task: str, error: str) -> dict[str, Any]:
    """A cell that could not be measured."""
    found = cell(method, sparsity, task, None)
    return {**found, "status": "failed", "error": error, "facts": {}}


def write_comparison(folder: Path, cells: Sequence[Mapping[str, Any]], **changes: Any) -> Path:
    """A results folder with ``config.json`` and ``results.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {**config(), "settings": {"seed": 0}, **changes})
    write_lines(folder / "results.jsonl", cells)
    return folder


def flags(good: int, total: int = 40) -> list[float]:
    return [float(place < good) for place in range(total)]


def one(method: str, sparsity: float, values: list[float], achieved: float | None = None) -> Any:
    result = accuracy(ACC, values, report=report(method, sparsity, achieved))
    return cell(method, sparsity, ACC, result)
