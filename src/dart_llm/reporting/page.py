"""Renders report pages from a template, a run's metadata and settings, and embedded plots.

A page has no scripts and sends no requests: styles and plots are embedded.  All text from models,
prompts and files is escaped.  In this module, ``config`` is the content of a run's config.json.
"""

from __future__ import annotations

import base64
import datetime
import shlex
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from dart_llm.errors import MissingExtra
from dart_llm.reporting import figures
from dart_llm.reporting.figures import Plot
from dart_llm.reporting.table import PageTable
from dart_llm.reporting.words import checkpoint_line

Facts = list[tuple[str, str, bool]]
"""Metadata at the top of a page: tuples (name, value, True if the value is shown as code)."""

PROVENANCE = ("versions", "machine", "git", "checkpoint")
"""Entries of config.json that pages show as tables."""

LARGE_SVG = 150_000
"""Size in bytes above which a plot is embedded as PNG instead of SVG."""


class Picture(NamedTuple):
    """A plot as a data URL."""

    name: str
    title: str
    alt: str
    source: str


def render(config: Mapping[str, Any], template: str, content: Mapping[str, Any]) -> str:
    """Return a run's page as HTML: ``content``, and the run's status, settings and provenance.

    ``template`` is a file in templates/ that extends page.html.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("dart_llm.reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["tied"] = lambda text: str(text).replace(" %", "\u00a0%")
    css = resources.files("dart_llm.reporting") / "templates" / "report.css"
    explicit = {key: value for key, value in config["settings"].items() if key in config["given"]}
    settings = _table("Explicit settings", "setting", explicit)
    provenance = [_table(key.capitalize(), "item", config[key]) for key in PROVENANCE]
    common = {
        "style": Markup(css.read_text(encoding="utf-8")),
        "status": config["status"],
        "settings": [settings] if settings.rows else [],
        "provenance": [table for table in provenance if table.rows],
    }
    return environment.get_template(template).render({**common, **content})


def _table(caption: str, head: str, entries: Mapping[str, Any] | None) -> PageTable:
    values = {
        name: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in flat(entries or {}).items()
    }
    return PageTable(caption, (head, "value"), tuple(values.items()), numeric=False)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to one level with dotted names, without settings that are None."""
    settings: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            settings |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            settings[f"{prefix}{key}"] = value
    return settings


def model_name(config: Mapping[str, Any]) -> str:
    """The checkpoint's short name."""
    checkpoint = config["checkpoint"] or {}
    return short_name(checkpoint.get("name") or config["settings"].get("model"))


def short_name(model: str | None) -> str:
    """The last part of a model's name or path."""
    return str(model or "unknown model").rstrip("/").rpartition("/")[2]


def small_print(config: Mapping[str, Any]) -> str:
    """The checkpoint in one line, for the small print of figures."""
    return checkpoint_line(model_name(config), config["checkpoint"] or {})


def facts(config: Mapping[str, Any]) -> Facts:
    """Checkpoint, device, date and command of a run, for the top of its page."""
    checkpoint = {"checkpoint": None, **(config["checkpoint"] or {})}
    checkpoint["checkpoint"] = checkpoint.get("name")
    checkpoint["file quantisation"] = checkpoint.get("file_quantisation")
    names = ("checkpoint", "file quantisation", "dtype", "weights", "sha256", "revision")
    pairs = [(name, str(v)) for name in names if (v := checkpoint.get(name)) is not None]
    return [*((*fact, fact[0] in ("sha256", "revision")) for fact in pairs), *origin_facts(config)]


def origin_facts(config: Mapping[str, Any]) -> Facts:
    """Device, date and command of a run."""
    program, *arguments = config["command"]
    started, finished = (config[key] for key in ("started", "finished"))
    begin = datetime.datetime.fromisoformat(started)
    date = begin.strftime("%Y-%m-%d %H:%M:%S %z").replace("+0000", "UTC")
    if finished:
        elapsed = datetime.datetime.fromisoformat(finished) - begin
        date += f", took {elapsed.total_seconds():,.0f} s"
    device = config["machine"]["device"]
    device_fact = [("device", device, False)] if device else []
    command = shlex.join([Path(program).name, *arguments])
    return [*device_fact, ("date", date, False), ("command", command, True)]


def pictures(wanted: Iterable[Plot]) -> tuple[list[Picture], str]:
    """Return all plots as pictures, and ""; without matplotlib, return [] and the reason."""
    try:
        return [Picture(plot.name, plot.title, plot.alt, _address(plot)) for plot in wanted], ""
    except MissingExtra as error:
        return [], f"No plots: {error}"


def _address(plot: Plot) -> str:
    data, kind = figures.render(plot, "svg"), "svg+xml"
    if len(data) > LARGE_SVG:
        data, kind = figures.render(plot, "png"), "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
