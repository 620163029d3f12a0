"""A model and how it is pruned, ready to be measured on tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from dart_llm.config import PruneConfig
from dart_llm.likelihood import likelihood_config
from dart_llm.masks import GIVEN
from dart_llm.session import Masks, Run


class Parts(Protocol):
    """Where finished parts of a measurement are kept; a results folder is one."""

    def part(self, key: str) -> Any:
        """What was saved under ``key``, or None."""

    def save_part(self, key: str, value: Any) -> None:
        """Keep JSON-able ``value``."""


@dataclass
class Memory:
    """Parts that live no longer than the process."""

    parts: dict[str, Any] = field(default_factory=dict)

    def part(self, key: str) -> Any:
        return self.parts.get(key)

    def save_part(self, key: str, value: Any) -> None:
        self.parts[key] = value


@dataclass(frozen=True)
class Candidate:
    """What is measured.  ``config`` None: the untouched model.

    ``masks``: the user's own, {layer: kept ids}.  ``held``: masks chosen by calibration.
    ``prior``: ranks that a calibration gave, [I] per layer, for scores that mix it in.
    ``notes``: what a reader of its numbers must know.  ``facts``: further numbers for tables, such
    as ``weight_bytes``.
    """

    model: Any
    tokenizer: Any
    config: PruneConfig | None
    masks: Mapping[int, Sequence[int] | Tensor] | None = None
    held: Masks | None = None
    prior: tuple[Tensor, ...] | None = None
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def label(self) -> str:
        """``dense``, or method and sparsity as in ``dart@0.5``."""
        if self.name:
            return self.name
        if self.config is None:
            return "dense"
        if self.masks is not None:
            return GIVEN
        return f"{self.config.method}@{'table' if self.asked is None else f'{self.asked:g}'}"

    @property
    def method(self) -> str:
        """Name of the method; of weights that were rounded, and of given masks, their label."""
        if self.config is None or self.masks is not None:
            return self.label
        return self.config.method

    @property
    def asked(self) -> float | None:
        """The sparsity that was asked for; None where a table, ``auto`` or masks set the counts."""
        if self.config is None:
            return 0.0
        fixed = self.config.budget.table is not None or self.config.score.strategy == "auto"
        if self.masks is not None or (fixed and self.config.sparsity is None):
            return None
        return self.config.target

    def run(self, likelihood: bool = False, make: Callable[..., Run] = Run) -> Run | None:
        """A new run, not attached; None for the untouched model.

        ``likelihood``: with the settings of likelihood tasks (masks at once, never a re-mask).
        ``make``: called as ``Run`` is, for another kind of run.
        """
        if self.config is None:
            return None
        config = likelihood_config(self.config) if likelihood else self.config
        return make(self.model, config, masks=self.masks, held=self.held, prior=self.prior)
