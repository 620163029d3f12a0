"""One passage through the model, and what every rule and threshold makes of its signals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dart_llm.detection import Watcher, make_watcher, replay, similarities, sweep_rule
from dart_llm.detection_inputs import Text
from dart_llm.detection_rates import auc
from dart_llm.recording import record
from dart_llm.settings_detect import DetectSettings
from dart_llm.signals import Recorded

NO_SIGNAL = "none"
"""The signal of rules that watch none: ``interval N``, ``never``."""


@dataclass(frozen=True)
class Study:
    """What is tried on every passage.

    ``watchers``: rules.  ``sweep``: (window, n0, k) of the curves.
    """

    signals: tuple[str, ...]
    watchers: tuple[Watcher, ...]
    sweep: tuple[tuple[int, int, float], ...]
    prompt: int
    observe: int
    horizon: int
    windows: tuple[int, ...]


def plan(settings: DetectSettings) -> Study:
    """Resolve all names; raises ``UnknownName`` and ``ConfigError``."""
    windows, observe = settings.window_list(), settings.observe_tokens
    return Study(
        settings.signal_names(),
        tuple(make_watcher(name, observe) for name in settings.rule_names()),
        tuple(
            (window, count, k)
            for window in windows
            for count in settings.count_list()
            for k in settings.threshold_list()
        ),
        settings.prompt_tokens,
        observe,
        settings.horizon,
        windows,
    )


def study(model: Any, text: Text, asked: Study) -> dict[str, Any]:
    """One line of results.jsonl.

    A trigger is the number of tokens of the passage that were read by then, prompt included.
    """
    found = record(model, text.ids, asked.prompt, asked.signals)
    return {
        "key": text.id,
        "status": "done",
        "error": None,
        "passage": {
            "id": text.id,
            "topics": list(text.topics),
            "tokens": len(text.ids),
            "prompt_tokens": asked.prompt,
            "changes": list(text.changes),
        },
        "rules": _rules(found, asked),
        "sweep": _sweep(found, asked),
        "auc": _aucs(found, text, asked),
    }


def _rules(found: Mapping[str, Recorded], asked: Study) -> list[dict[str, Any]]:
    rows = []
    for watcher in asked.watchers:
        names = list(asked.signals) if watcher.rule.window else [asked.signals[0]]
        for name in names:
            done = replay(found[name], asked.prompt, watcher)
            label = name if watcher.rule.window else NO_SIGNAL
            rows.append({"signal": label, "rule": watcher.name, "triggers": done.triggers})
    return rows


def _sweep(found: Mapping[str, Recorded], asked: Study) -> list[dict[str, Any]]:
    rows = []
    for name in asked.signals:
        for window, count, k in asked.sweep:
            watcher = Watcher("sweep", sweep_rule(window, k, count), asked.observe)
            triggers = replay(found[name], asked.prompt, watcher).triggers
            rows.append(
                {"signal": name, "window": window, "n0": count, "k": k, "triggers": triggers}
            )
    return rows


def _aucs(found: Mapping[str, Recorded], text: Text, asked: Study) -> list[dict[str, Any]]:
    """Per signal and window length: how well one window's similarity tells old topic from new.

    Windows after the prompt up to the first change, against those from it to the second change.
    """
    rows = []
    for name in asked.signals:
        for window in asked.windows:
            values = similarities(found[name], asked.prompt, window)
            value = auc(*_apart(values, window, text))
            rows.append({"signal": name, "window": window, "auc": value})
    return rows


def _apart(
    values: Sequence[tuple[int, float]], window: int, text: Text
) -> tuple[list[float], list[float]]:
    first, second = (*text.changes, len(text.ids))[:2]
    same = [value for at, value in values if at <= first]
    other = [value for at, value in values if at - window >= first and at <= second]
    return same, other
