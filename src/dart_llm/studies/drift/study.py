"""``dart-llm drift``: methods side by side on prompts or passages; resumable cell by cell."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_llm.errors import ConfigError, DartError, ResultsError
from dart_llm.evaluation.forced_decoding import ScheduledRun
from dart_llm.evaluation.perplexity import DIGITS, score_window
from dart_llm.evaluation.windows import Window
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import ResultLine
from dart_llm.experiments.study import Study, Unit
from dart_llm.files import finite, write_csv, write_lines
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length, widths
from dart_llm.pruning.records import DriftCheck
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table
from dart_llm.session.generation import CheckedModel, generate, text_ends
from dart_llm.session.prepare import prepare
from dart_llm.session.run import BoundMethod, Run
from dart_llm.studies.drift import report, summary
from dart_llm.studies.drift.cell import (
    DONE,
    EMPTY,
    FAILED,
    DriftCell,
    expand,
    recovery,
    topic_losses,
)
from dart_llm.studies.drift.masks import DriftRecorder, record
from dart_llm.studies.drift.plots import DriftView
from dart_llm.studies.drift.settings import DENSE, DETECTION, FORCED, Candidate, DriftSettings
from dart_llm.studies.drift.sources import (
    Reading,
    Source,
    cut_note,
    digest,
    load_sources,
    read_passage,
    read_prompt,
)

if TYPE_CHECKING:
    from dart_llm.evaluation.text_metrics import Encoder

EVERY = 20.0
"""Seconds between two times that the growing files are written: each is written whole."""


def triggers(reading: Reading, candidate: Candidate) -> list[int]:
    """Decode steps at which a timed method starts to observe, so that its masks are due in time.

    ``moment`` tokens after each change, of which the last ``observed`` ran dense.  A change whose
    topic is shorter than that has none.
    """
    starts = (reading.starts or ())[1:]
    lengths = (end - start for start, end in pairwise((*starts, reading.decoded)))
    first = candidate.moment - (candidate.observed or 0)
    pairs = zip(starts, lengths, strict=True)
    return [start + first for start, length in pairs if candidate.moment < length]


def read_losses(model: Any, run: Run | None, reading: Reading) -> list[float | None]:
    """The loss in nats of every token after the prompt; None for the first of them.

    ``run``: an attached run, or None for the untouched model.  Raises ``DartError`` when a loss is
    not finite.
    """
    try:
        scored = score_window(model, run, Window(reading.ids, reading.prompt + 1))
    except DartError as error:
        if type(error) is not DartError:
            raise
        words = str(error).removeprefix("slice 0: ")
        raise DartError(f"the passage {reading.source.id}: {words}") from None
    return [None, *(round(loss, DIGITS) for loss in scored.losses)]


def write_text(
    method: BoundMethod, run: Run | None, reading: Reading, tokens: int, **sampling: Any
) -> dict[str, Any]:
    """``text``, ``pieces`` and ``finish`` of up to ``tokens`` tokens.

    ``run``: an attached run, or None for the untouched model.  ``sampling``: ``temperature`` and
    ``seed``, of ``generate``.  The token that ends a text is one of its tokens, with an empty
    piece.  Raises ``DartError`` when a logit is not finite.
    """
    ends = text_ends(method.model, method.tokenizer)
    checked = CheckedModel(method.model, ends, f"the text after {reading.source.id}")
    made = generate(checked, method.tokenizer, reading.ids[None], tokens, run=run, **sampling)
    ended = bool(made.token_ids) and made.token_ids[-1] in ends
    pieces = [*made.tokens[:-1], ""] if ended else list(made.tokens)
    return {"text": "".join(pieces), "pieces": pieces, "finish": "eos" if ended else "length"}


class DriftStudy(Study[Any]):
    """Every method on every source; a cell that fails is noted, and the others continue."""

    kind = "drift"
    document = "summary.json"
    on_error = "record"
    progress = "cells"
    unit_times = "cell_s"
    shown = Study.shown | {"detection"}

    settings: DriftSettings

    def __init__(self, settings: DriftSettings, ui: Ui) -> None:
        super().__init__(settings, ui)
        self.candidates, self.sources = settings.candidates(), load_sources(settings)
        self.cells = expand(settings, self.sources, self.candidates)
        source = settings.detection
        self.detection = {} if source is None else _read_detection(Path(source) / DETECTION)
        self.measured: dict[str, DriftCell] = {}
        """Finished cells by key, with their records."""
        self.dtype: str | None = None
        self.tools: Encoder | None = None
        self.notes: list[str] = []
        self._readings: dict[str, Reading] = {}
        self._methods: dict[str, BoundMethod | DartError] = {}
        self._written = 0.0

    def inputs(self) -> Mapping[str, Any]:
        model, calibration = self.settings.model, self.settings.calibration
        weights = Digests().of(Cell(model, DENSE, "drift", calibration=calibration))
        return {**weights, "sources": digest(self.sources)}

    def identify(self) -> dict[str, Any]:
        presets = {c.label: c.config and c.config.to_dict() for c in self.candidates}
        return {**super().identify(), "presets": presets}

    def config_extra(self) -> dict[str, Any]:
        return {
            "seed": list(self.settings.seeds),
            "mode": self.settings.kind,
            "cells": [cell.facts(self.settings.model, self.dtype) for cell in self.cells],
            "sources": [{"id": source.id, "text": source.text} for source in self.sources],
            "metrics": None if self.tools is None else self.tools.to_dict(),
        }

    def load(self) -> None:
        """The model, the models of the metrics, and every source as its tokens."""
        super().load()
        self.dtype = checkpoint_facts(self.model).get("dtype")
        self._load_tools()
        sampled = self.settings.kind != FORCED and self.settings.temperature
        if len(self.settings.seeds) > 1 and not sampled:
            self.ui.say(
                "seeds differ only where a method draws at random, or with --temperature in mode "
                "free"
            )
        for source in self.sources:  # one that does not fit is refused before anything is computed
            self.reading(source)

    def _load_tools(self) -> None:
        """The models of the metrics; what is missing costs the metrics alone, never the study."""
        settings = self.settings
        if settings.kind == FORCED or not settings.metrics or len(self.candidates) == 1:
            return
        from dart_llm.evaluation.text_metrics import load_tools

        try:
            with self.ui.status("loading the models of the metrics") as news:
                self.tools = load_tools(
                    settings.embedder, cache_dir=settings.cache_dir, progress=news
                )
            self.notes += self.tools.notes
        except DartError as error:
            self.notes.append(f"no metrics: {error}")
            self.ui.say(self.notes[-1])

    def reading(self, source: Source) -> Reading:
        """The source as tokens; raises ``ConfigError`` when it does not fit model or settings."""
        if source.id not in self._readings:
            settings, tokenizer = self.settings, self.tokenizer
            longest, chat = context_length(self.model), (settings.chat, settings.generation)
            self._readings[source.id] = (
                read_passage(source, tokenizer, settings.prompt_tokens, longest)
                if settings.kind == FORCED
                else read_prompt(source, tokenizer, *chat, longest)
            )
        return self._readings[source.id]

    def method(self, cell: DriftCell) -> BoundMethod:
        """The model as the cell prunes it, calibrated where the method is.

        Raises the ``DartError`` that preparing it gave, at once when it was tried before.
        """
        config, settings = cell.config, self.settings
        key = json.dumps(None if config is None else config.to_dict(), sort_keys=True)
        if key not in self._methods:
            calibration = settings.calibration, settings.cache_dir, self.ui.say
            try:
                self._methods[key] = prepare(self.model, self.tokenizer, config, *calibration)
            except DartError as error:
                self._methods[key] = error
        method = self._methods[key]
        if isinstance(method, DartError):
            raise method
        return method

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """The files of the cells are complete, whatever ends the study."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(ResultsError):  # a full disk must not hide the first error
                if self.model is not None or self.folder.parts:
                    self._write_files()
            raise
        self._write_files()

    def units(self) -> Iterator[Unit]:
        return (Unit(cell.key, data=cell) for cell in self.cells)

    def finished(self, unit: Unit) -> Any:
        """What an earlier run kept, with its file of masks and the metrics that are wanted now."""
        cell: DriftCell = unit.data
        kept = self.folder.part(cell.key)
        if kept is None or (kept["accounting"] and not (self.path / cell.file).exists()):
            return None
        is_compared = kept["metrics"] or not self.tools or cell.dense
        return kept if is_compared else None

    def compute(self, unit: Unit) -> dict[str, Any]:
        """The cell's record; its masks go into a file.

        Raises ``DartError`` for what the method or the model cannot do, a number that is not finite
        among it, and ``ResultsError`` when the masks cannot be written.
        """
        cell: DriftCell = unit.data
        reading, method, recorder = self.reading(cell.source), self.method(cell), DriftRecorder()
        make = functools.partial(ScheduledRun, triggers=triggers(reading, cell.candidate))
        run = method.run() if cell.candidate.observed is None else method.run(make=make)
        if run is not None:
            run.on_selection = recorder
        with run if run is not None else contextlib.nullcontext():
            new = self._decode(cell, method, run, reading)
        topics = reading.source.topics
        starts = reading.starts or [None] * len(topics)
        pairs = zip(topics, starts, strict=True)
        new["topics"] = [{"name": t.name, "domain": t.domain, "start": at} for t, at in pairs]
        if run is not None:
            new |= record(run, recorder, widths(self.model))
            name = str(checkpoint_facts(self.model).get("name"))
            recorder.write(self.path / cell.file, name, cell.label)
        return dict(json.loads(json.dumps(finite({**EMPTY, **new}))))

    def _decode(
        self, cell: DriftCell, method: BoundMethod, run: Run | None, reading: Reading
    ) -> dict[str, Any]:
        """What the method reads or writes, and how well."""
        new: dict[str, Any] = {"prompt_tokens": reading.prompt}
        if cell.mode == FORCED:
            new |= {"pieces": list(reading.pieces), "finish": "length" if reading.cut else "end"}
            new["losses"] = read_losses(method.model, run, reading)
        else:
            sampling: dict[str, Any] = {"temperature": self.settings.temperature, "seed": cell.seed}
            new |= write_text(method, run, reading, self.settings.generation, **sampling)
            new["metrics"] = self._compare(cell, new["text"])
        return {**new, "decoded_tokens": len(new["pieces"])}

    def _compare(self, cell: DriftCell, text: str) -> dict[str, Any] | None:
        """The text beside the dense one of the same source and seed."""
        dense = self.measured.get(cell.dense_key)
        if self.tools is None or dense is None:
            return None
        from dart_llm.evaluation.text_metrics import compare

        return compare(text, dense.record["text"], self.tools)

    def take(self, unit: Unit, value: Any) -> None:
        cell = replace(unit.data, record=value)
        self.measured[cell.key] = cell
        self._add(cell, None)

    def fail(self, unit: Unit, sentence: str) -> None:
        self._add(unit.data, sentence)

    def _add(self, cell: DriftCell, error: str | None) -> None:
        self.lines.append(
            {
                "key": cell.key,
                "status": FAILED if error else DONE,
                "error": error,
                "label": cell.label,
                "cell": cell.facts(self.settings.model, self.dtype),
                **{name: cell.record.get(name, empty) for name, empty in EMPTY.items()},
                "loss": self._loss(cell),
            }
        )
        if time.monotonic() - self._written >= EVERY:
            self._write_files()

    def _loss(self, cell: DriftCell) -> dict[str, Any] | None:
        """Per topic, and the recovery after each change where dense was measured."""
        if "losses" not in cell.record:
            return None
        starts, losses = [topic["start"] for topic in cell.record["topics"]], cell.record["losses"]
        dense = self.measured.get(cell.dense_key)
        regained = dense and recovery(losses, dense.record["losses"], starts)
        return {
            "topics": topic_losses(losses, starts, self.settings.remask_at_change),
            "recovery": regained,
        }

    def _write_files(self) -> None:
        """results.jsonl, tokens.jsonl, texts.jsonl and drift.csv of what is measured."""
        cells = self.measured.values()
        write_lines(self.path / "results.jsonl", self.lines)
        tokens = [
            {"key": c.key, **{n: c.record.get(n) for n in ("pieces", "losses")}} for c in cells
        ]
        write_lines(self.path / "tokens.jsonl", tokens)
        if self.settings.kind != FORCED:
            names = ({"id": c.source.id, "method": c.label, "seed": c.seed} for c in cells)
            texts = ({"key": c.key, "text": c.record["text"]} for c in cells)
            rows = ({**name, **text} for name, text in zip(names, texts, strict=True))
            write_lines(self.path / "texts.jsonl", rows)
        columns = [column.name for column in fields(DriftCheck)]
        checks = ((c.key, check) for c in cells for check in c.record["checks"])
        lines = ([key, *(_plain(check[name]) for name in columns)] for key, check in checks)
        write_csv(self.path / "drift.csv", ("key", *columns), lines)
        self._written = time.monotonic()

    def summarise(self) -> dict[str, Any]:
        document = summary.summarise(self.lines)
        cut = cut_note(self._readings.values())
        document["notes"] = [*self.notes, *cut, *summary.notes(self.lines)]
        return document

    def result_lines(self) -> list[ResultLine]:
        return summary.result_lines(self.summary)

    def tables(self) -> list[Table]:
        return [summary.table(self.summary)]

    def sentences(self) -> list[str]:
        notes = [f"note: {note}" for note in self.summary["notes"]]
        return [*filter(None, [summary.headline(self.summary)]), *notes]

    def view(self) -> DriftView:
        """What pictures and page are made of."""
        cells = tuple(self.measured.values())
        return DriftView(self.path, self.config, self.summary, cells, self.failed, self.detection)

    def figures(self) -> Iterator[Plot]:
        return (plots[0] for _, plots in report.pictures(self.view(), most=1))

    def write_page(self) -> Path | None:
        return report.write(self.view())


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value


def _read_detection(path: Path) -> dict[str, Any]:
    """The document of a finished ``dart-llm detect``; raises ``ConfigError``."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
