"""Which checkpoint a model holds, with the facts that every number is reported with; digests."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from dart_llm.files import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel


HASH_UP_TO = 20_000_000_000
"""Bytes of weight files above which no checksum is computed: reading them takes minutes."""

READ = ("*.json", "*.jinja", "*.model", "*.py", "*.tiktoken", "*.txt")
"""Files of a checkpoint beside its weights that are read: configuration, tokenizer, code."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint before it is loaded: what it is, and how transformers is to read it."""

    name: str
    source: str
    reference: str
    """What ``from_pretrained`` is given: a folder or a hub id."""
    path: Path | None = None
    quantisation: str | None = None
    """Of the file's weights; ``None`` means that the model's configuration says."""
    sha256: str | None = None
    """Of the file; ``None`` means that it is computed from ``path`` when it is asked for."""
    revision: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments for the model's ``from_pretrained``."""
    file: Path | None = None
    """The GGUF file whose tensors are read at every load; ``reference`` has what belongs to it."""
    blocks: Path | None = None
    """The same file, where its blocks are kept."""


_LOADED: WeakKeyDictionary[PreTrainedModel, Checkpoint] = WeakKeyDictionary()


def remember(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Keep what ``model`` was loaded from, for as long as the model lives; nothing is set on it."""
    _LOADED[model] = checkpoint


def blocks_file(model: PreTrainedModel) -> Path | None:
    """The GGUF file whose blocks ``model`` holds."""
    known = _LOADED.get(model)
    return None if known is None else known.blocks


def checkpoint_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Name, source, path, revision, file quantisation, sha256, dtype and parameters of ``model``.

    ``sha256`` is that of the weight file, or of the GGUF it was converted from; with several files
    it is that of their ``sha256sum`` lines in alphabetical order.  What cannot be known is
    ``None``: a model that ``load`` did not make has no checksum and, without a quantisation in
    its configuration, no file quantisation.  ``weights`` is there where matrices are held in
    blocks: ``Q4_1 as in the file``, or ``rounded to Q8_0``.
    """
    known = _LOADED.get(model)
    held = _held_as(model, known)
    now = {
        "dtype": str(model.dtype).removeprefix("torch."),
        **({"weights": held} if held else {}),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    stated = _stated_quantisation(model)
    if known is None:
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        return {
            "name": name,
            "source": "not loaded by dart_llm",
            "path": name if Path(name).is_dir() else None,
            "revision": getattr(model.config, "_commit_hash", None),
            "file_quantisation": stated,
            "sha256": None,
            **now,
        }
    return {
        "name": known.name,
        "source": known.source,
        "path": str(known.path) if known.path else None,
        "revision": known.revision,
        "file_quantisation": known.quantisation or stated or "none",
        "sha256": known.sha256 or (weights_sha256(known.path) if known.path else None),
        **now,
    }


def _held_as(model: nn.Module, known: Checkpoint | None) -> str | None:
    """In words, how the matrices of ``model`` are held in blocks; None where none is."""
    from dart_llm.models.packed import PackedTensor

    held = [one for one in model.parameters() if isinstance(one, PackedTensor)]
    kinds = ", ".join(sorted({str(one.matrix.type()).upper() for one in held}))
    if known is not None and known.blocks is not None and held:
        return f"{known.quantisation or kinds} as in the file"
    return f"rounded to {kinds}" if held else None


def weights_sha256(folder: Path) -> str | None:
    """The checksum of a folder's weight files, as ``checkpoint_facts`` describes it."""
    files = _weight_files(folder)
    if sum(path.stat().st_size for path in files) > HASH_UP_TO:
        return None
    return _sums(files)


def contents(folder: Path) -> dict[str, str]:
    """Digests of what a folder loads: ``model``, its weights, and ``model_files``, all the rest.

    Weights of more than ``HASH_UP_TO`` bytes are known by the sizes and times of their files.
    """
    weights, files = _weight_files(folder), sorted(p for n in READ for p in folder.glob(n))
    states = [(path.name, *_state(path)) for path in weights]
    found = {
        "model": weights_sha256(folder) or (f"states of files {states}" if states else None),
        "model_files": _sums([path for path in files if path.is_file()]),
    }
    return {name: digest for name, digest in found.items() if digest}


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def _sums(files: Sequence[Path]) -> str | None:
    """The sha256 of one file, or of the ``sha256sum`` lines of several; None of none."""
    sums = {path.name: _sha256(path) for path in files}
    if len(sums) < 2:
        return next(iter(sums.values()), None)
    lines = "".join(f"{value}  {name}\n" for name, value in sums.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def _stated_quantisation(model: PreTrainedModel) -> str | None:
    """The quantisation method that the model's configuration names, if it names one."""
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method))


def _sha256(path: Path) -> str:
    blob = path.resolve()  # the hub's cache names large files by their sha256
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    return _remembered_sha256(blob, _state(blob))


@lru_cache(maxsize=256)
def _remembered_sha256(path: Path, _state: tuple[int, ...]) -> str:
    return file_sha256(path)


def _state(path: Path) -> tuple[int, ...]:
    """What changes with a file's contents; the time of change is the one nobody can set back."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


_tokenizers: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def remember_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """``tokenizer`` belongs to ``model``, so that the model can be given openings to go on from."""
    _tokenizers[model] = tokenizer


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of ``model``: remembered, or read from where the model came from; or None."""
    known = _tokenizers.get(model)
    name = getattr(model, "name_or_path", "")
    if known is None and name:
        from transformers import AutoTokenizer

        with contextlib.suppress(Exception):  # whatever is wrong there: it can do without
            known = AutoTokenizer.from_pretrained(name, local_files_only=True)
            remember_tokenizer(model, known)
    return known
