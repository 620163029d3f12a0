"""Masks as short JSON-able text, so that a resumed measurement counts the same ones."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
import torch

from dart_llm.masks import LayerMask
from dart_llm.session import Masks

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
