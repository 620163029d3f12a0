"""Chooses the executor that runs a model's pruned FFNs, and says why an executor cannot do so."""

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
    """Return why ``executor`` cannot run ``model``, and what to use instead; None if it can."""
    for reason, instead in _reasons(executor, model, blocks):
        cannot = f'executor "{executor}" cannot run {type(model).__name__}'
        return f'{cannot}: {reason}; use executor "{instead}" or "auto"'
    return None


def _reasons(executor: str, model: Any, blocks: Blocks) -> Iterator[tuple[str, str]]:
    """Yield each reason why ``executor`` cannot run ``model``, and the executor to use instead."""
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
    return "has no separate FFN module" if block.inline else None


def _no_triton_reason(block: FfnBlock) -> str | None:
    if importlib.util.find_spec("triton") is None:
        raise MissingExtra("triton", "gpu")
    from dart_llm.patching.executors.cuda import cuda_unsupported_reason

    return cuda_unsupported_reason(block)


def choose_executor(selector: MaskSelector, blocks: Blocks, model: Any) -> str:
    """Return the requested executor, or for ``auto`` the fastest of native, compact and masked.

    ``auto`` uses ``masked`` if every batch row has its own mask, if weights cannot be copied, if no
    kernel implements the per-token rule, or if the projections of all layers do more than multiply
    with their weights.  If only some do, it uses ``compact``, which runs these layers masked.  It
    also uses ``compact`` if nothing is pruned and the head is not screened, so that results equal
    the original model's to the last bit.  It never uses ``cuda``.
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
    unsupported = [weights_unsupported_reason(block) is not None for block in blocks]
    if any(unsupported):
        return "masked" if all(unsupported) else "compact"
    return "compact" if unsupported_reason("native", model, blocks) else "native"


def check_executor(blocks: Blocks, selector: MaskSelector, model: Any, chooses: bool) -> None:
    """Raise ``ConfigError`` if this model's FFNs do not support the configuration.

    ``chooses``: True if masks are chosen while the model runs, False if they are fixed.
    """
    executor = selector.config.executor
    if executor != "auto" and (reason := unsupported_reason(executor, model, blocks)):
        raise ConfigError(reason)
    offloaded = [block.index for block in blocks if block.offloaded]
    if offloaded and chooses and _reads_weights(selector, offloaded[0]):
        raise ConfigError(
            f"layer {offloaded[0]} is offloaded, so its weights cannot be read between forwards; "
            "use compensation=False and a score of activations only (normalized, magnitude)"
        )


def _reads_weights(selector: MaskSelector, layer: int) -> bool:
    """Return True if masks depend on the weights of ``layer``, and not only on activations."""
    if selector.config.compensation:
        return True
    weights = selector.layers[layer]
    try:
        score = SCORES.get(selector.config.score.name)
        return bool(score(torch.zeros(weights.width), weights).is_meta)
    except RuntimeError:  # the score combines activations with offloaded weights
        return True


def effective_executor(executor: str, steps: int, states: Iterable[SequenceState]) -> str:
    """Return ``WHOLE_STEPS`` if whole steps (one native call each) ran, else ``executor``."""
    return WHOLE_STEPS if steps and any(state.decoded for state in states) else executor
