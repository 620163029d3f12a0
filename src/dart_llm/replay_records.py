"""A recorded run: the records of ``/api/events``, one JSON document a line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError

Record = dict[str, Any]

KINDS = {
    "start": ("method", "layers", "neurons", "prompt"),
    "token": ("index", "text", "phase"),
    "check": ("step", "similarity"),
    "remask": ("step", "cause"),
    "mask": ("number", "token", "kept_share", "raster"),
    "done": (),
    "error": ("message",),
}
"""Kinds of records and what a page that shows them cannot do without."""

LARGEST = 64 << 20
"""Characters of a recording that is still taken."""


def read_records(source: str) -> list[Record]:
    """The records in a file (``-``: standard input), as JSON lines or as server-sent events.

    Raises ``ConfigError`` with the line that is wrong.
    """
    name = "standard input" if source == "-" else source
    records = []
    for number, line in enumerate(_text(source, name).splitlines(), 1):
        text = line.strip().removeprefix("data:").strip()
        if not text or text == "[DONE]" or text.startswith((":", "event:", "id:", "retry:")):
            continue
        records.append(_record(text, f"{name}, line {number}"))
    if not records or records[0]["kind"] != "start":
        raise ConfigError(
            f"{name} does not begin with a start record: give what POST /api/events answered, or "
            "what the window saved"
        )
    return records


def _text(source: str, name: str) -> str:
    try:
        text = sys.stdin.read(LARGEST + 1) if source == "-" else _file(Path(source))
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is no text in UTF-8: give a recording, JSON lines") from None
    if len(text) > LARGEST:
        raise ConfigError(f"{name} is larger than {LARGEST >> 20} MiB: give a shorter recording")
    return text


def _file(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as file:
        return file.read(LARGEST + 1)


def _record(text: str, place: str) -> Record:
    try:
        record = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise ConfigError(f"{place} is no JSON: give one record a line") from None
    kind = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{place} is no record: its kind must be one of {', '.join(KINDS)}")
    missing = [field for field in KINDS[kind] if field not in record]
    if missing:
        raise ConfigError(f"{place}: a {kind} record needs {', '.join(missing)}")
    return dict(record)


def _no_number(text: str) -> None:
    raise ValueError(text)
