"""Forced mode: a passage is read with its first tokens as the prompt; every next token's loss.

The first P tokens are prefilled dense and observed; the others run as decode tokens through the
live tracer (perplexity.py steps through them).  Token k after the prompt is fed in decode step k,
so the loss of token k + 1 is the first that step k decides: token 0, which the dense prompt
predicts, has none, and the last token is never fed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.sequence import Phase
from dart_llm.session.run import Run

FORCED_REMASK = "forced"
"""Cause of a re-mask at a known moment."""


class TimedRun(Run):
    """A run that makes new masks at known moments, in addition to its drift rule's.

    ``triggers``: decode steps before which all layers leave PRUNED and are observed anew.  The
    other arguments are those of ``Run``.
    """

    def __init__(
        self, model: Any, config: PruneConfig, triggers: Sequence[int], **settings: Any
    ) -> None:
        super().__init__(model, config, **settings)
        self._due = sorted(triggers)

    def tokens_until_change(self) -> int | None:
        """As of a run; acts on a moment that is due, and no forward goes past one."""
        self._force()
        bound = super().tokens_until_change()
        if not self._due or not self.controller.lives:
            return bound
        left = self._due[0] - self.controller.lives[-1].decoded
        return left if bound is None else min(bound, left)

    def _force(self) -> None:
        """Trigger when it is time; a sequence that has no masks yet goes on observing."""
        self.controller.flush()
        for life in self.controller.lives[-1:]:
            while self._due and life.decoded >= self._due[0]:
                self._due.pop(0)
                if life.phase is Phase.PRUNED:
                    with torch.inference_mode(False):  # the evidence outlives this forward
                        life.trigger(FORCED_REMASK)
