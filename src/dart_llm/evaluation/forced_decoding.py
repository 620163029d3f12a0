"""Teacher-forced decoding: known tokens fed as decode tokens; re-masks at scheduled steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.sequence import Phase
from dart_llm.session.run import Run

CHUNK = 256
"""The most decode tokens per forward, which bounds the memory of the logits."""

FORCED_REMASK = "forced"
"""The recorded cause of a re-mask at a scheduled step."""


def feed(
    model: Any,
    run: Run | None,
    ids: Tensor,
    cache: Any,
    take: Callable[[int, Tensor], None],
    *,
    first: int = 0,
    cached: int = 0,
    mask: Tensor | None = None,
    chunk: int = CHUNK,
) -> None:
    """Feed ``ids`` ([B, n]) as decode tokens, in chunks within which no mask can change.

    ``cache``: the KV cache of ``cached`` earlier tokens, or None.  ``mask``: attention mask
    [B, cached + n].  ``take(start, logits)`` is called per chunk for the tokens from ``first`` on:
    ``logits`` [B, m, V] are the outputs at ``ids[:, start : start + m]``, freed before the next
    chunk.  ``chunk``: the most tokens per forward; 1 means a step per token, as ``generate``
    decodes.  ``run``: attached, or None for the untouched model.
    """
    if run is not None and run.config.screens:
        chunk = 1  # the LM head is screened only in steps of one token
    start = 0
    while start < ids.shape[1]:
        size = min(chunk, ids.shape[1] - start)
        if run is not None:
            left = (run.config.release_step or 0) - start  # padded rows reach it in other steps
            size = min(size, left) if left > 0 else size
            if cached + start:
                size = min(size, run.tokens_until_change() or size)
        end = start + size
        scored = max(0, end - max(start, first))
        past: dict[str, Any] = {} if cache is None else {"cache": cache}
        if mask is not None:
            past["attention_mask"] = mask[:, : cached + end]
        step = contextlib.nullcontext() if run is None else run.decoding(prompt=cache is None)
        with step:
            output = model(ids[:, start:end], use_cache=True, logits_to_keep=max(1, scored), **past)
        cache = output.cache
        if scored:
            take(end - scored, output.logits)
        del output
        start = end


class ScheduledRun(Run):
    """A run that also re-masks at scheduled steps, in addition to its drift rule.

    ``triggers``: decode steps before which all layers leave PRUNED and are observed again.  The
    other arguments are those of ``Run``.
    """

    def __init__(
        self, model: Any, config: PruneConfig, triggers: Sequence[int], **settings: Any
    ) -> None:
        super().__init__(model, config, **settings)
        self._due = sorted(triggers)

    def tokens_until_change(self) -> int | None:
        """As in ``Run``, but at most up to the next scheduled step; triggers any that is due."""
        self._trigger_due()
        bound = super().tokens_until_change()
        if not self._due or not self.controller.sequences:
            return bound
        left = self._due[0] - self.controller.sequences[-1].decoded
        return left if bound is None else min(bound, left)

    def _trigger_due(self) -> None:
        """Trigger the steps that are due; a sequence without masks continues to observe."""
        self.controller.flush()
        for sequence in self.controller.sequences[-1:]:
            while self._due and sequence.decoded >= self._due[0]:
                self._due.pop(0)
                if sequence.phase is Phase.PRUNED:
                    with torch.inference_mode(False):  # the evidence outlives this forward
                        sequence.trigger(FORCED_REMASK)
