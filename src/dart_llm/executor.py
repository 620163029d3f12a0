"""Which executor runs a model, and what cannot run at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dart_llm.errors import ConfigError
from dart_llm.ffn import FfnBlock
from dart_llm.layout import why_not_in_place
from dart_llm.native_build import why_not
from dart_llm.native_ffn import why_not_block
from dart_llm.registry import SCORES
from dart_llm.select import Selector
from dart_llm.slim_parts import why_not_slim, why_not_step

NATIVE = ("native", "slim")
"""Executors that run the native CPU kernels."""


def choose_executor(selector: Selector, blocks: Sequence[FfnBlock], model: Any) -> str:
    """The fastest that can run: ``slim``, ``native``, ``compact``, ``masked``.

    ``masked`` where the rows of a batch have a mask each or layers cannot be compacted; ``compact``
    also where nothing is pruned, for then nothing may differ by a bit.
    """
    config = selector.config
    if config.executor != "auto":
        return config.executor
    if config.batch == "per_row" or any(block.inline or block.offloaded for block in blocks):
        return "masked"
    if selector.removes_nothing or any(why_not_block(block) for block in blocks):
        return "compact"
    if _compiled(model) or why_not() or why_not_in_place(model, blocks):
        return "compact"
    return "native" if why_not_slim(model) else "slim"


def why_not_graph(model: Any) -> str:
    """Why decode steps of ``model`` cannot be recorded: "", or a clause."""
    return "was compiled by torch" if _compiled(model) else why_not_step(model)


def _compiled(model: nn.Module) -> bool:
    """Whether ``model.compile()`` was called on it or a part of it: it traces no native call."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    )


def check_executor(
    blocks: Sequence[FfnBlock], selector: Selector, model: Any, chooses: bool
) -> None:
    """Raise ``ConfigError`` for what this model's FFNs cannot run.

    ``chooses``: whether masks are made, not given.
    """
    if selector.config.executor in NATIVE:
        _check_native(blocks, selector.config.executor, model)
    if selector.config.executor == "graph" and (reason := why_not_graph(model)):
        raise ConfigError(
            f'executor "graph" cannot run {type(model).__name__}, which {reason}; use "compact"'
        )
    inline = [block.index for block in blocks if block.inline]
    away = [block.index for block in blocks if block.offloaded]
    if selector.config.executor == "compact" and (inline or away):
        reason = "is offloaded" if away else "has no FFN module of its own"
        raise ConfigError(
            f'executor "compact" cannot run {type(model).__name__}: layer '
            f'{(away or inline)[0]} {reason}; use executor "masked" or "auto"'
        )
    if away and chooses and _reads_weights(selector, away[0]):
        raise ConfigError(
            f"layer {away[0]} is offloaded, so its weights cannot be read between forwards; "
            "use compensation=False and a score of activations alone (normalized, magnitude)"
        )


def _check_native(blocks: Sequence[FfnBlock], executor: str, model: Any) -> None:
    """Raise ``ConfigError`` where the native kernels, or whole native steps, cannot run."""
    name = type(model).__name__
    if _compiled(model):
        raise ConfigError(
            f'executor "{executor}" cannot run {name}, which was compiled by torch; use executor '
            '"compact" or "auto"'
        )
    if executor == "slim" and (reason := why_not_slim(model)):
        raise ConfigError(f'executor "slim" cannot run {name}, which {reason}; use "native"')
    for block in blocks:
        if reason := why_not_block(block):
            raise ConfigError(
                f'executor "{executor}" cannot run {name}: layer {block.index} {reason}; use '
                'executor "compact" or "auto"'
            )
    if reason := why_not():
        raise ConfigError(f'executor "{executor}": {reason}; use executor "compact" or "auto"')
    if reason := why_not_in_place(model, blocks):
        raise ConfigError(
            f'executor "{executor}" cannot run {name}: {reason}; use executor "compact" or "auto"'
        )


def _reads_weights(selector: Selector, layer: int) -> bool:
    """Whether masks are made from the weights of ``layer`` too, not from activations alone."""
    if selector.config.compensation or "squares" in selector.statistics.needs:
        return True
    weights = selector.layers[layer]
    try:
        return SCORES.get(selector.config.score.name)(torch.zeros(weights.width), weights).is_meta
    except RuntimeError:  # activations and weights that are not there do not mix
        return True
