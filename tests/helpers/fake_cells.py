"""Cell results of a comparison with known numbers, as a sweep writes them."""

import math

from fake_results import accounting

MODEL = "SmolLM2-135M-Instruct"
ACC, PPL = "arc_easy_local", "perplexity:wikitext2"
METHODS = ("static", "griffin", "flap", "published", "dart")
LOSS = {"dense": 0.0, "static": 5.0, "griffin": 1.0, "flap": 1.5, "published": 0.9, "dart": 0.7}
"""How much a method costs, in units that grow with the sparsity."""


def cell(method, sparsity, measurement, protocol="decode", **more):
    """One finished cell; ``more`` overrides entries of the cell's own settings."""
    label = method if sparsity is None or method == "dense" else f"{method}@{sparsity:g}"
    own = {"model": "smollm2-135m", "dtype": "float32", "method": method, "sparsity": sparsity}
    own |= {"task": (measurement or {}).get("task"), "options": {"protocol": protocol}, "seed": 0}
    known = {"name": MODEL, "file_quantisation": "Q4_K_M", "dtype": "float32"}
    return {
        "key": label,
        "label": label,
        "status": "done",
        "error": None,
        "cell": {**own, **more},
        "measurement": measurement and {**measurement, "protocol": protocol},
        "checkpoint": {**known, "sha256": "ab12" * 16},
        "facts": {"weight_bytes": 538_060_032},
    }


def measurement(task, values, report=None):
    """``Measurement.to_dict()``: flags, or losses of slices of 256 tokens."""
    metric, value = "acc", sum(values) / len(values)
    items = [{"id": str(n), metric: float(one)} for n, one in enumerate(values)]
    if task.startswith("perplexity"):
        metric, value = "perplexity", math.exp(value)
        items = [{"id": str(n), "mean_loss": v, "tokens": 256} for n, v in enumerate(values)]
    found = {"task": task, "metric": metric, "metrics": {metric: value}, "items": items}
    found |= {"higher_is_better": metric == "acc", "subtasks": {}, "notes": []}
    return {**found, "accounting": report, "masks": 0}


def report(method, sparsity, achieved=None):
    """Accounting; None for the untouched model.  What is not achieved ran dense."""
    if method.startswith("dense"):
        return None
    dense = 0.0 if achieved is None else 1 - achieved / sparsity
    found = accounting(method, sparsity, sparsity if achieved is None else achieved, dense)
    return {name: value for name, value in found.items() if name != "sequences"}


def measured(task, method, sparsity, report=None):
    """What ``method`` scores on items that all methods share: damage grows with the sparsity."""
    damage = LOSS[method] * sparsity**2
    chance = 0.55 - 0.3 * min(1, damage)
    values = [n * 37 % 150 < 150 * chance for n in range(150)]
    if task == PPL:
        values = [2.6 + 0.04 * n + damage * (3.4 + 0.02 * (n * 7 % 16)) for n in range(16)]
    return measurement(task, values, report)


def grid(methods=METHODS, sparsities=(0.3, 0.5, 0.7)):
    """Dense and every method at every sparsity on both tasks; ``dart`` falls short on one."""
    cells = []
    for task in (ACC, PPL):
        cells.append(cell("dense", 0.0, measured(task, "dense", 0.0)))
        for method, sparsity in ((m, s) for m in methods for s in sparsities):
            achieved = 0.875 * sparsity if (method, task) == ("dart", PPL) else None
            counted = report(method, sparsity, achieved)
            cells.append(cell(method, sparsity, measured(task, method, sparsity, counted)))
    return cells


def one(method, sparsity, good, achieved=None, task=ACC, **more):
    """A method that answers ``good`` of 40 questions."""
    flags = [float(place < good) for place in range(40)]
    return cell(
        method, sparsity, measurement(task, flags, report(method, sparsity, achieved)), **more
    )


def failed(method, sparsity, error):
    found = cell(method, sparsity, None, task=ACC)
    return {**found, "status": "failed", "error": error, "facts": {}}
