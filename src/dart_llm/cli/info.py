"""``dart-llm prompts``, ``methods`` and ``doctor``: what there is, for the terminal."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dart_llm.cli.options import Json, Plugin
from dart_llm.errors import ConfigError
from dart_llm.pruning import plugins

if TYPE_CHECKING:
    from dart_llm.data.passages import Passage
    from dart_llm.data.topic_prompts import DriftPrompt

Record = TypeVar("Record", "DriftPrompt", "Passage")

File = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A JSONL file instead of the package's own.")
]

ROWS = 20  # rows of a table without --limit


def generate_prompts(
    count: Annotated[int, typer.Argument(metavar="COUNT", help="How many prompts to make.")],
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the choice.")] = 0,
    ontology: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML file with domains of your own (docs/drift.md)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write JSONL here (default: to stdout).")
    ] = None,
    as_json: Json = False,
) -> None:
    """``dart-llm prompts generate``."""
    from dart_llm.data.topic_prompts import generate as make
    from dart_llm.data.topic_prompts import load_ontology, maximum
    from dart_llm.files import write_lines
    from dart_llm.reporting.console import Ui

    source = load_ontology(ontology)
    rows = [prompt.to_dict() for prompt in make(count, seed, source)]
    if out is not None:
        write_lines(out, rows)
        Ui(quiet=as_json).say(f"wrote {count} of {maximum(source):,} possible prompts to {out}")
    if as_json:
        facts = {"seed": seed, "ontology": ontology, "file": out, "possible": maximum(source)}
        typer.echo(json.dumps({**facts, "prompts": rows}, default=str))
    elif out is None:
        for row in rows:
            typer.echo(json.dumps(row))


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
    from dart_llm.data import passages as listing

    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} is too small: give 1 or more, or leave it out")
    if passages and template is not None:
        raise ConfigError("passages have no template: leave out --template or --passages")
    if passages:
        long = listing.in_domain(listing.listed_passages(file), domain)
        _print_list("passages", long, passage_table, limit, as_json)
    else:
        short = listing.choose(listing.listed_prompts(file), domain, template)
        _print_list("prompts", short, prompt_table, limit, as_json)


def _print_list(
    kind: str,
    records: Sequence[Record],
    table: Callable[[Sequence[Record]], Table],
    limit: int | None,
    as_json: bool,
) -> None:
    from dart_llm.reporting.console import Ui

    if as_json:
        rows = [record.to_dict() for record in records[:limit]]
        typer.echo(json.dumps({"total": len(records), kind: rows}))
        return
    if not records:
        typer.echo(f"no {kind} match")
        return
    ui, shown = Ui(), records[: limit or ROWS]
    ui.out.print(table(shown))
    if len(shown) < len(records):
        ui.say(f"{len(shown)} of {len(records)} {kind}; --limit {len(records)} shows all")


def show_prompt(
    name: Annotated[
        str,
        typer.Argument(metavar="ID", help="A prompt or a passage; the beginning of an id will do."),
    ],
    file: File = None,
    as_json: Json = False,
) -> None:
    """``dart-llm prompts show``."""
    from dart_llm.data import passages as listing
    from dart_llm.data.topic_prompts import DriftPrompt
    from dart_llm.reporting.console import Ui

    record = listing.find(listing.everything(file), name)
    if as_json:
        typer.echo(json.dumps(record.to_dict()))
    elif isinstance(record, DriftPrompt):
        print_prompt(record, Ui().out)
    else:
        print_passage(record, Ui().out)


# doctor


EXTRAS: dict[str, tuple[str, ...]] = {
    "eval": ("datasets", "lm_eval", "rouge_score"),
    "plots": ("matplotlib", "cmcrameri"),
    "drift": ("sentence_transformers", "sacrebleu", "bert_score", "rouge_score"),
    "native": ("ninja",),
    "trace": ("pandas",),
    "serve": ("fastapi", "prometheus_client", "uvicorn"),
    "cluster": ("ray",),
    "trackio": ("trackio",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "dev": ("pytest", "hypothesis", "mypy", "ruff", "openai", "schemathesis", "httpx"),
}

NO_COMPILER = "none: decoding falls back to executor compact, slower"


def examine(cache_dir: str | None = None) -> dict[str, Any]:
    """Everything that explains why a run works or does not; a token's value is never read out."""
    import torch
    from huggingface_hub import get_token

    from dart_llm.cache import cache_folder
    from dart_llm.experiments.provenance import machine, versions
    from dart_llm.models.float32_products import emulates
    from dart_llm.native.build import state as native_state

    cache = cache_folder(cache_dir)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    return {
        "versions": versions(),
        "machine": machine(),
        "devices": _devices(torch),
        "dtypes": (dtypes := _dtypes(torch)),
        "dtypes_emulated": [name for name in dtypes if emulates(getattr(torch, name))],
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
        "native_kernels": native_state(cache_dir),
        "default_model_weights": _held(native_state(cache_dir), torch.cuda.is_available()),
        "cache": str(cache),
        "free_disk_gib": round(shutil.disk_usage(existing).free / 2**30, 1),
        "hub_token": get_token() is not None,
        "hub_offline": os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"),
        "extras_missing": {extra: lacking for extra in EXTRAS if (lacking := _lacking(extra))},
        "summary": metadata("dart-llm")["Summary"],
    }


