"""``detection.json``: the lines of results.jsonl pooled into rows, curves and signals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dart_llm.detection_rates import Array, Outcome, bootstrap, outcome, rates, to_dict
from dart_llm.signals import SIGNALS, layers_of

SCHEMA = 1

Lines = Sequence[Mapping[str, Any]]

DEFINITIONS = {
    "signal": "what the rule watches; none: the rule watches nothing",
    "changes": "known changes of topic",
    "detected": "changes whose first trigger came within the horizon, before the next change",
    "rate": "detected / changes",
    "delay_median": "tokens of the new topic read at the trigger, median over detected changes",
    "delay_with_misses": "mean over all changes; a miss counts as the horizon, or as the "
    "length of the topic where that is shorter",
    "false_alarms_per_1000": "triggers in stationary text, per 1,000 tokens of it",
    "tokens": "stationary text: decoded tokens whose topic is that of the reference, that is, "
    "before the first change, and from the first trigger after a change to the next change",
    "late": "first triggers after a change that came after the horizon: neither detections nor "
    "false alarms",
    "alarms_per_1000": "all triggers per 1,000 decoded tokens",
    "blind_rate": "rate of a rule that fires at equal distances, as often in all: mean over "
    "changes of min(1, horizon x alarms per token)",
    "gain": "rate - blind_rate",
    "interval": "95 %, bootstrap over passages; [x, x]: these passages do not vary; null: one "
    "passage, or nothing to speak of",
    "curves": "theta = mu - k sigma, a trigger at n0; observe_tokens observed after a trigger; no "
    "guards",
    "delay": "of a curve's point: delay_median",
    "auc": "chance that a window of the old topic is more similar to the prompt than one of the "
    "new, mean over passages; 0.5: no information",
}


def document(
    lines: Lines, settings: Mapping[str, Any], checkpoint: Mapping[str, Any], layers: int
) -> dict[str, Any]:
    """Everything of detection.json.  ``layers``: of the model; ``settings``: as config.json's."""
    horizon, seed = int(settings["horizon"]), int(settings["seed"])
    return {
        "schema": SCHEMA,
        "rows": [
            {**key, **to_dict(rates(found, seed))}
            for key, found in _groups(lines, "rules", ("signal", "rule"), horizon)
        ],
        "curves": _curves(lines, horizon),
        "signals": _signals(lines, layers, seed),
        "passages": [line["passage"] for line in lines],
        "definitions": DEFINITIONS,
        "settings": dict(settings),
        "checkpoint": dict(checkpoint),
    }


def _groups(
    lines: Lines, part: str, names: Sequence[str], horizon: int
) -> list[tuple[dict[str, Any], list[Outcome]]]:
    """The outcomes over all passages of everything that was tried, in the order of the lines."""
    found: dict[tuple[Any, ...], list[Outcome]] = {}
    for line in lines:
        for entry in line[part]:
            key = tuple(entry[name] for name in names)
            found.setdefault(key, []).append(_outcome(entry, line["passage"], horizon))
    return [(dict(zip(names, key, strict=True)), outcomes) for key, outcomes in found.items()]


def _outcome(entry: Mapping[str, Any], passage: Mapping[str, Any], horizon: int) -> Outcome:
    return outcome(
        entry["triggers"],
        passage["changes"],
        passage["prompt_tokens"],
        passage["tokens"],
        horizon,
    )


def _curves(lines: Lines, horizon: int) -> list[dict[str, Any]]:
    curves: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for key, outcomes in _groups(lines, "sweep", ("signal", "window", "n0", "k"), horizon):
        found = rates(outcomes, intervals=False)
        point = {
            "k": key["k"],
            "rate": found.rate,
            "delay": found.delay_median,
            "delay_with_misses": found.delay_with_misses,
            "false_alarms_per_1000": found.false_alarms_per_1000,
            "alarms_per_1000": found.alarms_per_1000,
            "blind_rate": found.blind_rate,
        }
        curves.setdefault((key["signal"], key["window"], key["n0"]), []).append(point)
    return [
        {"signal": signal, "window": window, "n0": count, "points": points}
        for (signal, window, count), points in curves.items()
    ]


def _signals(lines: Lines, layers: int, seed: int) -> list[dict[str, Any]]:
    found: dict[tuple[str, int], list[float]] = {}
    for line in lines:
        for entry in line["auc"]:
            values = found.setdefault((entry["signal"], entry["window"]), [])
            if entry["auc"] is not None:
                values.append(entry["auc"])
    rows = []
    for (name, window), values in found.items():
        ends = bootstrap(_mean_of(values), len(values), seed) if len(values) > 1 else {}
        interval = ends.get("auc")
        rows.append(
            {
                "signal": name,
                "what": SIGNALS[name],
                "layers": list(layers_of(name, layers)),
                "window": window,
                "auc": math.fsum(values) / len(values) if values else None,
                "auc_interval": None if interval is None else list(interval),
            }
        )
    return rows


def _mean_of(values: Sequence[float]) -> Callable[[Array], dict[str, Array]]:
    return lambda weights: {"auc": weights @ np.array(values) / len(values)}
