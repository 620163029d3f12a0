"""``dart-llm prompts``, ``methods`` and ``doctor``: what there is, for the terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dart_llm.cli.options import Json, Plugin
from dart_llm.errors import ConfigError
from dart_llm.pruning import plugins

if TYPE_CHECKING:
    from dart_llm.data.passages import DriftPrompt, Passage

File = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A JSONL file instead of the package's own.")
]

ROWS = 20  # rows of a table without --limit
ARROW = " -> "


def list_prompts(
    domain: Annotated[
        str | None, typer.Option(metavar="NAME", help="With this domain on either side.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Prompts made from this template.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"The first N (default: {ROWS} in a table, all in JSON)."),
    ] = None,
    passages: Annotated[
        bool, typer.Option("--passages", metavar="", help="The long passages instead.")
    ] = False,
    file: File = None,
    as_json: Json = False,
) -> None:
    """``dart-llm prompts list``."""
    from dart_llm.data import passages as data
    from dart_llm.reporting.console import Ui

    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} is too small: give 1 or more, or leave it out")
    if passages and template is not None:
        raise ConfigError("passages have no template: leave out --template or --passages")
    kind = "passages" if passages else "prompts"
    records: Sequence[Any]
    if passages:
        records = data.choose(data.listed_passages(file), domain)
    else:
        records = data.choose(data.listed_prompts(file), domain, template)
    if as_json:
        rows = [record.to_dict() for record in records[:limit]]
        typer.echo(json.dumps({"total": len(records), kind: rows}))
        return
    if not records:
        typer.echo(f"no {kind} match")
        return
    ui, shown = Ui(), records[: limit or ROWS]
    table: Callable[[Any], Table] = _passage_table if passages else _prompt_table
    ui.out.print(table(shown))
    if len(shown) < len(records):
        ui.say(f"{len(shown)} of {len(records)} {kind}; --limit {len(records)} shows all")


def show_prompt(
    name: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="A prompt or a passage; the beginning of an id is enough."
        ),
    ],
    file: File = None,
    as_json: Json = False,
) -> None:
    """``dart-llm prompts show``."""
    from dart_llm.data import passages as data
    from dart_llm.data.passages import DriftPrompt
    from dart_llm.reporting.console import Ui

    record = data.find(data.everything(file), name)
    if as_json:
        typer.echo(json.dumps(record.to_dict()))
    elif isinstance(record, DriftPrompt):
        _print_prompt(record, Ui().out)
    else:
        _print_passage(record, Ui().out)


def _prompt_table(prompts: Iterable[DriftPrompt]) -> Table:
    rows = [
        (
            prompt.id,
            prompt.template,
            ARROW.join(prompt.domains),
            *(prompt.slots.get(f"topic_{side}", "") for side in "ab"),
        )
        for prompt in prompts
    ]
    return _table(("id", "template", "domains", "first topic", "second topic"), rows)


def _passage_table(passages: Iterable[Passage]) -> Table:
    """A row per topic of each passage, with its words and the character at which it begins."""
    rows = [
        (
            passage.id if segment.start == 0 else "",
            segment.topic.domain,
            segment.topic.name,
            f"{_words(segment.text):,}",
            f"{segment.start:,}",
        )
        for passage in passages
        for segment in passage.segments()
    ]
    return _table(("id", "domain", "topic", "words", "from character"), rows, words=3)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 99) -> Table:
    """``words``: columns of words, which are followed by columns of numbers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, head in enumerate(heads):
        justify: Any = "left" if number < words else "right"
        table.add_column(head, overflow="fold", justify=justify)
    for row in rows:
        table.add_row(*map(Text, row))  # Text: names may contain rich's square brackets
    return table


def _print_prompt(prompt: DriftPrompt, out: Console) -> None:
    """Where the prompt comes from, and its text."""
    facts = {"id": prompt.id, "template": prompt.template, "domains": ARROW.join(prompt.domains)}
    facts |= {"seed": "" if prompt.seed is None else str(prompt.seed), **prompt.slots}
    for name, value in facts.items():
        if value:
            _print_text(f"{name}: {value}", out)
    _print_text(prompt.text, out)


def _print_passage(passage: Passage, out: Console) -> None:
    """The text, with a line before each topic that says what and where it is."""
    _print_text(passage.id, out)
    for number, segment in enumerate(passage.segments(), start=1):
        line = (
            f"--- topic {number} of {len(passage.topics)}: {segment.topic.name} "
            f"({segment.topic.domain}), characters {segment.start:,} to {segment.end:,}, "
            f"{_words(segment.text):,} words ---"
        )
        out.print(Text(f"\n{line}\n", style="bold"), soft_wrap=not out.is_terminal)
        _print_text(segment.text, out)


