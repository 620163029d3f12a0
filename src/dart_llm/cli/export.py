"""``dart-llm export``: prune a model by one fixed mask, and write a GGUF file for llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import typer
from pydantic import model_validator

from dart_llm.cli.options import Config, Json
from dart_llm.data import documents
from dart_llm.data.texts import resolve_prompt
from dart_llm.errors import ConfigError
from dart_llm.files import finite, size_text
from dart_llm.settings import BaseSettings, load_arguments, merge, setting, words

if TYPE_CHECKING:
    from dart_llm.session.export import GgufExport

PANEL = "Export"


class ExportSettings(BaseSettings):
    """Settings of ``dart-llm export``: the model, which neurons it keeps, and the file to write."""

    UNUSED: ClassVar = (
        *("save_layer_topk", "masking_step", "release_step", "min_evidence", "ema_decay"),
        *("knowledge_drift", "drift", "head", "executor"),
        *("experiment_name", "results_dir", "style", "device_map", "dtype"),
        "attn_implementation",
    )

    method: str = setting("Pruning", "Prune by this method; see dart-llm methods.", "griffin")
    gguf: str = setting(PANEL, "Write this GGUF file.", "")
    prompt: str | None = setting(
        PANEL, "Keep the neurons that this prompt needs: a text, or a bundled prompt's name."
    )
    text: str | None = setting(
        PANEL, "Keep the neurons that these texts need: embedded, or files, comma-separated."
    )
    calibration: str | None = setting(PANEL, "Calibrate on this text (default: c4 from the hub).")

    @model_validator(mode="after")
    def _check_export(self) -> ExportSettings:
        if not self.gguf:
            raise ConfigError("no file to write: give --gguf FILE.gguf")
        if Path(self.gguf).suffix != ".gguf":
            raise ConfigError(f'--gguf {self.gguf} must end in ".gguf", as llama.cpp expects')
        if self.masks and (self.prompt or self.text):
            raise ConfigError("--masks already fixes the neurons: drop --prompt and --text")
        return self

    def texts(self) -> list[str]:
        """The texts from which the mask is selected: those of ``--text``, then the prompt."""
        sources = map(documents.resolve, words(self.text))
        texts = [text for source in sources for text in documents.load(source)]
        if self.prompt is not None:
            texts.append(resolve_prompt(self.prompt))
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
    """Load the model, select the neurons to keep, and write the file; return facts about it."""
    from dart_llm.experiments.artifacts import check_masks, read_masks
    from dart_llm.models.describe import widths
    from dart_llm.models.loading import load, resolve
    from dart_llm.session.gguf_export import export_gguf

    texts = settings.texts()
    masks = read_masks(settings.masks) if settings.masks else None
    options: dict[str, Any] = {"revision": settings.revision, "cache_dir": settings.cache_dir}
    source = resolve(settings.model, **options, packed=True, say=ui.say).blocks
    if source is None:
        remedy = "convert it with llama.cpp's convert_hf_to_gguf.py"
        raise ConfigError(f"{settings.model} is not a GGUF file: {remedy}")
    with ui.status(f"loading {settings.model}") as news:
        model, tokenizer = load(**load_arguments(settings), progress=news)
    if settings.masks:
        check_masks(settings.masks, widths(model))
    with ui.status(f"selecting neurons and writing {settings.gguf}"):
        arguments = (model, tokenizer, settings.gguf, texts, settings.prune_config())
        others: dict[str, Any] = {"source": source, "cache_dir": settings.cache_dir, "say": ui.say}
        return export_gguf(*arguments, masks=masks, calibration=settings.calibration, **others)


def _summary(written: GgufExport) -> str:
    """A text with the file's path, size and neurons per layer, and how much was requantised."""
    kinds = ", ".join(
        old if old == new else f"{new} (before: {old})" for old, new in written.kinds.items()
    )
    return (
        f"{written.path}: {size_text(written.bytes)} (before: {size_text(written.bytes_before)}), "
        f"{min(written.written)} to {max(written.written)} neurons per layer (before: "
        f"{max(written.neurons)}), achieved sparsity {written.achieved_sparsity:.1%}, down "
        f"projections {kinds}, {written.rounded:.0%} of their columns requantised"
    )
