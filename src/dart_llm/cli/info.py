"""Commands that only print information: ``prompts``, ``methods`` and ``doctor``."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dart_llm.cli.options import Json, Plugin
from dart_llm.pruning import registry
from dart_llm.settings import Settings, merge, setting

if TYPE_CHECKING:
    from dart_llm.data.passages import DriftPrompt, Passage

File = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Read this JSONL file, not the bundled data.")
]

ROWS = 20  # maximum number of rows in a table without --limit
ARROW = " -> "
PANEL = "Filter"


class PromptFilter(Settings):
    """Settings that select the prompts or passages that ``prompts list`` shows."""

    domain: str | None = setting(PANEL, "Show only those with a topic of this domain.")
    limit: int | None = setting(
        PANEL, f"Show only the first N (default: {ROWS}, or all with --json).", ge=1
    )
    passages: bool = setting(PANEL, "List the long passages instead of prompts.", False)


def list_prompts(flags: dict[str, Any], file: File = None, as_json: Json = False) -> None:
    """``dart-llm prompts list``."""
    from dart_llm.data import passages as data
    from dart_llm.reporting.console import Ui

    chosen = merge(PromptFilter, flags, environment={})
    records: Sequence[Any]
    if chosen.passages:
        kind, records = "passages", data.choose(data.listed_passages(file), chosen.domain)
    else:
        kind = "prompts"
        records = data.choose(data.listed_prompts(file), chosen.domain)
    if as_json:
        rows = [record.to_dict() for record in records[: chosen.limit]]
        typer.echo(json.dumps({"total": len(records), kind: rows}))
        return
    shown = records[: chosen.limit or ROWS]
    cells: Any = _passage_cells if chosen.passages else _prompt_cells
    Ui().out.print(_table(("id", "template", "domains", "topics"), map(cells, shown)))
    if len(shown) < len(records):
        note = f"{len(shown)} of {len(records)} {kind}; --limit {len(records)} shows all"
        typer.echo(note, err=True)


def _prompt_cells(prompt: DriftPrompt) -> tuple[str, ...]:
    topics = (prompt.slots.get(f"topic_{side}", "") for side in "ab")
    return prompt.id, prompt.template, ARROW.join(prompt.domains), ARROW.join(topics)


def _passage_cells(passage: Passage) -> tuple[str, ...]:
    parts = [(topic.domain, topic.name) for topic in passage.topics]
    return passage.id, "", *(ARROW.join(names) for names in zip(*parts, strict=True))


def show_prompt(
    name: Annotated[
        str, typer.Argument(metavar="ID", help="ID of a prompt or passage, or a unique prefix.")
    ],
    file: File = None,
    as_json: Json = False,
) -> None:
    """``dart-llm prompts show``: prints where a text comes from, and the text, topic by topic."""
    from dart_llm.data import passages as data
    from dart_llm.data.passages import Passage

    record = data.find(data.everything(file), name)
    if as_json:
        typer.echo(json.dumps(record.to_dict()))
    elif isinstance(record, Passage):
        typer.echo(record.id)
        for number, part in enumerate(record.segments(), start=1):
            typer.echo(
                f"\n--- topic {number} of {len(record.topics)}: {part.topic.name} "
                f"({part.topic.domain}), characters {part.start:,} to {part.end:,}, "
                f"{len(part.text.split()):,} words ---\n\n{part.text}"
            )
    else:
        parts = {"id": record.id, "template": record.template, "seed": record.seed, **record.slots}
        lines = [f"{key}: {value}" for key, value in parts.items() if value not in (None, "")]
        typer.echo("\n".join([*lines, record.text]))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    table = Table(*heads, box=SIMPLE_HEAD, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))  # rich would interpret square brackets in a plain str
    return table


def show_methods(plugin: Plugin = None, as_json: Json = False) -> None:
    """``dart-llm methods``."""
    if plugin is not None:
        registry.use_plugin(plugin)
    from dart_llm.pruning.methods import listing

    if as_json:
        typer.echo(json.dumps(listing()))
        return
    for kind, entries in listing().items():
        # a method's entry "source" lists the settings that the method stands for
        heads = ("name", "what it does", "settings" if kind == "methods" else "source")
        rows = [(entry["name"], entry["summary"], entry["source"]) for entry in entries]
        Console().print(_table(heads, rows, kind.replace("_", " ")))


# doctor


REQUIREMENT = re.compile(r"([\w-]+)[^;]*;.*extra == [\"']([\w-]+)[\"']")


def missing_extras() -> dict[str, list[str]]:
    """Maps an extra of dart-llm to the names of its packages that are not installed."""
    missing: dict[str, list[str]] = {}
    for requirement in requires("dart-llm") or ():
        match = REQUIREMENT.match(requirement)
        if match and match[1] != "dart-llm" and not _is_installed(match[1]):
            missing.setdefault(match[2], []).append(match[1])
    return missing


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        # ninja can also be installed as a program without a Python package
        return package == "ninja" and shutil.which(package) is not None


def examine(cache_dir: str | None = None) -> dict[str, Any]:
    """Return everything about the installation that can explain why a run works or fails.

    The report says whether a hub token is set, but does not contain the token.
    """
    import torch
    from huggingface_hub import get_token

    from dart_llm.cache import cache_folder
    from dart_llm.experiments.provenance import machine, versions
    from dart_llm.native.build import state as native_state

    cache = cache_folder(cache_dir)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    cuda = torch.cuda
    gpus = [f"cuda:{n} ({cuda.get_device_name(n)})" for n in range(cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    kernels = native_state(cache_dir)
    return {
        "versions": versions(),
        "machine": machine(),
        "devices": ["cpu", *gpus, *mps],
        "native_kernels": kernels,
        "default_model_weights": default_weights(kernels, bool(gpus)),
        "cache": str(cache),
        "free_disk_gib": round(shutil.disk_usage(existing).free / 2**30, 1),
        "hub_token": get_token() is not None,
        "hub_offline": os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"),
        "extras_missing": missing_extras(),
    }


def default_weights(kernels: str, gpu: bool) -> str:
    """Describe the format that the default model's weights have in memory by default.

    ``kernels``: the text that ``native.build.state`` returns.  ``gpu``: True if there is a GPU.
    """
    if gpu:
        return "bfloat16, on the GPU"
    if kernels.startswith("built: "):
        name = kernels.removeprefix("built: ")
        return f"Q4_1 as stored in the file, read by the {name} kernels"
    if kernels.startswith("not built yet"):
        return "Q4_1 as stored in the file"
    return "bfloat16, because Q4_1 weights need the native kernels"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value or "none")


def show_installation(
    cache_dir: Annotated[str | None, typer.Option(help="Report on this cache folder.")] = None,
    as_json: Json = False,
) -> None:
    """``dart-llm doctor``."""
    from dart_llm.reporting.console import Ui

    with Ui.started(as_json):
        report = examine(cache_dir)
    if as_json:
        typer.echo(json.dumps(report))
        return
    from dart_llm.reporting.page import flat

    rows = [(name.replace("_", " "), _cell(value)) for name, value in flat(report).items()]
    Console().print(_table(("item", "value"), rows, "dart-llm doctor"))
    if report["extras_missing"]:
        typer.echo("to install the packages of an extra, run e.g. pip install 'dart-llm[eval]'")
