"""What is known of a model before its weights are loaded: layers, size, what must be fetched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm.cache import cache_folder, hub_cache
from dart_llm.errors import LoadError
from dart_llm.experiments.cell import Cell
from dart_llm.files import file_sha256
from dart_llm.hub import check_download, hub_failure, plain, weight_files
from dart_llm.models.bundled import MODEL_SHA256, MODEL_WHEEL_BYTES
from dart_llm.models.checkpoint import contents
from dart_llm.models.gguf import converted_folder, is_intact
from dart_llm.models.loading import is_default, resolve

_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)(b|m)(?![a-z0-9])", re.IGNORECASE)


def named_weights(model: str) -> int | None:
    """Weights by the model's name: 8 billion for ``Llama-3.1-8B``; None without a size in it."""
    found = _SIZE.findall(model.rstrip("/").rpartition("/")[2])
    if not found:
        return None
    number, unit = found[-1]
    return int(float(number) * (10**9 if unit in "bB" else 10**6))


DEFAULT_LAYERS = 30
"""Layers of the embedded default, which is pinned: no file need be fetched to know them."""

_BYTES_PER_WEIGHT = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ModelSize:
    """``download``: bytes still to be fetched, None when the hub cannot be asked.

    ``weights``: number of weights, roughly, by the model's name where that is all there is; None
    when nothing is known.
    """

    download: int | None
    weights: int | None


def layer_count(cell: Cell) -> int:
    """Decoder layers of the cell's model, from its configuration; no weights are loaded.

    Raises ``LoadError`` when the configuration cannot be had.
    """
    if is_default(cell.model):
        return DEFAULT_LAYERS
    path = Path(cell.model).expanduser()
    if path.is_file():
        return _gguf_layers(path)
    from transformers import AutoConfig

    found = _resolve(cell)
    try:
        config: Any = AutoConfig.from_pretrained(
            found.reference,
            revision=cell.revision or "main",
            cache_dir=hub_cache(cell.cache_dir),
            trust_remote_code=cell.trust_remote_code,
        )
        return int(config.get_text_config(decoder=True).num_hidden_layers)
    except Exception as error:
        raise hub_failure(error, cell.model, cell.revision) or LoadError(
            f"the configuration of {cell.model} could not be read: {plain(error)}"
        ) from error


def _gguf_layers(path: Path) -> int:
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
        name = next(name for name in fields if name.endswith(".block_count"))
        return int(fields[name].contents())
    except (OSError, ValueError, IndexError, KeyError, StopIteration) as error:
        raise LoadError(f"{path} does not say how many layers it has: {plain(error)}") from error


def model_digests(model: str) -> dict[str, str]:
    """Digests of a local model: ``model``, its weights, and ``model_files``, what else is loaded.

    None of either for a model of the hub, which id and revision name, or for the default.
    """
    path = Path(model).expanduser()
    if is_default(model) or not path.exists():
        return {}
    return {"model": file_sha256(path)} if path.is_file() else contents(path)


def model_size(cell: Cell) -> ModelSize:
    """What must be fetched for the cell's model, and how large it is.

    Raises ``LoadError`` for a model that does not exist or that the disk has no room for.
    """
    if is_default(cell.model):
        folder = converted_folder(cache_folder(cell.cache_dir), MODEL_SHA256)
        ready = is_intact(folder, MODEL_SHA256, full=False)
        return ModelSize(0 if ready else MODEL_WHEEL_BYTES, 134_515_008)
    path = Path(cell.model).expanduser()
    if path.is_file():
        return ModelSize(0, 2 * path.stat().st_size)  # about 4 bits a weight
    found = _resolve(cell)
    if found.path is not None:
        return ModelSize(0, _weights(found.path))
    cache = hub_cache(cell.cache_dir)
    there = _cached_folder(cell, cache)
    if there is not None:
        return ModelSize(0, _weights(there))
    needed = check_download(cell.model, cell.revision, cache)
    return ModelSize(needed, named_weights(cell.model) if needed is None else needed // 2)


def _resolve(cell: Cell) -> Any:
    return resolve(
        cell.model,
        revision=cell.revision,
        cache_dir=cell.cache_dir,
        verify=False,
        say=lambda text: None,
    )


def _cached_folder(cell: Cell, cache: Path | None) -> Path | None:
    """The snapshot of a hub model that is in the cache with its weights."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        cell.model, "config.json", cache_dir=cache, revision=cell.revision
    )
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    return folder if weight_files(path.name for path in folder.iterdir()) else None


def _weights(folder: Path) -> int:
    import json

    size = sum((folder / name).stat().st_size for name in weight_files(_names(folder)))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return int(size // _BYTES_PER_WEIGHT.get(stored, 2))


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]
