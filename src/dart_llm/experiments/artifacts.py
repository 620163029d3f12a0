"""Files that a pruned run writes: activations, masks, and drift.csv (the detector's windows)."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
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
from dart_llm.pruning.token_level import NO_MASK, TokenMask, sequence_masks
from dart_llm.reporting.table import bytes_text
from dart_llm.reporting.words import count, dtype_text
from dart_llm.session.run import Run
from dart_llm.settings import ActivationSettings

# ``--save-activations``: estimate the size of the files, check the disk space, write the files.


@dataclass(frozen=True)
class Saver:
    """Saves activations in ``folder``, one file per text.

    ``wanted``: the layers, tensors and tokens to save.  ``tokens``: length of the longest text.
    """

    model: Any
    wanted: Wanted
    folder: Path
    tokens: int

    @property
    def nbytes(self) -> int:
        """Maximum size in bytes of one text's file, with token ids and all requested tensors."""
        tokens, total = self.wanted.tokens(self.tokens), 0
        for block in describe(self.model).blocks:
            if block.index in self.wanted.layers:
                down = block.matrices()[2]
                widths = [down.shape[1] if n == "u" else down.shape[0] for n in self.wanted.tensors]
                total += tokens * sum(widths) * down.element_size()
        return total + 4 * tokens

    def announce(self, texts: int, say: Callable[[str], None]) -> None:
        """Report the maximum total size of the files; ``texts`` is the number of texts.

        Raises ``ResultsError`` if the disk lacks space for the files, and ``ConfigError`` if even
        the longest text ends before the first requested token.
        """
        if not self.wanted.tokens(self.tokens):
            raise ConfigError(
                f"--activation-tokens begin at {self.wanted.start}, and the texts have at most "
                f"{count(self.tokens, 'token')}: give a range that begins earlier"
            )
        needed, free = texts * self.nbytes, shutil.disk_usage(self.folder).free
        if needed + MIN_FREE_BYTES > free:
            raise ResultsError(
                f"--save-activations needs {bytes_text(needed)} in {self.folder}, but only "
                f"{bytes_text(free)} are free: choose fewer layers, tokens or tensors"
            )
        say(
            f"--save-activations writes up to {bytes_text(needed)} to {self.folder}: "
            f"{', '.join(self.wanted.tensors)} of {count(len(self.wanted.layers), 'layer')}, "
            f"{self.wanted.tokens(self.tokens)} tokens per text; the measured times include the "
            "recording"
        )

    def path(self, name: str) -> Path:
        """The path of the file for the text called ``name``."""
        return self.folder / f"activations-{name}.safetensors"

    @contextlib.contextmanager
    def recording(self, name: str, text: str) -> Iterator[None]:
        """A context manager that records the sequence that runs in it, then writes the file.

        After an error nothing is written.  ``name``: the text's name.  ``text``: the tokenizer's
        input; the file's metadata contains the SHA-256 of ``text``.
        """
        with Recording(self.model, self.wanted) as recording:
            yield
        tensors, facts = recording.tensors(), checkpoint_facts(self.model)
        tokens = max((len(tensor) for tensor in tensors.values()), default=0)
        metadata = {
            "checkpoint": str(facts.get("name")),
            "checkpoint_sha256": str(facts.get("sha256")),
            "dtype": dtype_text(facts),
            "layers": ",".join(map(str, self.wanted.layers)),
            "tensors": ",".join(self.wanted.tensors),
            "tokens": f"{self.wanted.start}:{self.wanted.start + tokens}",
            "text": name,
            "text_sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
            "format": "layer{l}.{tensor}: [tokens, width]; token_ids: int32 [tokens]",
        }
        write_tensors(self.path(name), tensors, metadata)


def saver(settings: ActivationSettings, model: Any, folder: Path, tokens: int) -> Saver | None:
    """A ``Saver``, or None if nothing is to be saved; ``tokens``: length of the longest text."""
    if not settings.save_activations:
        return None
    return Saver(model, settings.wanted(len(describe(model).blocks)), folder, tokens)


# Masks.

FORMAT = "remask{i}.layer{l}.ids: kept neurons, int32; .scores: float32, larger is kept"


