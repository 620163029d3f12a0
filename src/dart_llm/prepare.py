"""From a configuration to what is measured: calibrated, quantised, or as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dart_llm.arch import describe
from dart_llm.calibration import calibrate
from dart_llm.candidate import Candidate
from dart_llm.config import PruneConfig
from dart_llm.learn import learn
from dart_llm.quantise import quantise, weight_facts
from dart_llm.select import check_fits

logger = logging.getLogger("dart_llm")


def prepare(
    model: Any,
    tokenizer: Any,
    config: PruneConfig | None,
    calibration: str | None = None,
    cache_dir: str | None = None,
    say: Callable[[str], None] = logger.info,
    masks: Mapping[int, Sequence[int] | Tensor] | None = None,
) -> Candidate:
    """Make ``config`` ready to be measured; None and the method ``dense``: the untouched model.

    ``calibration``: the text that static methods learn from (calibration_text.py; None: C4 from
    the hub).  ``cache_dir``: where calibrations and priors are kept.  ``masks``: the user's own,
    {layer: ids to keep}; nothing is calibrated then.  ``say`` is called with a line whenever there
    is news.

    Raises ``ConfigError`` and ``LoadError`` for a text that cannot be used or had.
    """
    if masks is not None:
        return Candidate(model, tokenizer, config, masks)
    if config is None or (config.method == "dense" and config.target == 0):
        return Candidate(model, tokenizer, None, facts=weight_facts(model))
    if config.weight_bits is not None:
        say(f"rounding a copy of the weights to {config.weight_bits} bits")
        found = quantise(model, config.weight_bits)
        return Candidate(
            found.model, tokenizer, None, notes=found.notes, facts=found.facts, name=config.method
        )
    layers = describe(model).weights(config.score.proxy_embedding, config.seed)
    if check_fits(config, layers).removes_nothing:
        return Candidate(model, tokenizer, config)
    if config.calibration is None:  # what attaching would learn, with news and the tokenizer
        learn(model, config, layers, cache_dir, say, tokenizer)
        return Candidate(model, tokenizer, config)
    ready = calibrate(model, tokenizer, config, calibration, cache_dir, say)
    notes = (ready.note,)
    return Candidate(model, tokenizer, config, held=ready.held, prior=ready.prior, notes=notes)
