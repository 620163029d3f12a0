"""``dart-llm detect``: run passages through the dense model and apply every drift rule.

A drift rule watches a signal (one vector per token, such as an attention output) and triggers when
masks should be rebuilt.  The passages' topic changes are known, so triggers can be classified.
``detection.json`` has a row per rule and signal.  It also has curves of rate and delay against
false alarms, with a point per threshold.  Each row and each point pools all passages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dart_llm.experiments.line_plots import Curve, Panel, line_plot
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import ResultLine
from dart_llm.experiments.study import Study, Unit
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length
from dart_llm.pruning import registry
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.drift import windows
from dart_llm.reporting import page
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Column, Table, grouped
from dart_llm.reporting.words import count
from dart_llm.studies.drift import report
from dart_llm.studies.drift.replay import (
    INTERVALS,
    Watcher,
    make_watcher,
    outcome,
    rates,
    record_signals,
    replay,
)
from dart_llm.studies.drift.settings import DetectSettings
from dart_llm.studies.drift.sources import Reading, cut_notes, digest, load_passages, read_passage

Row = Mapping[str, Any]

NO_SIGNAL = "none"
"""The value of ``signal`` for rules that watch no signal: ``interval N``, ``never``."""


class DetectionStudy(Study[DetectSettings]):
    """Passages with known topic changes, read by the dense model; a unit is a passage."""

    kind = "detect"
    document = "detection.json"
    progress = "passages"
    unit_times = "passage_s"

    def __init__(self, settings: DetectSettings, ui: Ui) -> None:
        super().__init__(settings, ui)
        self.watchers = watchers(settings)  # raises for unknown names before the model is loaded
        self.passages = load_passages(settings)
        self.notes: list[str] = []

    def inputs(self) -> Mapping[str, Any]:
        passages = {"passages": digest(self.passages)}
        return {**passages, **Digests().of_model(self.settings), **registry.plugin_digest()}

    def prune_document(self) -> dict[str, Any]:
        return PruneConfig.build("dense", seed=self.settings.seed).to_dict()

    def units(self) -> Iterable[Unit]:
        prompt, longest = self.settings.prompt_tokens, context_length(self.model)
        readings = [read_passage(p, self.tokenizer, prompt, longest) for p in self.passages]
        self.notes = cut_notes(readings)
        return [Unit(reading.source.id, data=reading) for reading in readings]

    def compute(self, unit: Unit) -> dict[str, Any]:
        return study_passage(self.model, unit.data, self.settings, self.watchers)

    def summarise(self) -> dict[str, Any]:
        checkpoint = dict(checkpoint_facts(self.model))
        return {**pool(self.lines, self.identity, checkpoint), "notes": self.notes}

    def result_lines(self) -> list[ResultLine]:
        return [
            ResultLine(
                label=rule_name(row),
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
        return [rules_table(self.summary)]

    def sentences(self) -> Sequence[str]:
        return [headline(self.summary)]

    def figures(self) -> list[Plot]:
        return plot_curves(self.summary, page.small_print(self.config))

    def write_page(self) -> Path:
        html = report.render_page(
            self.config,
            "Drift detection",
            headline(self.summary),
            {"detection": self.figures()},
            {"detection": rules_table(self.summary).html()},
            notes=self.notes,
        )
        return report.write(self.path, html)


def watchers(settings: DetectSettings) -> list[tuple[Watcher, dict[str, Any]]]:
    """The rules to test, then a rule for every point of the curves.

    Each has a dictionary: empty for a rule to test, with the keys ``POINT`` for a curve's point.
    Raises ``UnknownName`` and ``ConfigError``.
    """
    observe = settings.observe_tokens
    tested = [(make_watcher(name, observe), dict[str, Any]()) for name in settings.rule_names()]
    points = settings.curve_points()
    curves = [
        (Watcher("curve", windows(*p), observe), dict(zip(POINT, p, strict=True))) for p in points
    ]
    return tested + curves


POINT = ("window", "n0", "k")
"""The keys of a curve's point: tokens per window (``window``), the number of windows below
mu - k sigma that a trigger needs (``n0``), and the factor in this threshold (``k``)."""


def study_passage(
    model: Any,
    reading: Reading,
    settings: DetectSettings,
    watched: Sequence[tuple[Watcher, dict[str, Any]]],
) -> dict[str, Any]:
    """The line of results.jsonl for a passage, with the triggers of every rule on every signal.

    A trigger is stored as the number of tokens read by then, including the prompt.
    """
    signals = record_signals(model, reading.ids, settings.signals)

    def triggers() -> Iterator[dict[str, Any]]:
        for watcher, point in watched:
            names = settings.signals if watcher.rule.window else settings.signals[:1]
            for name in names:
                label = name if watcher.rule.window else NO_SIGNAL
                fired = replay(signals[name], reading.prompt, watcher)[0]
                yield {"signal": label, "rule": watcher.name, **point, "triggers": fired}

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
        "rules": list(triggers()),
    }


def pool(lines: Sequence[Row], settings: Row, checkpoint: Row) -> dict[str, Any]:
    """The content of detection.json, from the lines of results.jsonl and the ``settings``."""
    horizon, seed = int(settings["horizon"]), int(settings["seed"])
    rows = []
    for entries in zip(*(line["rules"] for line in lines), strict=True):
        outcomes = []
        for line, entry in zip(lines, entries, strict=True):
            passage = line["passage"]
            text = (passage["changes"], passage["prompt_tokens"], passage["tokens"], horizon)
            outcomes.append(outcome(entry["triggers"], *text))
        names = {name: value for name, value in entries[0].items() if name != "triggers"}
        rows.append({**names, **rates(outcomes, seed, intervals="k" not in names)})
    return {
        "schema": 1,
        "rows": [row for row in rows if "k" not in row],
        "curves": [row for row in rows if "k" in row],
        "passages": [line["passage"] for line in lines],
        "settings": dict(settings),
        "checkpoint": dict(checkpoint),
    }


# Table, headline and curves.

RULES = (
    Column("signal", "signal"),
    Column("rule", "rule"),
    Column("detected", lambda row: f"{row['detected']}/{row['changes']}"),
    Column("rate", "rate", ".0%", "rate_interval"),
    Column("delay, median", "delay_median", ".0f"),
    Column("delay with misses", "delay_with_misses", ".0f", "delay_with_misses_interval"),
    Column("false alarms / 1,000", "false_alarms_per_1000", ".1f", "fa_interval"),
    Column("late", "late"),
    Column("blind", "blind_rate", ".0%"),
    Column("gain", "gain", "+.0%", "gain_interval"),
)


def rules_table(document: Row) -> Table:
    """The table of the rules, with delays in tokens and intervals in brackets."""
    passages, settings = document["passages"], document["settings"]
    name = Path(str(document["checkpoint"].get("name") or settings["model"]).rstrip("/")).name
    changes = sum(len(passage["changes"]) for passage in passages)
    caption = (
        f"{name}, dense: {count(changes, 'change')} in {count(len(passages), 'passage')}, prompt "
        f"{settings['prompt_tokens']} tokens, horizon {settings['horizon']} tokens"
    )
    return Table("detection", caption, RULES, document["rows"], left=2, nothing="-")


def headline(document: Row) -> str:
    """A sentence on the rule with the largest gain over a blind rule (see ``blind_rule``)."""
    best = max(document["rows"], key=lambda row: (row["gain"], -row["false_alarms_per_1000"]))
    return (
        f"Largest gain over a blind rule that fires as often: {rule_name(best)} detects "
        f"{best['detected']} of {count(best['changes'], 'change')} (the blind rule "
        f"{best['blind_rate']:.0%}), with {best['false_alarms_per_1000']:.1f} false alarms per "
        "1,000 tokens."
    )


def rule_name(row: Row) -> str:
    """The rule's name, followed by the name of its signal if it watches a signal."""
    return row["rule"] if row["signal"] == NO_SIGNAL else f"{row['rule']} on {row['signal']}"


