"""The job of ``dart-llm inspect``: look at a model and two texts, write a results folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError, MissingExtra
from dart_llm.experiments.artifacts import saver
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import ResultsFolder, open_folder
from dart_llm.experiments.study import complete, config_document, leave, load_model, resumable
from dart_llm.files import write_csv, write_json, write_text
from dart_llm.reporting.console import Ui
from dart_llm.studies.inspection import analyses
from dart_llm.studies.inspection.analyses import neurons, overlap, space
from dart_llm.studies.inspection.readings import Study, weights
from dart_llm.studies.inspection.report import sentences, sheets
from dart_llm.studies.inspection.settings import InspectSettings
from dart_llm.studies.inspection.texts import InspectText, inspect_texts

KIND = "inspect"

LONGEST = 40
"""Rows that a table may have on the terminal."""


@dataclass
class InspectJob:
    """One inspection in progress; ``sections`` is what inspect.json holds beside the texts."""

    settings: InspectSettings
    ui: Ui
    folder: ResultsFolder
    texts: Sequence[InspectText]
    identity: dict[str, Any]
    sections: dict[str, Any] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)
    model: Any = None

    @property
    def path(self) -> Path:
        return self.folder.path


def run_inspect(
    settings: InspectSettings, what: Sequence[str], ui: Ui, fresh: bool = False
) -> InspectJob:
    """Look at everything in ``what`` (empty: all that the texts allow).

    An interruption or an error keeps the sections that were finished, and is raised again.
    """
    wanted = settings.chosen(what)
    texts = inspect_texts(settings)
    inputs = Digests().of_settings(settings)
    inputs |= {f"text {text.label}": text.sha256 for text in texts}
    identity = {"kind": KIND, **settings.model_dump(mode="json"), "what": wanted, "inputs": inputs}
    folder = open_folder(Path(settings.results_dir), settings.experiment, identity, fresh)
    job = InspectJob(settings, ui, folder, texts, identity)
    with resumable(job, lambda status: _leave(job, status), settings.model, settings.dtype) as took:
        _write_config(job, "running")
        job.model, tokenizer, job.timing["load_s"] = load_model(settings, ui)
        _write_config(job, "running")
        _inspect(job, tokenizer, wanted, bool(what))
        took()
        _finish(job)
    return job


def _leave(job: InspectJob, status: str) -> None:
    leave(job, status, lambda status: _write_config(job, status), bool(job.sections))


def _inspect(job: InspectJob, tokenizer: Any, wanted: Sequence[str], named: bool) -> None:
    study = Study(job.model, tokenizer, job.settings, job.texts)
    job.tokens = [len(ids) for ids in study.ids]
    wanted = [name for name in wanted if not _left_out(job, study, name, named)]
    _save_activations(job, study)
    for name in wanted:
        found, begin = job.folder.part(name), time.perf_counter()
        if found is None:
            with job.ui.status(f"inspecting {name}"):
                found = SECTIONS[name](study)
            job.folder.save_part(name, found)
        job.timing.setdefault("inspect_s", {})[name] = time.perf_counter() - begin
        job.sections[name] = found
        write_json(job.path / "inspect.json", document(job))


def _left_out(job: InspectJob, study: Study, name: str, named: bool) -> bool:
    """Whether a section that was not asked for by name cannot be made of these texts."""
    try:
        if name in ("overlap", "ablation"):
            study.selector  # noqa: B018 - raises where the method does not choose by a text
        if name == "ablation":
            analyses.check(study)
    except ConfigError as error:
        if named:
            raise
        job.ui.say(f"no {name}: {error}")
        return True
    return False


def _save_activations(job: InspectJob, study: Study) -> None:
    """Read the texts at once when their activations are to be kept: other sections reuse it."""
    keep = saver(job.settings, job.model, job.path, max(job.tokens, default=0))
    if keep is None:
        return
    if not job.texts:
        raise ConfigError("--save-activations keeps those of a text: give --prompt or --passage")
    keep.announce(len(job.texts), job.ui.say)
    study.saver = keep
    for number in range(len(job.texts)):
        study.reading(number)


def _layers(study: Study) -> dict[str, Any]:
    layers = [reading.impact for reading in study.reading(0)]
    return {"text": study.texts[0].label, "layers": layers}


def _weights(study: Study) -> dict[str, Any]:
    read = [reading.activations for reading in study.reading(0)] if study.texts else None
    text = study.texts[0].label if study.texts else None
    return {"weights": weights(study.view.blocks), "text": text, "activations": read}


SECTIONS: dict[str, Callable[[Study], dict[str, Any]]] = {
    "layers": _layers,
    "weights": _weights,
    "neurons": neurons,
    "overlap": overlap,
    "ablation": analyses.ablation,
    "space": space,
}


def document(job: InspectJob) -> dict[str, Any]:
    """inspect.json, and with the folder and the times what ``--json`` prints."""
    texts = [
        {**asdict(text), "sha256": text.sha256, "tokens_read": tokens}
        for text, tokens in zip(job.texts, job.tokens, strict=True)
    ]
    return {"texts": texts, "sentences": sentences(job.sections), "sections": dict(job.sections)}


def _write_config(job: InspectJob, status: str) -> None:
    prune = job.settings.prune_config().to_dict()
    job.config = config_document(KIND, job.identity, prune, job.model, status, job.config)
    write_json(job.path / "config.json", job.config)


def _finish(job: InspectJob) -> None:
    write_json(job.path / "timing.json", job.timing)
    found, told = sheets(job.sections), sentences(job.sections)
    for sheet in found:
        write_csv(job.path / f"{sheet.name}.csv", sheet.header, sheet.csv())
        if len(sheet.rows) <= LONGEST:
            job.ui.table(sheet.rich())
        else:
            job.ui.say(f"{sheet.caption}: {len(sheet.rows)} rows in {sheet.name}.csv")
    parts = [f"{sentence}\n" for sentence in told.values()]
    text = "\n".join([*parts, *(f"{sheet.markdown()}\n" for sheet in found)])
    write_text(job.path / "inspect.md", text)
    for sentence in told.values():
        job.ui.say(sentence)
    complete(job, lambda status: _write_config(job, status), lambda: _write_pages(job))


def _write_pages(job: InspectJob) -> None:
    from dart_llm.experiments.store import read
    from dart_llm.reporting import figures
    from dart_llm.studies.inspection import plots, report

    try:
        view = read(job.path)
        figures.save(job.path, plots.make(document(job), view.small_print))
    except MissingExtra as error:
        job.ui.say(f"no plots: {error}")
    job.ui.say(f"report: {report.write(job.path)}")
