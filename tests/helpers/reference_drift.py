"""The drift rule `dart` with its guards, a second time: docs/method.md in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW = 10
DEVIATIONS = 1.5
LOW_WINDOWS = 3
LEAST, MOST = 4, 128  # windows of a reference
MIN_DISTANCE = 64
DENSE_SHARE, ALLOWANCE, NEED = 0.05, 32, 32


class Detector:
    """Compares windows of the last hidden state with what was observed; sees no sinks."""

    def __init__(self) -> None:
        self.observed: list[Tensor] = []
        self.window: list[Tensor] = []
        self.centroid: Tensor | None = None
        self.threshold = 0.0
        self.low = self.refresh_tokens = 0
        self.last: int | None = None  # decoded tokens at the newest trigger

    def observe(self, v: Tensor) -> None:
        """Observed tokens [T, D]."""
        self.observed += [*v]

    def arm(self) -> None:
        """Masks are made from the observed tokens: so is the reference, if they are enough."""
        self.window, self.low, self.centroid = [], 0, None
        if len(self.observed) >= LEAST * WINDOW:
            self._refer()
        self.observed = []

    def _refer(self) -> None:
        tokens = torch.stack(self.observed)
        total, count = tokens.sum(0), len(tokens)
        windows = [w.sum(0) for w in tokens.split(WINDOW) if len(w) == WINDOW][-MOST:]
        alike = torch.stack(
            [
                F.cosine_similarity(w / WINDOW, (total - w) / (count - WINDOW), dim=0)
                for w in windows
            ]
        )
        self.centroid = total / count
        self.threshold = float(alike.mean() - DEVIATIONS * alike.std())

    def watch(self, v: Tensor, decoded: int) -> bool:
        """One pruned token [D], the ``decoded``-th of the sequence: whether it is a trigger."""
        self.window.append(v)
        if len(self.window) < WINDOW:
            return False
        window, self.window = torch.stack(self.window), []
        if self.centroid is None:
            self.observed = [*self.observed, *window]
            if len(self.observed) >= LEAST * WINDOW:
                self._refer()
                self.observed = []
            return False
        low = bool(F.cosine_similarity(window.mean(0), self.centroid, dim=0) < self.threshold)
        self.low = self.low + 1 if low else max(0, self.low - 1)
        if not low or self.low < LOW_WINDOWS or not self._allowed(decoded):
            return False
        self.refresh_tokens, self.last = self.refresh_tokens + NEED, decoded
        return True

    def _allowed(self, decoded: int) -> bool:
        near = self.last is not None and decoded - self.last < MIN_DISTANCE
        most = ALLOWANCE + DENSE_SHARE * (decoded + NEED)
        return not near and self.refresh_tokens + NEED <= most
