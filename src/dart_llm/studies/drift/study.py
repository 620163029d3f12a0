"""``dart-llm drift``: methods side by side on prompts or passages; resumable cell by cell."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError, DartError, ResultsError
from dart_llm.evaluation.forced_decoding import ScheduledRun
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.study import Study, Unit
from dart_llm.files import finite, write_json, write_text
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length, widths
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table
from dart_llm.session.prepare import PreparedMethod, prepare
from dart_llm.session.run import Run
from dart_llm.studies.drift import report, runs, summary
from dart_llm.studies.drift.cells import DriftCell, Source, digest, expand, load_sources
from dart_llm.studies.drift.record import DriftRecorder, Part, StudyFiles, record
from dart_llm.studies.drift.runs import Asking, Judge, Reading, load_judge
from dart_llm.studies.drift.settings import DENSE, DETECTION, FORCED, DriftSettings


def compute(cell: DriftCell, study: DriftStudy) -> Part:
    """The cell's part; its masks go into a file.

    Raises ``DartError`` for what the method or the model cannot do, a number that is not finite
    among it, and ``ResultsError`` when the masks cannot be written.
    """
    began = time.perf_counter()
    source, candidate = study.tokens_of(cell.source), study.candidate(cell)
    run, recorder = _run(cell, candidate, source), DriftRecorder()
    if run is not None:
        run.on_selection = recorder
    with run if run is not None else contextlib.nullcontext():
        if isinstance(source, Reading):
            part = _read(candidate, run, source)
        else:
            part = _write(cell, study.settings, candidate, run, source)
    topics = [{"name": topic.name, "domain": topic.domain} for topic in source.source.topics]
    starts = source.starts if isinstance(source, Reading) else [None] * len(topics)
    part["topics"] = [{**t, "start": start} for t, start in zip(topics, starts, strict=True)]
    part |= {"checks": [], "remasks": [], "dense_from": None, "accounting": None}
    if run is not None:
        part |= record(run, recorder, widths(study.model))
        name = str(checkpoint_facts(study.model).get("name"))
        recorder.write(study.files.masks / cell.file, name, cell.method.label)
    part["seconds"] = time.perf_counter() - began
    return dict(json.loads(json.dumps(finite(part))))


def _run(cell: DriftCell, candidate: PreparedMethod, source: Reading | Asking) -> Run | None:
    method = cell.method
    if method.observed is None or method.moment is None or not isinstance(source, Reading):
        return candidate.run()
    due = runs.triggers(source, method.observed, method.moment)
    return candidate.run(make=functools.partial(ScheduledRun, triggers=due))


def _read(candidate: PreparedMethod, run: Run | None, reading: Reading) -> Part:
    return {
        "prompt_tokens": reading.prompt,
        "decoded_tokens": reading.decoded,
        "finish": "length" if reading.cut else "end",
        "text": None,
        "pieces": list(reading.pieces),
        "losses": runs.losses(candidate.model, run, reading),
    }


def _write(
    cell: DriftCell,
    settings: DriftSettings,
    candidate: PreparedMethod,
    run: Run | None,
    asking: Asking,
) -> Part:
    model, tokenizer = candidate.model, candidate.tokenizer
    how = settings.generation, run, settings.temperature, cell.seed
    made = runs.write(model, tokenizer, asking, *how)
    return {
        "prompt_tokens": asking.ids.shape[1],
        "decoded_tokens": len(made.pieces),
        "finish": "eos" if made.ended else "length",
        "text": made.text,
        "pieces": list(made.pieces),
        "losses": None,
    }


def _notes(rows: Sequence[Mapping[str, Any]], forced: bool) -> list[str]:
    notes = []
    cut = {row["cell"]["source"] for row in rows if row["finish"] == "length"}
    if forced and cut:
        notes.append(f"{len(cut)} passages were cut where the model's context ends")
    pruned = [row["accounting"] for row in rows if row["accounting"] and row["cell"]["sparsity"]]
    unpruned = sum(not accounting["achieved_sparsity"] for accounting in pruned)
    if unpruned:
        notes.append(f"{unpruned} of {len(pruned)} pruned cells ended before a token ran pruned")
    return notes


class DriftStudy(Study[Any]):
    """Every method on every source; a cell that fails is noted, and the others go on."""

    kind = "drift"
    document = "summary.json"
    on_error = "record"
    shown = Study.shown | {"detection"}

    settings: DriftSettings

    def __init__(self, settings: DriftSettings, ui: Ui) -> None:
        super().__init__(settings, ui)
        self.methods, self.sources = settings.method_list(), load_sources(settings)
        self.cells = expand(settings, self.sources, self.methods)
        self.judge = Judge(None)
        self._tokens: dict[str, Reading | Asking] = {}
        self._candidates: dict[str, PreparedMethod | DartError] = {}

    @cached_property
    def files(self) -> StudyFiles:
        """The cells in the results folder."""
        model, moment = self.settings.model, self.settings.moment
        return StudyFiles(self.folder, self.cells, model, moment, failed=self.failed)

    def inputs(self) -> Mapping[str, Any]:
        model, calibration = self.settings.model, self.settings.calibration
        weights = Digests().of(Cell(model, DENSE, "drift", calibration=calibration))
        return {**weights, "sources": digest(self.sources)}

    def identify(self) -> dict[str, Any]:
        configs = {m.label: None if m.config is None else m.config.to_dict() for m in self.methods}
        return {**super().identify(), "presets": configs}

    def config_extra(self) -> dict[str, Any]:
        model, dtype = self.settings.model, self.files.dtype
        return {
            "seed": list(self.settings.seed_list()),
            "mode": self.settings.kind,
            "cells": [cell.facts(model, dtype) for cell in self.cells],
            "sources": [{"id": source.id, "text": source.text} for source in self.sources],
            "metrics": self.judge.facts(),
        }

    def load(self) -> None:
        """The model, the models of the metrics, and every source as its tokens."""
        super().load()
        settings = self.settings
        self.files.dtype = checkpoint_facts(self.model).get("dtype")
        self.judge = load_judge(settings, self.ui)
        sampled = settings.kind != FORCED and settings.temperature
        if len(settings.seed_list()) > 1 and not sampled:
            self.ui.say(
                "seeds differ only where a method draws by lot, or with --temperature in mode free"
            )
        for source in self.sources:  # one that does not fit is said before anything is computed
            self.tokens_of(source)

    def tokens_of(self, source: Source) -> Reading | Asking:
        """The source as tokens; raises ``ConfigError`` when it does not fit model or settings."""
        if source.id not in self._tokens:
            settings, longest = self.settings, context_length(self.model)
            self._tokens[source.id] = (
                runs.read(source, self.tokenizer, settings.prompt_tokens, longest)
                if settings.kind == FORCED
                else runs.ask(source, self.tokenizer, settings.chat, settings.generation, longest)
            )
        return self._tokens[source.id]

    def candidate(self, cell: DriftCell) -> PreparedMethod:
        """The model as the cell prunes it, calibrated or quantised where the method is.

        Raises the ``DartError`` that making it gave, at once when it was tried before.
        """
        config, settings = cell.config(), self.settings
        key = json.dumps(None if config is None else config.to_dict(), sort_keys=True)
        if key not in self._candidates:
            calibration = settings.calibration, settings.cache_dir, self.ui.say
            try:
                self._candidates[key] = prepare(self.model, self.tokenizer, config, *calibration)
            except DartError as error:
                self._candidates[key] = error
        candidate = self._candidates[key]
        if isinstance(candidate, DartError):
            raise candidate
        return candidate

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """The files of the cells are whole and their times told, whatever ends the study."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(ResultsError):  # a full disk must not hide the first error
                if self.model is not None or self.folder.parts:
                    self._write_files()
            raise
        self._write_files()

    def _write_files(self) -> None:
        self.lines = self.files.write()
        self._write_times()

    def _write_times(self) -> None:
        self.timing |= self.files.times(self.timing)
        write_json(self.path / "timing.json", self.timing)

    def units(self) -> Iterator[Unit]:
        files, ui = self.files, self.ui
        todo = {cell.key for cell in self.cells if files.part(cell) is None}
        if len(todo) < len(self.cells):
            ui.say(f"{len(self.cells) - len(todo)} of {len(self.cells)} cells are finished")
        with ui.progress(f"drift, mode {self.settings.kind}", len(todo)) as advance:
            for cell in self.cells:
                yield Unit(cell.key, data=cell)
                advance(cell.key in todo)

    def finished(self, unit: Unit) -> Part | None:
        return self.files.part(unit.data)

    def compute(self, unit: Unit) -> Part:
        return compute(unit.data, self)

    def take(self, unit: Unit, value: Part) -> None:
        self.judge.measure(self.files, unit.data)
        self.files.grow()

    def fail(self, unit: Unit, sentence: str) -> None:
        self.files.grow()

    def summarise(self) -> dict[str, Any]:
        document = summary.summarise(self.lines)
        document["notes"] += [*self.judge.notes, *_notes(self.lines, self.settings.kind == FORCED)]
        take_detection(self.settings.detection, self.path)
        self.summarised = time.perf_counter()
        return document

    def tables(self) -> list[Table]:
        title = summary.title(self.summary)
        return [summary.table(self.summary, title, brief) for brief in (False, True)]

    def markdown(self) -> str:
        return summary.markdown(self.summary)

    def sentences(self) -> list[str]:
        notes = [f"note: {note}" for note in self.summary["notes"]]
        return [text for text in (summary.sentence(self.summary), *notes) if text]

    def figures(self) -> Iterator[Plot]:
        return report.pictures(self.path)

    def write_page(self) -> Path | None:
        page = report.write(self.path)
        self.timing["pictures_s"] = time.perf_counter() - self.summarised
        self._write_times()
        return page


def take_detection(source: str | None, path: Path) -> None:
    """Copy the detection table of another run into the study's folder; None: nothing."""
    if source is None:
        return
    try:
        text = (Path(source) / DETECTION).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {Path(source) / DETECTION}: {error}") from None
    write_text(path / DETECTION, text)
