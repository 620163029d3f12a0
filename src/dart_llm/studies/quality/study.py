"""`bench quality`: every slice through every method, on one model after the other.

First the untouched model, GRIFFIN and all variants; then GRIFFIN at the sparsities that those
achieved and at their shares of bytes, each distinct one once; last the dense model in fewer bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dart_llm.data import documents
from dart_llm.data.documents import check_disjoint
from dart_llm.errors import ConfigError
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.study import Study, Unit, load_model
from dart_llm.experiments.variants import DENSE, GRIFFIN, Variant
from dart_llm.files import write_lines
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import context_length
from dart_llm.models.quantised import Quantised, round_weights_to
from dart_llm.reporting.console import Ui
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import Table
from dart_llm.session.prepare import prepare
from dart_llm.session.run import BoundMethod, Run
from dart_llm.settings import LOADING
from dart_llm.studies.quality import report
from dart_llm.studies.quality.gaps import groups, summarise, yardsticks
from dart_llm.studies.quality.settings import LEAD, SHIFT, QualitySettings, Rounding
from dart_llm.studies.quality.slices import (
    Pair,
    Part,
    pairs,
    score_rounded,
    score_shared_prompt,
    score_single,
)


class QualityStudy(Study[QualitySettings]):
    """A unit is one slice, measured in one way.

    Raises ``ConfigError`` and ``UnknownName`` before a model is loaded where that is possible.
    """

    kind = "quality"
    document = "quality.json"

    def __init__(self, settings: QualitySettings, ui: Ui) -> None:
        super().__init__(settings, ui)
        self.variants = settings.variant_list()
        """GRIFFIN is the first of them."""
        self.roundings = settings.rounding_list()
        self.in_bits: Quantised | None = None
        """The dense model in the bits that are being measured."""
        self.cells, self.sparsities = settings.cell_list(), settings.sparsity_list()
        if any(variant.config.calibration is not None for variant in self.variants):
            check_disjoint(settings.calibration, dict.fromkeys(settings.text))
        self.sources = documents.sources(settings.text)
        self.checkpoints: dict[str, dict[str, Any]] = {}
        self.slices: dict[str, int] = {}
        self.prepared: dict[tuple[str, float], tuple[BoundMethod, Run | None]] = {}
        self.shared: Iterator[tuple[str, float, Part]] = iter(())
        """Parts of one slice that follow from one pass over its prompt."""

    @property
    def model_name(self) -> str:
        return ", ".join(self.settings.names())

    def inputs(self) -> Mapping[str, Any]:
        digests = Digests()
        cell = Cell("", DENSE, "quality", calibration=self.settings.calibration)
        cell = replace(cell, **{name: getattr(self.settings, name) for name in LOADING})
        models = {
            name: digests.of(replace(cell, model=model))
            for name, model in self.settings.names().items()
        }
        return {**models, "texts": {source.label: source.digest for source in self.sources}}

    def identify(self) -> dict[str, Any]:
        presets = {variant.label: variant.config.to_dict() for variant in self.variants}
        return {**super().identify(), "presets": presets}

    def config_extra(self) -> dict[str, Any]:
        extra: dict[str, Any] = {"checkpoints": self.checkpoints}
        if len(self.settings.model) > 1:
            extra["checkpoint"] = None  # which one would be chance
        extra["cells"] = [
            {"model": name, "method": one.label, "sparsity": sparsity, "task": f"quality:{cell}"}
            for name in self.settings.names()
            for cell in self.cells
            for one in (self.variants[0], *self.measured(cell))
            for sparsity in self.sparsities
        ]
        return extra

    def load(self) -> None:
        """Nothing: the models are loaded one after the other."""

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        try:
            yield
        finally:
            write_lines(self.path / "results.jsonl", self.lines)

    def measured(self, cell: str) -> list[Variant]:
        """The variants of a cell, GRIFFIN left out: in one without a moment none is told it."""
        return [one for one in self.variants[1:] if cell == SHIFT or not one.oracle]

    # units

    def units(self) -> Iterator[Unit]:
        for name, model in self.settings.names().items():
            slices = self._load(name, model)
            asked = {cell: [0.0, *self.sparsities] for cell in self.cells}
            yield from self._pass(name, "methods", slices, asked, others=True)
            equal = self.equal_sparsities(name)
            yield from self._pass(name, "GRIFFIN at equal sparsity and bytes", slices, equal)
            yield from self._rounded(name, slices)

    def _load(self, name: str, model: str) -> Sequence[Pair]:
        """The model's slices; raises ``ConfigError`` for slices longer than its context."""
        settings = self.settings
        self.model, self.prepared = None, {}
        one = settings.model_copy(update={"model": model})
        self.model, self.tokenizer, seconds = load_model(one, self.ui)
        self.timing.setdefault("load_s", {})[name] = seconds
        self.checkpoints[name] = dict(checkpoint_facts(self.model))
        shift = SHIFT in self.cells
        shape = settings.shape
        slices = pairs(self.sources, settings.set, self.tokenizer, shape, settings.slices, shift)
        self.slices[name] = len(slices)
        longest = context_length(self.model)
        if longest is not None and shape.longest > longest:
            raise ConfigError(
                f"slices of up to {shape.longest} tokens are longer than the context of "
                f"{name}, {longest}: give fewer --prompt-tokens or --tokens"
            )
        return slices

    def equal_sparsities(self, name: str) -> dict[str, list[float]]:
        """GRIFFIN's sparsities by cell that the variants ask for and that were not measured."""
        equal: dict[str, list[float]] = {}
        for group in groups(line for line in self.lines if line["model"] == name):
            wanted = {
                sparsity
                for variant in self.measured(group.cell)
                for asked in self.sparsities
                for sparsity in yardsticks(group.at(variant.label, asked)).values()
            }
            equal[group.cell] = sorted(wanted - {0.0, *self.sparsities})
        return equal

    def _pass(
        self,
        name: str,
        what: str,
        slices: Sequence[Pair],
        griffin: Mapping[str, Sequence[float]],
        others: bool = False,
    ) -> Iterator[Unit]:
        """All measurements of every slice: dense and GRIFFIN, and with ``others`` the variants."""
        variants = {cell: self.measured(cell) if others else [] for cell in self.cells}
        each = sum(len(griffin[c]) + len(variants[c]) * len(self.sparsities) for c in self.cells)
        with self.ui.progress(f"{name}, {what}", each * len(slices)) as advance:
            for pair in slices:
                units = [_unit(name, c, None, s, pair) for c in griffin for s in griffin[c]]
                wanted = [one.data[0] for one in units if self.finished(one) is None]
                if wanted:
                    places = [(line["cell"], line["sparsity"]) for line in wanted]
                    config = self.variants[0].config
                    self.shared = score_shared_prompt(self.model, config, pair, places)
                units += [
                    _unit(name, cell, variant, sparsity, pair)
                    for cell in self.cells
                    for variant in variants[cell]
                    for sparsity in self.sparsities
                ]
                for unit in units:
                    yield unit
                    advance(1)

    def _rounded(self, name: str, slices: Sequence[Pair]) -> Iterator[Unit]:
        """The dense model rounded to each number of bits, one after the other."""
        total = len(self.roundings) * len(self.cells) * len(slices)
        with self.ui.progress(f"{name}, dense with fewer bits", total) as advance:
            for rounding in self.roundings:
                self.in_bits = None
                for cell in self.cells:
                    for pair in slices:
                        yield _unit(name, cell, rounding, 0.0, pair)
                        advance(1)
            self.in_bits = None

    def compute(self, unit: Unit) -> Part:
        line, variant, pair = unit.data
        if isinstance(variant, Rounding):
            if self.in_bits is None:
                self.in_bits = round_weights_to(self.model, variant.bits, variant.ffn)
            return score_rounded(self.in_bits, line["cell"], pair)
        if variant is None:
            cell, sparsity, part = next(self.shared)
            assert (cell, sparsity) == (line["cell"], line["sparsity"])
            return part
        return score_single(*self._prepare(variant, line["sparsity"]), line["cell"], pair)

    def _prepare(self, variant: Variant, sparsity: float) -> tuple[BoundMethod, Run | None]:
        """The variant made ready once; no run where one is told the moment: each has its own."""
        key = (variant.label, sparsity)
        if key not in self.prepared:
            where = (self.settings.calibration, self.settings.cache_dir, self.ui.say)
            method = prepare(self.model, self.tokenizer, variant.at(sparsity), *where)
            self.prepared[key] = (method, None if variant.oracle else method.run())
        return self.prepared[key]

    def take(self, unit: Unit, value: Part) -> None:
        """The part becomes a line; times stay out of it, so that equal runs give equal lines."""
        line = unit.data[0]
        seconds = self.timing.setdefault("variants_s", {})
        label = f"{line['model']}, {line['variant']}"
        seconds[label] = seconds.get(label, 0.0) + value["seconds"]
        self.lines.append({**line, **{k: v for k, v in value.items() if k != "seconds"}})

    # what is made of them

    def summarise(self) -> dict[str, Any]:
        settings = self.settings
        asked = {
            "set": settings.set,
            "seed": settings.seed,
            "prompt_tokens": settings.prompt_tokens,
            "tokens": settings.tokens,
            "lead_tokens": LEAD,
            "sparsities": list(self.sparsities),
            "pool": list(settings.pool_list()),
            "texts": [
                {"label": one.label, "documents": len(one.documents), "sha256": one.digest}
                for one in self.sources
            ],
            "variants": {one.label: one.config.to_dict() for one in self.variants},
            "roundings": [one.label for one in self.roundings],
            "slices": self.slices,
            "checkpoints": self.checkpoints,
        }
        return summarise(self.lines, asked)

    def tables(self) -> Sequence[Table]:
        return [report.csv_table(self.summary), *report.tables(self.summary)]

    def sentences(self) -> Sequence[str]:
        return [*report.sentences(self.summary), *self.summary["notes"]]

    def markdown(self) -> str:
        return report.markdown(self.summary)

    def figures(self) -> Iterable[Plot]:
        return report.make(self.summary)

    def answer(self) -> dict[str, Any]:
        known = {name: self.config[name] for name in ("versions", "machine", "git")}
        return {"folder": str(self.path), **self.summary, **known, "timing": self.timing}


def _unit(
    model: str, cell: str, variant: Variant | Rounding | None, sparsity: float, pair: Pair
) -> Unit:
    """One measurement: how its line begins, the variant and the pair.

    ``variant`` None: the untouched model (sparsity 0), or GRIFFIN.
    """
    label = variant.label if variant else GRIFFIN if sparsity else DENSE
    line = {
        "model": model,
        "cell": cell,
        "variant": label,
        "sparsity": sparsity,
        "slice": pair.first.id,
        "source": pair.first.source,
    }
    key = f"{model}|{cell}|{label}@{sparsity:g}|{pair.first.id}"
    return Unit(key, data=(line, variant, pair))
