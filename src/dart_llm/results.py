"""A run's results folder: ``<results>/<experiment>/<time>/``.

``config.json`` is written first and says how far the run came.  Every file is replaced whole, so a
reader never sees half of one, and what is finished survives an interruption: ``parts.jsonl`` keeps
the finished parts until everything else is written.  While a run lives it holds the folder's lock.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm.errors import ResultsError
from dart_llm.folder_lock import LOCK, FolderLock, is_taken, take
from dart_llm.jsonl import append_row, whole_rows

PARTS = "parts.jsonl"
INPUTS = "inputs"
"""Of a run's settings: digests of what they only point at (cell_inputs.py)."""
_NAMED = {
    "model": "the model's weights",
    "model_files": "the model's configuration or tokenizer",
    "sources": "the prompts or passages",
    "layer_topk": "the layer table",
}
"""Inputs whose name says too little."""
_STAMP = re.compile(r"\d{8}-\d{6}(-\d+)?")
_CONFIG_PART = ".config.json.part"
_FIRST = {LOCK, _CONFIG_PART}
"""All that a run writes before its folder says what it is."""
MIN_FREE_BYTES = 50 * 2**20
SCHEMA = 1


@dataclass(frozen=True)
class ResultsFolder:
    """One run's folder; ``parts`` are the finished parts that a resumed run starts from."""

    path: Path
    parts: dict[str, Any]
    resumed: bool
    lock: FolderLock | None = None
    note: str = ""
    """Why an unfinished folder with equal settings was not resumed."""

    @property
    def stamp(self) -> str:
        """The run's time, as it stands in the log names."""
        return self.path.name[:15]

    def part(self, key: str) -> Any:
        """What ``save_part`` kept under ``key``, or None."""
        return self.parts.get(key)

    def save_part(self, key: str, value: Any) -> None:
        """Keep a finished part; it survives any interruption after this call."""
        self.parts[key] = value
        try:
            append_row(self.path / PARTS, {"key": key, "value": finite(value)})
        except OSError as error:
            raise ResultsError(
                f"cannot write {self.path / PARTS}: {error.strerror or error}"
            ) from None

    def finish(self) -> None:
        """Drop the parts: the files proper hold everything."""
        (self.path / PARTS).unlink(missing_ok=True)

    def release(self) -> None:
        """This run writes no more: another may go on here."""
        if self.lock is not None:
            self.lock.release()

    def discard(self) -> None:
        """Remove a folder of this call that holds no result, and its experiment if empty."""
        if self.resumed or self.parts:
            return
        self.release()
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: it holds other runs
            self.path.parent.rmdir()


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
    """The newest unfinished folder that no run holds, or why one is not taken."""
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
            return ResultsFolder(folder, _read_parts(folder), True, lock)
        if lock is not None:
            lock.release()
    return why


def _remove_empty(base: Path) -> None:
    """Remove folders of runs that were killed before they wrote their first file."""
    for folder in base.iterdir():
        with contextlib.suppress(OSError):  # a run that begins in one meanwhile keeps it
            if not _STAMP.fullmatch(folder.name) or not _names(folder) <= _FIRST:
                continue
            lock = None if is_taken(folder) else take(folder)
            if lock is not None:
                if _names(folder) <= _FIRST:
                    (folder / _CONFIG_PART).unlink(missing_ok=True)
                lock.release()
                folder.rmdir()


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _new_folder(base: Path) -> tuple[Path, FolderLock | None]:
    stamp = now().strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        folder = base / (stamp if number == 0 else f"{stamp}-{number}")
        with contextlib.suppress(FileExistsError, FileNotFoundError):  # removed as an empty one
            folder.mkdir()
            return folder, take(folder)
    raise ResultsError(f"too many results folders of the same second in {base}")


def _changes(folder: Path, settings: Mapping[str, Any]) -> list[str] | None:
    """What was read by an unfinished run with equal settings and is another now.

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


def _read_parts(folder: Path) -> dict[str, Any]:
    return {row["key"]: row["value"] for row in whole_rows(folder / PARTS)}


def finite(value: Any) -> Any:
    """The same data with numbers that are not finite replaced by None (JSON has none)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` whole; raises ``ResultsError`` when the disk is full or read-only."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes, make_folder: bool = False) -> None:
    """The same for data; ``make_folder``: also the folder that it lies in."""
    partial = path.with_name(f".{path.name}.part")
    try:
        if make_folder:
            path.parent.mkdir(exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error.strerror or error}") from None


def write_json(path: Path, data: Any) -> None:
    """Write as valid JSON, whole."""
    write_text(path, json.dumps(finite(data), indent=1, allow_nan=False) + "\n")


def page_json(data: Any) -> str:
    """JSON for a page: no ``<`` in it, so nothing can end the element that it stands in."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON document per line, whole."""
    write_text(path, "".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows))


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file, whole; None is an empty cell."""
    import csv
    import io

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    write_text(path, buffer.getvalue())
