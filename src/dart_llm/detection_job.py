"""The job of ``dart-llm detect``: passages through the dense model, tables, plots; resumable."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dart_llm import detection_inputs as inputs
from dart_llm import detection_plot, detection_summary, detection_table
from dart_llm.arch import context_length
from dart_llm.cell_inputs import Digests
from dart_llm.checkpoint import checkpoint_facts
from dart_llm.detection_study import Study, plan, study
from dart_llm.job_common import config_document, load_model
from dart_llm.job_ending import complete, kept, leave, write_plots
from dart_llm.read_points import EAGER, layer_count
from dart_llm.recording import needs_eager
from dart_llm.results import ResultsFolder, open_folder, write_json, write_lines
from dart_llm.settings_detect import DetectSettings, identity
from dart_llm.ui import Ui

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
    passages = inputs.passages(settings.passages, settings.limit)
    sums = {"passages": inputs.digest(passages), **Digests().of_model(settings.model)}
    known = identity(settings, sums)
    folder = open_folder(Path(settings.results_dir), settings.experiment, known, fresh)
    job = DetectJob(settings, ui, folder, known)
    with kept(job, lambda status: _leave(job, status), settings.model, settings.dtype) as took:
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
    job.found = detection_summary.document(job.rows, job.identity, facts, layer_count(job.model))
    if needs_eager(job.settings.signal_names()):
        job.found["notes"] = [EAGER_NOTE]
    write_json(job.path / "detection.json", job.found)
    write_json(job.path / "timing.json", job.timing)
    detection_table.write(job.path, job.found)
    job.ui.table(detection_table.rich_table(job.found))
    job.ui.say(detection_table.conclusion(job.found))
    write_plots(job, detection_plot.make(job.found))
    complete(job, lambda status: _write_config(job, status))


def document(job: DetectJob) -> dict[str, Any]:
    """What ``--json`` prints: detection.json with its folder and times."""
    return {"folder": str(job.path), **job.found, "timing": job.timing}
