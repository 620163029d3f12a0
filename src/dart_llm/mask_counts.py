"""How often each neuron was kept: what is remembered of the masks of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dart_llm.masks import LayerMask


class MaskCounts:
    """Counts, per layer, how many masks kept each neuron; plug into ``run.on_masks``.

    Masks that are announced twice in a row, when chosen and when applied, count once.
    """

    def __init__(self) -> None:
        self.masks = 0
        self._last: Sequence[LayerMask | None] | None = None
        self._counts: list[Tensor] = []

    def __call__(self, masks: Sequence[LayerMask | None]) -> None:
        if masks is self._last or not any(mask is not None for mask in masks):
            return
        self._last = masks
        if not self._counts:
            self._counts = [torch.zeros(0, dtype=torch.int32) for _ in masks]
        self.masks += 1
        for layer, mask in enumerate(masks):
            if mask is None:
                continue
            if not len(self._counts[layer]):
                self._counts[layer] = torch.zeros(mask.width, dtype=torch.int32)
            self._counts[layer][mask.ids.cpu()] += 1

    @property
    def counts(self) -> tuple[Tensor, ...]:
        """[I] int32 per layer; empty for a layer that was never masked."""
        return tuple(self._counts)


def tensors(counts: Sequence[Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Named for a safetensors file: ``<prefix>layer<l>.kept``."""
    return {f"{prefix}layer{i}.kept": c for i, c in enumerate(counts) if len(c)}
