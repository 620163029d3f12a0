"""One model through every slice of ``dart-llm bench quality``; what is finished is not repeated.

First the untouched model, GRIFFIN and all variants; then GRIFFIN at the sparsities that those
achieved and at their shares of bytes, each distinct one once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dart_llm.arch import context_length
from dart_llm.candidate import Candidate, Parts
from dart_llm.errors import ConfigError
from dart_llm.news import News
from dart_llm.prepare import prepare
from dart_llm.quality_lines import Lines, account
from dart_llm.quality_score import Part, alone, shared
from dart_llm.quality_slices import SHIFT, Pair, Shape
from dart_llm.quality_variants import DENSE, GRIFFIN, Variant
from dart_llm.session import Run
from dart_llm.ui import Ui


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
    parts: Parts
    ui: Ui
    lines: list[dict[str, Any]] = field(default_factory=list)
    """Lines of results.jsonl."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By variant."""
    _ready: dict[tuple[str, float], tuple[Candidate, Run | None]] = field(default_factory=dict)

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
        news = News(self.ui.say if not self.ui.live else lambda text: None, total, "measurements")
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
            for cell, sparsity, part in shared(self.model, config, pair, todo):
                self.parts.save_part(self._key(*_shared(cell, sparsity), pair), part)
        for one in wanted:
            self._keep(*_shared(*one), pair)
            yield
        for cell, variant, sparsity in others:
            place = (cell, variant.label, sparsity)
            if self._part(*place, pair) is None:
                part = alone(*self._prepared(variant, sparsity), cell, pair)
                self.parts.save_part(self._key(*place, pair), part)
            self._keep(*place, pair)
            yield

    def _prepared(self, variant: Variant, sparsity: float) -> tuple[Candidate, Run | None]:
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