def _held(kernels: str, gpu: bool) -> str:
    """How the weights of the default model are held where nothing else is asked for."""
    if gpu:
        return "bfloat16, on the GPU"
    built, _, name = kernels.partition("built: ")
    if not built and name:
        return f"Q4_1 as in the file, read by the kernels {name}"
    later = kernels.startswith("not built yet")
    return "Q4_1 as in the file" if later else "bfloat16: blocks need the native kernels"


def _devices(torch: Any) -> list[str]:
    found = ["cpu"]
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count)]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _dtypes(torch: Any) -> list[str]:
    """Dtypes in which a small matrix product works on the CPU."""
    found = []
    for name in ("float32", "float16", "bfloat16"):
        try:
            a = torch.ones(2, 2, dtype=getattr(torch, name))
            (a @ a).sum().item()
        except RuntimeError:
            continue
        found.append(name)
    return found


def _dtypes_text(dtypes: Sequence[str], emulated: Sequence[str]) -> str:
    """Which are native and which emulated, and what follows from that."""
    text = ", ".join(name for name in dtypes if name not in emulated)
    if not emulated:
        return text
    return f"{text}; emulated: {', '.join(emulated)} (prompts are computed in float32 instead)"


def _lacking(extra: str) -> list[str]:
    return [
        name
        for name in EXTRAS[extra]
        if importlib.util.find_spec(name) is None and not (name == "ninja" and shutil.which(name))
    ]


def print_report(found: dict[str, Any]) -> None:
    """The findings as a table on stdout."""
    machine, compiler = found["machine"], found["compiler"]
    rows = {name: value or "missing" for name, value in found["versions"].items()} | {
        "system": f"{machine['system']}, {machine['processor']}",
        "cores, memory": f"{machine['cores']}, {machine['memory_gib']} GiB",
        "devices": ", ".join(found["devices"]),
        "dtypes on the CPU": _dtypes_text(found["dtypes"], found["dtypes_emulated"]),
        "C++ compiler": Path(compiler).name if compiler else NO_COMPILER,
        "native CPU kernels": found["native_kernels"],
        "default model's weights": found["default_model_weights"],
        "cache": found["cache"],
        "free disk": f"{found['free_disk_gib']} GiB",
        "hub token": "present" if found["hub_token"] else "none (public models only)",
        "hub": "offline (HF_HUB_OFFLINE)" if found["hub_offline"] else "online",
        "OMP_WAIT_POLICY": machine["omp_wait_policy"] or "not set",
    }
    for extra, lacking in found["extras_missing"].items():
        rows[f"extra {extra}"] = f"lacks {', '.join(lacking)}: pip install 'dart-llm[{extra}]'"
    if not found["extras_missing"]:
        rows["extras"] = "all present"
    table = Table(title="dart-llm doctor", title_justify="left", show_header=False)
    for row in rows.items():
        table.add_row(*map(str, row))
    Console(markup=False).print(table)


