"""JSONL files, one JSON object a line: reading them with errors that name the line, and adding."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dart_llm.errors import ConfigError

BLOCK = 2**16
"""Bytes that are read at once to find the last line break."""


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of ``path`` with the numbers of their lines, from 1; blank lines are skipped.

    Raises ``ConfigError`` for a file that is missing or cannot be read as UTF-8 text, and for a
    line that is not a JSON object.
    """
    try:
        # Not splitlines(): a JSON string may hold U+2028, which that takes for a line break.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}: give an existing one") from None
    except OSError as error:
        raise ConfigError(f"cannot read the file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the file {path} cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\ud" in line.lower():  # an escape may be half a character, which is no text
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ConfigError(
                f"line {number} of {path} holds half a character, {half}: correct it"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"line {number} of {path} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(
                f"line {number} of {path} needs a JSON object, and holds a {type(row).__name__}: "
                "write {...}"
            )
        yield number, row


def append_row(path: Path, row: Any) -> None:
    """Add one document as a line that survives whatever happens after this call.

    A line without its line break, which a full disk or a kill left, is cut off first: it would
    swallow this one.  Raises ``OSError``, and ``ValueError`` for numbers that JSON has not.
    """
    line = json.dumps(row, allow_nan=False) + "\n"
    with path.open("a+b") as file:
        cut_torn_line(file)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def cut_torn_line(file: BinaryIO) -> None:
    """Cut an open file to its last line break."""
    end = size = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - BLOCK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        file.truncate(end)


def whole_rows(path: Path) -> Iterator[Any]:
    """The documents of a file that ``append_row`` made; what is torn or damaged is left out."""
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
    except OSError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # a power cut may leave other bytes
            continue
