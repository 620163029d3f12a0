"""Create, lock and resume a run's results folder, ``<results>/<experiment>/<time>/``.

``config.json`` is written first and contains the run's status.  Files are replaced atomically, so a
reader never sees a partial file.  ``parts.jsonl`` caches finished work (parts) until everything
else is written, so that an interruption loses no finished work.  A running process locks ``.lock``.
``rows.jsonl`` contains the measured numbers, each line a ``ResultLine``.  The command ``results``
and the web page's list of past runs read this file; trackers get the same numbers.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from pydantic import BaseModel, ConfigDict

from dart_llm.errors import ResultsError
from dart_llm.files import append_row, finite, read_json, whole_rows

SCHEMA = 1

PARTS, ROWS, LOCK = "parts.jsonl", "rows.jsonl", ".lock"

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)

LOCK_SECONDS = 0.05  # ``take`` waits this long, because ``is_taken`` locks for a moment

MIN_FREE_BYTES = 50 * 2**20


class ResultLine(BaseModel):
    """A metric of one method on one model; fields that do not apply are None.

    ``label``: the line's readable name, e.g. ``dart 30 %``.  ``requested`` and ``achieved``: the
    sparsity, as the fraction of FFN neurons removed.  ``low`` and ``high``: the 95 % interval of
    ``value``.  ``dense_share``: the fraction of decoded tokens that ran with all neurons.
    ``weights``: the weight format in memory, e.g. ``q8_0``; None means unquantised weights in
    ``dtype``.  ``error``: why ``value`` is None.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    label: str
    method: str
    model: str
    task: str
    metric: str
    value: float | None = None
    higher_is_better: bool = False
    requested: float | None = None
    achieved: float | None = None
    low: float | None = None
    high: float | None = None
    dense_share: float | None = None
    remasks: int | None = None
    seed: int | None = None
    dtype: str | None = None
    weights: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class ResultsFolder:
    """A run's folder; ``parts``: the finished work by key, which a resumed run does not repeat."""

    path: Path
    parts: dict[str, Any]
    resumed: bool
    lock: BaseFileLock | None = None
    changed: str = ""
    """Why an unfinished folder with equal settings was not resumed; "" if there was none."""

    @property
    def stamp(self) -> str:
        """The run's start time as it appears in the name of its log file."""
        return self.path.name[:15]

    def part(self, key: str) -> Any:
        """The value that ``save_part`` stored under ``key``, or None."""
        return self.parts.get(key)

    def save_part(self, key: str, value: Any) -> None:
        """Store the result of finished work, so that later interruptions cannot lose it."""
        self.parts[key] = value
        path = self.path / PARTS
        try:
            append_row(path, {"key": key, "value": finite(value)})
        except OSError as error:
            raise ResultsError(f"cannot write {path}: {error.strerror or error}") from None

    def finish(self) -> None:
        """Delete the cache of finished work."""
        (self.path / PARTS).unlink(missing_ok=True)

    def release(self) -> None:
        """Release the lock so that another run can resume here."""
        release(self.lock)

    def discard(self) -> None:
        """Remove the folder if it is new and has no parts, and the experiment's folder if empty."""
        if self.resumed or self.parts:
            return
        self.release()
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty if there are other runs
            self.path.parent.rmdir()


def take(folder: Path) -> BaseFileLock | None:
    """Acquire the lock of ``folder``; return None if another process has it.

    The operating system releases the lock when the process ends.  Raises ``OSError`` if the lock
    file cannot be written.
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
        return lock  # a file system without locks: two runs in one folder are not detected
    if path.exists():
        return lock
    lock.release()  # the previous run has just removed the file
    return take(folder)


def release(lock: BaseFileLock | None) -> None:
    """Remove the lock file and release the lock; a second call does nothing."""
    if lock is not None and lock.is_locked:
        with contextlib.suppress(OSError):  # Windows cannot remove an open file
            Path(lock.lock_file).unlink()
        lock.release()


def is_taken(folder: Path) -> bool:
    """Whether a running process has the lock of ``folder``."""
    if not (folder / LOCK).is_file():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # another user's folder, or a file system without locks
        return False


def now() -> datetime.datetime:
    """The local time, to the second."""
    return datetime.datetime.now().astimezone().replace(microsecond=0)


def open_folder(
    root: Path, experiment: str, settings: Mapping[str, Any], fresh: bool = False
) -> ResultsFolder:
    """Resume the newest unfinished folder with equal settings, or create a folder.

    ``fresh``: if True, always create a folder.  Raises ``ResultsError`` if the folder cannot be
    written or the disk is full.
    """
    base = root / experiment
    try:
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=base, buffering=0) as probe:  # the file is deleted at once
            probe.write(b"x")
        free = shutil.disk_usage(base).free
        if free < MIN_FREE_BYTES:
            raise ResultsError(
                f"only {free / 2**20:.0f} MiB are free for results in {base}: free disk space, or "
                "choose another folder with --results-dir"
            )
        resumed = "" if fresh else _resume(base, settings)
        return _new_folder(base, resumed) if isinstance(resumed, str) else resumed
    except OSError as error:
        raise ResultsError(
            f"cannot write results to {base}: {error.strerror or error}; choose another folder "
            "with --results-dir"
        ) from None


def _resume(base: Path, settings: Mapping[str, Any]) -> ResultsFolder | str:
    """Resume the newest unfinished, unlocked folder with equal settings; else return why not."""
    reason = ""
    for folder in sorted(base.iterdir(), reverse=True):
        changed = _changes(folder, settings)
        if changed is None or is_taken(folder):
            continue
        if changed:
            reason = (
                reason or f"{folder} is not resumed: {' and '.join(changed)} changed since it began"
            )
            continue
        lock = take(folder)
        if lock is not None and _changes(folder, settings) == []:  # that run may just have ended
            parts = {row["key"]: row["value"] for row in whole_rows(folder / PARTS)}
            return ResultsFolder(folder, parts, True, lock)
        release(lock)
    return reason


def _changes(folder: Path, settings: Mapping[str, Any]) -> list[str] | None:
    """Name the inputs that changed since an unfinished run with equal settings began in ``folder``.

    None means that there is no such run.  A run that stopped after writing its final status is
    still unfinished if ``parts.jsonl`` exists.
    """
    config = read_json(folder / "config.json")
    unfinished = config.get("status") in ("running", "interrupted", "failed")
    before, now = mapping(config.get("settings")), dict(settings)
    old, new = (mapping(values.pop("inputs", None)) for values in (before, now))
    if before != now or not (unfinished or (folder / PARTS).exists()):
        return None
    return list(dict.fromkeys(_changed_inputs(old, new)))


def _changed_inputs(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of changed inputs; a grid's inputs are grouped by cell."""
    for name in {**old, **new}:
        before, now = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from _changed_inputs(before, now)
        elif before != now:
            yield {"model": "the model's weights", "sources": "the prompts"}.get(name, name)


def _new_folder(base: Path, changed: str) -> ResultsFolder:
    stamp = now().strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        folder = base / (stamp if number == 0 else f"{stamp}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return ResultsFolder(folder, {}, False, take(folder), changed)
    raise ResultsError(f"too many results folders with the same time in {base}")


def mapping(value: Any) -> dict[str, Any]:
    """``value`` as a dict if it is a mapping, else an empty dict."""
    return dict(value) if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """``value`` as a float if it is a number, else None."""
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable else None
