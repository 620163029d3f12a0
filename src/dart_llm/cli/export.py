"""``dart-llm export``: one mask of a text as a file for llama.cpp, and what was written of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import typer
from pydantic import model_validator

from dart_llm.cli.options import Config, Json
from dart_llm.data import documents
from dart_llm.data.prompts import given_prompt, read_prompt_file
from dart_llm.errors import ConfigError
from dart_llm.files import finite, size_text
from dart_llm.reporting.table import Column, Table
from dart_llm.settings import BaseSettings, load_arguments, merge, setting, words

if TYPE_CHECKING:
    from dart_llm.session.gguf_export import GgufExport

PANEL = "Export"


class ExportSettings(BaseSettings):
    """``dart-llm export``: the model, the neurons that it keeps, and the file."""

    UNUSED: ClassVar = (
        *("save_layer_topk", "masking_step", "release_step", "min_evidence", "ema_decay"),
        *("knowledge_drift", "drift", "head", "executor"),
        *("experiment_name", "results_dir", "style", "device_map", "dtype"),
        "attn_implementation",
    )

    method: str = setting("Pruning", "Preset; dart-llm methods lists them.", "griffin")
    gguf: str = setting(PANEL, "The GGUF file to write.", "")
    prompt: str | None = setting(PANEL, "A prompt to keep neurons for, or a shipped prompt's name.")
    prompt_file: str | None = setting(PANEL, "Read that prompt from this file; - is stdin.")
    text: str | None = setting(
        PANEL, "Texts to keep neurons for, comma-separated: embedded, or files (a JSONL's rows)."
    )
    calibration: str | None = setting(
        PANEL, "Text for methods that calibrate (default: c4 of the hub)."
    )

    @model_validator(mode="after")
    def _check_export(self) -> ExportSettings:
        if not self.gguf:
            raise ConfigError("nothing is named to be written: give --gguf FILE.gguf")
        if Path(self.gguf).suffix != ".gguf":
            raise ConfigError(f'--gguf {self.gguf} must end in ".gguf", as llama.cpp expects')
        if self.masks and (self.prompt or self.prompt_file or self.text):
            raise ConfigError("--masks names the neurons themselves: drop the prompt and the texts")
        return self

    def texts(self) -> list[str]:
        """What the mask is chosen for, in order."""
        found = [text for name in words(self.text) for text in documents.whole_texts(name)]
        if self.prompt is not None:
            found.append(given_prompt(self.prompt))
        if self.prompt_file is not None:
            found.append(read_prompt_file(self.prompt_file))
        return found


def export(flags: dict[str, Any], config: Config = None, as_json: Json = False) -> None:
    """``dart-llm export``."""
    settings = merge(ExportSettings, flags, config)
    from dart_llm.reporting.console import Ui

    with Ui.started(as_json) as ui:
        for note in settings.notes:
            ui.say(note)
        found = _written(settings, ui)
    if as_json:
        typer.echo(json.dumps(finite(found.to_dict())))
        return
    ui.result(table(found).rich())
    for line in sentences(found):
        ui.result(line)


def _written(settings: ExportSettings, ui: Any) -> GgufExport:
    """Load, choose and write."""
    from dart_llm.experiments.artifacts import check_masks, read_masks
    from dart_llm.models.describe import widths
    from dart_llm.models.loading import load, resolve
    from dart_llm.session.gguf_export import export_gguf

    texts = settings.texts()
    masks = read_masks(settings.masks) if settings.masks else None
    source = resolve(
        settings.model,
        revision=settings.revision,
        cache_dir=settings.cache_dir,
        packed=True,
        say=ui.say,
    ).blocks
    if source is None:
        raise ConfigError(
            f"{settings.model} is no GGUF file, and only such a file is narrowed: make one of it "
            "with llama.cpp's convert_hf_to_gguf.py and give that as --model"
        )
    with ui.status(f"loading {settings.model}") as news:
        model, tokenizer = load(**load_arguments(settings), progress=news)
    if settings.masks:
        check_masks(settings.masks, widths(model))
    with ui.status(f"choosing neurons and writing {settings.gguf}"):
        return export_gguf(
            model,
            tokenizer,
            settings.gguf,
            texts,
            settings.prune_config(),
            masks=masks,
            source=source,
            calibration=settings.calibration,
            cache_dir=settings.cache_dir,
            say=ui.say,
        )


def table(found: GgufExport) -> Table:
    """A row for all neighbouring layers that are alike."""
    rows: list[dict[str, Any]] = []
    for layer, counts in enumerate(zip(found.neurons, found.asked, found.written, strict=True)):
        if rows and rows[-1]["counts"] == counts:
            rows[-1]["last"] = layer
        else:
            rows.append({"first": layer, "last": layer, "counts": counts})
    columns = (
        Column("layers", _span),
        Column("neurons", lambda row: row["counts"][0], ","),
        Column("to keep", lambda row: row["counts"][1], ","),
        Column("written", lambda row: row["counts"][2], ","),
        Column("removed", lambda row: 1 - row["counts"][2] / row["counts"][0], ".1%"),
    )
    return Table("", f"{found.method} in {found.path.name}", columns, rows)


def _span(row: Any) -> str:
    first, last = row["first"], row["last"]
    return str(first) if first == last else f"{first}-{last}"


def sentences(found: GgufExport) -> list[str]:
    """What was written, and what was not kept as it was."""
    after, before = size_text(found.bytes), size_text(found.bytes_before)
    kinds = ", ".join(
        old if old == new else f"{new} (before: {old})" for old, new in found.kinds.items()
    )
    told = [
        f"{found.path}: {after} (before: {before}), achieved sparsity "
        f"{found.achieved_sparsity:.1%}, architecture {found.architecture}",
        f"down projections are {kinds}: {found.rounded:.0%} of their columns lie in another block "
        "and were rounded for it; gate, up and all else are as stored",
    ]
    if found.block > 1:
        told.append(f"widths are whole blocks of {found.block} neurons")
    if found.compensated:
        told.append("biases of the down projections carry the mean of what was removed")
    return told
