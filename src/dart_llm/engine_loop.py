"""The forwards of one request: its prompt in pieces, then token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dart_llm.loop import OwnLoop

PIECE = 512
"""Prompt tokens that are read at once: between two pieces a request can be cancelled."""
SCORED_PIECE = 64
"""The same where the logits of every token are wanted, a vocabulary of numbers each."""


class Forwards:
    """Runs the attached model for ``rows`` rows of one request.  ``cache``: None: an empty one."""

    def __init__(self, model: Any, attachment: Any, rows: int, cache: Any = None) -> None:
        self.cache = cache
        self._model, self._rows, self._device = model, rows, model.device
        self._loop = attachment.loop = OwnLoop()

    def read(
        self,
        ids: Sequence[int],
        cancelled: Callable[[], bool],
        scored: Callable[[Tensor], None] | None = None,
    ) -> Tensor | None:
        """Read prompt tokens; logits [rows, V] after the last, None when it was cancelled.

        ``scored`` is given the logits [n, V] of every n tokens that were read.
        """
        self._loop.prompt = True
        size, kept = (PIECE, 1) if scored is None else (SCORED_PIECE, 0)
        logits = None
        for start in range(0, len(ids), size):
            if cancelled():
                return None
            piece = torch.tensor([ids[start : start + size]] * self._rows, device=self._device)
            every = self._forward(piece, logits_to_keep=kept)
            logits = every[:, -1]
            if scored is not None:
                scored(every[0])
        return logits

    def decode(self, tokens: Sequence[int], live: Sequence[bool]) -> Tensor:
        """Feed one token per row; logits [rows, V].  ``live``: rows that have not ended."""
        self._loop.prompt = False
        self._loop.live = None if all(live) else torch.tensor(live, device=self._device)
        return self._forward(torch.tensor(tokens, device=self._device)[:, None])[:, -1]

    def _forward(self, ids: Tensor, **options: Any) -> Tensor:
        """Logits [rows, n, V]."""
        if self.cache is not None:
            options["cache"] = self.cache
        output = self._model(ids, use_cache=True, **options)
        self.cache = output.cache
        logits: Tensor = output.logits
        return logits
