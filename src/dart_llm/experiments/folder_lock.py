"""Whether a results folder is being written: a lock on its file ``.lock``, held while a run lives.

The system frees the lock with the process, however that ends, and knows it across containers that
share the folder.  A process number says less: it is given again, and every container has its own.
Where a file system has no locks, the number counts together with where and when it was given.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from dart_llm.experiments.provenance import is_alive

LOCK = ".lock"

_TRIES = 5
"""A folder that is merely looked at is locked for an instant."""

_ORPHANS = 100
"""Looks at a lock whose writer is dead: what that was starting holds it until it is begun."""

_TAKEN = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)


class FolderLock:
    """Held until ``release``, or until the process ends."""

    def __init__(self, path: Path, handle: int) -> None:
        self._path, self._handle = path, handle
        self._close = weakref.finalize(self, os.close, handle)
        self._close.atexit = False  # a fork that ends by itself must not touch its parent's lock

    def release(self) -> None:
        """Free the folder; a second call does nothing."""
        if self._close.alive:
            with contextlib.suppress(OSError):
                os.truncate(self._handle, 0)  # Windows keeps a file that is open
                self._path.unlink()
            self._close()


def take(folder: Path) -> FolderLock | None:
    """The lock of ``folder``; None while a run that lives holds it.

    Raises ``OSError`` where its file cannot be written.
    """
    path = folder / LOCK
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(0.01)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            free = _lock(handle, path, shared=False)
            if free and _is_same(handle, path):
                os.truncate(handle, 0)
                own = {"process": os.getpid(), "started": _started(os.getpid())}
                os.write(handle, json.dumps({"place": _place(), **own}).encode())
                return FolderLock(path, handle)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    return None


def is_taken(folder: Path) -> bool:
    """Whether a run that lives holds the lock of ``folder``."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        for _ in range(_ORPHANS):
            if _lock(handle, folder / LOCK, shared=True):
                return False
            if _lives(_read(folder / LOCK)):
                return True
            time.sleep(0.01)
        return True
    finally:
        os.close(handle)


def _is_same(handle: int, path: Path) -> bool:
    """Whether the locked file is still the folder's: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


if sys.platform == "win32":

    def _lock(handle: int, path: Path, shared: bool) -> bool:
        return not _lives(_read(path))

else:
    import fcntl

    def _lock(handle: int, path: Path, shared: bool) -> bool:
        """Lock an open file; False while another holds it."""
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in _TAKEN and not _lives(_read(path))
        return True


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lives(writer: dict[str, Any]) -> bool:
    """Whether a noted process lives; True where that cannot be found out from here."""
    if not writer:
        return False
    if writer.get("place") != _place():
        return True
    process = writer.get("process")
    return is_alive(process) and writer.get("started") == _started(process)


def _place() -> list[str]:
    """Host, its start, and the container: where process numbers are given."""
    found = [platform.node()]
    with contextlib.suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return found


def _started(process: Any) -> str | None:
    """When a process began, in ticks since the system did; None where that is not told."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return fields[19] if len(fields) > 19 else None
