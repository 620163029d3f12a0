"""`bench quality`: the tasks ``continuation`` and ``shift`` of a grid, and what each method closes
of GRIFFIN's gap to the dense model.

First the untouched model, GRIFFIN and all variants; then GRIFFIN at the sparsities that those
achieved and at their shares of bytes, each distinct one once; last the dense model in fewer bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dart_llm.data import documents
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.slices import LEAD
from dart_llm.experiments import comparison
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.study import Unit
from dart_llm.experiments.variants import DENSE, Variant
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table
from dart_llm.settings import LOADING
from dart_llm.studies.quality import report
from dart_llm.studies.quality.gaps import groups, matched_sparsities, summarise
from dart_llm.studies.quality.settings import SHIFT, QualitySettings
from dart_llm.studies.sweep.grid import check_cells
from dart_llm.studies.sweep.study import MeasureStudy


class QualityStudy(MeasureStudy[QualitySettings]):
    """A unit is one model, method and sparsity on one task.

    Raises ``ConfigError`` and ``UnknownName`` before a model is loaded where that is possible.
    """

    def __init__(self, settings: QualitySettings, ui: Ui) -> None:
        self.variants = settings.variant_list()
        """GRIFFIN is the first of them."""
        self.roundings = settings.rounding_list()
        self.digests, self.calibration_text = Digests(), settings.calibration
        cells = [
            cell for model in settings.names().values() for cell in self._cells(settings, model)
        ]
        check_cells(cells)
        super().__init__(settings, ui, cells)

    def identify(self) -> dict[str, Any]:
        presets = {variant.label: variant.config.to_dict() for variant in self.variants}
        return {**super().identify(), "presets": presets}

    def config_extra(self) -> dict[str, Any]:
        return {**super().config_extra(), "checkpoints": self._checkpoints()}

    def _checkpoints(self) -> dict[str, Any]:
        loaded = [line for line in reversed(self.lines) if line["checkpoint"]]
        checkpoints = {line["cell"]["model"]: line["checkpoint"] for line in loaded}
        return {name: checkpoints.get(model, {}) for name, model in self.settings.names().items()}

    # cells

    def _cells(self, settings: QualitySettings, model: str) -> Iterator[Cell]:
        """Everything of one model but GRIFFIN at equal sparsity and bytes."""
        for cell in settings.cells:
            base = self._cell(settings, model, cell)
            yield base
            for sparsity in settings.sparsities:
                yield self._pruned(base, self.variants[0], sparsity)
            for variant in self.variants[1:]:
                if cell == SHIFT or not variant.oracle:  # without a change there is no oracle
                    for sparsity in settings.sparsities:
                        yield self._pruned(base, variant, sparsity)
            for rounding in self.roundings:
                weights = f"{rounding.bits} {rounding.part}"
                yield replace(base, name=rounding.label, rounding=weights)

    def _cell(self, settings: QualitySettings, model: str, cell: str) -> Cell:
        """The untouched model on the task of ``cell``."""
        options = MeasureOptions(
            limit=settings.slices,
            prompt_tokens=settings.prompt_tokens,
            scored_tokens=settings.tokens,
            seed=settings.seed,
        )
        loading = {name: getattr(settings, name) for name in LOADING}
        task = settings.task(cell)
        plain = Cell(model, DENSE, task, seed=settings.seed, options=options, **loading)
        return replace(plain, inputs=self.digests.of(plain, plain.config()))

    def _pruned(self, base: Cell, variant: Variant, sparsity: float) -> Cell:
        config = variant.at(sparsity).to_dict()
        taken = ("method", "sparsity", "seed")
        cell = replace(
            base,
            method=variant.config.method,
            name=f"{variant.label}@{sparsity:g}",
            sparsity=sparsity,
            seed=variant.config.seed,
            overrides={k: v for k, v in config.items() if k not in taken and v is not None},
            options=replace(base.options, oracle=variant.oracle),
        )
        learns = variant.config.calibration
        if learns is not None and learns.source == "text":
            cell = replace(cell, calibration=self.calibration_text)
        return replace(cell, inputs=self.digests.of(cell))

    def units(self) -> Iterator[Unit]:
        for name, model in self.settings.names().items():
            of_model = [cell for cell in self.cells if cell.model == model]
            yield from self.units_of([cell for cell in of_model if not cell.rounding])
            equal = list(self._equal_cells(name, model))
            self.cells = (*self.cells, *(cell for cell in equal if cell not in self.cells))
            yield from self.units_of([*equal, *(cell for cell in of_model if cell.rounding)])

    def _equal_cells(self, name: str, model: str) -> Iterator[Cell]:
        """GRIFFIN where the variants are compared with it and it was not measured."""
        for group in groups(one for one in self.lines if one["cell"]["model"] == model):
            wanted = {
                sparsity
                for variant in self.variants[1:]
                for requested in self.settings.sparsities
                if group.has(variant.label, requested)
                for sparsity in matched_sparsities(group.at(variant.label, requested)).values()
            }
            base = self._cell(self.settings, model, group.cell)
            for sparsity in sorted(wanted - {0.0, *self.settings.sparsities}):
                yield self._pruned(base, self.variants[0], sparsity)

    # what is made of them

    def summarise(self) -> dict[str, Any]:
        self.rows = comparison.rows(self.lines)
        self._write_samples()
        settings = self.settings
        sources = documents.sources(settings.text)
        requested = {
            "set": settings.set,
            "seed": settings.seed,
            "prompt_tokens": settings.prompt_tokens,
            "tokens": settings.tokens,
            "lead_tokens": LEAD,
            "sparsities": list(settings.sparsities),
            "pool": list(settings.pooled),
            "texts": [
                {"label": one.label, "documents": len(one.documents), "sha256": one.digest}
                for one in sources
            ],
            "variants": {one.label: one.config.to_dict() for one in self.variants},
            "roundings": [one.label for one in self.roundings],
            "checkpoints": self._checkpoints(),
        }
        return summarise(self.lines, requested)

    def tables(self) -> Sequence[Table]:
        return [report.csv_table(self.summary), *report.tables(self.summary)]

    def sentences(self) -> Sequence[str]:
        return [*report.sentences(self.summary), *self.summary["notes"]]

    def markdown(self) -> str:
        return report.markdown(self.summary)

    def figures(self) -> Iterable[Plot]:
        return report.make(self.summary)

    def write_page(self) -> Path | None:
        return None

    def answer(self) -> dict[str, Any]:
        known = {name: self.config[name] for name in ("versions", "machine", "git")}
        return {**super().answer(), **known}
