"""Teacher-forced decoding: the tokens of a fixed text are fed as if the model had generated them.

``ScheduledRun`` also re-masks (observes the model again and selects new masks) at given steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dart_llm.models.calls import cache_name, cache_of
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.sequence import Phase
from dart_llm.session.run import Run

CHUNK = 256
"""Maximum number of decode tokens per forward; it limits the memory that the logits need."""

FORCED_REMASK = "forced"
"""The recorded cause of a re-mask at a scheduled step."""


def feed(
    model: Any,
    run: Run | None,
    ids: Tensor,
    cache: Any,
    on_logits: Callable[[int, Tensor], None],
    *,
    first: int = 0,
    cached: int = 0,
    mask: Tensor | None = None,
    chunk: int = CHUNK,
) -> None:
    """Feed ``ids`` ([B, n]) as decode tokens, in chunks within which no mask can change.

    ``run`` must be attached to the model; None means the untouched model.  ``cached`` is the number
    of earlier tokens in the KV cache ``cache`` (None if there are none).  ``mask`` is the attention
    mask [B, cached + n].  ``first`` is the index in ``ids`` of the first token whose logits are
    needed.  For each chunk with such tokens, ``on_logits(start, logits)`` gets their logits
    [B, m, V], the outputs at ``ids[:, start : start + m]``, which are freed before the next chunk.
    ``chunk`` is the maximum number of tokens per forward; 1 means one token per step, as in
    ``generate``.
    """
    if run is not None and run.config.screens:
        chunk = 1  # the LM head is screened only in steps of one token
    start = 0
    while start < ids.shape[1]:
        size = min(chunk, ids.shape[1] - start)
        if run is not None:
            # end the chunk at release_step; padded rows reach that step at another position
            remaining = (run.config.release_step or 0) - start
            size = min(size, remaining) if remaining > 0 else size
            if cached + start:
                size = min(size, run.tokens_until_change() or size)
        end = start + size
        scored = max(0, end - max(start, first))
        past: dict[str, Any] = {} if cache is None else {cache_name(): cache}
        if mask is not None:
            past["attention_mask"] = mask[:, : cached + end]
        step = contextlib.nullcontext() if run is None else run.decoding(prompt=cache is None)
        with step:
            output = model(ids[:, start:end], use_cache=True, logits_to_keep=max(1, scored), **past)
        cache = cache_of(output)
        if scored:
            on_logits(end - scored, output.logits)
        del output
        start = end


class ScheduledRun(Run):
    """A run that also re-masks at scheduled steps, in addition to its drift rule.

    ``triggers`` are decode steps.  Before each of them, all layers leave the phase PRUNED and are
    observed again.  The other arguments are those of ``Run``.
    """

    def __init__(
        self, model: Any, config: PruneConfig, triggers: Sequence[int], **settings: Any
    ) -> None:
        super().__init__(model, config, **settings)
        self._due = sorted(triggers)

    def tokens_until_change(self) -> int | None:
        """Start any re-mask that is due; return the number of tokens until the next mask change.

        None means no limit.
        """
        self._trigger_due()
        bound = super().tokens_until_change()
        if not self._due or not self.controller.sequences:
            return bound
        remaining = self._due[0] - self.controller.sequences[-1].decoded
        return remaining if bound is None else min(bound, remaining)

    def _trigger_due(self) -> None:
        """Start the re-masks that are due; a sequence without masks just keeps observing."""
        self.controller.flush()
        for sequence in self.controller.sequences[-1:]:
            while self._due and sequence.decoded >= self._due[0]:
                self._due.pop(0)
                if sequence.phase is Phase.PRUNED:
                    with torch.inference_mode(False):  # observations outlive this forward
                        sequence.trigger(FORCED_REMASK)
