"""Cell results of a comparison with known numbers, as a sweep writes them."""

import math
import random

from fake_results import accounting

MODEL = "SmolLM2-135M-Instruct"
ACC, PPL, ROUGE = "arc_easy_local", "perplexity:wikitext2", "summarize:xsum"
METHODS = ("static", "griffin", "flap", "published", "dart")
SPARSITIES = (0.3, 0.5, 0.7)
LOSS = {"dense": 0.0, "static": 5.0, "griffin": 1.0, "flap": 1.5, "published": 0.9, "dart": 0.7}
"""How much a method costs, in units that grow with the sparsity."""


def cell(method, sparsity, measurement, **more):
    """One finished cell; ``more`` overrides entries of the cell's own settings."""
    label = method if sparsity is None or method == "dense" else f"{method}@{sparsity:g}"
    if more.get("layers"):
        label = f"{method} layers {more['layers']} keep {more['keep']:g}"
    own = {"model": "smollm2-135m", "dtype": "float32", "method": method, "sparsity": sparsity}
    own |= {"task": (measurement or {}).get("task"), "protocol": "decode", "seed": 0, **more}
    known = {"name": MODEL, "file_quantisation": "Q4_K_M", "dtype": "float32"}
    known["sha256"] = "ab12" * 16
    return {
        "key": label,
        "label": label,
        "status": "done",
        "error": None,
        "cell": own,
        "measurement": measurement and {**measurement, "protocol": own["protocol"]},
        "checkpoint": known,
        "facts": {"weight_bytes": 538_060_032},
    }


def measurement(task, values, report=None):
    """``Measurement.to_dict()``: flags, ROUGE of documents, or losses of slices of 256 tokens."""
    kind = task.partition(":")[0]
    metric = {"perplexity": "perplexity", "summarize": "rougeL"}.get(kind, "acc")
    value = sum(values) / len(values)
    items = [{"id": f"{task}/{n}", metric: float(one)} for n, one in enumerate(values)]
    if metric == "perplexity":
        value = math.exp(value)
        items = [{"id": str(n), "mean_loss": v, "tokens": 256} for n, v in enumerate(values)]
    found = {"task": task, "metric": metric, "metrics": {metric: value}, "items": items}
    found |= {"higher_is_better": metric != "perplexity", "subtasks": {}, "notes": []}
    return {**found, "accounting": report, "masks": 0}


def report(method, sparsity, achieved=None):
    """Accounting; None for the untouched model.  What is not achieved ran dense."""
    if method.startswith("dense"):
        return None
    dense = 0.0 if achieved is None else 1 - achieved / sparsity
    found = accounting(method, sparsity, sparsity if achieved is None else achieved, dense)
    return {name: value for name, value in found.items() if name != "sequences"}


def measured(task, method, sparsity, report=None):
    """What ``method`` scores: noise shared by all methods, damage that grows with the sparsity."""
    shared, own = random.Random(task), random.Random(f"{task}/{method}/{sparsity}")
    damage = LOSS.get(method, 1.2) * sparsity**2
    if task.startswith("perplexity"):
        slices = [2.9 + shared.gauss(0, 0.25) for _ in range(16)]
        values = [s + 3.6 * damage + damage * own.gauss(0, 0.15) for s in slices]
    elif task.startswith("summarize"):
        base = [shared.uniform(0.1, 0.35) for _ in range(10)]
        values = [max(0, b - 0.2 * damage + own.gauss(0, 0.02)) for b in base]
    else:
        chances = [shared.random() for _ in range(150)]
        values = [c < 0.55 - 0.3 * min(1, damage) + own.gauss(0, 0.03) for c in chances]
    return measurement(task, values, report)


def grid(tasks=(ACC, "mmlu_local", PPL, ROUGE), methods=METHODS, sparsities=SPARSITIES, **more):
    """Dense and every method at every sparsity on every task."""
    cells = []
    for task in tasks:
        cells.append(cell("dense", 0.0, measured(task, "dense", 0.0), **more))
        for method in methods:
            for sparsity in sparsities:
                achieved = 0.875 * sparsity if (method, task) == ("dart", ROUGE) else None
                found = report(method, sparsity, achieved)
                cells.append(
                    cell(method, sparsity, measured(task, method, sparsity, found), **more)
                )
    return cells


def layer_curve(task=PPL, count=30):
    """One layer pruned at a time, keeping 50 and 25 %: the first and the last layer matter."""
    base = measured(task, "dense", 0.0)
    cells = [cell("dense", 0.0, base)]
    for keep in (0.5, 0.25):
        for layer in range(count):
            weight = (1 - keep) * (0.2 + 1.5 * math.exp(-layer) + 0.5 * math.exp(layer - 29))
            losses = [item["mean_loss"] + 0.1 * weight for item in base["items"]]
            found = measurement(task, losses, report("griffin", (1 - keep) / count))
            cells.append(cell("griffin", None, found, layers=str(layer), keep=keep))
    return cells


def failed(method, sparsity, task, error):
    found = cell(method, sparsity, None, task=task)
    return {**found, "status": "failed", "error": error, "facts": {}}


def flags(good, total=40):
    return [float(place < good) for place in range(total)]


def one(method, sparsity, good, achieved=None, **more):
    """A method that answers ``good`` of 40 questions."""
    task = more.pop("task", ACC)
    found = measurement(task, flags(good), report(method, sparsity, achieved))
    return cell(method, sparsity, found, **more)
