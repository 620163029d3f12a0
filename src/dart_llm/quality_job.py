"""The job of ``dart-llm bench quality``: every model in turn, then tables and a plot; resumable."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dart_llm import quality_plot, quality_table, quality_texts
from dart_llm.calibration_text import check_disjoint
from dart_llm.cell import Cell
from dart_llm.cell_inputs import Digests
from dart_llm.checkpoint import checkpoint_facts
from dart_llm.job_common import config_document, load_model
from dart_llm.job_ending import complete, kept, leave, write_plots
from dart_llm.quality_slices import LEAD, SHIFT, pairs
from dart_llm.quality_study import Plan, Study
from dart_llm.quality_summary import summarise
from dart_llm.quality_texts import Source
from dart_llm.quality_variants import DENSE
from dart_llm.results import ResultsFolder, open_folder, write_json, write_lines
from dart_llm.settings_quality import QualitySettings
from dart_llm.ui import Ui


@dataclass
class QualityJob:
    """One job in progress; ``lines`` are those of results.jsonl, ``found`` is quality.json."""

    settings: QualitySettings
    ui: Ui
    folder: ResultsFolder
    sources: tuple[Source, ...]
    plan: Plan
    identity: dict[str, Any]
    model: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    slices: dict[str, int] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    timing: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder.path


def run_quality(settings: QualitySettings, ui: Ui, fresh: bool = False) -> QualityJob:
    """Measure every model; an interruption or an error keeps what was measured.

    Raises ``ConfigError`` and ``UnknownName`` before a model is loaded where that is possible.
    """
    job = _open(settings, ui, fresh)
    models = ", ".join(settings.names())
    with kept(job, lambda status: _leave(job, status), models, settings.dtype) as took:
        _write_config(job, "running")
        for name, model in settings.names().items():
            _study(job, name, model)
        took()
        _finish(job)
    return job


def _leave(job: QualityJob, status: str) -> None:
    leave(job, status, lambda status: _write_config(job, status), bool(job.lines))


def _open(settings: QualitySettings, ui: Ui, fresh: bool) -> QualityJob:
    variants = settings.variant_list()
    if any(one.config.calibration is not None for one in variants):
        check_disjoint(settings.calibration, dict.fromkeys(settings.text))
    sources = quality_texts.sources(settings.text)
    digests, inputs = Digests(), dict[str, Any]()
    for name, model in settings.names().items():
        cell = Cell(model, DENSE, "quality", calibration=settings.calibration)
        inputs[name] = digests.of(cell)
    inputs["texts"] = {source.label: source.digest for source in sources}
    presets = {one.label: one.config.to_dict() for one in variants}
    asked = settings.model_dump(mode="json")
    identity = {"kind": "quality", **asked, "inputs": inputs, "presets": presets}
    folder = open_folder(Path(settings.results_dir), settings.experiment, identity, fresh)
    plan = Plan(
        settings.cell_list(),
        settings.sparsity_list(),
        variants,
        settings.shape,
        settings.calibration,
        settings.cache_dir,
    )
    return QualityJob(settings, ui, folder, sources, plan, identity)


def _study(job: QualityJob, name: str, model: str) -> None:
    """Load one model and measure it; its lines are kept, also when it is interrupted."""
    settings, plan, job.model = job.settings, job.plan, None
    job.model, tokenizer, seconds = load_model(settings.base(model), job.ui)
    job.timing.setdefault("load_s", {})[name] = seconds
    job.checkpoints[name] = dict(checkpoint_facts(job.model))
    _write_config(job, "running")
    read = pairs(
        job.sources,
        settings.set,
        tokenizer,
        plan.shape,
        settings.slices,
        SHIFT in plan.cells,
    )
    job.slices[name] = len(read)
    study = Study(name, job.model, tokenizer, plan, read, job.folder, job.ui)
    try:
        study.run()
    finally:
        job.lines += study.lines
        own = {f"{name}, {label}": seconds for label, seconds in study.seconds.items()}
        job.timing.setdefault("variants_s", {}).update(own)
        write_lines(job.path / "results.jsonl", job.lines)


def _write_config(job: QualityJob, status: str) -> None:
    found = config_document("quality", job.identity, {}, job.model, status, job.config)
    found["checkpoints"] = job.checkpoints
    if len(job.settings.model) > 1:
        found["checkpoint"] = None  # which one would be chance
    found["cells"] = [
        {"model": name, "method": one.label, "sparsity": sparsity, "task": f"quality:{cell}"}
        for name in job.settings.names()
        for cell in job.plan.cells
        for one in (job.plan.variants[0], *job.plan.measured(cell))
        for sparsity in job.plan.sparsities
    ]
    job.config = found
    write_json(job.path / "config.json", found)


def _finish(job: QualityJob) -> None:
    job.found = summarise(job.lines, _asked(job))
    write_json(job.path / "quality.json", job.found)
    write_json(job.path / "timing.json", job.timing)
    quality_table.write(job.path, job.found)
    for table in quality_table.rich_tables(job.found):
        job.ui.table(table)
    for line in (*quality_table.sentences(job.found), *job.found["notes"]):
        job.ui.say(line)
    write_plots(job, quality_plot.make(job.found))
    complete(job, lambda status: _write_config(job, status))


def _asked(job: QualityJob) -> dict[str, Any]:
    """What ``quality_summary.summarise`` is told beside the lines."""
    settings, plan = job.settings, job.plan
    return {
        "set": settings.set,
        "seed": settings.seed,
        "prompt_tokens": settings.prompt_tokens,
        "tokens": settings.tokens,
        "lead_tokens": LEAD,
        "sparsities": list(plan.sparsities),
        "pool": list(settings.pool_list()),
        "texts": [
            {"label": one.label, "documents": len(one.documents), "sha256": one.digest}
            for one in job.sources
        ],
        "variants": {one.label: one.config.to_dict() for one in plan.variants},
        "slices": job.slices,
        "checkpoints": job.checkpoints,
    }


def document(job: QualityJob) -> dict[str, Any]:
    """What ``--json`` prints: quality.json with its folder, versions and times."""
    known = {name: job.config[name] for name in ("versions", "machine", "git")}
    return {"folder": str(job.path), **job.found, **known, "timing": job.timing}
