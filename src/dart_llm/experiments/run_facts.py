"""What every page says of its run: head, settings, provenance."""

from __future__ import annotations

import contextlib
import datetime
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dart_llm.experiments.store import ResultsView, flat, mapping, number
from dart_llm.reporting import page
from dart_llm.reporting import words as sentences
from dart_llm.reporting.speed_up import ADVICE
from dart_llm.reporting.table import PageTable, bytes_text

SETTINGS = {"settings": "Settings that were given"}

PROVENANCE = {
    "versions": "Versions",
    "machine": "Machine",
    "git": "Source code",
    "checkpoint": "Checkpoint",
}


def render(
    source: ResultsView | Mapping[str, Any],
    template: str,
    content: Mapping[str, Any],
    **filters: Callable[..., Any],
) -> str:
    """The page of a run: ``content``, and the run's status, settings and provenance.

    ``source``: config.json, or a folder that was read.
    """
    config = source.config if isinstance(source, ResultsView) else source
    own = {
        "status": str(config.get("status") or "unknown"),
        "settings": _tables(config, SETTINGS, "setting"),
        "provenance": _tables(config, PROVENANCE, "what"),
    }
    return page.render(template, {**own, **content}, filters)


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


def origin_facts(config: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Device, date and command: name, value, and whether the value is set as code."""
    facts: list[tuple[str, Any, bool]] = [
        ("device", mapping(config.get("machine")).get("device"), False),
        ("date", _date(config), False),
        ("command", _command(config.get("command")), True),
    ]
    return [(name, str(value), code) for name, value, code in facts if value is not None]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def title(view: ResultsView) -> str:
    if len(view.accountings) > 1:
        return f"{_settings(view)} on {view.name}"
    if view.method == "dense":
        return f"Dense on {view.name}"
    amount = "" if view.asked is None else f" at {sentences.percent(view.asked)}"
    return f"{view.method}{amount} on {view.name}"


def _settings(view: ResultsView) -> str:
    """The settings of a run of several, in words."""
    return named(map(sentences.label_text, view.accountings))


def conclusion(view: ResultsView) -> str:
    if len(view.accountings) > 1:
        return f"One prompt, dense and under {len(view.accountings)} settings."
    rows = view.perplexity[0]["rows"] if view.perplexity else []
    return sentences.conclusion(rows, accounting=view.generated, method=view.method)


def _accounting(view: ResultsView) -> dict[str, Any]:
    """Of the generated text, or else of the perplexity row that the page speaks of."""
    row = sentences.headline(view.perplexity[0]["rows"], view.method) if view.perplexity else None
    return view.generated or mapping(mapping(row).get("accounting"))


def named(values: Iterable[Any]) -> str:
    """Each value once."""
    return ", ".join(dict.fromkeys(str(v) for v in values if v is not None)) or "not known"


def facts(view: ResultsView) -> list[tuple[str, str, bool]]:
    """Name, value, and whether the value is to be set as code."""
    known = view.checkpoint
    where = "generated text" if view.generated else "perplexity slices"
    achieved = number(_accounting(view).get("achieved_sparsity"))
    shares = [None if s is None else sentences.percent(s) for s in (view.asked, achieved)]
    method: str | None = None if view.method == "unknown" else view.method
    if len(view.accountings) > 1:
        shares, method = [None, None], _settings(view)
    found: list[tuple[str, Any, bool]] = [
        ("method" if len(view.accountings) < 2 else "settings", method, False),
        ("sparsity asked for", shares[0], False),
        ("achieved sparsity", shares[1] and f"{shares[1]} ({where})", False),
        ("checkpoint", known.get("name"), False),
        ("file quantisation", known.get("file_quantisation"), False),
        ("dtype", known.get("dtype"), False),
        ("weights", known.get("weights"), False),
        ("device", mapping(view.config.get("machine")).get("device"), False),
        ("date", _date(view.config), False),
        ("sha256", known.get("sha256"), True),
        ("revision", known.get("revision"), True),
        ("command", _command(view.config.get("command")), True),
    ]
    return [(name, str(value), code) for name, value, code in found if value is not None]


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


def cards(view: ResultsView) -> list[tuple[str, str, str]]:
    """The figures that head the page: value, what it is, and a note.

    Of several settings none: the tables compare them.
    """
    if len(view.accountings) > 1:
        return []
    found, counted = [], _accounting(view)
    achieved = number(counted.get("achieved_sparsity"))
    dense = number(counted.get("dense_token_share"))
    if achieved is not None:
        note = "in the generated text" if view.generated else "in the perplexity slices"
        note += "" if view.asked is None else f"; {sentences.percent(view.asked)} asked for"
        found.append((sentences.percent(achieved), "of the FFN neurons removed", note))
    rows = view.perplexity[0]["rows"] if view.perplexity else []
    row = sentences.headline(rows, view.method)
    over = None if row is None else sentences.ratio(row, rows)
    if row is not None and over is not None:
        note = f"{sentences.row_name(row)}, text {view.perplexity[0].get('text', 'not known')}"
        found.append((f"x {sentences.times(over)}", "perplexity over dense", note))
    found += _speed_card(view.timing)
    if dense is not None:
        count = sentences.count(int(counted.get("remasks") or 0), "re-mask")
        found.append((sentences.percent(dense), "of the decoded tokens ran dense", count))
    return found


def _speed_card(timing: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    what = f"speed of decoding over dense{sentences.dense_by(timing)}"
    if timing.get("disturbed"):
        return [("disturbed", what, ADVICE)]
    speed, limit = number(timing.get("speed_up")), number(timing.get("bytes_limit"))
    if speed is None:
        return []
    note = "" if limit is None else f"bandwidth limit {limit:.2f} x"
    return [(f"{speed:.2f} x", what, note)]


def other_times(timing: Mapping[str, Any]) -> str:
    """What loading and the whole run took, and the memory, as one sentence."""
    parts = []
    load, total, peak = map(number, map(timing.get, ("load_s", "total_s", "peak_memory_bytes")))
    if load is not None:
        parts.append(f"loading took {load:,.1f} s")
    if total is not None:
        parts.append(f"the whole run {total:,.1f} s")
    if peak is not None:
        parts.append(f"peak memory {bytes_text(peak)}")
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""
