"""``dart-llm export``: one mask of a text as a file for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import typer
from pydantic import model_validator

from dart_llm.cli.options import Config, Json
from dart_llm.data import documents
from dart_llm.data.texts import read_prompt_file, resolve_prompt
from dart_llm.errors import ConfigError
from dart_llm.files import finite, size_text
from dart_llm.settings import BaseSettings, load_arguments, merge, setting, words

if TYPE_CHECKING:
    from dart_llm.session.export import GgufExport

PANEL = "Export"


class ExportSettings(BaseSettings):
    """``dart-llm export``: the model, the neurons that it keeps, and the file."""

    UNUSED: ClassVar = (
        *("save_layer_topk", "masking_step", "release_step", "min_evidence"),
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
        """The texts that the mask is selected for, in order."""
        texts = [text for name in words(self.text) for text in documents.whole_texts(name)]
        if self.prompt is not None:
            texts.append(resolve_prompt(self.prompt))
        if self.prompt_file is not None:
            texts.append(read_prompt_file(self.prompt_file))
        return texts


def export(flags: dict[str, Any], config: Config = None, as_json: Json = False) -> None:
    """``dart-llm export``."""
    settings = merge(ExportSettings, flags, config)
    from dart_llm.reporting.console import Ui

    with Ui.started(as_json) as ui:
        for note in settings.notes:
            ui.say(note)
        written = _write(settings, ui)
    if as_json:
        typer.echo(json.dumps(finite(written.to_dict())))
        return
    ui.result(_summary(written))


def _write(settings: ExportSettings, ui: Any) -> GgufExport:
    """Load the model, select the neurons and write the file."""
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
            f"{settings.model} is not a GGUF file: convert it with llama.cpp's "
            "convert_hf_to_gguf.py and give the result as --model"
        )
    with ui.status(f"loading {settings.model}") as news:
        model, tokenizer = load(**load_arguments(settings), progress=news)
    if settings.masks:
        check_masks(settings.masks, widths(model))
    with ui.status(f"selecting neurons and writing {settings.gguf}"):
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


def _summary(written: GgufExport) -> str:
    """The file, how narrow it is, and what had to be rounded for it."""
    widths = sorted(set(written.written))
    kept = f"{widths[0]} to {widths[-1]}" if len(widths) > 1 else str(widths[0])
    kinds = ", ".join(
        old if old == new else f"{new} (before: {old})" for old, new in written.kinds.items()
    )
    block = f", widths in blocks of {written.block}" if written.block > 1 else ""
    biases = ", means of what was removed in the biases" if written.compensated else ""
    return (
        f"{written.path}: {size_text(written.bytes)} (before: {size_text(written.bytes_before)}), "
        f"{kept} neurons per layer (before: {max(written.neurons)}), "
        f"achieved sparsity {written.achieved_sparsity:.1%}, architecture {written.architecture}, "
        f"down projections {kinds}, {written.rounded:.0%} of their columns rounded again"
        f"{block}{biases}"
    )
