"""A run's results folder: ``<results>/<experiment>/<time>/``.

``config.json`` is written first and says how far the run came.  Every file is replaced whole, so a
reader never sees half of one, and what is finished survives an interruption: ``parts.jsonl`` keeps
the finished parts until the run is complete.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm.errors import ResultsError
from dart_llm.process_state import is_alive

PARTS = "parts.jsonl"
MIN_FREE_BYTES = 50 * 2**20
SCHEMA = 1


@dataclass(frozen=True)
class ResultsFolder:
    """One run's folder; ``parts`` are the finished parts that a resumed run starts from."""

    path: Path
    parts: dict[str, Any]
    resumed: bool

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
        line = json.dumps({"key": key, "value": finite(value)}) + "\n"
        try:
            with (self.path / PARTS).open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ResultsError(
                f"cannot write {self.path / PARTS}: {error.strerror or error}"
            ) from None

    def finish(self) -> None:
        """Drop the parts: the files proper hold everything."""
        (self.path / PARTS).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove a folder of this call that holds no result, and its experiment if empty."""
        if self.resumed or self.parts:
            return
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
        probe = base / f".write-test-{os.getpid()}"
        probe.write_text("x", encoding="utf-8")
        probe.unlink()
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
    if not fresh:
        for folder in sorted(base.iterdir(), reverse=True):
            if _resumable(folder, settings):
                return ResultsFolder(folder, _read_parts(folder), True)
    return ResultsFolder(_new_folder(base), {}, False)


def _new_folder(base: Path) -> Path:
    stamp = now().strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        folder = base / (stamp if number == 0 else f"{stamp}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise ResultsError(f"too many results folders of the same second in {base}")


def _resumable(folder: Path, settings: Mapping[str, Any]) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    process = config.get("process")
    if config.get("status") == "running" and process != os.getpid() and is_alive(process):
        return False
    unfinished = config.get("status") in ("running", "interrupted", "failed")
    return unfinished and config.get("settings") == dict(settings)


def _read_parts(folder: Path) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    try:
        lines = (folder / PARTS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return parts
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the line that was being written when the run stopped
        parts[entry["key"]] = entry["value"]
    return parts


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
