"""A run's results folder, ``<results>/<experiment>/<time>/``: created, locked, resumed.

``config.json`` is written first and has the run's status.  Every file is replaced whole, so a
reader never sees half of one.  ``parts.jsonl`` caches finished work until everything else is
written, so that an interruption loses none of it.  A running process has the lock on ``.lock``.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from dart_llm.errors import ResultsError
from dart_llm.files import append_row, finite, whole_rows
from dart_llm.reporting.words import dtype_text, file_text

PARTS = "parts.jsonl"

INPUTS = "inputs"
"""In a run's settings: digests of the files that they only name (``provenance.Digests``)."""

_NAMED = {
    "model": "the model's weights",
    "model_files": "the model's configuration or tokenizer",
    "sources": "the prompts or passages",
    "layer_topk": "the layer table",
}
"""Inputs in words, where their name alone would be unclear."""

_STAMP = re.compile(r"\d{8}-\d{6}(-\d+)?")

_CONFIG_PART = ".config.json.*.part"
"""An unfinished ``config.json``: besides the lock the first file of a run."""

LOCK = ".lock"

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)

LOCK_SECONDS = 0.05
"""``is_taken`` locks for an instant: ``take`` waits that long."""

MIN_FREE_BYTES = 50 * 2**20

SCHEMA = 1


@dataclass(frozen=True)
class ResultsFolder:
    """One run's folder; ``parts``: finished work by key, from which a resumed run starts."""

    path: Path
    parts: dict[str, Any]
    resumed: bool
    lock: BaseFileLock | None = None
    note: str = ""
    """Why an unfinished folder with equal settings was not resumed."""

    @property
    def stamp(self) -> str:
        """The run's time, as in the names of its logs."""
        return self.path.name[:15]

    def part(self, key: str) -> Any:
        """What ``save_part`` stored under ``key``, or None."""
        return self.parts.get(key)

    def save_part(self, key: str, value: Any) -> None:
        """Store finished work; it survives any interruption after this call."""
        self.parts[key] = value
        try:
            append_row(self.path / PARTS, {"key": key, "value": finite(value)})
        except OSError as error:
            raise ResultsError(
                f"cannot write {self.path / PARTS}: {error.strerror or error}"
            ) from None

    def finish(self) -> None:
        """Delete the cache of finished work."""
        (self.path / PARTS).unlink(missing_ok=True)

    def release(self) -> None:
        """Release the lock so that another run can resume here."""
        release(self.lock)

    def discard(self) -> None:
        """Remove a new folder without results, and its experiment's folder if empty."""
        if self.resumed or self.parts:
            return
        self.release()
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: there are other runs
            self.path.parent.rmdir()


def take(folder: Path) -> BaseFileLock | None:
    """The lock of ``folder``; None while another process has it.

    The system frees it with the process.  Raises ``OSError`` where its file cannot be written.
    """
    path = folder / LOCK
    lock = FileLock(path, timeout=LOCK_SECONDS, thread_local=False)
    try:
        lock.acquire(poll_interval=0.01)
    except Timeout:
        return None
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
        return lock  # a file system without locks: two runs in one folder are not noticed
    if path.exists():
        return lock
    lock.release()  # the run before has just removed the file
    return take(folder)


def release(lock: BaseFileLock | None) -> None:
    """Remove the lock's file and free it; a second call does nothing."""
    if lock is not None and lock.is_locked:
        with contextlib.suppress(OSError):  # Windows keeps a file that is open
            Path(lock.lock_file).unlink()
        lock.release()


def is_taken(folder: Path) -> bool:
    """Whether a running process has the lock of ``folder``."""
    path = folder / LOCK
    if not path.is_file():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # a folder of somebody else, or without locks
        return False


def now() -> datetime.datetime:
    """The local time, to the second."""
    return datetime.datetime.now().astimezone().replace(microsecond=0)


def open_folder(
    root: Path, experiment: str, settings: Mapping[str, Any], fresh: bool = False
) -> ResultsFolder:
    """The newest unfinished folder with equal settings, or a new one.

    Raises ``ResultsError`` when the folder cannot be written or the disk is full.
    """
    base = root / experiment
    try:
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=base, buffering=0) as probe:  # nothing of it stays
            probe.write(b"x")
        free = shutil.disk_usage(base).free
    except OSError as error:
        raise ResultsError(
            f"cannot write results to {base}: {error.strerror or error}; choose another folder "
            "with --results-dir"
        ) from None
    if free < MIN_FREE_BYTES:
        raise ResultsError(
            f"only {free / 2**20:.0f} MiB are free where results go ({base}): make room, or choose "
            "another folder with --results-dir"
        )
    try:
        _remove_empty(base)
        found = None if fresh else _resume(base, settings)
        if isinstance(found, ResultsFolder):
            return found
        folder, lock = _new_folder(base)
        return ResultsFolder(folder, {}, False, lock, found or "")
    except OSError as error:
        raise ResultsError(f"cannot write to {base}: {error.strerror or error}") from None


