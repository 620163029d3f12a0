"""What can be chosen by name, for ``dart-llm methods`` and the docs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from rich.console import Console
from rich.table import Table

from dart_llm.config import PruneConfig
from dart_llm.registry import BUDGETS, DRIFT_RULES, METHODS, SCORES


def listing() -> dict[str, list[dict[str, str]]]:
    """Name, one-line description and source of every method, score, budget and drift rule."""
    return {
        "methods": [_method(name) for name in METHODS.names()],
        "scores": [_entry(name, SCORES.get(name)) for name in SCORES.names()],
        "budgets": [
            *(_entry(name, BUDGETS.get(name)) for name in BUDGETS.names()),
            {
                "name": "blend A B",
                "summary": "The mean of two budgets' keep counts.",
                "source": "this project; docs/method.md",
            },
        ],
        "drift_rules": [
            {"name": name, "summary": _first_line(DRIFT_RULES.get(name).__doc__), "source": ""}
            for name in DRIFT_RULES.names()
        ],
    }


def _method(name: str) -> dict[str, str]:
    config = METHODS.get(name)
    try:
        text = import_module(f"dart_llm.presets.{name.replace('-', '_')}").__doc__
    except ImportError:
        text = ""
    return {"name": name, "summary": _first_line(text), "source": _settings(config)}


def _settings(config: PruneConfig) -> str:
    if config.weight_bits is not None:
        return f"weights of {config.weight_bits} bits, nothing removed"
    parts = [
        f"score {config.score.name}",
        f"budget {config.budget.name}",
        f"drift {config.drift.rule}",
        f"evidence {config.remask.evidence}",
        f"compensation {'on' if config.compensation else 'off'}",
    ]
    if config.token is not None:
        copies = f"{config.token.bits}-bit copies in groups of {config.token.group}"
        parts.append(f"winners of every token by {copies}")
    if config.calibration is not None:
        size = f"{config.calibration.sequences} x {config.calibration.length} tokens"
        parts.append(f"{config.calibration.purpose} from calibration on {size}")
    return ", ".join(parts)


def _entry(name: str, rule: Any) -> dict[str, str]:
    return {"name": name, "summary": rule.summary, "source": rule.source}


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]


def print_listing() -> None:
    """The listing as tables on stdout."""
    console = Console()
    for kind, entries in listing().items():
        second = "settings" if kind == "methods" else "source"
        table = Table(title=kind.replace("_", " "), title_justify="left")
        for column in ("name", "what it does", second):
            table.add_column(column)
        for entry in entries:
            table.add_row(entry["name"], entry["summary"], entry["source"])
        console.print(table)
