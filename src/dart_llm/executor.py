"""Which executor runs a model, and what cannot run at all."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from dart_llm.agreement import why_not_weights
from dart_llm.bare import is_compiled
from dart_llm.errors import ConfigError
from dart_llm.ffn import FfnBlock
from dart_llm.layout import why_not_in_place
from dart_llm.native_build import why_not
from dart_llm.native_ffn import why_not_block
from dart_llm.registry import SCORES
from dart_llm.select import Selector
from dart_llm.slim_parts import why_not_slim, why_not_step
from dart_llm.step_agreement import model_signature, why_not_alike

NATIVE = ("native", "slim")
"""Executors that run the native CPU kernels."""

BY_WEIGHTS = (*NATIVE, "graph", "compact")
"""Executors that run the weights of FFNs, not their modules."""

_steps: weakref.WeakKeyDictionary[Any, dict[str, tuple[Any, str]]] = weakref.WeakKeyDictionary()
"""What was found of a model's whole steps, per executor, and under which signature."""


def choose_executor(selector: Selector, blocks: Sequence[FfnBlock], model: Any) -> str:
    """The fastest that can run: ``slim``, ``native``, ``compact``, ``masked``.

    ``masked`` where the rows of a batch have a mask each or layers cannot be compacted; ``compact``
    also where nothing is pruned, for then nothing may differ by a bit.  Under ``compact`` a layer
    whose weights do not say what its projections compute is run as by ``masked``.
    """
    config = selector.config
    if config.executor != "auto":
        return config.executor
    if config.batch == "per_row" or any(block.inline or block.offloaded for block in blocks):
        return "masked"
    if selector.removes_nothing:
        return "compact"
    odd = [bool(why_not_weights(block)) for block in blocks]
    if any(odd):
        return "masked" if all(odd) else "compact"
    if is_compiled(model) or any(why_not_block(block) for block in blocks):
        return "compact"
    if why_not() or why_not_in_place(model, blocks):
        return "compact"
    return "native" if why_no_steps("slim", model) else "slim"


def why_no_steps(executor: str, model: Any, mark: tuple[Any, ...] = ()) -> str:
    """Why ``slim`` or ``graph`` cannot decode ``model`` by whole steps: "", or a clause.

    ``mark``: the model's signature, where it is known.  What was found holds until it changes.
    """
    mark = mark or model_signature(model)
    known = _steps.setdefault(model, {}).get(executor)
    if known is None or known[0] != mark:
        known = _steps[model][executor] = mark, _why_no_steps(executor, model)
    return known[1]


def _why_no_steps(executor: str, model: Any) -> str:
    if is_compiled(model):
        return "was compiled by torch"
    reason = why_not_slim(model) if executor == "slim" else why_not_step(model)
    return reason or why_not_alike(model)  # what it is made of comes first: then a step can run


def check_executor(
    blocks: Sequence[FfnBlock], selector: Selector, model: Any, chooses: bool
) -> None:
    """Raise ``ConfigError`` for what this model's FFNs cannot run.

    ``chooses``: whether masks are made, not given.
    """
    if selector.config.executor in BY_WEIGHTS:
        _check_weights(blocks, selector.config.executor, type(model).__name__)
    if selector.config.executor in NATIVE:
        _check_native(blocks, selector.config.executor, model)
    if selector.config.executor == "graph" and (reason := why_no_steps("graph", model)):
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
    if is_compiled(model):
        raise ConfigError(
            f'executor "{executor}" cannot run {name}, which was compiled by torch; use executor '
            '"compact" or "auto"'
        )
    if executor == "slim" and (reason := why_no_steps("slim", model)):
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


def _check_weights(blocks: Sequence[FfnBlock], executor: str, name: str) -> None:
    """Raise ``ConfigError`` where an FFN's modules compute something else than its weights say."""
    for block in blocks:
        if reason := why_not_weights(block):
            raise ConfigError(
                f'executor "{executor}" cannot run {name}: layer {block.index} {reason}; use '
                'executor "masked" or "auto"'
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
