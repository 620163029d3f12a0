"""What a screened head learns of a model: hidden states of text that the model writes itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dart_llm.calibration.collect import evaluating
from dart_llm.calibration.learn import STATES, Lesson
from dart_llm.calibration.progress import Advance, Say, forwards, nothing
from dart_llm.errors import ConfigError, DartError
from dart_llm.models.checkpoint import remember_tokenizer
from dart_llm.models.describe import decoder_of
from dart_llm.models.packed import place_of
from dart_llm.models.screen import Screen
from dart_llm.patching.patch import check_free
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.weights import FfnWeights

logger = logging.getLogger("dart_llm")

LEARNING = "learning what the screened head reads from the model's own text, once per model"

AT_ONCE = 4
"""Sequences of a forward."""

_made: WeakKeyDictionary[nn.Module, tuple[object, Screen]] = WeakKeyDictionary()
"""The newest screen of a model, and what it was made for."""


def learn_screen(
    model: Any,
    config: PruneConfig,
    layers: Sequence[FfnWeights],
    cache_dir: str | None = None,
    say: Say = logger.info,
    tokenizer: Any = None,
) -> Screen | None:
    """The screen of the head of ``model``; None where ``config`` wants the whole head.

    Raises ``AttachError`` for a model that is being pruned, ``ConfigError`` for a head that cannot
    be screened.
    """
    if not config.screens:
        return None
    weight = screenable(model)
    check_free(model)
    if tokenizer is not None:
        remember_tokenizer(model, tokenizer)
    plain = config if config.prior is not None else config.replace({"prior": {"tokens": 0}})
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        lesson = Lesson(model, plain, tuple(layers), cache_dir, say)
        mark = lesson.text_key, place_of(weight), config.head.bytes
        known = _made.get(model)
        if known is not None and known[0] == mark:
            return known[1]

        def states(faster: Any, ids: Tensor, advance: Advance) -> Tensor:
            return hidden_states(faster, ids, advance).to(model.dtype)

        found = lesson.of_own_text(STATES, weight.device, states, LEARNING)
        screen = Screen.of(weight, found, config.head.bytes)
    _made[model] = mark, screen
    return screen


def screenable(model: Any) -> Tensor:
    """The weight [V, D] of the head; raises ``ConfigError`` where it is no plain linear layer."""
    head = model.get_output_embeddings()
    weight: Any = getattr(head, "weight", None)
    if weight is None or getattr(head, "bias", None) is not None or weight.is_meta:
        raise ConfigError(
            f'{type(model).__name__} has no plain output head at hand: leave head.kind at "full"'
        )
    return weight.detach()  # type: ignore[no-any-return]


def hidden_states(model: Any, ids: Tensor, advance: Advance = nothing) -> Tensor:
    """What the head reads of texts ids [n, T]: [n T, D] on the host, in the model's dtype."""
    seen: list[Tensor] = []
    head: Any = model.get_output_embeddings()
    width = head.weight.shape[1]

    def take(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0].detach().reshape(-1, width).cpu())

    handle = decoder_of(model).register_forward_hook(take)
    try:
        for _ in forwards(model, torch.split(ids, AT_ONCE), advance):
            pass
    finally:
        handle.remove()
    states = torch.cat(seen)
    if not bool(states.isfinite().all()):
        raise DartError("the model's last hidden states are not finite: try dtype float32")
    return states
