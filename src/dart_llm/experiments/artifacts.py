"""Files of a run: masks (written, read back), drift windows, activations.

The files of a results folder that come from a pruned run.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from dart_llm.errors import ConfigError, ResultsError
from dart_llm.experiments.store import MIN_FREE_BYTES
from dart_llm.files import write_csv, write_json, write_tensors
from dart_llm.models.capture import Recording, Wanted
from dart_llm.models.checkpoint import checkpoint_facts
from dart_llm.models.describe import describe
from dart_llm.pruning.records import DriftCheck, Remask
from dart_llm.pruning.sequence import SequenceState
from dart_llm.pruning.token_level import NO_MASK, sequence_masks
from dart_llm.reporting.table import bytes_text
from dart_llm.reporting.words import dtype_text
from dart_llm.session.run import Run
from dart_llm.settings import ActivationSettings

# ``--save-activations``: how large the files will be, whether they fit, and writing them.


@dataclass(frozen=True)
class Saver:
    """Keeps the activations of texts of at most ``tokens`` tokens in ``folder``."""

    model: Any
    wanted: Wanted
    folder: Path
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of one text's tensors, at most: all layers, tokens and tensors, and token ids."""
        kept, total = self.wanted.tokens(self.tokens), 0
        for block in describe(self.model).blocks:
            if block.index in self.wanted.layers:
                down = block.matrices()[2]
                widths = [down.shape[1] if n == "u" else down.shape[0] for n in self.wanted.tensors]
                total += kept * sum(widths) * down.element_size()
        return total + 4 * kept

    def announce(self, texts: int, say: Callable[[str], None]) -> None:
        """Say how much ``texts`` texts will take; raises ``ResultsError`` when it does not fit."""
        need, free = texts * self.nbytes, shutil.disk_usage(self.folder).free
        if need + MIN_FREE_BYTES > free:
            raise ResultsError(
                f"--save-activations needs {bytes_text(need)} in {self.folder}, where "
                f"{bytes_text(free)} are free: keep fewer in Python, with models.capture.Recording"
            )
        layers = len(self.wanted.layers)
        say(
            f"--save-activations writes up to {bytes_text(need)} to {self.folder}: "
            f"{', '.join(self.wanted.tensors)} of {layers} layer{'' if layers == 1 else 's'}, "
            f"{self.wanted.tokens(self.tokens)} tokens of a text; recording takes time that the "
            "measured times include"
        )

    def path(self, name: str) -> Path:
        """The file of the text called ``name``."""
        return self.folder / f"activations-{name}.safetensors"

    @contextlib.contextmanager
    def recording(self, name: str, text: str) -> Iterator[None]:
        """Record the sequence that runs inside; written when the block ends without an error.

        ``text``: what was given to the tokenizer; its sha256 goes into the metadata.
        """
        with Recording(self.model, self.wanted) as recording:
            yield
        self._write(name, text, recording.tensors())

    def _write(self, name: str, text: str, tensors: dict[str, Tensor]) -> None:
        facts, path = checkpoint_facts(self.model), self.path(name)
        kept = max((len(tensor) for tensor in tensors.values()), default=0)
        metadata = {
            "checkpoint": str(facts.get("name")),
            "checkpoint_sha256": str(facts.get("sha256")),
            "dtype": dtype_text(facts),
            "layers": ",".join(map(str, self.wanted.layers)),
            "tensors": ",".join(self.wanted.tensors),
            "tokens": f"{self.wanted.start}:{self.wanted.start + kept}",
            "text": name,
            "text_sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
            "format": "layer{l}.{tensor}: [tokens, width]; token_ids: int32 [tokens]",
        }
        write_tensors(path, tensors, metadata)


def saver(settings: ActivationSettings, model: Any, folder: Path, tokens: int) -> Saver | None:
    """A ``Saver`` when activations are to be saved.  ``tokens``: of the longest text in all."""
    if not settings.save_activations:
        return None
    return Saver(model, settings.wanted(len(describe(model).blocks)), folder, tokens)


FORMAT = "remask{i}.layer{l}.ids: kept neurons, int32; .scores: float32, larger is kept"


class MaskRecorder:
    """Collects kept ids and scores of every mask, on the host; plug into ``run.on_selection``."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.remasks: list[Remask] = []
        self.per_token = False
        """Whether tokens choose their own neurons, so that there are no ids to keep."""

    def __call__(self, remask: Remask, life: SequenceState) -> None:
        prefix = f"remask{len(self.remasks)}.layer"
        self.remasks.append(remask)
        assert life.selection is not None
        plain = sequence_masks(life.selection.masks)
        self.per_token = plain is not life.selection.masks
        for layer, mask in enumerate(plain):
            if mask is not None:
                self.tensors[f"{prefix}{layer}.ids"] = mask.ids.to("cpu", torch.int32)
        for layer, score in enumerate(life.selection.scores):
            self.tensors[f"{prefix}{layer}.scores"] = score.float().cpu()

    def write(self, path: Path, checkpoint: str, method: str) -> None:
        """Kept ids and scores of every mask; raises ``ResultsError`` when the disk is full."""
        count = str(len(self.remasks))
        facts = {"checkpoint": checkpoint, "method": method, "remasks": count, "format": FORMAT}
        write_tensors(path, self.tensors, facts)


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
    recorder.write(folder / "masks.safetensors", checkpoint, report.method)


def _entries(file: Any, kind: str) -> Iterator[tuple[int, int, str]]:
    """Mask, layer and key of the tensors of one kind, ``ids`` or ``scores``."""
    for key in file.keys():  # noqa: SIM118 - not a mapping
        if found := re.fullmatch(rf"remask(\d+)\.layer(\d+)\.{kind}", key):
            yield int(found[1]), int(found[2]), key


def read_masks(path: str) -> dict[int, Tensor]:
    """The newest masks of a masks.safetensors: {layer: kept neuron ids}.

    Raises ``ConfigError`` when the file cannot be read or has no masks.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[int, dict[int, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for number, layer, key in _entries(file, "ids"):
                found.setdefault(number, {})[layer] = file.get_tensor(key).long()
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

    with safe_open(path, framework="pt") as file:
        name = (file.metadata() or {}).get("checkpoint", "another model")
        scores = _entries(file, "scores")
        found = {layer: file.get_slice(key).get_shape()[0] for _, layer, key in scores}
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


def read_checks(folder: Path) -> list[DriftCheck]:
    """The windows of drift.csv; none where there is no such file."""
    path = folder / "drift.csv"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = ({**row, "threshold": row["threshold"] or None} for row in csv.DictReader(lines))
    checks = [TypeAdapter(DriftCheck).validate_python(row) for row in rows]
    return [check for check in checks if math.isfinite(check.similarity)]
