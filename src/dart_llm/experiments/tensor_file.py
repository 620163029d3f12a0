"""Writing safetensors files: whole, readable like other files, equal bytes for equal contents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dart_llm.errors import ResultsError


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Replace ``path`` whole; raises ``ResultsError`` when the disk is full or read-only."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode & 0o777  # safetensors writes 0600
        save_file(dict(tensors), partial, None if metadata is None else dict(metadata))
        partial.chmod(mode)
        _sort_header(partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise ResultsError(f"cannot write {path}: {error}") from None


def _sort_header(path: Path) -> None:
    """Metadata in alphabetical order: safetensors writes it in a new order each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        data = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(data) <= size:
            file.seek(8)
            file.write(data.ljust(size))
