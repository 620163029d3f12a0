"""``dart-llm drift``: compare methods on prompts or passages; an interrupted study resumes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_llm.errors import DartError
from dart_llm.evaluation.perplexity import DIGITS, score_window
from dart_llm.evaluation.windows import Window
from dart_llm.experiments.artifacts import MaskRecorder
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import ResultLine
from dart_llm.experiments.study import Study, Unit
from dart_llm.files import finite, write_lines
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length, widths
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table
from dart_llm.session.generation import CheckedModel, generate, text_ends
from dart_llm.session.run import BoundMethod, Run, prepare
from dart_llm.studies.drift import report, summary
from dart_llm.studies.drift.runs import EMPTY, DriftRun, run_record
from dart_llm.studies.drift.settings import DENSE, FORCED, DriftSettings
from dart_llm.studies.drift.sources import (
    Reading,
    cut_notes,
    digest,
    load_sources,
    read_passage,
    read_prompt,
)

if TYPE_CHECKING:
    from dart_llm.evaluation.text_metrics import Encoder


def read_losses(model: Any, run: Run | None, reading: Reading) -> list[float | None]:
    """The loss in nats of every token after the prompt, None for the first.

    ``run``: the attached run, or None for the untouched model.  Raises ``DartError`` if a loss is
    not finite.
    """
    scored = score_window(model, run, Window(reading.ids, reading.prompt + 1))
    return [None, *(round(loss, DIGITS) for loss in scored.losses)]


def write_text(
    method: BoundMethod, run: Run | None, reading: Reading, tokens: int, **sampling: Any
) -> dict[str, Any]:
    """Generate up to ``tokens`` tokens; returns ``text``, ``pieces`` and ``finish``.

    ``run``: the attached run, or None for the untouched model.  ``sampling``: ``temperature`` and
    ``seed`` for ``generate``.  The end token counts as a token, with an empty piece.  Raises
    ``DartError`` if a logit is not finite.
    """
    ends = text_ends(method.model, method.tokenizer)
    checked = CheckedModel(method.model, ends, f"the text after {reading.source.id}")
    generation = generate(checked, method.tokenizer, reading.ids[None], tokens, run=run, **sampling)
    ended = bool(generation.token_ids) and generation.token_ids[-1] in ends
    pieces = [*generation.tokens[:-1], ""] if ended else list(generation.tokens)
    return {"text": "".join(pieces), "pieces": pieces, "finish": "eos" if ended else "length"}


class DriftStudy(Study[DriftSettings]):
    """Every method on every source; a failed run is recorded, and the other runs continue."""

    kind = "drift"
    document = "summary.json"
    on_error = "record"
    progress = "runs"
    unit_times = "run_s"

    def __init__(self, settings: DriftSettings, ui: Ui) -> None:
        super().__init__(settings, ui)
        self.candidates, self.sources = settings.candidates(), load_sources(settings)
        self.runs: list[DriftRun] = []
        """Measured and failed runs, with their records."""
        self.dense: dict[tuple[str, int], DriftRun] = {}
        """Runs of the untouched model, by source and seed."""
        self.readings: dict[str, Reading] = {}
        """The tokenised sources, by id."""
        self.dtype: str | None = None
        self.tools: Encoder | None = None
        self.notes: list[str] = []
        self._methods: dict[tuple[str, int], BoundMethod] = {}

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
            "sources": [{"id": source.id, "text": source.text} for source in self.sources],
            "metrics": None if self.tools is None else self.tools.to_dict(),
        }

    def load(self) -> None:
        """Load the model and the metrics' encoder, and tokenise all sources.

        Raises ``ConfigError`` for a source that does not fit, before any computation.
        """
        super().load()
        self.dtype = checkpoint_facts(self.model).get("dtype")
        self._load_tools()
        settings, longest = self.settings, context_length(self.model)
        for source in self.sources:
            self.readings[source.id] = (
                read_passage(source, self.tokenizer, settings.prompt_tokens, longest)
                if settings.kind == FORCED
                else read_prompt(
                    source, self.tokenizer, settings.chat, settings.generation, longest
                )
            )
        self.notes += cut_notes(list(self.readings.values()))

    def _load_tools(self) -> None:
        """Load the metrics' encoder; without it the study has no metrics but still runs."""
        settings = self.settings
        if settings.kind == FORCED or not settings.metrics or len(self.candidates) == 1:
            return
        from dart_llm.evaluation.text_metrics import load_tools

        try:
            with self.ui.status("loading the metrics' encoder") as news:
                self.tools = load_tools(
                    settings.embedder, cache_dir=settings.cache_dir, progress=news
                )
            self.notes += self.tools.notes
        except DartError as error:
            self.notes.append(f"no metrics: {error}")
            self.ui.say(self.notes[-1])

    def units(self) -> Iterator[Unit]:
        grid = product(self.sources, self.settings.seeds, self.candidates)
        for number, (source, seed, candidate) in enumerate(grid):
            run = DriftRun(self.settings.kind, source, candidate, seed, number)
            yield Unit(run.key, data=run)

    def finished(self, unit: Unit) -> Any:
        """The stored record of an earlier run, unless it lacks the requested metrics."""
        record = self.folder.part(unit.key)
        lacks_metrics = self.tools and record and not record["metrics"] and not unit.data.is_dense
        return None if lacks_metrics else record

    def compute(self, unit: Unit) -> dict[str, Any]:
        """The run's record; its masks are written to a file.

        Raises ``DartError`` if the method does not support the model or a number is not finite, and
        ``ResultsError`` if the masks cannot be written.
        """
        drift_run: DriftRun = unit.data
        reading, method = self.readings[drift_run.source.id], self._method(drift_run)
        run, recorder = method.run(), MaskRecorder()
        if run is not None:
            run.on_selection = recorder
        with run if run is not None else contextlib.nullcontext():
            record = self._decode(drift_run, method, run, reading)
        topics = reading.source.topics
        starts = reading.starts or [None] * len(topics)
        pairs = zip(topics, starts, strict=True)
        record["topics"] = [{"name": t.name, "domain": t.domain, "start": at} for t, at in pairs]
        if run is not None:
            record |= run_record(run, recorder, widths(self.model))
            name = str(checkpoint_facts(self.model).get("name"))
            recorder.write(self.path / drift_run.masks_file, name, drift_run.label)
        return dict(json.loads(json.dumps(finite({**EMPTY, **record}))))

    def _method(self, run: DriftRun) -> BoundMethod:
        """The run's method bound to the model, after calibration if it needs any."""
        key, settings = (run.label, run.seed), self.settings
        if key not in self._methods:
            calibration = settings.calibration, settings.cache_dir, self.ui.say
            self._methods[key] = prepare(self.model, self.tokenizer, run.config, *calibration)
        return self._methods[key]

    def _decode(
        self, drift_run: DriftRun, method: BoundMethod, run: Run | None, reading: Reading
    ) -> dict[str, Any]:
        """Read the passage or continue the prompt; returns a record with losses or metrics."""
        record: dict[str, Any] = {"prompt_tokens": reading.prompt}
        if drift_run.mode == FORCED:
            record |= {"pieces": list(reading.pieces), "finish": "length" if reading.cut else "end"}
            record["losses"] = read_losses(method.model, run, reading)
        else:
            temperature, tokens = self.settings.temperature, self.settings.generation
            sampling = {"temperature": temperature, "seed": drift_run.seed}
            record |= write_text(method, run, reading, tokens, **sampling)
            record["metrics"] = self._compare(drift_run, record["text"])
        return {**record, "decoded_tokens": len(record["pieces"])}

    def _compare(self, run: DriftRun, text: str) -> dict[str, Any] | None:
        """Metrics against the dense text of this source and seed; None without it or an encoder."""
        dense = self.dense.get(run.source_key)
        if self.tools is None or dense is None:
            return None
        from dart_llm.evaluation.text_metrics import compare

        return compare(text, dense.record["text"], self.tools)

    def take(self, unit: Unit, value: Any) -> None:
        self._add(replace(unit.data, record=value))

    def fail(self, unit: Unit, sentence: str) -> None:
        self._add(replace(unit.data, error=sentence))

    def _add(self, run: DriftRun) -> None:
        self.runs.append(run)
        self.lines.append(run.line(self.settings.model, self.dtype))
        if run.is_dense and run.error is None:
            self.dense[run.source_key] = run

    def summarise(self) -> dict[str, Any]:
        """Make the summary; write results.jsonl only here, because its lines contain all tokens."""
        write_lines(self.path / "results.jsonl", self.lines)
        document = summary.summarise(self.runs, self.settings.model, self.dtype)
        return {**document, "notes": [*self.notes, *document["notes"]]}

    def result_lines(self) -> list[ResultLine]:
        return summary.result_lines(self.summary)

    def tables(self) -> list[Table]:
        return [summary.table(self.summary)]

    def sentences(self) -> list[str]:
        notes = [f"note: {note}" for note in self.summary["notes"]]
        return [*filter(None, [summary.headline(self.summary)]), *notes]

    def figures(self) -> list[Plot]:
        return [
            plot for plots in report.pictures(self.runs, self.config).values() for plot in plots
        ]

    def write_page(self) -> Path:
        html = report.render(self.runs, self.config, self.summary)
        return report.write(self.path, html)
