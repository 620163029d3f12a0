"""The study: one cell computed, all cells run.

The job of ``dart-llm drift``: methods side by side on prompts or passages; resumable.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dart_llm.errors import CellsFailed, ConfigError, DartError, ResultsError
from dart_llm.evaluation.forced_decoding import TimedRun
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import ResultsFolder, open_folder
from dart_llm.experiments.study import config_document, load_model, resumable, write_logs
from dart_llm.files import finite, write_csv, write_json, write_text
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length, widths
from dart_llm.models.devices import memory_failure
from dart_llm.reporting.console import ProgressLog, Ui
from dart_llm.session.prepare import PreparedMethod, prepare
from dart_llm.session.run import Run
from dart_llm.studies.drift import runs
from dart_llm.studies.drift import summary as drift_summary
from dart_llm.studies.drift import summary as drift_tables
from dart_llm.studies.drift.cells import DriftCell, Source, digest, expand, load_sources
from dart_llm.studies.drift.methods import DENSE
from dart_llm.studies.drift.record import DriftRecorder, Part, StudyFiles, record, write_masks
from dart_llm.studies.drift.runs import Asking, Judge, Reading, load_judge
from dart_llm.studies.drift.settings import DETECTION, FORCED, DriftSettings

# One cell of a drift study, computed: its finished part, and its file of masks.


@dataclass
class Bench:
    """The loaded model with all sources as tokens; pruned forms of it are made once."""

    settings: DriftSettings
    model: Any
    tokenizer: Any
    say: Callable[[str], None]
    ready: dict[str, Reading | Asking] = field(default_factory=dict)
    candidates: dict[str, PreparedMethod | DartError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.widths = widths(self.model)

    def take(self, source: Source) -> Reading | Asking:
        """The source as tokens; raises ``ConfigError`` when it does not fit model or settings."""
        if source.id not in self.ready:
            settings, longest = self.settings, context_length(self.model)
            if settings.kind == FORCED:
                self.ready[source.id] = runs.read(
                    source, self.tokenizer, settings.prompt_tokens, longest
                )
            else:
                self.ready[source.id] = runs.ask(
                    source, self.tokenizer, settings.chat, settings.generation, longest
                )
        return self.ready[source.id]

    def candidate(self, cell: DriftCell) -> PreparedMethod:
        """The model as the cell prunes it, calibrated or quantised where the method is.

        Raises the ``DartError`` that making it gave, at once when it was tried before.
        """
        config = cell.config()
        key = json.dumps(None if config is None else config.to_dict(), sort_keys=True)
        if key not in self.candidates:
            settings = self.settings
            try:
                self.candidates[key] = prepare(
                    self.model,
                    self.tokenizer,
                    config,
                    settings.calibration,
                    settings.cache_dir,
                    self.say,
                )
            except DartError as error:
                self.candidates[key] = error
        found = self.candidates[key]
        if isinstance(found, DartError):
            raise found
        return found


def compute(cell: DriftCell, bench: Bench, masks: Path) -> Part:
    """The cell's part; ``masks``: the folder for files of masks.

    Raises ``DartError`` for what the method or the model cannot do, a number that is not finite
    among it, and ``ResultsError`` when the masks cannot be written.
    """
    began = time.perf_counter()
    source, candidate = bench.take(cell.source), bench.candidate(cell)
    run, recorder = _run(cell, candidate, source), DriftRecorder()
    if run is not None:
        run.on_selection = recorder
    with run if run is not None else nullcontext():
        if isinstance(source, Reading):
            part = _read(candidate, run, source)
        else:
            part = _write(cell, bench.settings, candidate, run, source)
    kept: Part = {"checks": [], "remasks": [], "dense_from": None, "accounting": None}
    if run is not None:
        kept = record(run, recorder, bench.widths)
        name = str(checkpoint_facts(bench.model).get("name"))
        write_masks(masks / cell.file, recorder, name, cell.method.label)
    seconds = time.perf_counter() - began
    return dict(json.loads(json.dumps(finite({**part, **kept, "seconds": seconds}))))


def _run(cell: DriftCell, candidate: PreparedMethod, source: Reading | Asking) -> Run | None:
    method = cell.method
    if method.observed is None or method.moment is None or not isinstance(source, Reading):
        return candidate.run()
    due = runs.triggers(source, method.observed, method.moment)
    return candidate.run(make=functools.partial(TimedRun, triggers=due))


def _read(candidate: PreparedMethod, run: Run | None, reading: Reading) -> Part:
    topics = zip(reading.source.topics, reading.starts, strict=True)
    return {
        "topics": [{"name": t.name, "domain": t.domain, "start": start} for t, start in topics],
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
    made = runs.write(
        candidate.model,
        candidate.tokenizer,
        asking,
        settings.generation,
        run,
        settings.temperature,
        cell.seed,
    )
    topics = asking.source.topics
    return {
        "topics": [{"name": t.name, "domain": t.domain, "start": None} for t in topics],
        "prompt_tokens": asking.ids.shape[1],
        "decoded_tokens": len(made.pieces),
        "finish": "eos" if made.ended else "length",
        "text": made.text,
        "pieces": list(made.pieces),
        "losses": None,
    }


# What ends a drift study: summary, timing, pictures and the report page.


def write_summary(
    files: StudyFiles, rows: Sequence[Mapping[str, Any]], notes: Sequence[str], ui: Ui
) -> dict[str, Any]:
    """summary.json, summary.md and summary.csv, and the table on the terminal."""
    summary = drift_summary.summarise(rows)
    summary["notes"] += [*notes, *_notes(rows)]
    title = _title(summary)
    write_json(files.path / "summary.json", summary)
    write_text(files.path / "summary.md", drift_tables.markdown(summary, title))
    write_csv(files.path / "summary.csv", *drift_tables.flat(summary))
    ui.table(drift_tables.table(summary, title))
    for line in (drift_tables.sentence(summary), *(f"note: {n}" for n in summary["notes"])):
        if line:
            ui.say(line)
    return summary


def _title(summary: Mapping[str, Any]) -> str:
    model = Path(str(summary["model"]).rstrip("/")).name
    what = "passages" if summary["mode"] == FORCED else "prompts"
    unit = ", losses in nats" if summary["mode"] == FORCED else ""
    return (
        f"drift, mode {summary['mode']}: {summary['sources']} {what}, {model} "
        f"({summary['dtype']}), means with 95 % intervals{unit}"
    )


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cut = {row["cell"]["source"] for row in rows if row["finish"] == "length"}
    forced = any(row["cell"]["mode"] == FORCED for row in rows)
    found = []
    if forced and cut:
        found.append(f"{len(cut)} passages were cut where the model's context ends")
    pruned = [row for row in rows if row["accounting"] and row["cell"]["sparsity"]]
    unpruned = [row for row in pruned if not row["accounting"]["achieved_sparsity"]]
    if unpruned:
        found.append(
            f"{len(unpruned)} of {len(pruned)} pruned cells ended before a token ran pruned"
        )
    return found


def times(files: StudyFiles, timing: Mapping[str, Any]) -> dict[str, Any]:
    """timing.json: seconds of every phase, method and cell, earlier runs of the study included.

    ``timing``: what this run knows, ``load_s``, ``total_s`` and so on.
    """
    cells, metrics, methods = dict[str, float](), dict[str, float](), dict[str, float]()
    for cell in files.cells:
        part, judged = files.part(cell), files.metrics(cell)
        if part is not None:
            cells[cell.key] = part["seconds"]
            label = cell.method.label
            methods[label] = methods.get(label, 0.0) + part["seconds"]
        if judged is not None:
            metrics[cell.key] = judged["seconds"]
    phases = {
        "load": timing.get("load_s"),
        "cells": sum(cells.values()),
        "metrics": sum(metrics.values()),
        "pictures": timing.get("pictures_s"),
    }
    return {**timing, "phases_s": phases, "methods_s": methods, "cells": cells, "metrics": metrics}


def take_detection(source: str | None, path: Path) -> None:
    """Copy the detection table of another run into the study's folder; None: nothing."""
    if source is None:
        return
    try:
        text = (Path(source) / DETECTION).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {Path(source) / DETECTION}: {error}") from None
    write_text(path / DETECTION, text)