class MaskRecorder:
    """Collects, on the CPU, each mask's kept neurons and the scores of all neurons.

    Assign an instance to ``run.on_selection``; the run then calls it after each selection.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.remasks: list[Remask] = []
        self.per_token = False
        """True if each token selects its own neurons, so that no mask with fixed ids exists."""

    def __call__(self, remask: Remask, sequence: SequenceState) -> None:
        prefix = f"remask{len(self.remasks)}.layer"
        self.remasks.append(remask)
        assert sequence.selection is not None
        masks = sequence_masks(sequence.selection.masks)
        self.per_token = any(isinstance(m, TokenMask) for m in sequence.selection.masks)
        for layer, mask in enumerate(masks):
            if mask is not None:
                self.tensors[f"{prefix}{layer}.ids"] = mask.ids.to("cpu", torch.int32)
        for layer, score in enumerate(sequence.selection.scores):
            self.tensors[f"{prefix}{layer}.scores"] = score.float().cpu()

    def write(self, path: Path, checkpoint: str, method: str) -> None:
        """Write the ids and scores of every mask; raises ``ResultsError`` if the disk is full."""
        metadata = {"checkpoint": checkpoint, "method": method, "format": FORMAT}
        write_tensors(path, self.tensors, {**metadata, "remasks": str(len(self.remasks))})


def write_masks(folder: Path, recorder: MaskRecorder, run: Run, checkpoint: str) -> None:
    """Write masks.json (counts and causes) and masks.safetensors (kept ids and scores)."""
    report = run.report()
    remasks, layers = (list(map(asdict, items)) for items in (recorder.remasks, report.layers))
    note = {"note": NO_MASK} if recorder.per_token else {}
    write_json(folder / "masks.json", {"remasks": remasks, "layers": layers, **note})
    recorder.write(folder / "masks.safetensors", checkpoint, report.method)


def _entries(file: Any, kind: str) -> Iterator[tuple[int, int, str]]:
    """Yield (mask number, layer, key) for each tensor of one kind (``ids`` or ``scores``)."""
    for key in file.keys():  # noqa: SIM118 - not a mapping
        if match := re.fullmatch(rf"remask(\d+)\.layer(\d+)\.{kind}", key):
            yield int(match[1]), int(match[2]), key


def read_masks(path: str) -> dict[int, Tensor]:
    """Read a masks.safetensors file's last selection; maps a layer to its kept neuron ids.

    Raises ``ConfigError`` if the file cannot be read or has no masks.
    """
    from safetensors import SafetensorError, safe_open

    masks: dict[int, dict[int, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for number, layer, key in _entries(file, "ids"):
                masks.setdefault(number, {})[layer] = file.get_tensor(key).long()
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"cannot read masks from {path}: {error}") from None
    if not masks:
        raise ConfigError(
            f"{path} has no masks, whose keys are like remask0.layer3.ids (methods with per-token "
            "selection write no masks): give the masks of another method"
        )
    return masks[max(masks)]


def check_masks(path: str, widths: Sequence[int]) -> None:
    """Raise ``ConfigError`` if the masks in ``path`` were made for a model of another shape.

    ``widths``: the number of neurons in each layer of the model.  Masks without scores are
    accepted, because only scores show how many neurons a layer had.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        name = (file.metadata() or {}).get("checkpoint", "another model")
        scores = _entries(file, "scores")
        neurons = {layer: file.get_slice(key).get_shape()[0] for _, layer, key in scores}
    mask_widths = [neurons[layer] for layer in sorted(neurons)]
    if mask_widths and mask_widths != list(widths):
        raise ConfigError(
            f"the masks in {path} are for {name}, which has {_shape(mask_widths)}; this model has "
            f"{_shape(widths)}: give masks that were made for it"
        )


def _shape(widths: Sequence[int]) -> str:
    neurons = " or ".join(str(width) for width in sorted(set(widths)))
    return f"{len(widths)} layers of {neurons} neurons"


# drift.csv


def write_drift(folder: Path, checks: Sequence[DriftCheck]) -> None:
    """Write drift.csv: a line per batch row for each window that the drift detector checked."""
    rows = ([int(v) if isinstance(v, bool) else v for v in astuple(check)] for check in checks)
    write_csv(folder / "drift.csv", [field.name for field in fields(DriftCheck)], rows)


def read_checks(folder: Path) -> list[DriftCheck]:
    """Read the windows of drift.csv with a finite similarity; [] if there is no such file."""
    path = folder / "drift.csv"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = ({**row, "threshold": row["threshold"] or None} for row in csv.DictReader(lines))
    checks = TypeAdapter(list[DriftCheck]).validate_python(list(rows))
    return [check for check in checks if math.isfinite(check.similarity)]