def _words(text: str) -> int:
    return len(text.split())


def _print_text(text: str, out: Console) -> None:
    # lines are wrapped for a reader, and left whole for a program or a file
    out.print(Text(text), soft_wrap=not out.is_terminal)


# methods


def show_methods(plugin: Plugin = None, as_json: Json = False) -> None:
    """``dart-llm methods``."""
    if plugin is not None:
        plugins.use(plugin)
    from dart_llm.pruning.methods import listing

    if as_json:
        typer.echo(json.dumps(listing()))
        return
    for kind, entries in listing().items():
        third = "settings" if kind == "methods" else "source"
        table = Table("name", "what it does", third, title=kind.replace("_", " "))
        for entry in entries:
            table.add_row(entry["name"], entry["summary"], entry["source"])
        Console().print(table)


# doctor


REQUIREMENT = re.compile(r"([\w-]+)[^;]*;.*extra == [\"']([\w-]+)[\"']")


def missing_extras() -> dict[str, list[str]]:
    """The packages that are not installed, by the extra of dart-llm that requires them."""
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
        return package == "ninja" and shutil.which(package) is not None


def examine(cache_dir: str | None = None) -> dict[str, Any]:
    """Everything that explains why a run works or does not; the value of a token is never read."""
    import torch
    from huggingface_hub import get_token

    from dart_llm.cache import cache_folder
    from dart_llm.experiments.provenance import machine, versions
    from dart_llm.models.float32_products import emulates
    from dart_llm.native.build import state as native_state

    cache = cache_folder(cache_dir)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    dtypes = _dtypes(torch)
    kernels = native_state(cache_dir)
    return {
        "versions": versions(),
        "machine": machine(),
        "devices": _devices(torch),
        "dtypes": dtypes,
        "dtypes_emulated": [name for name in dtypes if emulates(getattr(torch, name))],
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
        "native_kernels": kernels,
        "default_model_weights": _default_weights(kernels, torch.cuda.is_available()),
        "cache": str(cache),
        "free_disk_gib": round(shutil.disk_usage(existing).free / 2**30, 1),
        "hub_token": get_token() is not None,
        "hub_offline": os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"),
        "extras_missing": missing_extras(),
        "summary": metadata("dart-llm")["Summary"],
    }


def _default_weights(kernels: str, gpu: bool) -> str:
    """The format of the default model's weights in memory, unless another one is requested."""
    if gpu:
        return "bfloat16, on the GPU"
    built, _, name = kernels.partition("built: ")
    if not built and name:
        return f"Q4_1 as in the file, read by the kernels {name}"
    later = kernels.startswith("not built yet")
    return "Q4_1 as in the file" if later else "bfloat16: blocks need the native kernels"


def _devices(torch: Any) -> list[str]:
    devices = ["cpu"]
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count)]
    return [*devices, "mps"] if torch.backends.mps.is_available() else devices


def _dtypes(torch: Any) -> list[str]:
    """Dtypes in which a small matrix product works on the CPU."""
    working = []
    for name in ("float32", "float16", "bfloat16"):
        try:
            a = torch.ones(2, 2, dtype=getattr(torch, name))
            (a @ a).sum().item()
        except RuntimeError:
            continue
        working.append(name)
    return working


def _report_rows(report: dict[str, Any]) -> dict[str, str]:
    """The report in words; the entries of nested ones beside the others."""
    rows: dict[str, str] = {}
    for name, value in report.items():
        if name == "extras_missing":
            for extra, packages in value.items():
                install = f"pip install 'dart-llm[{extra}]'"
                rows[f"extra {extra}"] = f"missing: {', '.join(packages)}; {install}"
        elif isinstance(value, dict):
            rows |= _report_rows(value)
        elif isinstance(value, bool):
            rows[name.replace("_", " ")] = "yes" if value else "no"
        else:
            text = ", ".join(value) if isinstance(value, list) else str(value or "none")
            rows[name.replace("_", " ")] = text
    return rows


def show_installation(
    cache_dir: Annotated[str | None, typer.Option(help="Cache to look at.")] = None,
    as_json: Json = False,
) -> None:
    """``dart-llm doctor``."""
    from dart_llm.reporting.console import Ui

    with Ui.started(as_json):
        report = examine(cache_dir)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        table = Table(title="dart-llm doctor", title_justify="left", show_header=False)
        for row in _report_rows(report).items():
            table.add_row(*row)
        Console(markup=False).print(table)