def write_pictures(path: Path, ui: Ui) -> None:
    """plots/*.png and report.html, as far as their packages are installed.

    What cannot be drawn is said; the numbers are written by then.
    """
    from dart_llm.studies.drift import report

    try:
        report.write_all(path)
    except DartError as error:
        ui.say(f"no pictures: {error}")
    try:
        ui.say(f"report: {report.write(path)}")
    except DartError as error:
        ui.say(f"no report: {error}")


@dataclass
class DriftJob:
    """One study in progress."""

    settings: DriftSettings
    ui: Ui
    files: StudyFiles
    sources: tuple[Source, ...]
    identity: dict[str, Any]
    model: Any = None
    tokenizer: Any = None
    judge: Judge = field(default_factory=lambda: Judge(None))
    config: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> ResultsFolder:
        return self.files.folder

    @property
    def path(self) -> Path:
        return self.files.path


def run_drift(settings: DriftSettings, ui: Ui, fresh: bool = False) -> DriftJob:
    """Compute every cell that is not finished yet, then tables, pictures and the page.

    A cell that fails is marked, and the others go on; ``CellsFailed`` is raised at the end.  An
    interruption or any other error keeps what was computed.
    """
    job = _open(settings, ui, fresh)
    with resumable(job, lambda status: _leave(job, status), settings.model, settings.dtype) as took:
        _write_config(job, "running")
        _load(job)
        _write_config(job, "running")
        _compute_all(job)
        took()
        _finish(job)
    _check(job)
    return job


