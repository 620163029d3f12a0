"""`detect`: settings, passages, rules, curves, summary.

``detection.json``: the lines of results.jsonl pooled into rows, curves and signals.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dart_llm.data import passages as inputs
from dart_llm.data.passages import Text
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import ResultsFolder, open_folder
from dart_llm.experiments.study import (
    complete,
    config_document,
    leave,
    load_model,
    resumable,
    write_plots,
)
from dart_llm.files import write_json, write_lines
from dart_llm.models.capture import EAGER, layer_count
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length
from dart_llm.reporting.console import Ui
from dart_llm.studies.detection import report
from dart_llm.studies.detection.replay import (
    Array,
    Outcome,
    Watcher,
    auc,
    bootstrap,
    make_watcher,
    outcome,
    rates,
    replay,
    similarities,
    sweep_rule,
    to_dict,
)
from dart_llm.studies.detection.settings import DetectSettings, identity
from dart_llm.studies.detection.signals import SIGNALS, Recorded, layers_of, needs_eager, record

# One passage through the model, and what every rule and threshold makes of its signals.


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


# The job of ``dart-llm detect``: passages through the dense model, tables, plots; resumable.


EAGER_NOTE = (
    "attention-scores reads the attention weights, so the model is loaded with eager attention, "
    "for all signals"
)


@dataclass
class DetectJob:
    """One job in progress; ``rows`` are lines of results.jsonl, ``found`` is detection.json."""

    settings: DetectSettings
    ui: Ui
    folder: ResultsFolder
    identity: dict[str, Any]
    model: Any = None
    tokenizer: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    timing: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder.path


def run_detect(settings: DetectSettings, ui: Ui, fresh: bool = False) -> DetectJob:
    """Study every passage; an interruption or an error keeps the passages that were finished.

    Raises ``ConfigError`` and ``UnknownName`` before the model is loaded where that is possible.
    """
    asked = plan(settings)
    passages = inputs.tokenised_passages(settings.passages, settings.limit)
    sums = {"passages": inputs.digest(passages), **Digests().of_model(settings.model)}
    known = identity(settings, sums)
    folder = open_folder(Path(settings.results_dir), settings.experiment, known, fresh)
    job = DetectJob(settings, ui, folder, known)
    with resumable(job, lambda status: _leave(job, status), settings.model, settings.dtype) as took:
        _write_config(job, "running")
        _load(job)
        texts = [inputs.tokens(passage, job.tokenizer) for passage in passages]
        inputs.check(texts, asked.prompt, context_length(job.model))
        with ui.progress("passages", len(texts)) as advance:
            for text in texts:
                _study(job, text, asked)
                advance(1)
        took()
        _finish(job)
    return job


def _leave(job: DetectJob, status: str) -> None:
    leave(job, status, lambda status: _write_config(job, status), bool(job.rows))


def _load(job: DetectJob) -> None:
    settings = job.settings
    if needs_eager(settings.signal_names()):
        job.ui.say(EAGER_NOTE)
        settings = settings.model_copy(update={"attn_implementation": EAGER})
    job.model, job.tokenizer, job.timing["load_s"] = load_model(settings, job.ui)
    _write_config(job, "running")


def _study(job: DetectJob, text: inputs.Text, asked: Study) -> None:
    begin = time.perf_counter()
    row = job.folder.part(text.id)
    if row is None:
        row = study(job.model, text, asked)
        job.folder.save_part(text.id, row)
        job.timing.setdefault("passage_s", {})[text.id] = time.perf_counter() - begin
    job.rows.append(row)
    write_lines(job.path / "results.jsonl", job.rows)


def _write_config(job: DetectJob, status: str) -> None:
    prune = job.settings.prune_config().to_dict()
    job.config = config_document("detect", job.identity, prune, job.model, status, job.config)
    write_json(job.path / "config.json", job.config)


def _finish(job: DetectJob) -> None:
    facts = dict(checkpoint_facts(job.model))
    job.found = summary_document(job.rows, job.identity, facts, layer_count(job.model))
    if needs_eager(job.settings.signal_names()):
        job.found["notes"] = [EAGER_NOTE]
    write_json(job.path / "detection.json", job.found)
    write_json(job.path / "timing.json", job.timing)
    report.write(job.path, job.found)
    job.ui.table(report.rich_table(job.found))
    job.ui.say(report.conclusion(job.found))
    write_plots(job, report.make_curves(job.found))
    complete(job, lambda status: _write_config(job, status))


def study_document(job: DetectJob) -> dict[str, Any]:
    """What ``--json`` prints: detection.json with its folder and times."""
    return {"folder": str(job.path), **job.found, "timing": job.timing}
