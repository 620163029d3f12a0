"""What is kept of one pruned run: windows, masks before and after every re-mask, accounting."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dart_llm.life import Life
from dart_llm.outputs import MaskRecorder
from dart_llm.records import Remask
from dart_llm.results import finite
from dart_llm.session import Run
from dart_llm.tensor_file import write_tensors

FORMAT = "remask{i}.layer{l}.ids: kept neurons, int32; .scores: float32, larger is kept"


class DriftRecorder(MaskRecorder):
    """Also keeps how many dense tokens came right before each mask, and where pruning ended."""

    def __init__(self) -> None:
        super().__init__()
        self.observed: list[int] = []
        self._life: Life | None = None

    def __call__(self, remask: Remask, life: Life) -> None:
        super().__call__(remask, life)
        self.observed.append(life.observed)
        self._life = life

    def dense_from(self) -> int | None:
        """The decode step from which all ran dense to the end; None where the last was pruned.

        Released, or the text ended while tokens were observed for masks that never came.
        """
        if self._life is None:
            return None
        ends = itertools.takewhile(lambda one: one.kept is None, reversed(self._life.periods))
        dense = sum(one.length for one in ends)
        return self._life.decoded - dense if dense else None


def record(run: Run, recorder: DriftRecorder, widths: Sequence[int]) -> dict[str, Any]:
    """``checks``, ``remasks``, ``dense_from`` and ``accounting`` of a run of one sequence.

    JSON-able.  ``widths``: neurons per layer.
    """
    accounting = run.report().to_dict()
    accounting.pop("sequences")
    found = {
        "checks": [asdict(check) for check in run.drift_checks],
        "remasks": remasks(recorder, widths),
        "dense_from": recorder.dense_from(),
        "accounting": accounting,
    }
    return dict(json.loads(json.dumps(finite(found))))


def remasks(recorder: DriftRecorder, widths: Sequence[int]) -> list[dict[str, Any]]:
    """One entry per mask; per layer the Jaccard overlap with the mask before, |A & B| / |A | B|,
    and how many neurons left and joined.  ``observed``: dense tokens right before it."""
    found: list[dict[str, Any]] = []
    before: list[Tensor] | None = None
    for number, remask in enumerate(recorder.remasks):
        masks = [_kept(recorder, number, layer, width) for layer, width in enumerate(widths)]
        alone = before is None or recorder.per_token
        moves = None if alone else [_moves(*two) for two in zip(before or [], masks, strict=True)]
        found.append(
            {
                "step": remask.step,
                "cause": remask.cause,
                "kept": list(remask.kept),
                "evidence_tokens": remask.evidence_tokens,
                "observed": recorder.observed[number],
                "jaccard": None if moves is None else [jaccard for jaccard, _, _ in moves],
                "left": None if moves is None else [left for _, left, _ in moves],
                "joined": None if moves is None else [joined for _, _, joined in moves],
            }
        )
        before = masks
    return found


def _kept(recorder: DriftRecorder, number: int, layer: int, width: int) -> Tensor:
    """[width] bool; a layer without ids is dense."""
    ids = recorder.tensors.get(f"remask{number}.layer{layer}.ids")
    if ids is None:
        return torch.ones(width, dtype=torch.bool)
    mask = torch.zeros(width, dtype=torch.bool)
    mask[ids.long()] = True
    return mask


def _moves(old: Tensor, new: Tensor) -> tuple[float, int, int]:
    both, either = int((old & new).sum()), int((old | new).sum())
    return both / either if either else 1.0, int(old.sum()) - both, int(new.sum()) - both


def write_masks(path: Path, recorder: DriftRecorder, checkpoint: str, label: str) -> None:
    """Kept ids and scores of every mask, as ``dart-llm run`` writes them.

    Raises ``ResultsError`` when the disk is full or read-only.
    """
    metadata = {
        "checkpoint": checkpoint,
        "method": label,
        "remasks": str(len(recorder.remasks)),
        "format": FORMAT,
    }
    write_tensors(path, recorder.tensors, metadata)
