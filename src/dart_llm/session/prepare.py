"""``prepare``: a configuration, and what it learnt of this model, ready to be measured on tasks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from dart_llm.calibration.calibrate import calibrate
from dart_llm.calibration.head import learn_screen
from dart_llm.calibration.learn import self_calibrate
from dart_llm.models.describe import describe
from dart_llm.models.quantised import quantise, weight_facts
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.masks import USER_MASKS, Masks
from dart_llm.pruning.selection import check_fits
from dart_llm.session.run import Run


def likelihood_config(config: PruneConfig) -> PruneConfig:
    """The configuration under which likelihood tasks run: masks at once, never a re-mask."""
    return config.replace({"masking_step": 0, "min_evidence": 0, "drift": {"rule": "never"}})


class UnitStore(Protocol):
    """Where finished parts of a measurement are kept; a results folder is one."""

    def part(self, key: str) -> Any:
        """What was saved under ``key``, or None."""

    def save_part(self, key: str, value: Any) -> None:
        """Keep JSON-able ``value``."""


@dataclass
class MemoryStore:
    """Parts that live no longer than the process."""

    parts: dict[str, Any] = field(default_factory=dict)

    def part(self, key: str) -> Any:
        return self.parts.get(key)

    def save_part(self, key: str, value: Any) -> None:
        self.parts[key] = value


@dataclass(frozen=True)
class PreparedMethod:
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
            return USER_MASKS
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


logger = logging.getLogger("dart_llm")


def is_untouched(config: PruneConfig) -> bool:
    """Whether ``config`` leaves the model as it is, modules and executor too."""
    plain = config.executor == "auto" and not config.screens
    return config.method == "dense" and config.target == 0 and plain


def prepare(
    model: Any,
    tokenizer: Any,
    config: PruneConfig | None,
    calibration: str | None = None,
    cache_dir: str | None = None,
    say: Callable[[str], None] = logger.info,
    masks: Mapping[int, Sequence[int] | Tensor] | None = None,
) -> PreparedMethod:
    """Make ``config`` ready to be measured; None and the method ``dense``: the untouched model.

    ``dense`` under an executor that was named runs by it: whole steps of the kernels are faster.

    ``calibration``: the text that static methods learn from (data/documents.py; None: C4 from
    the hub).  ``cache_dir``: where calibrations and priors are kept.  ``masks``: the user's own,
    {layer: ids to keep}; nothing is calibrated then.  ``say`` is called with a line whenever there
    is news.

    Raises ``ConfigError`` and ``LoadError`` for a text that cannot be used or had.
    """
    if masks is not None:
        return PreparedMethod(model, tokenizer, config, masks)
    if config is None or is_untouched(config):
        return PreparedMethod(model, tokenizer, None, facts=weight_facts(model))
    if config.weight_bits is not None:
        say(f"rounding a copy of the weights to {config.weight_bits} bits")
        found = quantise(model, config.weight_bits)
        return PreparedMethod(
            found.model, tokenizer, None, notes=found.notes, facts=found.facts, name=config.method
        )
    layers = describe(model).weights(config.score.proxy_embedding, config.seed)
    learn_screen(model, config, layers, cache_dir, say, tokenizer)
    if check_fits(config, layers).removes_nothing:
        how = "screened head" if config.screens else config.executor
        name = f"dense, {how}" if config.method == "dense" else ""
        return PreparedMethod(model, tokenizer, config, name=name)
    if config.calibration is None:  # what attaching would learn, with news and the tokenizer
        self_calibrate(model, config, layers, cache_dir, say, tokenizer)
        return PreparedMethod(model, tokenizer, config)
    ready = calibrate(model, tokenizer, config, calibration, cache_dir, say)
    notes = (ready.note,)
    return PreparedMethod(model, tokenizer, config, held=ready.held, prior=ready.prior, notes=notes)
