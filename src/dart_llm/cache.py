"""Cache folders, and cached files, which are named by their inputs and written atomically.

A cached file is called ``<key>-<digest><suffix>``: ``key`` identifies the inputs from which it was
made, and ``digest`` identifies its content.  The complete file appears at once, in one rename.  A
file that does not match its digest is removed with a warning, and the caller makes it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import time
from pathlib import Path

from dart_llm.errors import LoadError, ResultsError
from dart_llm.files import size_text, write_bytes

logger = logging.getLogger("dart_llm")


def hub_cache(cache_dir: str | Path | None = None) -> Path | None:
    """Return the folder for hub models: ``cache_dir``, or DART_CACHE, or None (hub's default)."""
    text = str(cache_dir) if cache_dir else os.environ.get("DART_CACHE", "")
    return Path(text).expanduser() if text else None


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the folder for cached files: ``dart-llm`` in ``hub_cache`` or the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (hub_cache(cache_dir) or Path(home).expanduser()) / "dart-llm"


def make_folder(folder: Path) -> Path:
    """Create ``folder`` if needed, and return it; raises ``LoadError`` if it is not writable."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise LoadError(
            f"the cache folder {folder} cannot be written; choose another one with --cache-dir "
            "or DART_CACHE"
        )
    return folder


def require_space(needed: int, folder: Path, what: str) -> None:
    """Raise ``LoadError`` if fewer than ``needed`` bytes are free on the disk of ``folder``.

    ``what``: the operation that needs the space, as the subject of the message.
    """
    free = free_bytes(folder)
    if needed > free:
        raise LoadError(
            f"{what} needs {size_text(needed)} on disk and only {size_text(free)} are free in "
            f"{folder}; free some space or move the cache with --cache-dir or DART_CACHE"
        )


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of ``folder``, which need not exist yet."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


SCRATCH = ".tmp-"
"""Prefix of unfinished files and folders, but those of ``files.replacing`` end in .part instead."""

STALE_AFTER = 24 * 3600.0
"""Seconds after which an unfinished file is considered left over from a killed process."""

DIGITS = 32
"""Number of hexadecimal digits in keys and digests, which have 128 bits."""


def processor() -> str:
    """Return the name of this machine's CPU, for keys of cached measurements and for results."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def key_of(*parts: object) -> str:
    """Return a key of 32 hexadecimal digits that depends on the ``repr`` of ``parts``."""
    return digest_of(repr(parts).encode())


def digest_of(data: bytes) -> str:
    """Return the first 32 hexadecimal digits of the sha256 of ``data``."""
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def read(folder: Path, key: str, suffix: str) -> bytes | None:
    """Return the content that is stored under ``key``; None if it is missing or damaged."""
    path = find(folder, key, suffix)
    return None if path is None else path.read_bytes()


def find(folder: Path, key: str, suffix: str) -> Path | None:
    """Return the path of the undamaged file that is stored under ``key``; None if there is none."""
    sweep(folder)
    damaged = False
    for path in sorted(folder.glob(f"{key}-*{suffix}")):
        with contextlib.suppress(OSError):  # a directory, or unreadable
            if path.name == _name(key, path.read_bytes(), suffix):
                return path
        damaged = True
        _remove(path)
    if damaged:
        logger.warning("a damaged file in %s was removed; its content is made again", folder)
    return None


def write(folder: Path, key: str, suffix: str, data: bytes) -> Path:
    """Store ``data`` under ``key``; several processes may store the same key at once.

    The data is flushed to the disk on return.  Raises ``LoadError``, and leaves nothing behind, if
    the folder is not writable or the disk is full.
    """
    path = make_folder(folder) / _name(key, data, suffix)
    if path.is_dir():
        _remove(path)
    try:
        write_bytes(path, data)
    except ResultsError as error:
        raise LoadError(str(error)) from None
    sync(folder)
    return path


def _name(key: str, data: bytes, suffix: str) -> str:
    return f"{key}-{digest_of(data)}{suffix}"


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk, if the system supports it."""
    with contextlib.suppress(OSError):  # some systems do not open folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: Path) -> None:
    """Remove unfinished files and folders in ``folder`` that are older than ``STALE_AFTER``."""
    for path in [*folder.glob(f"{SCRATCH}*"), *folder.glob(".*.part")]:
        with contextlib.suppress(OSError):  # another process removed it first
            if time.time() - path.lstat().st_mtime > STALE_AFTER:
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
