"""What is known of a model before its weights are loaded: layers, digests, what must be fetched."""

from __future__ import annotations

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

DEFAULT_LAYERS = 30
"""Layers of the embedded default, which is pinned: no file need be fetched to know them."""


def layer_count(cell: Cell) -> int:
    """Decoder layers of the cell's model, from its configuration; no weights are loaded.

    Raises ``LoadError`` when the configuration cannot be had.
    """
    if is_default(cell.model):
        return DEFAULT_LAYERS
    path = Path(cell.model).expanduser()
    if path.is_file():
        from gguf import GGUFReader

        try:
            fields = GGUFReader(path).fields
            name = next(name for name in fields if name.endswith(".block_count"))
            return int(fields[name].contents())
        except (OSError, ValueError, IndexError, KeyError, StopIteration) as error:
            why = f"{path} does not say how many layers it has: {plain(error)}"
            raise LoadError(why) from error
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


def model_digests(model: str) -> dict[str, str]:
    """Digests of a local model: ``model``, its weights, and ``model_files``, what else is loaded.

    None of either for a model of the hub, which id and revision name, or for the default.
    """
    path = Path(model).expanduser()
    if is_default(model) or not path.exists():
        return {}
    return {"model": file_sha256(path)} if path.is_file() else contents(path)


def download_size(cell: Cell) -> int | None:
    """Bytes still to be fetched for the cell's model; None when the hub cannot be asked.

    Raises ``LoadError`` for a model that does not exist or that the disk has no room for.
    """
    if is_default(cell.model):
        folder = converted_folder(cache_folder(cell.cache_dir), MODEL_SHA256)
        return 0 if is_intact(folder, MODEL_SHA256, full=False) else MODEL_WHEEL_BYTES
    if Path(cell.model).expanduser().is_file() or _resolve(cell).path is not None:
        return 0
    cache = hub_cache(cell.cache_dir)
    return 0 if _is_cached(cell, cache) else check_download(cell.model, cell.revision, cache)


def _resolve(cell: Cell) -> Any:
    return resolve(
        cell.model, revision=cell.revision, cache_dir=cell.cache_dir, say=lambda text: None
    )


def _is_cached(cell: Cell, cache: Path | None) -> bool:
    """Whether the cache has a hub model with its weights."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(
        cell.model, "config.json", cache_dir=cache, revision=cell.revision
    )
    if not isinstance(config, str):
        return False
    return bool(weight_files(path.name for path in Path(config).parent.iterdir()))
