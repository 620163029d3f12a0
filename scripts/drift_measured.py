"""Markdown tables of the drift studies under benchmarks/results/; used by check_docs.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from table_head import above, linked, read, table, today

MODELS = ("smollm2", "qwen")
WINDOW = 10
"""Tokens of a window in the table of signals."""

METRICS = {
    "document_similarity": "document",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "bertscore": "BERTScore",
    "sentence_coverage": "coverage",
    "sentence_order": "order",
}


def forced(root: Path, name: str) -> str:
    """Mean loss after the changes of topic, by method."""
    data = read(root, name)
    head = ["method", "achieved", "dense tokens", "re-masks per passage", "loss after"]
    head += ["minus dense", "minus never", "from token 64 on, minus never", "recovered in"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in data["rows"]:
        loss = row["loss"]
        lines.append(
            [
                today(data, row["label"]),
                *_account(row),
                _value(loss["after"]),
                _change(loss["after_minus_dense"]),
                _change(loss["after_minus_never"]),
                _change(loss["later_minus_never"]),
                _recovery(loss["recovery"]),
            ]
        )
    return f"{above(root, name)}\n\n{table(lines)}"


def pairs(root: Path, name: str) -> str:
    """Loss after the changes of one method minus that of another, at equal achieved sparsity."""
    data = read(root, name)
    head = ["method", "achieved", "against", "achieved", "loss after, difference by passage"]
    lines = [head, ["---", "---:", "---", "---:", "---:"]]
    achieved = {row["label"]: f"{row['achieved_sparsity']:.1%}" for row in data["rows"]}
    for pair in data["pairs"]:
        told = "" if not pair["after"]["significant"] else " better"
        if told and pair["after"]["mean"] > 0:
            told = " worse"
        own, other = pair["label"], pair["other"]
        change = f"{_change(pair['after'])}{told}"
        names = (today(data, own), today(data, other))
        lines.append([names[0], achieved[own], names[1], achieved[other], change])
    return f"{above(root, name)}\n\n{table(lines)}"


def free(root: Path, name: str) -> str:
    """Closeness to the dense text, by method, and where the time goes."""
    data = read(root, name)
    head = ["method", "achieved", "dense tokens", "re-masks per prompt", *METRICS.values()]
    lines = [[*head, "seconds"], ["---", *["---:"] * len(head)]]
    seconds = data["times"]["methods_s"]
    for row in data["rows"]:
        own = row["metrics"] or {}
        values = [_value(own.get(metric)) for metric in METRICS]
        spent = f"{seconds[row['label']]:.0f}"
        lines.append([today(data, row["label"]), *_account(row), *values, spent])
    phases = ", ".join(f"{k} {v:.0f} s" for k, v in data["times"]["phases_s"].items())
    time = f"{data['times']['total_s'] / 60:.0f} minutes in all: {phases}."
    return f"{above(root, name)}\n\n{table(lines)}\n\n{data['sources']} prompts. {time}"


def _account(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['achieved_sparsity']:.1%}",
        f"{row['dense_token_share']:.1%}",
        f"{row['remasks_per_cell'] or 0:.1f}",
    ]


def _value(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "–"
    return f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _change(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "–"
    return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def _recovery(found: Mapping[str, Any] | None) -> str:
    if not found or found["mean_tokens"] is None:
        return "–"
    return f"{found['mean_tokens']:.0f} tokens ({found['recovered']} of {found['changes']})"


def rules(root: Path, name: str) -> str:
    """Every rule on every signal."""
    data = read(root, name)
    head = ["rule", "signal", "detected", "delay, median", "false alarms / 1,000", "late"]
    head += ["blind rate", "gain over blind"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for row in data["rows"]:
        delay = "–" if row["delay_median"] is None else _spread(row, "delay", "delay_median")
        lines.append(
            [
                today(data, row["rule"]),
                row["signal"],
                f"{row['detected']} of {row['changes']}",
                delay,
                _spread(row, "fa", "false_alarms_per_1000", 1),
                str(row["late"]),
                f"{row['blind_rate']:.0%}",
                f"{row['gain']:+.0%} ({_ends(row['gain_interval'], '+.0%')})",
            ]
        )
    return f"{above(root, name)}\n\n{table(lines)}"


def _spread(row: Mapping[str, Any], interval: str, name: str, digits: int = 0) -> str:
    ends = row[f"{interval}_interval"]
    return f"{row[name]:.{digits}f}" + (f" ({_ends(ends, f'.{digits}f')})" if ends else "")


def _ends(ends: Sequence[float], form: str) -> str:
    return f"{ends[0]:{form}} to {ends[1]:{form}}"


def signals(root: Path) -> str:
    """How well one window tells old topic from new, and the best points of the curves."""
    head = ["model", "signal", f"AUC of one window of {WINDOW} tokens"]
    head += ["best W, n0, k", "detected", "delay with misses", "false alarms / 1,000"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for model in MODELS:
        data = read(root, f"detection-{model}")
        for signal in dict.fromkeys(curve["signal"] for curve in data["curves"]):
            auc = next(
                row for row in data["signals"] if (row["signal"], row["window"]) == (signal, WINDOW)
            )
            lines.append(
                [
                    data["checkpoint"]["name"],
                    signal,
                    f"{auc['auc']:.2f} ({_ends(auc['auc_interval'], '.2f')})",
                    *_best(data["curves"], signal),
                ]
            )
    note = (
        "Best: the threshold mu - k sigma, counted to n0, with the least mean delay (a miss counts "
        f"as the horizon) among those with at most {ALARMS:.0f} false alarms per 1,000 tokens; "
        "chosen on these passages, so the figure flatters."
    )
    files = [f"detection-{model}" for model in MODELS]
    return f"{above(root, *files)}\n\n{table(lines)}\n\n{note}"


ALARMS = 2.0
"""False alarms per 1,000 tokens that the best points may have."""


def _best(curves: Sequence[Mapping[str, Any]], signal: str) -> list[str]:
    points = [
        (point["delay_with_misses"], curve["window"], curve["n0"], point)
        for curve in curves
        if curve["signal"] == signal
        for point in curve["points"]
        if point["false_alarms_per_1000"] <= ALARMS
    ]
    delay, window, count, point = min(points, key=lambda found: found[:3])
    return [
        f"{window}, {count}, {point['k']:g}",
        f"{point['rate']:.0%}",
        f"{delay:.0f}",
        f"{point['false_alarms_per_1000']:.1f}",
    ]


def tables(root: Path) -> dict[str, tuple[Path, str]]:
    """Block name -> the page that holds it and its content."""
    page = root / "docs/measurements.md"
    blocks = {f"detection-{model}": rules(root, f"detection-{model}") for model in MODELS}
    blocks["signals"] = signals(root)
    for name in ("drift-forced-smollm2", "drift-forced-qwen", "drift-equal-smollm2"):
        blocks[name] = forced(root, name)
    blocks["drift-pairs-smollm2"] = pairs(root, "drift-equal-smollm2")
    blocks["drift-free-smollm2"] = free(root, "drift-free-smollm2")
    return linked({name: (page, text) for name, text in blocks.items()}, root)