def _resume(base: Path, settings: Mapping[str, Any]) -> ResultsFolder | str | None:
    """The newest unfinished, unlocked folder of equal settings, or why one is not resumed."""
    why = None
    for folder in sorted(base.iterdir(), reverse=True):
        changed = _changes(folder, settings)
        if changed is None or is_taken(folder):
            continue
        if changed:
            why = why or f"{folder} is not resumed: {' and '.join(changed)} changed since it began"
            continue
        lock = take(folder)
        if lock is not None and _changes(folder, settings) == []:  # it may have ended meanwhile
            parts = {row["key"]: row["value"] for row in whole_rows(folder / PARTS)}
            return ResultsFolder(folder, parts, True, lock)
        release(lock)
    return why


def _remove_empty(base: Path) -> None:
    """Remove folders of runs that were killed before they wrote their first file."""
    for folder in base.iterdir():
        with contextlib.suppress(OSError):  # a run that begins in one meanwhile keeps it
            if not _STAMP.fullmatch(folder.name) or not _is_empty(folder):
                continue
            lock = None if is_taken(folder) else take(folder)
            if lock is not None:
                if _is_empty(folder):
                    for part in folder.glob(_CONFIG_PART):
                        part.unlink(missing_ok=True)
                release(lock)
                folder.rmdir()


def _is_empty(folder: Path) -> bool:
    return all(path.name == LOCK or path.match(_CONFIG_PART) for path in folder.iterdir())


def _new_folder(base: Path) -> tuple[Path, BaseFileLock | None]:
    stamp = now().strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        folder = base / (stamp if number == 0 else f"{stamp}-{number}")
        with contextlib.suppress(FileExistsError, FileNotFoundError):  # removed as an empty one
            folder.mkdir()
            return folder, take(folder)
    raise ResultsError(f"too many results folders of the same second in {base}")


def _changes(folder: Path, settings: Mapping[str, Any]) -> list[str] | None:
    """Which inputs changed since an unfinished run with equal settings began.

    None for a folder that is finished, or of other settings.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        theirs = dict(config["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    unfinished = config.get("status") in ("running", "interrupted", "failed")
    if not unfinished and not (folder / PARTS).exists():  # else it was killed at its very end
        return None
    mine = dict(settings)
    before, now = (dict(_leaves(one.pop(INPUTS, {}))) for one in (theirs, mine))
    if theirs != mine:
        return None
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return list(dict.fromkeys(_NAMED.get(name[-1], name[-1]) for name in changed))


def _leaves(data: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        yield path, data


def timing_text(timing: dict[str, Any]) -> str:
    """timing_<time>.log: the numbers of timing.json for people."""
    lines = []
    for key, value in timing.items():
        if value is None:
            continue
        if isinstance(value, dict):
            known = {name: one for name in value if (one := number(value[name])) is not None}
            if value and not known:
                continue  # lists and documents, which the JSON file alone has
            value = ", ".join(f"{name} {one:.4g}" for name, one in known.items())
        lines.append(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
    return "\n".join(lines) + "\n"


# What pages say of a folder's configuration.


def checkpoint_line(name: str, facts: Mapping[str, Any]) -> str:
    """A checkpoint in one line: name, file quantisation, dtype, start of the checksum."""
    parts = [name]
    if facts.get("file_quantisation"):
        parts.append(file_text(facts))
    if facts.get("dtype"):
        parts.append(dtype_text(facts))
    if facts.get("sha256"):
        parts.append(f"sha256 {str(facts['sha256'])[:12]}")
    return " · ".join(parts)


def mapping(value: Any) -> dict[str, Any]:
    """``value`` when it is a mapping, else an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, names joined by dots; what is None is left out."""
    settings: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            settings |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            settings[f"{prefix}{key}"] = value
    return settings


def number(value: Any) -> float | None:
    """``value`` as a float when it is a number, else None."""
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable else None
