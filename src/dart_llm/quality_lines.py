"""The measured lines of ``dart-llm bench quality``, found by model, cell, variant and sparsity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dart_llm.quality_variants import DENSE, GRIFFIN

Line = Mapping[str, Any]
"""One line of results.jsonl: ``model``, ``cell``, ``variant``, ``sparsity``, ``slice``, ``source``,
``loss``, ``tokens``, ``accounting``."""

Place = tuple[str, str, str, float]
"""Model, cell, variant, sparsity."""

Array = NDArray[np.float64]

STEP = 3
"""Decimals to which GRIFFIN's sparsities are rounded."""

EQUAL_SPARSITY, EQUAL_BYTES = "equal_sparsity", "equal_bytes"
YARDSTICKS = {
    EQUAL_SPARSITY: "GRIFFIN at the method's achieved sparsity, dense tokens counting 0",
    EQUAL_BYTES: "GRIFFIN at 1 - the method's share of the dense FFN bytes, if run compactly",
}
"""The two columns of a comparison."""


@dataclass(frozen=True)
class Account:
    """What a variant cost over all slices of a cell; shares weighted by decoded tokens."""

    achieved_sparsity: float
    sparsity_while_pruned: float
    dense_token_share: float
    remasks: int
    ffn_bytes_share: float
    ffn_flops_share: float
    extra_memory_bytes: int

    @property
    def yardsticks(self) -> dict[str, float]:
        """GRIFFIN's sparsity in each column; never below 0, where GRIFFIN is dense."""
        wanted = {EQUAL_SPARSITY: self.achieved_sparsity, EQUAL_BYTES: 1 - self.ffn_bytes_share}
        return {name: yardstick(value) for name, value in wanted.items()}


def yardstick(value: float) -> float:
    """A sparsity that GRIFFIN can be run at, rounded."""
    return min(max(0.0, round(value, STEP)), round(1 - 10.0**-STEP, STEP))


def account(lines: Sequence[Line]) -> Account:
    """The account of one variant in one cell; its lines hold an ``accounting``."""
    parts = [line["accounting"] for line in lines]
    total = sum(part["decoded_tokens"] for part in parts)

    def mean(name: str) -> float:
        return float(sum(part[name] * part["decoded_tokens"] for part in parts) / total)

    achieved, dense = mean("achieved_sparsity"), mean("dense_token_share")
    return Account(
        achieved,
        achieved / (1 - dense) if dense < 1 else 0.0,
        dense,
        sum(part["remasks"] for part in parts),
        mean("ffn_bytes_share_if_compact"),
        mean("ffn_flops_share_if_compact"),
        max(part["extra_memory_bytes"] for part in parts),
    )


class Lines:
    """Lines in any order; of each place the slices come in the order of the dense ones."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self._found: dict[Place, dict[str, Line]] = {}
        for line in lines:
            place = (line["model"], line["cell"], line["variant"], float(line["sparsity"]))
            self._found.setdefault(place, {})[line["slice"]] = line

    @property
    def groups(self) -> list[tuple[str, str]]:
        """Models and cells that were measured, in order."""
        return list(dict.fromkeys((model, cell) for model, cell, _, _ in self._found))

    def at(self, model: str, cell: str, variant: str, sparsity: float) -> list[Line]:
        """The lines of one place, one per slice; raises ``KeyError`` for one that is missing."""
        found = self._found[model, cell, variant, sparsity]
        return [found[name] for name in self._found[model, cell, DENSE, 0.0]]

    def griffin(self, model: str, cell: str, sparsity: float) -> list[Line]:
        """GRIFFIN at ``sparsity``; at 0 it is the untouched model."""
        return self.at(model, cell, GRIFFIN if sparsity else DENSE, sparsity)

    def has(self, model: str, cell: str, variant: str, sparsity: float) -> bool:
        """Whether the place was measured."""
        return (model, cell, variant, sparsity) in self._found

    def gaps(self, model: str, cell: str, lines: Sequence[Line]) -> Array:
        """Mean loss of each slice minus the untouched model's, nats; [slices]."""
        dense = self.at(model, cell, DENSE, 0.0)
        return losses(lines) - losses(dense)


def losses(lines: Sequence[Line]) -> Array:
    """Mean loss of each slice; [slices]."""
    return np.array([line["loss"] for line in lines], dtype=np.float64)
