"""The masks of a drift cell: which neurons live when, and how much of them a re-mask keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dart_llm.drift_view_cells import DriftCell
from dart_llm.errors import ResultsError

Live = NDArray[np.bool_]

MOST_COLUMNS = 5
"""Masks that a free text's flow shows: the first ones, and the last."""


@dataclass(frozen=True)
class Masks:
    """``live``: per layer, [masks, width]; ``steps``: from which decode step each is in force."""

    steps: tuple[int, ...]
    live: tuple[Live, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(layer.shape[1] for layer in self.live)


@dataclass(frozen=True)
class Period:
    """Decoded tokens ``start`` to ``end`` (not included) under mask ``mask``; None: dense."""

    start: int
    end: int
    mask: int | None


@dataclass(frozen=True)
class Flow:
    """Neurons between two masks: in both, only in the old, only in the new, in neither."""

    kept: int
    left: int
    joined: int
    out: int

    @property
    def share_kept(self) -> float:
        """Of the old mask's neurons."""
        return self.kept / max(1, self.kept + self.left)


def read(cell: DriftCell) -> Masks | None:
    """The masks of ``cell``; None where it has none, as where every token chooses its own neurons.

    Layers without kept ids are dense: all their neurons live.  Raises ``ResultsError`` for a
    neuron beyond the layer's width.
    """
    if cell.masks is None or not cell.remasks:
        return None
    from safetensors import safe_open

    with safe_open(cell.masks, framework="np") as file:
        names = set(file.keys())
        ids = {name: file.get_tensor(name) for name in names if name.endswith(".ids")}
        widths = {name: file.get_slice(name).get_shape()[0] for name in names - ids.keys()}
    if not ids:
        return None
    layers = range(len(cell.remasks[0].kept))
    live = tuple(_layer(ids, widths, layer, cell) for layer in layers)
    return Masks(tuple(mask.step for mask in cell.remasks), live) if live else None


def _layer(ids: dict[str, Any], widths: dict[str, int], layer: int, cell: DriftCell) -> Live:
    width = widths.get(f"remask0.layer{layer}.scores") or _width(cell, layer)
    live = np.ones((len(cell.remasks), width), dtype=np.bool_)
    for number in range(len(cell.remasks)):
        own = ids.get(f"remask{number}.layer{layer}.ids")
        if own is None:
            continue
        if len(own) and not 0 <= int(own.min()) <= int(own.max()) < width:
            raise ResultsError(
                f"the masks of the cell {cell.key} keep neurons beyond the {width} of layer "
                f"{layer}: run the cell anew"
            )
        live[number] = False
        live[number, own] = True
    return live


def _width(cell: DriftCell, layer: int) -> int:
    layers = (cell.accounting or {}).get("layers") or []
    return int(layers[layer]["width"]) if layer < len(layers) else cell.remasks[0].kept[layer]


def jaccard(one: Live, other: Live) -> float:
    """|A and B| / |A or B|; 1 for two empty sets."""
    union = int(np.count_nonzero(one | other))
    return int(np.count_nonzero(one & other)) / union if union else 1.0


def overlap(masks: Masks, before: bool = False) -> NDArray[np.float64]:
    """[layers, masks]: Jaccard with the first mask, or with the mask before (the first: 1)."""
    count = len(masks.steps)
    rows = [
        [jaccard(live[max(0, k - 1) if before else 0], live[k]) for k in range(count)]
        for live in masks.live
    ]
    return np.array(rows, dtype=np.float64)


def chance(masks: Masks) -> float:
    """Jaccard to expect of two independent masks of these sizes: mean over layers of k / (2 - k).

    k: the layer's keep ratio.  Their intersection holds k^2 of the layer, their union 2 k - k^2.
    """
    ratios = [float(live[0].mean()) for live in masks.live]
    return float(np.mean([k / (2 - k) for k in ratios]))


def flow(masks: Masks, old: int, new: int) -> Flow:
    """Summed over all layers."""
    kept = left = joined = out = 0
    for live in masks.live:
        a, b = live[old], live[new]
        both = int(np.count_nonzero(a & b))
        kept, left = kept + both, left + int(a.sum()) - both
        joined, out = joined + int(b.sum()) - both, out + int(np.count_nonzero(~(a | b)))
    return Flow(kept, left, joined, out)


def moved(masks: Masks) -> int:
    """The layer whose masks overlap least with its first one."""
    return int(overlap(masks)[:, 1:].mean(1).argmin()) if len(masks.steps) > 1 else 0


def periods(cell: DriftCell) -> list[Period]:
    """The decoded tokens cut where masks change.

    Dense: before the first mask, the tokens observed for a mask, from a trigger on, and where
    pruning ended.
    """
    cuts: dict[int, int | None] = {0: None}
    if cell.dense_from is not None:
        cuts[cell.dense_from] = None
    for check in cell.checks:
        if check.trigger:
            cuts[check.step] = None
    before = 0
    for mask in cell.remasks:
        if mask.observed:
            cuts[max(before, mask.step - mask.observed)] = None
        before = mask.step
    cuts |= {mask.step: place for place, mask in enumerate(cell.remasks)}
    starts = sorted(step for step in cuts if step < cell.decoded_tokens)
    ends = [*starts[1:], cell.decoded_tokens]
    return [Period(a, b, cuts[a]) for a, b in zip(starts, ends, strict=True) if b > a]


def columns(cell: DriftCell) -> list[tuple[str, int]]:
    """Names and mask numbers for a flow: the mask in force where each topic ends.

    Where the places of the topics are not known, the masks themselves, at most ``MOST_COLUMNS``.
    """
    if not cell.remasks:
        return []
    if cell.changes:
        ends = [topic.end or 0 for topic in cell.topics]
        return [
            (topic.name, _in_force(cell, end))
            for topic, end in zip(cell.topics, ends, strict=True)
            if cell.remasks[0].step < end
        ]
    chosen: Sequence[int] = range(len(cell.remasks))
    if len(chosen) > MOST_COLUMNS:
        chosen = [*chosen[: MOST_COLUMNS - 1], chosen[-1]]
    return [(f"mask of step {cell.remasks[k].step}", k) for k in chosen]


def _in_force(cell: DriftCell, end: int) -> int:
    return max(place for place, mask in enumerate(cell.remasks) if mask.step < end)