# prompts and passages as tables, and one in full


ARROW = " -> "


def prompt_table(prompts: Sequence[DriftPrompt]) -> Table:
    """A row per prompt."""
    table = _table("id", "template", "domains", "first topic", "second topic")
    for prompt in prompts:
        topics = [prompt.slots.get(f"topic_{side}", "") for side in ("a", "b")]
        cells = (prompt.id, prompt.template, ARROW.join(prompt.domains), *topics)
        table.add_row(*map(Text, cells))  # Text: an ontology may hold rich's square brackets
    return table


def passage_table(passages: Sequence[Passage]) -> Table:
    """A row per topic of each passage, with its words and the character at which it begins."""
    table = _table("id", "domain", "topic")
    for name in ("words", "from character"):
        table.add_column(name, justify="right")
    for passage in passages:
        for one in passage.segments():
            names = (passage.id if one.start == 0 else "", one.topic.domain, one.topic.name)
            counts = (f"{words(one.text):,}", f"{one.start:,}")
            table.add_row(*map(Text, names), *counts)
    return table


def print_prompt(prompt: DriftPrompt, out: Console) -> None:
    """Where the prompt comes from, and its text."""
    facts = {"id": prompt.id, "template": prompt.template, "domains": ARROW.join(prompt.domains)}
    facts["seed"] = "" if prompt.seed is None else str(prompt.seed)
    facts |= {f"slot {name}": value for name, value in prompt.slots.items()}
    table = Table(show_header=False)
    for name, value in facts.items():
        if value:
            table.add_row(Text(name), Text(value))
    out.print(table)
    _print_text(prompt.text, out)


def print_passage(passage: Passage, out: Console) -> None:
    """The text, with a line before each topic that says what and where it is."""
    _print_text(passage.id, out)
    for number, segment in enumerate(passage.segments(), start=1):
        line = (
            f"--- topic {number} of {len(passage.topics)}: {segment.topic.name} "
            f"({segment.topic.domain}), characters {segment.start:,} to {segment.end:,}, "
            f"{words(segment.text):,} words ---"
        )
        out.print(Text(f"\n{line}\n", style="bold"), soft_wrap=not out.is_terminal)
        _print_text(segment.text, out)


def words(text: str) -> int:
    """Words between spaces."""
    return len(text.split())


def _print_text(text: str, out: Console) -> None:
    # Lines are broken for a reader, and left whole for a program or a file.
    out.print(Text(text), soft_wrap=not out.is_terminal)


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def show_methods(plugin: Plugin = None, as_json: Json = False) -> None:
    """``dart-llm methods``."""
    if plugin is not None:
        plugins.use(plugin)
    from dart_llm.pruning.methods import listing

    if as_json:
        typer.echo(json.dumps(listing()))
        return
    console = Console()
    for kind, entries in listing().items():
        second = "settings" if kind == "methods" else "source"
        table = Table(title=kind.replace("_", " "), title_justify="left")
        for column in ("name", "what it does", second):
            table.add_column(column)
        for entry in entries:
            table.add_row(entry["name"], entry["summary"], entry["source"])
        console.print(table)


def show_installation(
    cache_dir: Annotated[str | None, typer.Option(help="Cache to look at.")] = None,
    as_json: Json = False,
) -> None:
    """``dart-llm doctor``."""
    from dart_llm.reporting.console import Ui

    with Ui.started(as_json):
        found = examine(cache_dir)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        print_report(found)
