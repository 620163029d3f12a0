"""Masks over time: recorded while a cell runs, read back from its file for the pictures."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dart_llm.experiments.artifacts import MaskRecorder
from dart_llm.pruning.records import Remask
from dart_llm.pruning.sequence import SequenceState
from dart_llm.session.run import Run
from dart_llm.studies.drift.cell import DriftCell


class DriftRecorder(MaskRecorder):
    """Also keeps the sequence, which counts the tokens under every mask."""

    def __init__(self) -> None:
        super().__init__()
        self._sequence: SequenceState | None = None

    def __call__(self, remask: Remask, life: SequenceState) -> None:
        super().__call__(remask, life)
        self._sequence = life

    def spans(self) -> list[tuple[int, int, int | None]]:
        """``MaskSpan``s of all decode steps, as JSON-able data."""
        steps = [remask.step for remask in self.remasks]
        spans, start = list[tuple[int, int, int | None]](), 0
        for span in self._sequence.mask_spans if self._sequence else ():
            end = start + span.length
            cuts = [start, *(step for step in steps if start < step < end), end]
            for first, last in pairwise(cuts):
                mask = None if span.kept is None else bisect_right(steps, first) - 1
                spans += [(first, last, mask)] if first < last else []
            start = end
        return spans


def record(run: Run, recorder: DriftRecorder, widths: Sequence[int]) -> dict[str, Any]:
    """``checks``, ``remasks``, ``spans`` and ``accounting`` of a run of one sequence.

    ``widths``: neurons per layer.
    """
    accounting = run.report().to_dict()
    accounting.pop("sequences")
    return {
        "checks": [asdict(check) for check in run.drift_checks],
        "remasks": remasks(recorder, widths),
        "spans": recorder.spans(),
        "accounting": accounting,
    }


def remasks(recorder: DriftRecorder, widths: Sequence[int]) -> list[dict[str, Any]]:
    """One entry per mask; per layer the Jaccard overlap with the mask before, |A & B| / |A | B|,
    and how many neurons left and joined."""
    entries: list[dict[str, Any]] = []
    before: list[LiveNeurons] | None = None
    for number, remask in enumerate(recorder.remasks):
        masks = [_live(recorder.tensors, number, *layer) for layer in enumerate(widths)]
        entry: dict[str, Any] = {
            "step": remask.step,
            "cause": remask.cause,
            "kept": list(remask.kept),
            "evidence_tokens": remask.evidence_tokens,
            **dict.fromkeys(("jaccard", "left", "joined")),
        }
        if before is not None and not recorder.per_token:
            pairs = list(zip(before, masks, strict=True))
            entry["jaccard"] = [jaccard(old, new) for old, new in pairs]
            entry["left"] = [int((old & ~new).sum()) for old, new in pairs]
            entry["joined"] = [int((new & ~old).sum()) for old, new in pairs]
        entries.append(entry)
        before = masks
    return entries


LiveNeurons = NDArray[np.bool_]
"""Which neurons of one layer are kept: [width], or [masks, width]."""


def _live(ids: Mapping[str, Any], number: int, layer: int, width: int) -> LiveNeurons:
    """[width]; a layer without ids is dense: all its neurons live."""
    kept = ids.get(f"remask{number}.layer{layer}.ids")
    if kept is None:
        return np.ones(width, dtype=np.bool_)
    return np.isin(np.arange(width), np.asarray(kept))


def read_masks(cell: DriftCell, folder: Path) -> tuple[LiveNeurons, ...]:
    """[masks, width] per layer; nothing where every token selects its own neurons."""
    from safetensors import safe_open

    with safe_open(folder / cell.file, framework="np") as file:
        names = [name for name in file.keys() if name.endswith(".ids")]  # noqa: SIM118
        ids = {name: file.get_tensor(name) for name in names}
    widths = [int(layer["width"]) for layer in cell.record["accounting"]["layers"]]
    numbers = range(len(cell.record["remasks"])) if ids else ()
    layers = enumerate(widths) if ids else ()
    return tuple(
        np.stack([_live(ids, n, layer, width) for n in numbers]) for layer, width in layers
    )


def jaccard(one: LiveNeurons, other: LiveNeurons) -> float:
    """|A and B| / |A or B|; 1 for two empty sets."""
    union = int(np.count_nonzero(one | other))
    return int(np.count_nonzero(one & other)) / union if union else 1.0


def overlap(masks: Sequence[LiveNeurons]) -> NDArray[np.float64]:
    """[layers, masks]: Jaccard with the first mask."""
    return np.array([[jaccard(live[0], mask) for mask in live] for live in masks])


def chance(masks: Sequence[LiveNeurons]) -> float:
    """Jaccard to expect of two independent masks of these sizes: mean over layers of k / (2 - k).

    k: the layer's keep ratio.  Their intersection holds k^2 of the layer, their union 2 k - k^2.
    """
    ratios = [float(live[0].mean()) for live in masks]
    return fmean(k / (2 - k) for k in ratios)


@dataclass(frozen=True)
class MaskSpan:
    """Decoded tokens ``start`` to ``end`` (not included) under mask ``mask``; None: dense."""

    start: int
    end: int
    mask: int | None


def mask_spans(cell: DriftCell) -> list[MaskSpan]:
    """The decoded tokens cut where masks change; the last token, never fed, is of the last span."""
    spans = [MaskSpan(*span) for span in cell.record["spans"]]
    if not spans:
        return [MaskSpan(0, cell.decoded, None)]
    return [*spans[:-1], replace(spans[-1], end=cell.decoded)]
