"""What is known of a model before its weights are loaded: layers, and what must be fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dart_llm.cache import cache_folder, hub_cache
from dart_llm.errors import LoadError
from dart_llm.experiments.cell import Cell
from dart_llm.hub import check_download, hub_failure, plain, weight_files
from dart_llm.models.cached import MODEL_SHA256, MODEL_WHEEL_BYTES, converted_folder, is_intact
from dart_llm.models.gguf_file import read_gguf
from dart_llm.models.loading import is_default, placement, resolve, weight_format
from dart_llm.settings import load_arguments

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
        layers = read_gguf(path).fact("block_count")
        if not isinstance(layers, int):
            raise LoadError(f"{path} does not say how many layers it has")
        return layers
    return int(configuration(cell).get_text_config(decoder=True).num_hidden_layers)


def configuration(options: Any, say: Callable[[str], None] = lambda text: None) -> Any:
    """transformers' configuration of a model; ``options``: a cell, or what has its fields.

    Raises ``LoadError`` when it cannot be had.
    """
    from transformers import AutoConfig

    found = resolve(options.model, revision=options.revision, cache_dir=options.cache_dir, say=say)
    file = found.arguments.get("gguf_file")
    try:
        return AutoConfig.from_pretrained(
            found.reference,
            revision=options.revision or "main",
            cache_dir=hub_cache(options.cache_dir),
            trust_remote_code=options.trust_remote_code,
            **({"gguf_file": file} if file else {}),
        )
    except Exception as error:
        raise hub_failure(error, options.model, options.revision) or LoadError(
            f"the configuration of {options.model} could not be read: {plain(error)}"
        ) from error


def requested_format(options: Any) -> str:
    """The weight format that ``options``, with the fields of ``ModelOptions``, lead to."""
    arguments = load_arguments(options)
    placed = placement(arguments["device"], arguments["device_map"])
    chosen, away = options.dtype is not None, "device_map" in placed
    return weight_format(options.model, options.weights, chosen=chosen, away=away)


def download_size(cell: Cell) -> int | None:
    """Bytes still to be fetched for the cell's model; None when the hub cannot be asked.

    Raises ``LoadError`` for a model that does not exist or that the disk has no room for.
    """
    if is_default(cell.model):
        folder = converted_folder(cache_folder(cell.cache_dir), MODEL_SHA256)
        return 0 if is_intact(folder, MODEL_SHA256) else MODEL_WHEEL_BYTES
    place: Any = {"revision": cell.revision, "cache_dir": cell.cache_dir}
    local = Path(cell.model).expanduser().is_file()
    if local or resolve(cell.model, **place, say=lambda text: None).path is not None:
        return 0
    cache = hub_cache(cell.cache_dir)
    return 0 if _is_cached(cell, cache) else check_download(cell.model, cell.revision, cache)


def _is_cached(cell: Cell, cache: Path | None) -> bool:
    """Whether the cache has a hub model with its weights."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(
        cell.model, "config.json", cache_dir=cache, revision=cell.revision
    )
    if not isinstance(config, str):
        return False
    return bool(weight_files(path.name for path in Path(config).parent.iterdir()))
