"""``dart-llm detect``: passages through the dense model, and what every drift rule makes of them.

``detection.json``: the lines of results.jsonl pooled into rows, curves and signals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dart_llm.experiments import stats
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import ResultLine
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
from dart_llm.studies.drift import detect_report, report
from dart_llm.studies.drift.plots import DriftView
from dart_llm.studies.drift.replay import (
    INTERVALS,
    Outcome,
    Watcher,
    auc,
    make_watcher,
    outcome,
    rates,
    replay,
    similarities,
)
from dart_llm.studies.drift.settings import SCORES, SIGNALS, DetectSettings
from dart_llm.studies.drift.signals import Recorded, layers_of, record
from dart_llm.studies.drift.sources import Reading, cut_note, digest, load_passages, read_passage

NO_SIGNAL = "none"
"""The signal of rules that watch none: ``interval N``, ``never``."""

EAGER_NOTE = (
    "attention-scores reads the attention weights, so the model is loaded with eager attention, "
    "for all signals"
)


class DetectionStudy(Study[DetectSettings]):
    """Passages with known changes of topic, read by the dense model; a unit is a passage."""

    kind = "detect"
    document = "detection.json"
    progress = "passages"
    unit_times = "passage_s"

    def __init__(self, settings: DetectSettings, ui: Ui) -> None:
        super().__init__(settings, ui)
        watchers(settings)  # an unknown name is refused before the model is loaded
        self.passages = load_passages(settings)
        self.notes = [EAGER_NOTE] if SCORES in settings.signals else []

    def inputs(self) -> Mapping[str, Any]:
        passages = {"passages": digest(self.passages)}
        return {**passages, **Digests().of_model(self.settings), **plugins.digest()}

    def prune_document(self) -> dict[str, Any]:
        return PruneConfig.build("dense", seed=self.settings.seed).to_dict()

    @property
    def load_settings(self) -> ModelOptions:
        if SCORES not in self.settings.signals:
            return self.settings
        return self.settings.noted({"attn_implementation": EAGER}, EAGER_NOTE)

    def units(self) -> Iterable[Unit]:
        prompt, longest = self.settings.prompt_tokens, context_length(self.model)
        read = [read_passage(one, self.tokenizer, prompt, longest) for one in self.passages]
        self.notes += cut_note(read)
        return [Unit(reading.source.id, data=reading) for reading in read]

    def compute(self, unit: Unit) -> dict[str, Any]:
        return study_passage(self.model, unit.data, self.settings)

    def summarise(self) -> dict[str, Any]:
        facts = dict(checkpoint_facts(self.model))
        document = pool(self.lines, self.identity, facts, layer_count(self.model))
        return {**document, "notes": self.notes}

    def result_lines(self) -> list[ResultLine]:
        return [
            ResultLine(
                label=detect_report.name(row),
                method="dense",
                model=self.settings.model,
                task=f"detect:{row['signal']}",
                metric=metric,
                value=row[metric],
                higher_is_better=metric in ("rate", "gain"),
                low=(row[ends] or [None])[0],
                high=(row[ends] or [None])[-1],
                seed=self.settings.seed,
                dtype=self.summary["checkpoint"].get("dtype"),
            )
            for row in self.summary["rows"]
            for metric, ends in INTERVALS.items()
        ]

    def tables(self) -> Sequence[Table]:
        return [
            detect_report.rules_table(self.summary),
            detect_report.signals_table(self.summary),
        ]

    def sentences(self) -> Sequence[str]:
        return [detect_report.headline(self.summary)]

    def figures(self) -> Iterable[Plot]:
        return detect_report.make_curves(self.summary)

    def write_page(self) -> Path:
        return report.write(DriftView(self.path, self.config, {}, detection=self.summary))


def watchers(settings: DetectSettings) -> list[Watcher]:
    """The rules that are tried; raises ``UnknownName`` and ``ConfigError``."""
    return [make_watcher(name, settings.observe_tokens) for name in settings.rule_names()]


# One passage: a line of results.jsonl.


def study_passage(model: Any, reading: Reading, settings: DetectSettings) -> dict[str, Any]:
    """What every rule and threshold makes of the signals of one passage.

    A trigger is the number of tokens of the passage that were read by then, prompt included.
    """
    signals = record(model, reading.ids, reading.prompt, settings.signals)
    return {
        "key": reading.source.id,
        "status": "done",
        "error": None,
        "passage": {
            "id": reading.source.id,
            "topics": [topic.name for topic in reading.source.topics],
            "tokens": len(reading.ids),
            "prompt_tokens": reading.prompt,
            "changes": list(reading.changes),
        },
        "rules": list(_rules(signals, reading.prompt, settings)),
        "sweep": list(_sweep(signals, reading.prompt, settings)),
        "auc": list(_aucs(signals, reading, settings)),
    }


Signals = Mapping[str, Recorded]


def _rules(signals: Signals, prompt: int, settings: DetectSettings) -> Iterator[dict[str, Any]]:
    for watcher in watchers(settings):
        windowed = bool(watcher.rule.window)
        for name in signals if windowed else [*signals][:1]:
            triggers = replay(signals[name], prompt, watcher).triggers
            label = name if windowed else NO_SIGNAL
            yield {"signal": label, "rule": watcher.name, "triggers": triggers}


def _sweep(signals: Signals, prompt: int, settings: DetectSettings) -> Iterator[dict[str, Any]]:
    for name, signal in signals.items():
        for window, count, k in settings.curve_points():
            watcher = Watcher("sweep", windows(window, count, k), settings.observe_tokens)
            triggers = replay(signal, prompt, watcher).triggers
            yield {"signal": name, "window": window, "n0": count, "k": k, "triggers": triggers}


def _aucs(signals: Signals, reading: Reading, settings: DetectSettings) -> Iterator[dict[str, Any]]:
    """Per signal and window length: how well one window's similarity tells old topic from new.

    Windows after the prompt up to the first change, against those from it to the second change.
    """
    first, second = (*reading.changes, len(reading.ids))[:2]
    for name, signal in signals.items():
        for window in settings.windows:
            values = similarities(signal, reading.prompt, window)
            same = [value for at, value in values if at <= first]
            other = [value for at, value in values if at - window >= first and at <= second]
            yield {"signal": name, "window": window, "auc": auc(same, other)}


# All passages: detection.json.

SCHEMA = 1

Lines = Sequence[Mapping[str, Any]]


def pool(
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
        text = (passage["changes"], passage["prompt_tokens"], passage["tokens"], horizon)
        for entry in line[part]:
            key = tuple(entry[name] for name in names)
            groups.setdefault(key, []).append(outcome(entry["triggers"], *text))
    return [(dict(zip(names, key, strict=True)), outcomes) for key, outcomes in groups.items()]


POINT = (
    *("rate", "delay_median", "delay_with_misses", "false_alarms_per_1000", "alarms_per_1000"),
    "blind_rate",
)
"""Entries of a curve's point, from the rates."""


def _curves(lines: Lines, horizon: int) -> list[dict[str, Any]]:
    curves: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for key, outcomes in _groups(lines, "sweep", ("signal", "window", "n0", "k"), horizon):
        pooled = rates(outcomes, intervals=False)
        point = {"k": key["k"], **{name: pooled[name] for name in POINT}}
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
            values += [] if entry["auc"] is None else [entry["auc"]]
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
