"""The job of ``dart-llm drift``: methods side by side on prompts or passages; resumable."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dart_llm import drift_finish
from dart_llm.cell import Cell
from dart_llm.cell_inputs import Digests
from dart_llm.devices import memory_failure
from dart_llm.drift_cell import Bench, compute
from dart_llm.drift_files import StudyFiles
from dart_llm.drift_grid import DriftCell, Source, digest, expand, load_sources
from dart_llm.drift_methods import DENSE
from dart_llm.drift_metrics import Judge, load_judge
from dart_llm.errors import CellsFailed, DartError, ResultsError
from dart_llm.job_common import config_document, load_model, write_logs
from dart_llm.job_ending import kept
from dart_llm.loading import checkpoint_facts
from dart_llm.news import News
from dart_llm.results import ResultsFolder, finite, open_folder, write_json
from dart_llm.settings_drift import FORCED, DriftSettings
from dart_llm.ui import Ui


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
    with kept(job, lambda status: _leave(job, status), settings.model, settings.dtype) as took:
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
    news = News(ui.say if not ui.live else lambda text: None, len(todo))
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
    job.summary = drift_finish.write_summary(files, rows, job.judge.notes, ui)
    write_json(job.path / "timing.json", drift_finish.times(files, job.timing))
    status = "failed" if files.failed else "complete"
    _write_config(job, status)
    began = time.perf_counter()
    drift_finish.take_detection(job.settings.detection, job.path)
    drift_finish.write_pictures(job.path, ui)
    job.timing["pictures_s"] = time.perf_counter() - began
    write_json(job.path / "timing.json", drift_finish.times(files, job.timing))
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
    write_json(job.path / "timing.json", drift_finish.times(job.files, job.timing))
    _write_config(job, status)
    _write_logs(job)


def _write_logs(job: DriftJob) -> None:
    found = drift_finish.times(job.files, job.timing)
    shown = {key: value for key, value in found.items() if key not in ("cells", "metrics")}
    write_logs(job.files.folder, job.ui.log, shown)


def document(job: DriftJob) -> dict[str, Any]:
    """What ``--json`` prints."""
    found: dict[str, Any] = finite(
        {
            "folder": str(job.path),
            **job.summary,
            "timing": drift_finish.times(job.files, job.timing),
        }
    )
    return found
