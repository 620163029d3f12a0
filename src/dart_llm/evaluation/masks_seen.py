"""The masks that held while a task was measured: counted, and kept as parts.

Masks as short JSON-able text, so that a resumed measurement counts the same ones.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dart_llm.pruning.masks import LayerMask, Masks

# How often each neuron was kept: what is remembered of the masks of an evaluation.


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


Packed = list[list[int | str] | None]
"""Per layer: its width and which neurons are kept, one bit each in base64; None: dense."""


class Taken:
    """Collects the masks that a run announces, each once; plug into ``run.on_masks``."""

    def __init__(self) -> None:
        self.packed: list[Packed] = []
        self._last: Masks | None = None

    def __call__(self, masks: Masks) -> None:
        """Masks that are chosen beforehand are announced again when they are first applied."""
        if masks is not self._last and any(mask is not None for mask in masks):
            self.packed.append(pack(masks))
        self._last = masks

    def take(self) -> list[Packed]:
        """What was collected since the last call.

        Masks that go on counting are collected again: a part must not depend on whether the one
        before it was computed in the same process.
        """
        found, self.packed, self._last = self.packed, [], None
        return found


def pack(masks: Sequence[LayerMask | None]) -> Packed:
    """Which neurons each layer keeps; compensation is left out."""
    return [
        None
        if mask is None
        else [
            mask.width,
            base64.b64encode(np.packbits(mask.dense(torch.bool).cpu().numpy()).tobytes()).decode(),
        ]
        for mask in masks
    ]


def unpack(packed: Packed) -> Masks:
    """The masks that ``pack`` wrote, on the host."""
    found: list[LayerMask | None] = []
    for layer in packed:
        if layer is None:
            found.append(None)
            continue
        width, text = int(layer[0]), base64.b64decode(str(layer[1]))
        bits = np.unpackbits(np.frombuffer(text, dtype=np.uint8), count=width)
        found.append(LayerMask(torch.from_numpy(bits.copy()).nonzero().flatten(), width))
    return tuple(found)
