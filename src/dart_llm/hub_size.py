"""The size of a hub download against the free disk, before the download starts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from dart_llm.cache import require_space
from dart_llm.errors import LoadError
from dart_llm.hub_errors import unreachable

logger = logging.getLogger("dart_llm")

TIMEOUT = 10.0
"""Seconds that the hub may take to name the sizes; without an answer the check is left out."""
_KINDS = (
    r"model\.safetensors",
    r"model-\d+-of-\d+\.safetensors",
    r"pytorch_model\.bin",
    r"pytorch_model-\d+-of-\d+\.bin",
)


def weight_files(names: Iterable[str]) -> list[str]:
    """The files among ``names`` that transformers fetches: the first kind that is there."""
    listed = list(names)
    for kind in _KINDS:
        found = [name for name in listed if re.fullmatch(kind, name)]
        if found:
            return found
    return []


def check_download(model: str, revision: str | None, cache: Path | None) -> int | None:
    """Bytes of weights of ``model`` that are still to be downloaded.

    Raises ``LoadError`` when the disk has less room than that, or the repository holds nothing
    that transformers loads.  ``None`` means that the hub cannot be asked, so that only the cache
    can help.  Any other failure returns 0: loading reports it.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=TIMEOUT)
    except Exception as error:
        logger.debug("no sizes for %s: %s", model, type(error).__name__)
        return None if unreachable(error) else 0
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if "config.json" not in sizes:
        raise LoadError(
            f"{model} holds no transformers checkpoint (no config.json); if it holds a .gguf file, "
            "download that and give its path"
        )
    missing = [name for name in weight_files(sizes) if not _cached(model, name, info.sha, cache)]
    needed = sum(sizes[name] for name in missing)
    if needed:
        where = cache or Path(constants.HF_HUB_CACHE)
        require_space(needed, where, f"the download of {model}")
    return needed


def _cached(model: str, name: str, revision: str | None, cache: Path | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, name, cache_dir=cache, revision=revision), str)
