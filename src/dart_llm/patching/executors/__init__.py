"""The executors: which one runs a model, and why one cannot."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from dart_llm.errors import ConfigError, MissingExtra
from dart_llm.models.agreement import is_compiled, weights_unsupported_reason
from dart_llm.models.ffn import FfnBlock
from dart_llm.native.build import why_not
from dart_llm.patching.executors.native_ffn import native_unsupported_reason, not_in_place_reason
from dart_llm.patching.executors.token_ffn import WHOLE_STEPS
from dart_llm.pruning.registry import SCORES, TOKEN_RULES
from dart_llm.pruning.selection import MaskSelector
from dart_llm.pruning.sequence import SequenceState

Blocks = Sequence[FfnBlock]


def unsupported_reason(executor: str, model: Any, blocks: Blocks) -> str | None:
    """Why ``executor`` cannot run ``model``, and what can; None if it can."""
    for reason, instead in _reasons(executor, model, blocks):
        cannot = f'executor "{executor}" cannot run {type(model).__name__}'
        return f'{cannot}: {reason}; use executor "{instead}" or "auto"'
    return None


def _reasons(executor: str, model: Any, blocks: Blocks) -> Iterator[tuple[str, str]]:
    """Clauses, and the executor to use instead; ``masked`` runs everything."""
    if executor == "masked":
        return
    yield from _layer_reasons(blocks, [weights_unsupported_reason, _not_copied_reason], "masked")
    if executor == "compact":
        return
    if is_compiled(model):
        yield "it was compiled by torch", "compact"
    kernels = _no_triton_reason if executor == "cuda" else native_unsupported_reason
    yield from _layer_reasons(blocks, [kernels], "compact")
    if executor == "native" and (reason := why_not() or not_in_place_reason(model, blocks)):
        yield reason, "compact"


def _layer_reasons(
    blocks: Blocks, checks: Sequence[Callable[[FfnBlock], str | None]], instead: str
) -> Iterator[tuple[str, str]]:
    for check in checks:
        for block in blocks:
            if reason := check(block):
                yield f"layer {block.index} {reason}", instead


def _not_copied_reason(block: FfnBlock) -> str | None:
    if block.offloaded:
        return "is offloaded"
    return "has no FFN module of its own" if block.inline else None


def _no_triton_reason(block: FfnBlock) -> str | None:
    if importlib.util.find_spec("triton") is None:
        raise MissingExtra("triton", "gpu")
    from dart_llm.patching.executors.cuda import cuda_unsupported_reason

    return cuda_unsupported_reason(block)


def choose_executor(selector: MaskSelector, blocks: Blocks, model: Any) -> str:
    """The fastest that can run: ``native``, ``compact``, ``masked``; ``cuda`` has to be named.

    ``masked`` where the rows of a batch have a mask each, layers cannot be compacted, or tokens
    select in a way that no kernel implements; ``compact`` also where nothing is pruned, for then
    nothing may differ by a bit.  Under ``compact`` a layer whose weights do not say what its
    projections compute is run as by ``masked``.
    """
    config = selector.config
    if config.executor != "auto":
        return config.executor
    if config.batch == "per_row" or any(map(_not_copied_reason, blocks)):
        return "masked"
    if selector.removes_nothing and not config.screens:
        return "compact"
    if config.token is not None and not TOKEN_RULES.get(config.token.rule).native:
        return "masked"
    odd = [weights_unsupported_reason(block) is not None for block in blocks]
    if any(odd):
        return "masked" if all(odd) else "compact"
    return "compact" if unsupported_reason("native", model, blocks) else "native"


def check_executor(blocks: Blocks, selector: MaskSelector, model: Any, chooses: bool) -> None:
    """Raise ``ConfigError`` for what this model's FFNs cannot run.

    ``chooses``: whether masks are computed, not fixed.
    """
    executor = selector.config.executor
    if executor != "auto" and (reason := unsupported_reason(executor, model, blocks)):
        raise ConfigError(reason)
    away = [block.index for block in blocks if block.offloaded]
    if away and chooses and _reads_weights(selector, away[0]):
        raise ConfigError(
            f"layer {away[0]} is offloaded, so its weights cannot be read between forwards; "
            "use compensation=False and a score of activations alone (normalized, magnitude)"
        )


def _reads_weights(selector: MaskSelector, layer: int) -> bool:
    """Whether masks are computed from the weights of ``layer`` too, not from activations alone."""
    if selector.config.compensation:
        return True
    weights = selector.layers[layer]
    try:
        score = SCORES.get(selector.config.score.name)
        return bool(score(torch.zeros(weights.width), weights).is_meta)
    except RuntimeError:  # activations and offloaded weights do not mix
        return True


def effective_executor(executor: str, steps: int, states: Iterable[SequenceState]) -> str:
    """``executor``; of ``native`` whether whole steps decoded tokens."""
    return WHOLE_STEPS if steps and any(state.decoded for state in states) else executor
