"""What every page says of its run: head, settings, provenance."""

from __future__ import annotations

import contextlib
import datetime
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dart_llm.experiments.store import checkpoint_line, flat, mapping
from dart_llm.reporting import page
from dart_llm.reporting.table import PageTable

PROVENANCE = {
    "versions": "Versions",
    "machine": "Machine",
    "git": "Source code",
    "checkpoint": "Checkpoint",
}


def render(
    config: Mapping[str, Any],
    template: str,
    content: Mapping[str, Any],
    **filters: Callable[..., Any],
) -> str:
    """The page of a run: ``content``, and the run's status, settings and provenance."""
    about = {
        "status": str(config.get("status") or "unknown"),
        "settings": _tables(config, {"settings": "Settings that were given"}, "setting"),
        "provenance": _tables(config, PROVENANCE, "what"),
    }
    return page.render(template, {**about, **content}, filters)


def _tables(config: Mapping[str, Any], captions: Mapping[str, str], head: str) -> list[PageTable]:
    """Entries of config.json as tables of names and values; only settings that were given."""
    found, given = [], config.get("given")
    for key, caption in captions.items():
        entries = flat(mapping(config.get(key)))
        if key == "settings" and isinstance(given, list):
            entries = {name: value for name, value in entries.items() if name in given}
        rows = tuple((name, _plain(value)) for name, value in entries.items())
        found += [PageTable(caption, (head, "value"), rows, numeric=False)] if rows else []
    return found


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def model_name(config: Mapping[str, Any]) -> str:
    """The checkpoint's short name."""
    name = mapping(config.get("checkpoint")).get("name")
    name = name or mapping(config.get("settings")).get("model")
    return str(name or "unknown model").rstrip("/").rsplit("/", 1)[-1]


def small_print(config: Mapping[str, Any]) -> str:
    """The checkpoint in one line, under figures."""
    return checkpoint_line(model_name(config), mapping(config.get("checkpoint")))


def named(values: Iterable[Any]) -> str:
    """Each value once."""
    return ", ".join(dict.fromkeys(str(v) for v in values if v is not None)) or "not known"


def facts(config: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Checkpoint, device, date and command: name, value, and whether the value is set as code."""
    checkpoint = mapping(config.get("checkpoint"))
    names = {"checkpoint": "name", "file quantisation": "file_quantisation"}
    names |= {name: name for name in ("dtype", "weights", "sha256", "revision")}
    found = {name: checkpoint.get(key) for name, key in names.items()}
    code = ("sha256", "revision")
    known = [(name, str(v), name in code) for name, v in found.items() if v is not None]
    return [*known, *origin_facts(config)]


def origin_facts(config: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Device, date and command, as in ``facts``."""
    found = {
        "device": mapping(config.get("machine")).get("device"),
        "date": _date(config),
        "command": _command(config.get("command")),
    }
    return [(name, str(v), name == "command") for name, v in found.items() if v is not None]


def _date(config: Mapping[str, Any]) -> str | None:
    text = None
    with contextlib.suppress(KeyError, TypeError, ValueError):
        started = datetime.datetime.fromisoformat(str(config.get("started")))
        text = started.strftime("%Y-%m-%d %H:%M:%S %z").replace("+0000", "UTC").strip()
        took = datetime.datetime.fromisoformat(str(config["finished"])) - started
        return f"{text}, took {took.total_seconds():,.0f} s"
    return text


def _command(command: Any) -> str | None:
    if not isinstance(command, Sequence) or isinstance(command, str) or not command:
        return None
    words = [str(word) for word in command]
    return shlex.join([Path(words[0]).name, *words[1:]])
