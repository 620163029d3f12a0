"""Decode tokens that were seen and not yet added to the evidence.

Adding sixteen tokens at once costs about as much as adding one, so observing stays cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Seen = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""u [B, T, I], z [B, T, D], and x, r [B, T, D] and f [B, T, F] where they are needed."""

LIMIT = 16
"""Tokens after which the evidence is updated."""

MAX_BYTES = 4 << 20
"""Bytes after which it is updated, however few the tokens: large models gain nothing by waiting."""


def outlasting(u: Tensor, z: Tensor, x: Tensor | None, r: Tensor | None, f: Tensor | None) -> Seen:
    """What one layer saw, outside any graph and safe from what the model does later."""
    # z is cloned: some layers add to the FFN's output in place after it returned
    kept = z.detach().clone()
    same = r is z or (r is not None and r.data_ptr() == z.data_ptr())
    x, r, f = (t if t is None else t.detach() for t in (x, r, f))
    return u.detach(), kept, x, kept if same else r, f


Update = Callable[[list[bool], int, Seen, Tensor | None], None]


@dataclass
class Observations:
    """A queue of observed decode tokens of all layers; ``observing``: one flag per life."""

    update: Update
    observing: list[bool] = field(default_factory=list)
    layers: dict[int, list[Seen]] = field(default_factory=dict)
    weights: list[Tensor | None] = field(default_factory=list)
    shapes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.shapes)

    def add(
        self,
        observing: list[bool],
        layers: dict[int, Seen],
        weights: Tensor | None,
        rows: int,
        tokens: int,
    ) -> None:
        """Queue the first ``tokens`` of one forward; ``weights``: [B, tokens] or None."""
        if not layers or not tokens:
            return
        if observing != self.observing or (self.shapes and self.shapes[0][0] != rows):
            self.flush()
        self.observing = observing
        for layer, seen in layers.items():
            self.layers.setdefault(layer, []).append(_first(seen, tokens))
        self.weights.append(weights)
        self.shapes.append((rows, tokens))
        if self.tokens >= LIMIT or self.nbytes() >= MAX_BYTES:
            self.flush()

    def nbytes(self) -> int:
        """Bytes of the queued tensors; all layers hold as much as the first."""
        first = next(iter(self.layers.values()), [])
        each = sum(t.numel() * t.element_size() for seen in first for t in seen if t is not None)
        return each * len(self.layers)

    def flush(self) -> None:
        """Add everything queued to the evidence."""
        weights = self._joined_weights()
        for layer, seen in self.layers.items():
            us, zs, *others = zip(*seen, strict=True)
            x, r, f = (_join(parts) for parts in others)
            joined = (torch.cat(us, 1), torch.cat(zs, 1), x, r, f)
            self.update(self.observing, layer, joined, weights)
        self.layers, self.weights, self.shapes = {}, [], []

    def _joined_weights(self) -> Tensor | None:
        given = next((w for w in self.weights if w is not None), None)
        if given is None:
            return None
        parts = [
            torch.ones(shape, device=given.device) if w is None else w
            for w, shape in zip(self.weights, self.shapes, strict=True)
        ]
        return torch.cat(parts, 1)


def _first(seen: Seen, tokens: int) -> Seen:
    """The first ``tokens`` of what one layer saw."""
    if seen[0].shape[1] == tokens:
        return seen
    u, z, x, r, f = (None if t is None else t[:, :tokens] for t in seen)
    assert u is not None
    assert z is not None
    return u, z, x, r, f


def _join(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found, 1) if found else None
