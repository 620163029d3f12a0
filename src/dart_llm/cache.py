"""Where checkpoints are kept on this machine, and whether there is room for them."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from dart_llm.errors import LoadError


def chosen_cache(cache_dir: str | Path | None = None) -> Path | None:
    """The folder the user chose: the argument, else ``DART_CACHE``, else ``None``."""
    text = str(cache_dir) if cache_dir else os.environ.get("DART_CACHE", "")
    return Path(text).expanduser() if text else None


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Where dart_llm keeps what it fetched and converted: ``<chosen or user cache>/dart-llm``."""
    base = chosen_cache(cache_dir)
    if base is None:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        base = Path(home).expanduser()
    return base / "dart-llm"


def hub_cache(cache_dir: str | Path | None = None) -> Path | None:
    """Where hub models go: the folder the user chose, or ``None`` for the hub library's own."""
    return chosen_cache(cache_dir)


def make_folder(folder: Path) -> Path:
    """Create ``folder``; raises ``LoadError`` when it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise LoadError(
            f"the cache folder {folder} cannot be written; choose another one with --cache-dir "
            "or DART_CACHE"
        )
    return folder


def require_space(needed: int, folder: Path, what: str) -> None:
    """Raise ``LoadError`` when fewer than ``needed`` bytes are free where ``folder`` lies."""
    free = free_bytes(folder)
    if needed > free:
        raise LoadError(
            f"{what} needs {size_text(needed)} on disk and only {size_text(free)} are free in "
            f"{folder}; free some space or move the cache with --cache-dir or DART_CACHE"
        )


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that holds ``folder``, which need not exist yet."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def size_text(count: int) -> str:
    """Bytes for people: ``0.4 MB``, ``812 MB``, ``16.1 GB``."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"


def file_sha256(path: Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
