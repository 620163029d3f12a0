"""The jobs of ``dart-llm eval``, ``perplexity`` and ``summarize``: one method, some tasks."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dart_llm.errors import MissingExtra
from dart_llm.evaluation.tasks import check_calibration, check_task, count, measure
from dart_llm.experiments import rows as measure_rows
from dart_llm.experiments.artifacts import check_masks, read_masks
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import ResultsFolder, open_folder
from dart_llm.experiments.study import complete, config_document, leave, load_model, resumable
from dart_llm.experiments.trackers import Tracker, open_tracker
from dart_llm.files import write_json, write_lines
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import widths
from dart_llm.reporting.console import Ui
from dart_llm.session.prepare import PreparedMethod, prepare
from dart_llm.studies.evaluate.settings import MeasureSettings


@dataclass
class MeasureJob:
    """One job in progress; ``rows`` are lines of results.jsonl."""

    settings: MeasureSettings
    ui: Ui
    folder: ResultsFolder
    identity: dict[str, Any]
    model: Any = None
    tokenizer: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    timing: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder.path


def run_measure(settings: MeasureSettings, ui: Ui, fresh: bool = False) -> MeasureJob:
    """Measure every task; an interruption or an error keeps what was computed."""
    tasks = settings.task_names()
    for task in tasks:  # before hours of work on the tasks that stand before a wrong name
        check_task(task, settings.options())
    masks = read_masks(settings.masks) if settings.masks else None
    if masks is None:
        own = settings.prune_config()
        check_calibration(own, settings.calibration, tasks, settings.options())
    options = settings.options()
    inputs = Digests().of_settings(settings, [(task, options) for task in tasks])
    identity = {"kind": settings.kind, **settings.model_dump(mode="json"), "inputs": inputs}
    folder = open_folder(Path(settings.results_dir), settings.experiment, identity, fresh)
    job = MeasureJob(settings, ui, folder, identity)
    with resumable(job, lambda status: _leave(job, status), settings.model, settings.dtype) as took:
        _write_config(job, "running")
        with _tracker(job) as tracker:
            job.model, job.tokenizer, job.timing["load_s"] = load_model(settings, ui)
            _write_config(job, "running")
            for candidate in _candidates(job, masks):
                for task in tasks:
                    _measure(job, candidate, task, tracker)
        took()
        _finish(job)
    return job


def _leave(job: MeasureJob, status: str) -> None:
    leave(job, status, lambda status: _write_config(job, status), bool(job.rows))


def _tracker(job: MeasureJob) -> Tracker:
    settings = job.settings
    name = f"{settings.experiment}/{job.path.name}"
    tracker = open_tracker(
        settings.tracker, "dart-llm", name, job.config, Path(settings.results_dir)
    )
    if tracker.where:
        job.ui.say(tracker.where)
    return tracker


def _candidates(job: MeasureJob, masks: Any) -> list[PreparedMethod]:
    settings = job.settings
    own = settings.prune_config()
    config = None if own.method == "dense" else own
    if settings.masks:
        check_masks(settings.masks, widths(job.model))
    candidate = prepare(
        job.model,
        job.tokenizer,
        config,
        settings.calibration,
        settings.cache_dir,
        job.ui.say,
        masks=masks,
    )
    if candidate.config is None or not settings.dense:
        return [candidate]
    return [prepare(job.model, job.tokenizer, None), candidate]


def _measure(job: MeasureJob, candidate: PreparedMethod, task: str, tracker: Tracker) -> None:
    options = job.settings.options()
    begin = time.perf_counter()
    label = f"{task}: {candidate.label}"
    with job.ui.progress(label, count(task, options, job.tokenizer, job.model)) as advance:
        found = measure(candidate, task, options, job.folder, advance)
    seconds = time.perf_counter() - begin
    job.timing.setdefault("measure_s", {})[label] = seconds
    row = measure_rows.row(candidate, found, job.settings, dict(checkpoint_facts(job.model)))
    job.rows.append(row)
    if getattr(job.settings, "log_samples", True):
        job.samples += [
            {"task": task, "label": candidate.label, **sample} for sample in found.samples
        ]
    write_lines(job.path / "results.jsonl", job.rows)
    if job.samples:
        write_lines(job.path / "samples.jsonl", job.samples)
    tracker.log_measurement(found.to_dict(), candidate.label)


def _write_config(job: MeasureJob, status: str) -> None:
    prune = job.settings.prune_config().to_dict()
    job.config = config_document(
        job.settings.kind, job.identity, prune, job.model, status, job.config
    )
    write_json(job.path / "config.json", job.config)


def _finish(job: MeasureJob) -> None:
    write_json(job.path / "timing.json", job.timing)
    job.ui.table(measure_rows.table(job.rows))
    _compare(job)
    for note in measure_rows.notes(job.rows):
        job.ui.say(f"note: {note}")
    complete(job, lambda status: _write_config(job, status), lambda: _write_page(job))


def _compare(job: MeasureJob) -> None:
    """Paired differences, where the untouched model was measured too."""
    if len({row["label"] for row in job.rows}) < 2:
        return
    from dart_llm.experiments import comparison, comparison_report

    with contextlib.suppress(MissingExtra):
        rows = comparison.rows(job.rows)
        for table in comparison_report.rich_tables(rows):
            job.ui.table(table)
        job.ui.say(comparison_report.summary(rows))


def _write_page(job: MeasureJob) -> None:
    from dart_llm.experiments import comparison_report

    try:
        job.ui.say(f"report: {comparison_report.write(job.path)}")
    except MissingExtra as error:
        job.ui.say(f"no report: {error}")


def document(job: MeasureJob) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {"folder": str(job.path), **measure_rows.document(job.rows), "timing": job.timing}
