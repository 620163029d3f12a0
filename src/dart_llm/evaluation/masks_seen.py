"""Finished parts of a measurement: their masks, their sums, and how they are stored.

A part is JSON-able data with at least ``report`` (``RunReport.to_dict()`` or None), ``masks``
(packed) and, where tokens ran outside any run, ``dense_tokens``.  A resumed measurement reads its
parts back, and counts and merges the same ones.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dart_llm.pruning.masks import LayerMask, Masks
from dart_llm.pruning.records import add_dense, merge_reports
from dart_llm.session.prepare import UnitStore
from dart_llm.session.run import Run

Part = Mapping[str, Any]

Packed = list[list[int | str] | None]
"""Per layer: its width and which neurons are kept, one bit each in base64; None: dense."""


class TakenMasks:
    """Collects the masks that a run applies, each once; set it as ``run.on_masks``."""

    def __init__(self) -> None:
        self.packed: list[Packed] = []
        self._last: Masks | None = None

    def __call__(self, masks: Masks) -> None:
        """Masks that were chosen beforehand arrive again when they are first applied."""
        if masks is not self._last and any(mask is not None for mask in masks):
            self.packed.append(pack(masks))
        self._last = masks

    def take(self) -> list[Packed]:
        """What was collected since the last call.

        Masks that stay in force are collected again: a part must not depend on whether the one
        before it was computed in the same process.
        """
        packed, self.packed, self._last = self.packed, [], None
        return packed


def pack(masks: Sequence[LayerMask | None]) -> Packed:
    """Which neurons each layer keeps; compensation is left out."""

    def bits(mask: LayerMask) -> str:
        packed = np.packbits(mask.dense(torch.bool).cpu().numpy())
        return base64.b64encode(packed.tobytes()).decode()

    return [None if mask is None else [mask.width, bits(mask)] for mask in masks]


def kept_flags(layer: list[int | str]) -> Tensor:
    """Which neurons of a packed layer are kept, [I] bool."""
    width, text = int(layer[0]), base64.b64decode(str(layer[1]))
    bits = np.unpackbits(np.frombuffer(text, dtype=np.uint8), count=width)
    return torch.from_numpy(bits.astype(bool))


def count_masks(parts: Iterable[Part]) -> tuple[tuple[Tensor, ...], int]:
    """Per layer how many masks kept each neuron ([I] int32; empty: never masked); and how many."""
    counts: list[Tensor] = []
    total = 0
    for packed in (packed for part in parts for packed in part["masks"]):
        counts = counts or [torch.zeros(0, dtype=torch.int32) for _ in packed]
        total += 1
        for index, layer in enumerate(packed):
            if layer is not None:
                flags = kept_flags(layer).int()
                counts[index] = counts[index] + flags if len(counts[index]) else flags
    return tuple(counts), total


def tensors(counts: Sequence[Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Named for a safetensors file: ``<prefix>layer<l>.kept``."""
    return {f"{prefix}layer{i}.kept": c for i, c in enumerate(counts) if len(c)}


def merge_accounting(run: Run | None, parts: Iterable[Part]) -> dict[str, Any] | None:
    """The reports of all parts as one, without ``sequences``; None for the untouched model."""
    if run is None:
        return None
    parts = list(parts)
    reports = [part["report"] for part in parts if part["report"]]
    run.reset()
    merged = merge_reports(reports) if reports else run.report().to_dict()
    merged = dict(add_dense(merged, sum(part.get("dense_tokens", 0) for part in parts)))
    merged.pop("sequences")
    return merged


def finished_part(parts: UnitStore, key: str, make: Callable[[], Part]) -> Part:
    """The part stored under ``key``, or what ``make`` returns, which is then stored."""
    part: Part | None = parts.part(key)
    if part is None:
        part = make()
        parts.save_part(key, part)
    return part
