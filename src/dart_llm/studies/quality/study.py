"""The study ``bench quality``: the share of GRIFFIN's gap to dense that each method closes.

The tasks are ``continuation`` and ``shift``, where the topic changes.  The untouched model, GRIFFIN
and all variants are measured first.  Then GRIFFIN is measured again to match each
measurement of another variant: at the sparsity that the variant achieved, and at the sparsity at
which GRIFFIN reads as many bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dart_llm.evaluation.tasks import SHIFT
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.store import SCHEMA
from dart_llm.experiments.study import Unit
from dart_llm.experiments.variants import DENSE, Variant
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table
from dart_llm.reporting.words import dtype_text, file_text
from dart_llm.settings import LOADING
from dart_llm.studies.quality import gaps
from dart_llm.studies.quality.settings import QualitySettings
from dart_llm.studies.sweep.grid import check_cells
from dart_llm.studies.sweep.study import MeasureStudy


class QualityStudy(MeasureStudy[QualitySettings]):
    """A unit is a cell: a method at one sparsity on one task.

    Raises ``ConfigError`` and ``UnknownName`` before a model is loaded, if possible.
    """

    def __init__(self, settings: QualitySettings, ui: Ui) -> None:
        self.variants = settings.variant_list()
        """The variants, GRIFFIN first."""
        self.digests = Digests()
        cells = [cell for kind in settings.tasks for cell in self._cells(settings, kind)]
        check_cells(cells)
        super().__init__(settings, ui, cells)

    # cells

    def _cells(self, settings: QualitySettings, kind: str) -> Iterator[Cell]:
        """The cells of a task, except those of GRIFFIN at matched sparsities."""
        base = self._dense(settings, kind)
        yield base
        for variant in self.variants:
            if kind == SHIFT or not variant.oracle:  # an oracle needs a topic change
                for sparsity in settings.sparsities:
                    yield self._pruned(settings, base, variant, sparsity)

    def _dense(self, settings: QualitySettings, kind: str) -> Cell:
        loading = {name: getattr(settings, name) for name in LOADING}
        task, options = settings.task(kind), settings.options()
        cell = Cell(settings.model, DENSE, task, seed=settings.seed, options=options, **loading)
        return replace(cell, inputs=self.digests.of(cell))

    def _pruned(
        self, settings: QualitySettings, base: Cell, variant: Variant, sparsity: float
    ) -> Cell:
        config = variant.at(sparsity).to_dict()
        fields = ("method", "sparsity", "seed")
        calibration = variant.config.calibration
        cell = replace(
            base,
            method=variant.config.method,
            name=f"{variant.label}@{sparsity:g}",
            sparsity=sparsity,
            seed=variant.config.seed,
            overrides={k: v for k, v in config.items() if k not in fields and v is not None},
            options=replace(base.options, oracle=variant.oracle),
            calibration=settings.calibration
            if calibration and calibration.source == "text"
            else None,
        )
        return replace(cell, inputs=self.digests.of(cell))

    def units(self) -> Iterator[Unit]:
        yield from self.units_of(self.cells)
        matched = [cell for cell in self._matched() if cell not in self.cells]
        self.cells = (*self.cells, *matched)
        yield from self.units_of(matched)

    def _matched(self) -> Iterator[Cell]:
        """The cells of GRIFFIN at matched sparsities at which it has not been measured yet."""
        settings, (griffin, *others) = self.settings, self.variants
        for group in gaps.groups(self.lines):
            wanted = {
                sparsity
                for variant in others
                for requested in settings.sparsities
                if group.has(variant.label, [requested])
                for sparsity in gaps.matched_sparsities(group.at(variant.label, requested)).values()
            }
            base = self._dense(settings, group.task)
            for sparsity in sorted(wanted - {0.0, *settings.sparsities}):
                yield self._pruned(settings, base, griffin, sparsity)

    # results

    def summarise(self) -> dict[str, Any]:
        super().summarise()
        settings, labels = self.settings, [variant.label for variant in self.variants]
        amounts = (settings.sparsities, settings.pooled, settings.seed)
        return {
            "schema": SCHEMA,
            "sparsities": list(settings.sparsities),
            "pool": list(settings.pooled),
            "variants": {variant.label: variant.config.to_dict() for variant in self.variants},
            "checkpoint": self.config_extra()["checkpoint"],
            "rows": gaps.make_rows(self.lines, labels, *amounts),
        }

    @property
    def about(self) -> str:
        """Model, texts and slice sizes, for captions."""
        settings, facts = self.settings, self.summary["checkpoint"]
        model = f"{facts['name']} ({file_text(facts)}, {dtype_text(facts)})"
        sizes = f"{settings.prompt_tokens} prompt + {settings.tokens} scored tokens"
        return f"{model}, slices of {', '.join(settings.text)}, set {settings.set}; {sizes}"

    def tables(self) -> Sequence[Table]:
        return gaps.tables(self.summary["rows"], self.about)

    def sentences(self) -> Sequence[str]:
        return gaps.headlines(self.summary["rows"])

    def figures(self) -> Iterable[Plot]:
        return gaps.plots(self.summary["rows"], self.about)

    def write_page(self) -> Path | None:
        return None
