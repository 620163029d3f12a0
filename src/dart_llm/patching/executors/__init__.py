"""Which executor runs a model, and what cannot run at all."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dart_llm.errors import ConfigError
from dart_llm.models.agreement import is_compiled, weights_unsupported_reason
from dart_llm.models.ffn import FfnBlock
from dart_llm.models.steps import (
    attention_by_inputs,
    graph_unsupported_reason,
    slim_unsupported_reason,
)
from dart_llm.native.build import why_not
from dart_llm.patching.executors.native_ffn import (
    NO_MODULE,
    native_unsupported_reason,
    not_in_place_reason,
)
from dart_llm.patching.executors.step_agreement import disagreement_reason, model_signature
from dart_llm.patching.executors.triton_ffn import triton_unsupported_reason
from dart_llm.pruning.registry import SCORES, TOKEN_RULES
from dart_llm.pruning.selection import MaskSelector

NATIVE = ("native", "slim")
"""Executors that run the native CPU kernels."""

BY_WEIGHTS = (*NATIVE, "graph", "compact", "triton")
"""Executors that run the weights of FFNs, not their modules."""

_steps: weakref.WeakKeyDictionary[Any, dict[str, tuple[Any, str]]] = weakref.WeakKeyDictionary()
"""What was found of a model's whole steps, per executor, and under which signature."""


def choose_executor(selector: MaskSelector, blocks: Sequence[FfnBlock], model: Any) -> str:
    """The fastest that can run: ``slim``, ``native``, ``compact``, ``masked``.

    ``masked`` where the rows of a batch have a mask each, layers cannot be compacted, or tokens
    choose in a way that no kernel knows; ``compact``
    also where nothing is pruned, for then nothing may differ by a bit.  Under ``compact`` a layer
    whose weights do not say what its projections compute is run as by ``masked``.
    """
    config = selector.config
    if config.executor != "auto":
        return config.executor
    if config.batch == "per_row" or any(block.inline or block.offloaded for block in blocks):
        return "masked"
    if selector.removes_nothing and not config.screens:
        return "compact"
    if config.token is not None and not TOKEN_RULES.get(config.token.rule).native:
        return "masked"
    odd = [bool(weights_unsupported_reason(block)) for block in blocks]
    if any(odd):
        return "masked" if all(odd) else "compact"
    if is_compiled(model) or any(native_unsupported_reason(block) for block in blocks):
        return "compact"
    if why_not() or not_in_place_reason(model, blocks):
        return "compact"
    if no_steps_reason("slim", model):
        return "native"
    return "native" if not_in_place_reason(model, (), attention_by_inputs(model)) else "slim"


def no_steps_reason(executor: str, model: Any, mark: tuple[Any, ...] = ()) -> str:
    """Why ``slim``, or those by graphs, cannot decode ``model`` by whole steps: "", or a clause.

    ``mark``: the model's signature, where it is known.  What was found holds until it changes.
    """
    mark = mark or model_signature(model)
    known = _steps.setdefault(model, {}).get(executor)
    if known is None or known[0] != mark:
        known = _steps[model][executor] = mark, _no_steps_reason(executor, model)
    return known[1]


def _no_steps_reason(executor: str, model: Any) -> str:
    if is_compiled(model):
        return "was compiled by torch"
    why = slim_unsupported_reason if executor == "slim" else graph_unsupported_reason
    return why(model) or disagreement_reason(model)  # what it is made of first: then a step can run


def check_executor(
    blocks: Sequence[FfnBlock], selector: MaskSelector, model: Any, chooses: bool
) -> None:
    """Raise ``ConfigError`` for what this model's FFNs cannot run.

    ``chooses``: whether masks are made, not given.
    """
    executor = selector.config.executor
    if objection := next(_objections(executor, blocks, model), ""):
        raise ConfigError(f'executor "{executor}"{objection}')
    away = [block.index for block in blocks if block.offloaded]
    if away and chooses and _reads_weights(selector, away[0]):
        raise ConfigError(
            f"layer {away[0]} is offloaded, so its weights cannot be read between forwards; "
            "use compensation=False and a score of activations alone (normalized, magnitude)"
        )


def _objections(executor: str, blocks: Sequence[FfnBlock], model: Any) -> Iterator[str]:
    """Why an executor cannot run this model, and what can."""
    cannot = f" cannot run {type(model).__name__}"
    compact, masked = 'use executor "compact" or "auto"', 'use executor "masked" or "auto"'
    if executor in BY_WEIGHTS:
        for block in blocks:
            if reason := weights_unsupported_reason(block):
                yield f"{cannot}: layer {block.index} {reason}; {masked}"
    if executor in NATIVE:
        if is_compiled(model):
            yield f"{cannot}, which was compiled by torch; {compact}"
        if executor == "slim" and (reason := no_steps_reason("slim", model)):
            yield f'{cannot}, which {reason}; use "native"'
        for block in blocks:
            if reason := native_unsupported_reason(block):
                yield f"{cannot}: layer {block.index} {reason}; {compact}"
        if reason := why_not():
            yield f": {reason}; {compact}"
        others = attention_by_inputs(model) if executor == "slim" else []
        if reason := not_in_place_reason(model, blocks, others):
            yield f"{cannot}: {reason}; {compact}"
    if executor == "graph" and (reason := no_steps_reason("graph", model)):
        yield f'{cannot}, which {reason}; use "compact"'
    if executor == "triton":
        if is_compiled(model):
            yield f"{cannot}, which was compiled by torch; {compact}"
        for block in blocks:
            if reason := triton_unsupported_reason(block):
                yield f"{cannot}: layer {block.index} {reason}; {compact}"
    if executor == "compact":
        for found, reason in (("offloaded", "is offloaded"), ("inline", NO_MODULE)):
            for block in blocks:
                if getattr(block, found):
                    yield f"{cannot}: layer {block.index} {reason}; {masked}"


def _reads_weights(selector: MaskSelector, layer: int) -> bool:
    """Whether masks are made from the weights of ``layer`` too, not from activations alone."""
    if selector.config.compensation:
        return True
    weights = selector.layers[layer]
    try:
        score = SCORES.get(selector.config.score.name)
        return bool(score(torch.zeros(weights.width), weights).is_meta)
    except RuntimeError:  # activations and weights that are not there do not mix
        return True