QUANTITIES = {"rate": "changes detected (share)", "delay_with_misses": "mean delay (tokens)"}
"""The quantities drawn against false alarms, with their axis labels."""


def plot_curves(document: Row, small: str) -> list[Plot]:
    """Plots of rate and delay against false alarms: a curve per signal, a marker per k."""
    points, horizon = document["curves"], int(document["settings"]["horizon"])
    x_end = max(1.0, *(point["false_alarms_per_1000"] for point in points))
    x = np.linspace(0.0, x_end, 51).tolist()
    panels = []
    for (window, n0), members in grouped(points, lambda p: (p["window"], p["n0"])).items():
        xlabel = f"false alarms per 1,000 tokens (W = {window}, n0 = {n0})"
        for quantity, ylabel in QUANTITIES.items():
            curves = [
                Curve(
                    signal, [p["false_alarms_per_1000"] for p in line], [p[quantity] for p in line]
                )
                for signal, line in grouped(members, lambda p: p["signal"]).items()
            ]
            blind = [blind_rule(quantity, rate / 1000, horizon) for rate in x]
            curves.append(Curve("blind rule", x, blind, is_reference=True))
            panels.append(Panel(xlabel, ylabel, curves))
    title = "Detection of topic changes against false alarms"
    words = (
        "the threshold is theta = mu - k sigma, with a marker per k; a trigger needs n0 low "
        "windows of W tokens; a missed change counts as a delay of the horizon; the blind rule "
        f"fires as often, at equal distances · {small}"
    )
    return [line_plot("detection", title, words, panels)]


def blind_rule(name: str, per_token: float, horizon: int) -> float:
    """The detection rate or mean delay of a rule that fires every 1 / f tokens.

    f is ``per_token``.  If ``name`` is "rate", the rate is returned, else the delay.  The change is
    equally likely anywhere between two alarms, so the delay w is uniform on (0, 1 / f].  With
    horizon H the rate is min(1, H f).  A miss counts as H, so the mean delay is the mean of
    min(w, H): H - f H^2 / 2 for H f <= 1, and 1 / (2 f) beyond.
    """
    expected = horizon * per_token
    if name == "rate":
        return min(1.0, expected)
    return horizon * (1 - expected / 2) if expected <= 1 else 1 / (2 * per_token)
