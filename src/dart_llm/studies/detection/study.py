"""`detect`: passages through the dense model, and what every drift rule makes of their signals.

``detection.json``: the lines of results.jsonl pooled into rows, curves and signals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from dart_llm.data import passages as inputs
from dart_llm.data.passages import Text
from dart_llm.experiments import stats
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.study import Study, Unit
from dart_llm.models.capture import EAGER, layer_count
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length
from dart_llm.pruning import plugins
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.drift import windows
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table
from dart_llm.reporting.words import too_few
from dart_llm.settings import ModelOptions
from dart_llm.studies.detection import report
from dart_llm.studies.detection.replay import (
    Outcome,
    Watcher,
    auc,
    make_watcher,
    outcome,
    rates,
    replay,
    similarities,
)
from dart_llm.studies.detection.settings import DetectSettings
from dart_llm.studies.detection.signals import SCORES, SIGNALS, Recorded, layers_of, record

NO_SIGNAL = "none"
"""The signal of rules that watch none: ``interval N``, ``never``."""

EAGER_NOTE = (
    "attention-scores reads the attention weights, so the model is loaded with eager attention, "
    "for all signals"
)


def watchers(settings: DetectSettings) -> list[Watcher]:
    """The rules that are tried; raises ``UnknownName`` and ``ConfigError``."""
    return [make_watcher(name, settings.observe_tokens) for name in settings.rule_names()]


class DetectionStudy(Study[DetectSettings]):
    """Passages with known changes of topic, read by the dense model; a unit is a passage."""

    kind = "detect"
    document = "detection.json"
    progress = "passages"
    unit_times = "passage_s"

    def __init__(self, settings: DetectSettings, ui: Ui) -> None:
        super().__init__(settings, ui)
        watchers(settings)  # a name that does not exist is said before the model is loaded
        self.passages = inputs.passages(settings.passages)[: settings.limit]
        self.eager = SCORES in settings.signal_names()

    def inputs(self) -> Mapping[str, Any]:
        passages = inputs.digest(self.passages)
        return {"passages": passages, **Digests().of_model(self.settings), **plugins.digest()}

    def prune_document(self) -> dict[str, Any]:
        return PruneConfig.build("dense", seed=self.settings.seed).to_dict()

    @property
    def load_settings(self) -> ModelOptions:
        if not self.eager:
            return self.settings
        return self.settings.noted({"attn_implementation": EAGER}, EAGER_NOTE)

    def units(self) -> Iterable[Unit]:
        texts = [inputs.tokens(passage, self.tokenizer) for passage in self.passages]
        inputs.check(texts, self.settings.prompt_tokens, context_length(self.model))
        return [Unit(text.id, data=text) for text in texts]

    def compute(self, unit: Unit) -> dict[str, Any]:
        return read_passage(self.model, unit.data, self.settings)

    def summarise(self) -> dict[str, Any]:
        facts = dict(checkpoint_facts(self.model))
        summary = summary_document(self.lines, self.identity, facts, layer_count(self.model))
        return {**summary, "notes": [EAGER_NOTE]} if self.eager else summary

    def tables(self) -> Sequence[Table]:
        return [report.rules_table(self.summary)]

    def sentences(self) -> Sequence[str]:
        return [report.conclusion(self.summary)]

    def markdown(self) -> str:
        return report.markdown(self.summary)

    def figures(self) -> Iterable[Plot]:
        return report.make_curves(self.summary)


# One passage: a line of results.jsonl.


def read_passage(model: Any, text: Text, asked: DetectSettings) -> dict[str, Any]:
    """What every rule and threshold makes of the signals of one passage.

    A trigger is the number of tokens of the passage that were read by then, prompt included.
    """
    signals = record(model, text.ids, asked.prompt_tokens, asked.signal_names())
    return {
        "key": text.id,
        "status": "done",
        "error": None,
        "passage": {
            "id": text.id,
            "topics": list(text.topics),
            "tokens": len(text.ids),
            "prompt_tokens": asked.prompt_tokens,
            "changes": list(text.changes),
        },
        "rules": list(_rules(signals, asked)),
        "sweep": list(_sweep(signals, asked)),
        "auc": list(_aucs(signals, text, asked)),
    }


def _rules(signals: Mapping[str, Recorded], asked: DetectSettings) -> Iterator[dict[str, Any]]:
    names = asked.signal_names()
    for watcher in watchers(asked):
        windowed = bool(watcher.rule.window)
        for name in names if windowed else names[:1]:
            triggers = replay(signals[name], asked.prompt_tokens, watcher).triggers
            label = name if windowed else NO_SIGNAL
            yield {"signal": label, "rule": watcher.name, "triggers": triggers}


def _sweep(signals: Mapping[str, Recorded], asked: DetectSettings) -> Iterator[dict[str, Any]]:
    for name in asked.signal_names():
        for window, count, k in asked.sweep_list():
            watcher = Watcher("sweep", windows(window, count, k), asked.observe_tokens)
            triggers = replay(signals[name], asked.prompt_tokens, watcher).triggers
            yield {"signal": name, "window": window, "n0": count, "k": k, "triggers": triggers}


def _aucs(
    signals: Mapping[str, Recorded], text: Text, asked: DetectSettings
) -> Iterator[dict[str, Any]]:
    """Per signal and window length: how well one window's similarity tells old topic from new.

    Windows after the prompt up to the first change, against those from it to the second change.
    """
    first, second = (*text.changes, len(text.ids))[:2]
    for name in asked.signal_names():
        for window in asked.window_list():
            values = similarities(signals[name], asked.prompt_tokens, window)
            same = [value for at, value in values if at <= first]
            other = [value for at, value in values if at - window >= first and at <= second]
            yield {"signal": name, "window": window, "auc": auc(same, other)}


# All passages: detection.json.


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


def summary_document(
    lines: Lines, settings: Mapping[str, Any], checkpoint: Mapping[str, Any], layers: int
) -> dict[str, Any]:
    """Everything of detection.json.  ``layers``: of the model; ``settings``: as config.json's."""
    horizon, seed = int(settings["horizon"]), int(settings["seed"])
    return {
        "schema": SCHEMA,
        "rows": [
            {**key, **rates(outcomes, seed)}
            for key, outcomes in _groups(lines, "rules", ("signal", "rule"), horizon)
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
    groups: dict[tuple[Any, ...], list[Outcome]] = {}
    for line in lines:
        passage = line["passage"]
        place = (passage["changes"], passage["prompt_tokens"], passage["tokens"], horizon)
        for entry in line[part]:
            key = tuple(entry[name] for name in names)
            groups.setdefault(key, []).append(outcome(entry["triggers"], *place))
    return [(dict(zip(names, key, strict=True)), outcomes) for key, outcomes in groups.items()]


POINT = {
    "rate": "rate",
    "delay": "delay_median",
    "delay_with_misses": "delay_with_misses",
    "false_alarms_per_1000": "false_alarms_per_1000",
    "alarms_per_1000": "alarms_per_1000",
    "blind_rate": "blind_rate",
}
"""Entries of a curve's point, and what they are in the rates."""


def _curves(lines: Lines, horizon: int) -> list[dict[str, Any]]:
    curves: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for key, outcomes in _groups(lines, "sweep", ("signal", "window", "n0", "k"), horizon):
        pooled = rates(outcomes, intervals=False)
        point = {"k": key["k"], **{name: pooled[source] for name, source in POINT.items()}}
        curves.setdefault((key["signal"], key["window"], key["n0"]), []).append(point)
    return [
        {"signal": signal, "window": window, "n0": count, "points": points}
        for (signal, window, count), points in curves.items()
    ]


def _signals(lines: Lines, layers: int, seed: int) -> list[dict[str, Any]]:
    by_signal: dict[tuple[str, int], list[float]] = {}
    for line in lines:
        for entry in line["auc"]:
            values = by_signal.setdefault((entry["signal"], entry["window"]), [])
            if entry["auc"] is not None:
                values.append(entry["auc"])
    rows = []
    for (name, window), values in by_signal.items():
        interval = stats.interval(values, seed=seed)
        rows.append(
            {
                "signal": name,
                "what": SIGNALS[name],
                "layers": list(layers_of(name, layers)),
                "window": window,
                "auc": fmean(values) if values else None,
                "auc_interval": list(interval.ends) if interval and interval.ends else None,
                "no_interval": too_few(len(values)),
            }
        )
    return rows
