"""`bench quality`: settings, variants, slices through every method.

One model through every slice of ``dart-llm bench quality``; what is finished is not repeated.

First the untouched model, GRIFFIN and all variants; then GRIFFIN at the sparsities that those
achieved and at their shares of bytes, each distinct one once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dart_llm.data import documents
from dart_llm.data.documents import Source, check_disjoint
from dart_llm.errors import ConfigError
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import ResultsFolder, open_folder
from dart_llm.experiments.study import (
    complete,
    config_document,
    leave,
    load_model,
    resumable,
    write_plots,
)
from dart_llm.experiments.variants import DENSE, GRIFFIN, Variant
from dart_llm.files import write_json, write_lines
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length
from dart_llm.reporting.console import ProgressLog, Ui
from dart_llm.session.prepare import PreparedMethod, UnitStore, prepare
from dart_llm.session.run import Run
from dart_llm.studies.quality import report
from dart_llm.studies.quality.gaps import Lines, account, summarise
from dart_llm.studies.quality.settings import QualitySettings
from dart_llm.studies.quality.slices import (
    LEAD,
    SHIFT,
    Pair,
    Part,
    Shape,
    pairs,
    score_shared_prompt,
    score_single,
)


@dataclass(frozen=True)
class Plan:
    """What is measured on every model.  ``variants``: GRIFFIN is the first of them."""

    cells: tuple[str, ...]
    sparsities: tuple[float, ...]
    variants: tuple[Variant, ...]
    shape: Shape
    calibration: str | None = None
    cache_dir: str | None = None

    def measured(self, cell: str) -> list[Variant]:
        """The variants of a cell, GRIFFIN left out: in one without a moment none is told it."""
        return [one for one in self.variants[1:] if cell == SHIFT or not one.oracle]


@dataclass
class Study:
    """One loaded model, called ``name`` in the results, with its slices."""

    name: str
    model: Any
    tokenizer: Any
    plan: Plan
    pairs: Sequence[Pair]
    parts: UnitStore
    ui: Ui
    lines: list[dict[str, Any]] = field(default_factory=list)
    """Lines of results.jsonl."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By variant."""
    _ready: dict[tuple[str, float], tuple[PreparedMethod, Run | None]] = field(default_factory=dict)

    def run(self) -> None:
        """Measure everything; raises ``ConfigError`` for slices longer than the model's context."""
        longest = context_length(self.model)
        if longest is not None and self.plan.shape.longest > longest:
            raise ConfigError(
                f"slices of up to {self.plan.shape.longest} tokens are longer than the context of "
                f"{self.name}, {longest}: give fewer --prompt-tokens or --tokens"
            )
        asked = [0.0, *self.plan.sparsities]
        first = dict.fromkeys(self.plan.cells, asked)
        self._measure("methods", first, self.plan.measured)
        self._measure("GRIFFIN at equal sparsity and bytes", self.yardsticks(), lambda cell: [])

    def yardsticks(self) -> dict[str, list[float]]:
        """GRIFFIN's sparsities by cell that the variants ask for and that were not measured."""
        lines = Lines(self.lines)
        found: dict[str, list[float]] = {}
        for cell in self.plan.cells:
            equal = {
                sparsity
                for variant in self.plan.measured(cell)
                for asked in self.plan.sparsities
                for sparsity in account(
                    lines.at(self.name, cell, variant.label, asked)
                ).yardsticks.values()
            }
            found[cell] = sorted(equal - {0.0, *self.plan.sparsities})
        return found

    def _measure(
        self,
        what: str,
        griffin: Mapping[str, Sequence[float]],
        variants: Callable[[str], Sequence[Variant]],
    ) -> None:
        cells, asked = self.plan.cells, self.plan.sparsities
        others = [(c, v, s) for c in cells for v in variants(c) for s in asked]
        total = (sum(map(len, griffin.values())) + len(others)) * len(self.pairs)
        news = ProgressLog(
            self.ui.say if not self.ui.live else lambda text: None, total, "measurements"
        )
        with self.ui.progress(f"{self.name}, {what}", total, told=True) as advance:
            for pair in self.pairs:
                for _ in self._slice(pair, griffin, others):
                    news.done()
                    advance(1)

    def _slice(
        self,
        pair: Pair,
        griffin: Mapping[str, Sequence[float]],
        others: Sequence[tuple[str, Variant, float]],
    ) -> Iterator[None]:
        """Every measurement of one slice, kept as soon as it is made."""
        wanted = [(cell, s) for cell in griffin for s in griffin[cell]]
        todo = [one for one in wanted if self._part(*_shared(*one), pair) is None]
        if todo:
            config = self.plan.variants[0].config
            for cell, sparsity, part in score_shared_prompt(self.model, config, pair, todo):
                self.parts.save_part(self._key(*_shared(cell, sparsity), pair), part)
        for one in wanted:
            self._keep(*_shared(*one), pair)
            yield
        for cell, variant, sparsity in others:
            place = (cell, variant.label, sparsity)
            if self._part(*place, pair) is None:
                part = score_single(*self._prepared(variant, sparsity), cell, pair)
                self.parts.save_part(self._key(*place, pair), part)
            self._keep(*place, pair)
            yield

    def _prepared(self, variant: Variant, sparsity: float) -> tuple[PreparedMethod, Run | None]:
        """The variant made ready once; no run where one is told the moment: each has its own."""
        key = (variant.label, sparsity)
        if key not in self._ready:
            candidate = prepare(
                self.model,
                self.tokenizer,
                variant.at(sparsity),
                self.plan.calibration,
                self.plan.cache_dir,
                self.ui.say,
            )
            self._ready[key] = (candidate, None if variant.oracle else candidate.run())
        return self._ready[key]

    def _key(self, cell: str, label: str, sparsity: float, pair: Pair) -> str:
        return f"{self.name}|{cell}|{label}@{sparsity:g}|{pair.first.id}"

    def _part(self, cell: str, label: str, sparsity: float, pair: Pair) -> Part | None:
        found: Part | None = self.parts.part(self._key(cell, label, sparsity, pair))
        return found

    def _keep(self, cell: str, label: str, sparsity: float, pair: Pair) -> None:
        """The part becomes a line; times stay out of it, so that equal runs give equal lines."""
        part = self._part(cell, label, sparsity, pair)
        assert part is not None
        self.seconds[label] = self.seconds.get(label, 0.0) + part["seconds"]
        self.lines.append(
            {
                "model": self.name,
                "cell": cell,
                "variant": label,
                "sparsity": sparsity,
                "slice": pair.first.id,
                "source": pair.first.source,
                **{name: value for name, value in part.items() if name != "seconds"},
            }
        )


def _shared(cell: str, sparsity: float) -> tuple[str, str, float]:
    """Where a part of the untouched model (sparsity 0) or of GRIFFIN is kept."""
    return cell, GRIFFIN if sparsity else DENSE, sparsity


# The job of ``dart-llm bench quality``: every model in turn, then tables and a plot; resumable.


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
    with resumable(job, lambda status: _leave(job, status), models, settings.dtype) as took:
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
    sources = documents.sources(settings.text)
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
    report.write(job.path, job.found)
    for table in report.rich_tables(job.found):
        job.ui.table(table)
    for line in (*report.sentences(job.found), *job.found["notes"]):
        job.ui.say(line)
    write_plots(job, report.make(job.found))
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