def _open(settings: DriftSettings, ui: Ui, fresh: bool) -> DriftJob:
    methods, sources = settings.method_list(), load_sources(settings)
    cells = expand(settings, sources, methods)
    inputs = Digests().of(Cell(settings.model, DENSE, "drift", calibration=settings.calibration))
    inputs["sources"] = digest(sources)
    asked = settings.model_dump(mode="json", exclude={"detection"})  # of the report alone
    data = {"kind": "drift", **asked, "inputs": inputs}
    data["presets"] = {m.label: None if m.config is None else m.config.to_dict() for m in methods}
    folder = open_folder(Path(settings.results_dir), settings.experiment, data, fresh)
    files = StudyFiles(folder, cells, settings.model, settings.moment)
    return DriftJob(settings, ui, files, sources, data)


def _load(job: DriftJob) -> None:
    """The model, every source as its tokens, and the models of the metrics."""
    settings, ui = job.settings, job.ui
    job.model, job.tokenizer, job.timing["load_s"] = load_model(settings.base(), ui)
    job.files.dtype = checkpoint_facts(job.model).get("dtype")
    job.judge = load_judge(settings, ui)
    if len(settings.seed_list()) > 1 and not (settings.kind != FORCED and settings.temperature):
        ui.say("seeds differ only where a method draws by lot, or with --temperature in mode free")


def _compute_all(job: DriftJob) -> None:
    files, ui = job.files, job.ui
    bench = Bench(job.settings, job.model, job.tokenizer, ui.say)
    for source in job.sources:  # a source that does not fit is said before anything is computed
        bench.take(source)
    todo = [cell for cell in files.cells if files.part(cell) is None]
    if len(todo) < len(files.cells):
        ui.say(f"{len(files.cells) - len(todo)} of {len(files.cells)} cells are finished")
    news = ProgressLog(ui.say if not ui.live else lambda text: None, len(todo))
    with ui.progress(f"drift, mode {job.settings.kind}", len(files.cells), told=True) as advance:
        for cell in files.cells:
            if files.part(cell) is None:
                _compute(job, bench, cell)
                news.done()
            job.judge.measure(files, cell)
            advance(1)


def _compute(job: DriftJob, bench: Bench, cell: DriftCell) -> None:
    """Compute and keep one cell; whatever goes wrong in it becomes its sentence."""
    try:
        part = compute(cell, bench, job.files.masks)
    except ResultsError:
        raise  # a full disk is no matter of one cell
    except Exception as error:
        sentence = _sentence(error, job.settings)
        job.ui.say(f"{cell.key} failed: {sentence}")
        job.files.fail(cell, sentence)
    else:
        job.files.save(cell, part)


def _sentence(error: Exception, settings: DriftSettings) -> str:
    if isinstance(error, DartError):
        return str(error)
    memory = memory_failure(error, settings.model, settings.dtype or "the checkpoint's dtype")
    if memory is not None:
        return str(memory)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _write_config(job: DriftJob, status: str) -> None:
    found = config_document("drift", job.identity, {}, job.model, status, job.config)
    found["seed"] = list(job.settings.seed_list())
    found["mode"] = job.settings.kind
    found["cells"] = [cell.facts(job.settings.model, job.files.dtype) for cell in job.files.cells]
    found["sources"] = [{"id": source.id, "text": source.text} for source in job.sources]
    found["metrics"] = job.judge.facts()
    job.config = found
    write_json(job.path / "config.json", found)


def _finish(job: DriftJob) -> None:
    files, ui = job.files, job.ui
    rows = files.write()
    job.summary = write_summary(files, rows, job.judge.notes, ui)
    write_json(job.path / "timing.json", times(files, job.timing))
    status = "failed" if files.failed else "complete"
    _write_config(job, status)
    began = time.perf_counter()
    take_detection(job.settings.detection, job.path)
    write_pictures(job.path, ui)
    job.timing["pictures_s"] = time.perf_counter() - began
    write_json(job.path / "timing.json", times(files, job.timing))
    _write_logs(job)
    ui.say(f"results: {job.path}")
    if not files.failed:  # else the parts stay: the same command tries the failed cells again
        files.folder.finish()


def _check(job: DriftJob) -> None:
    if job.files.failed:
        key, sentence = next(iter(job.files.failed.items()))
        raise CellsFailed(
            f"{len(job.files.failed)} of {len(job.files.cells)} cells failed, the others are kept "
            f"in {job.path}; the first, {key}: {sentence}",
            document(job),
        )


def _leave(job: DriftJob, status: str) -> None:
    if job.files.write():
        job.ui.say(f"what was finished is kept in {job.path}; the same command resumes")
    write_json(job.path / "timing.json", times(job.files, job.timing))
    _write_config(job, status)
    _write_logs(job)


def _write_logs(job: DriftJob) -> None:
    found = times(job.files, job.timing)
    shown = {key: value for key, value in found.items() if key not in ("cells", "metrics")}
    write_logs(job.files.folder, job.ui.log, shown)


def document(job: DriftJob) -> dict[str, Any]:
    """What ``--json`` prints."""
    found: dict[str, Any] = finite(
        {
            "folder": str(job.path),
            **job.summary,
            "timing": times(job.files, job.timing),
        }
    )
    return found
