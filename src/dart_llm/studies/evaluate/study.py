"""`eval`, `perplexity` and `summarize`: one method, and the untouched model, on some tasks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dart_llm.evaluation.tasks import check_calibration, check_task, count, measure
from dart_llm.experiments import comparison, comparison_report
from dart_llm.experiments import rows as measure_rows
from dart_llm.experiments.artifacts import check_masks, read_masks
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.study import Study, Unit
from dart_llm.experiments.trackers import open_tracker
from dart_llm.files import write_lines
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import widths
from dart_llm.reporting.console import Ui
from dart_llm.reporting.table import Table
from dart_llm.session.prepare import prepare
from dart_llm.session.run import BoundMethod
from dart_llm.studies.evaluate.settings import MeasureSettings


class MeasureStudy(Study[MeasureSettings]):
    """A unit is one method on one task; a measurement keeps finer pieces of itself."""

    unit_times = "measure_s"

    def __init__(self, settings: MeasureSettings, ui: Ui) -> None:
        super().__init__(settings, ui)
        self.kind = settings.kind
        self.tasks, self.options = settings.task_names(), settings.options()
        for task in self.tasks:  # before hours of work on the tasks that stand before a wrong name
            check_task(task, self.options)
        self.masks = read_masks(settings.masks) if settings.masks else None
        if self.masks is None:
            config = settings.prune_config()
            check_calibration(config, settings.calibration, self.tasks, self.options)
        self.samples: list[dict[str, Any]] = []

    def inputs(self) -> Mapping[str, Any]:
        return Digests().of_settings(self.settings, [(task, self.options) for task in self.tasks])

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        settings, name = self.settings, f"{self.settings.experiment}/{self.path.name}"
        folder = Path(settings.results_dir)
        with open_tracker(settings.tracker, "dart-llm", name, self.config, folder) as self.tracker:
            if self.tracker.where:
                self.ui.say(self.tracker.where)
            yield

    def units(self) -> Sequence[Unit]:
        return [
            Unit(f"{task}: {candidate.label}", data=(candidate, task))
            for candidate in self._candidates()
            for task in self.tasks
        ]

    def _candidates(self) -> list[BoundMethod]:
        settings, own = self.settings, self.settings.prune_config()
        if settings.masks:
            check_masks(settings.masks, widths(self.model))
        where = (settings.calibration, settings.cache_dir, self.ui.say)
        candidate = prepare(self.model, self.tokenizer, own, *where, masks=self.masks)
        if candidate.config is None or not settings.dense:
            return [candidate]
        return [prepare(self.model, self.tokenizer, None), candidate]

    def finished(self, unit: Unit) -> None:
        """Nothing: ``measure`` finds its finished pieces in the folder."""

    def save(self, unit: Unit, value: Any) -> None:
        """Nothing, likewise."""

    def compute(self, unit: Unit) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        candidate, task = unit.data
        total = count(task, self.options, self.tokenizer, self.model)
        with self.ui.progress(unit.key, total) as advance:
            found = measure(candidate, task, self.options, self.folder, advance)
        self.tracker.log_measurement(found.to_dict(), candidate.label)
        facts = dict(checkpoint_facts(self.model))
        samples = [{"task": task, "label": candidate.label, **one} for one in found.samples]
        return measure_rows.row(candidate, found, self.settings, facts), samples

    def take(self, unit: Unit, value: Any) -> None:
        row, samples = value
        super().take(unit, row)
        if samples and getattr(self.settings, "log_samples", True):
            self.samples += samples
            write_lines(self.path / "samples.jsonl", self.samples)

    def summarise(self) -> dict[str, Any]:
        several = len({row["label"] for row in self.lines}) > 1  # paired with the untouched model
        self.compared = comparison.rows(self.lines) if several else []
        return measure_rows.document(self.lines)

    def tables(self) -> Sequence[Table]:
        return [measure_rows.table(self.lines, self.compared)]

    def sentences(self) -> Sequence[str]:
        told = [comparison_report.summary(self.compared)] if self.compared else []
        return [*told, *(f"note: {note}" for note in measure_rows.notes(self.lines))]

    def write_page(self) -> Path:
        return comparison_report.write(self.path)
