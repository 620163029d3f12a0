"""``prepare``: a configuration with its statistics, ready to be measured on tasks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from dart_llm.calibration.self_calibration import calibrate, learn_screen, self_calibrate
from dart_llm.models.describe import weight_facts
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.masks import Ids
from dart_llm.session.run import BoundMethod

logger = logging.getLogger("dart_llm")


class UnitStore(Protocol):
    """Where finished items of a measurement are cached: a results folder is one."""

    def part(self, key: str) -> Any: ...

    def save_part(self, key: str, value: Any) -> None: ...


@dataclass
class MemoryStore:
    """Items that live no longer than the process."""

    parts: dict[str, Any] = field(default_factory=dict)

    def part(self, key: str) -> Any:
        return self.parts.get(key)

    def save_part(self, key: str, value: Any) -> None:
        self.parts[key] = value


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
    masks: Ids | None = None,
) -> BoundMethod:
    """Make ``config`` ready to be measured; None, or ``dense`` by no executor: the untouched model.

    ``calibration``: the text of static methods (data/documents.py; None: C4 from the hub).
    ``cache_dir``: where calibrations and learned statistics are cached.  ``masks``: the user's,
    {layer: ids to keep}; nothing is calibrated then.  ``say`` is called with lines of progress.

    Raises ``ConfigError`` and ``LoadError`` for a text that cannot be used or had.
    """
    method = BoundMethod(model, tokenizer, config, masks)
    if masks is not None:
        return method
    if config is None or is_untouched(config):
        return BoundMethod(model, tokenizer, None, facts=weight_facts(model))
    learn_screen(model, config, method.layers, cache_dir, say, tokenizer)
    if method.selector.removes_nothing:
        how = "screened head" if config.screens else config.executor
        return replace(method, name=f"dense, {how}" if config.method == "dense" else "")
    if config.calibration is None:  # what attaching would learn, with progress and the tokenizer
        self_calibrate(model, config, method.layers, cache_dir, say, tokenizer)
        return method
    ready = calibrate(model, tokenizer, config, calibration, cache_dir, say)
    fixed, prior = ready.fixed_masks, ready.prior
    return replace(method, fixed_masks=fixed, prior=prior, notes=(ready.note,))
