"""Markdown tables of the evaluations under benchmarks/results/; used by check_docs.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from table_head import above, linked, read, span, table, today

Rows = list[dict[str, Any]]

NAMES = ("smollm2", "qwen")


def full(root: Path, name: str) -> str:
    """Every task of one model: value, difference to dense and to GRIFFIN, accounting."""
    data = read(root, f"evaluation-{name}")
    parts = [_task(rows, data) for rows in _by_task(data["rows"]).values()]
    return "\n\n".join([above(root, f"evaluation-{name}"), *parts, _note(data)])


def _task(rows: Rows, data: Mapping[str, Any]) -> str:
    first = rows[0]
    better = "higher" if first["higher_is_better"] else "lower"
    head = [
        "method",
        "achieved",
        f"{first['metric']} ({better} is better)",
        "against dense",
        "against GRIFFIN, same asked sparsity",
        "dense tokens",
        "re-masks",
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        ratio = row["metric"].endswith("perplexity")
        unequal = " †" if row["unequal"] else ""
        lines.append(
            [
                today(data, row["label"]),
                f"{row['achieved']:.1%}{unequal}",
                _value(row),
                _change(row["to_dense"], ratio, row["higher_is_better"]),
                _change(row["to_griffin"], ratio, row["higher_is_better"]) + unequal,
                f"{row['dense_share']:.1%}",
                f"{row['remasks']:,}",
            ]
        )
    return f"**{first['task']}**, {first['items']} items\n\n{table(lines)}"


def _by_task(rows: Rows) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for row in rows:
        if row["status"] == "done":
            found.setdefault(row["task"], []).append(row)
    return found


def _value(row: Mapping[str, Any]) -> str:
    found = row["interval"]
    ends = f" ({_figure(found['low'])} to {_figure(found['high'])})" if found else ""
    return f"{_figure(row['value'])}{ends}"


def _figure(value: float) -> str:
    if value >= 1e5:
        mantissa, _, power = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(power)}"
    return f"{value:.3f}" if value < 1 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _change(found: Mapping[str, Any] | None, ratio: bool, higher_is_better: bool) -> str:
    """A difference, or a ratio of perplexities, and what may be said of it."""
    if found is None:
        return "–"
    shown = [found["estimate"], found["low"], found["high"]]
    middle, low, high = (f"{_times(x)}" if ratio else f"{x:+.3f}" for x in shown)
    above = found["estimate"] > (1 if ratio else 0)
    verdict = " better" if above == higher_is_better else " worse"
    times = "x " if ratio else ""
    return f"{times}{middle} ({low} to {high}){verdict if found['significant'] else ''}"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


_INTERVALS = (
    "In brackets 95 % bootstrap intervals over items; differences are paired by item, and marked "
    "better or worse where the interval excludes none and six items or more differ."
)

_DECODE = (
    "Protocol decode: the prompt runs dense, its last token and what follows pruned; contexts "
    "under 16 tokens run dense and count as dense tokens."
)


def _note(data: Mapping[str, Any]) -> str:
    unequal = any(row["unequal"] for row in data["rows"])
    mark = " † Achieved sparsity differs from GRIFFIN's by over a point." if unequal else ""
    return f"{_INTERVALS} {_DECODE}{mark}"


def leaks(root: Path) -> str:
    """The same masks' protocols side by side: how much having seen the answers flatters."""
    data = read(root, "evaluation-leak")
    lines = [["method", "task", "full", "published", "published against full"]]
    lines.append(["---", "---", "---:", "---:", "---:"])
    for leak in data["leaks"]:
        same = (leak["label"], leak["task"])
        row = next(r for r in data["rows"] if (r["label"], r["task"]) == same)
        ratio = row["metric"].endswith("perplexity")
        change = _change(leak["interval"], ratio, row["higher_is_better"])
        values = [_figure(leak["full"]), _figure(leak["published"])]
        lines.append([leak["label"], f"{leak['task']}: {row['metric']}", *values, change])
    known = [row for row in data["rows"] if row["method"] != "dense"]
    account = (
        f"Achieved sparsity {span([r['achieved'] for r in known])}, dense tokens "
        f"{span([r['dense_share'] for r in known])}, "
        f"re-masks {sum(r['remasks'] for r in known)}."
    )
    return f"{above(root, 'evaluation-leak')}\n\n{table(lines)}\n\n{_INTERVALS} {account}"


def harness(root: Path, names: tuple[str, ...]) -> str:
    """Agreement with lm-eval's own model, and the time of whole evaluations."""
    files = [(read(root, name), name) for name in names]
    head = ["dtype", "evaluation", "acc", "acc_norm", "items that differ (acc, acc_norm)"]
    head += ["achieved", "dense tokens", "re-masks", "seconds", "x plain"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for data, _ in files:
        for name, row in data["rows"].items():
            found, differ = row["metrics"], row.get("items_differing_from_plain")
            pruned = "achieved_sparsity" in row
            lines.append(
                [
                    data["checkpoint"]["dtype"],
                    today(data, name),
                    f"{found['acc']:.4f}",
                    f"{found['acc_norm']:.4f}",
                    f"{differ['acc']}, {differ['acc_norm']}" if differ else "–",
                    f"{row['achieved_sparsity']:.1%}" if pruned else "0.0%",
                    f"{row['dense_token_share']:.1%}" if pruned else "100.0%",
                    str(row["remasks"]) if pruned else "0",
                    f"{row['seconds']:.0f}",
                    f"{row['times_plain']:.2f}",
                ]
            )
    first = files[0][0]
    note = (
        f"{first['items']} items of {first['task']}, median of {first['rounds']} rounds in random "
        "order, one run per dtype."
    )
    return f"{above(root, *names)}\n\n{table(lines)}\n\n{note}"


def recipe(root: Path) -> str:
    """The perplexities of the small recipe: every method and sparsity."""
    name = "evaluation-recipe-small"
    data = read(root, name)
    (rows, *_) = _by_task(data["rows"]).values()
    return f"{above(root, name)}\n\n{_task(rows, data)}\n\n{_INTERVALS}"


def tables(root: Path) -> dict[str, tuple[Path, str]]:
    """Block name -> the page that holds it and its content."""
    page = root / "docs/measurements.md"
    blocks = {f"evaluation-{name}": (page, full(root, name)) for name in NAMES}
    blocks["harness"] = (page, harness(root, ("harness_float32", "harness_bfloat16")))
    blocks["leaks"] = (page, leaks(root))
    blocks["recipe-small"] = (root / "docs/recipes.md", recipe(root))
    return linked(blocks, root)
