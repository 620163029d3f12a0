"""Masks over time: recorded while a cell runs, read back from its file for the pictures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
    """Also keeps how many dense tokens came right before each mask, and where pruning ended."""

    def __init__(self) -> None:
        super().__init__()
        self.observed: list[int] = []
        self._life: SequenceState | None = None

    def __call__(self, remask: Remask, life: SequenceState) -> None:
        super().__call__(remask, life)
        self.observed.append(life.observed)
        self._life = life

    def dense_from(self) -> int | None:
        """The decode step from which all ran dense to the end; None where the last was pruned.

        Released, or the text ended while tokens were observed for masks that never came.
        """
        if self._life is None:
            return None
        ends = itertools.takewhile(lambda span: span.kept is None, reversed(self._life.mask_spans))
        dense = sum(span.length for span in ends)
        return self._life.decoded - dense if dense else None


def record(run: Run, recorder: DriftRecorder, widths: Sequence[int]) -> dict[str, Any]:
    """``checks``, ``remasks``, ``dense_from`` and ``accounting`` of a run of one sequence.

    ``widths``: neurons per layer.
    """
    accounting = run.report().to_dict()
    accounting.pop("sequences")
    return {
        "checks": [asdict(check) for check in run.drift_checks],
        "remasks": remasks(recorder, widths),
        "dense_from": recorder.dense_from(),
        "accounting": accounting,
    }


def remasks(recorder: DriftRecorder, widths: Sequence[int]) -> list[dict[str, Any]]:
    """One entry per mask; per layer the Jaccard overlap with the mask before, |A & B| / |A | B|,
    and how many neurons left and joined.  ``observed``: dense tokens right before it."""
    entries: list[dict[str, Any]] = []
    before: list[LiveNeurons] | None = None
    for number, remask in enumerate(recorder.remasks):
        masks = [_live(recorder.tensors, number, *layer) for layer in enumerate(widths)]
        entry: dict[str, Any] = {
            "step": remask.step,
            "cause": remask.cause,
            "kept": list(remask.kept),
            "evidence_tokens": remask.evidence_tokens,
            "observed": recorder.observed[number],
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
    """The decoded tokens cut where masks change.

    Dense: before the first mask, the tokens observed for a mask, from a trigger on, and where
    pruning ended.
    """
    cuts: dict[int, int | None] = {0: None}
    if cell.record["dense_from"] is not None:
        cuts[cell.record["dense_from"]] = None
    cuts |= dict.fromkeys(check.step for check in cell.checks if check.trigger)
    before = 0
    for mask in cell.record["remasks"]:
        if mask["observed"]:
            cuts[max(before, mask["step"] - mask["observed"])] = None
        before = mask["step"]
    cuts |= {mask["step"]: number for number, mask in enumerate(cell.record["remasks"])}
    starts = sorted(step for step in cuts if step < cell.decoded)
    ends = [*starts[1:], cell.decoded]
    return [MaskSpan(a, b, cuts[a]) for a, b in zip(starts, ends, strict=True) if b > a]
