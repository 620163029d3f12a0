"""The files of a results folder that come from a pruned run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dart_llm.errors import ConfigError
from dart_llm.life import Life
from dart_llm.records import DriftCheck, Remask
from dart_llm.results import write_csv, write_json
from dart_llm.session import Run
from dart_llm.tensor_file import write_tensors
from dart_llm.token_select import NO_MASK, sequence_masks


class MaskRecorder:
    """Collects kept ids and scores of every mask, on the host; plug into ``run.on_selection``."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.remasks: list[Remask] = []
        self.per_token = False
        """Whether tokens choose their own neurons, so that there are no ids to keep."""

    def __call__(self, remask: Remask, life: Life) -> None:
        number = len(self.remasks)
        self.remasks.append(remask)
        assert life.selection is not None
        plain = sequence_masks(life.selection.masks)
        self.per_token = plain is not life.selection.masks
        for layer, mask in enumerate(plain):
            if mask is not None:
                self.tensors[f"remask{number}.layer{layer}.ids"] = mask.ids.to("cpu", torch.int32)
        for layer, score in enumerate(life.selection.scores):
            self.tensors[f"remask{number}.layer{layer}.scores"] = score.float().cpu()


def write_masks(folder: Path, recorder: MaskRecorder, run: Run, checkpoint: str) -> None:
    """masks.json (counts and causes) and masks.safetensors (kept ids and scores)."""
    report = run.report()
    write_json(
        folder / "masks.json",
        {
            "remasks": [asdict(remask) for remask in recorder.remasks],
            "layers": [asdict(layer) for layer in report.layers],
            **({"note": NO_MASK} if recorder.per_token else {}),
        },
    )
    metadata = {
        "checkpoint": checkpoint,
        "method": report.method,
        "remasks": str(len(recorder.remasks)),
        "format": "remask{i}.layer{l}.ids: kept neurons, int32; .scores: float32, larger is kept",
    }
    write_tensors(folder / "masks.safetensors", recorder.tensors, metadata)


def read_masks(path: str) -> dict[int, Tensor]:
    """The newest masks of a masks.safetensors: {layer: kept neuron ids}.

    Raises ``ConfigError`` when the file cannot be read or holds no masks.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[int, dict[int, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                remask, layer, kind = key.split(".")
                if kind == "ids":
                    number, index = int(remask.removeprefix("remask")), int(layer[5:])
                    found.setdefault(number, {})[index] = file.get_tensor(key).long()
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"cannot read masks from {path}: {error}") from None
    if not found:
        raise ConfigError(
            f"{path} holds no masks; expected keys like remask0.layer3.ids (a method that chooses "
            "for every token leaves none)"
        )
    return found[max(found)]


def check_masks(path: str, widths: Sequence[int]) -> None:
    """Raise ``ConfigError`` when the masks in ``path`` were made for a model of another shape.

    ``widths``: neurons per layer of the model at hand.  Given masks have no scores: their file
    does not say which shape they are for.
    """
    from safetensors import safe_open

    found: dict[int, int] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            _, layer, kind = key.split(".")
            if kind == "scores":
                found[int(layer[5:])] = file.get_slice(key).get_shape()[0]
        name = (file.metadata() or {}).get("checkpoint", "another model")
    theirs = [found[layer] for layer in sorted(found)]
    if theirs and theirs != list(widths):
        raise ConfigError(
            f"the masks in {path} are of {name}, which has {_shape(theirs)}; the model at hand has "
            f"{_shape(widths)}: give masks that were made on it"
        )


def _shape(widths: Sequence[int]) -> str:
    neurons = " or ".join(str(width) for width in sorted(set(widths)))
    return f"{len(widths)} layers of {neurons} neurons"


def write_drift(folder: Path, checks: tuple[DriftCheck, ...]) -> None:
    """drift.csv: one row per completed window and batch row."""
    header = [field.name for field in fields(DriftCheck)]
    rows = [
        [int(v) if isinstance(v, bool) else v for v in (getattr(check, n) for n in header)]
        for check in checks
    ]
    write_csv(folder / "drift.csv", header, rows)


def timing_text(timing: dict[str, Any]) -> str:
    """timing_<time>.log: the numbers of timing.json for people."""
    lines = []
    for key, value in timing.items():
        if isinstance(value, dict):
            parts = (f"{name} {number:.4g}" for name, number in value.items() if number is not None)
            lines.append(f"{key}: {', '.join(parts)}")
        elif isinstance(value, float):
            lines.append(f"{key}: {value:.4g}")
        else:
            lines.append(f"{key}: {value}")
    return "\n".join(lines) + "\n"
