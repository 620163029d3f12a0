"""The models of ``dart-llm bench speed``: a checkpoint, or its shape alone with random weights.

One model for every format in which the weights are held.

With arch.py a place that knows transformers: it makes models, and looks into their caches.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dart_llm.errors import ConfigError, LoadError
from dart_llm.experiments.held import Held, named
from dart_llm.experiments.model_facts import configuration
from dart_llm.experiments.study import load_model
from dart_llm.experiments.timed_cases import Format
from dart_llm.hub import plain
from dart_llm.models.block_types import ROUNDED
from dart_llm.models.checkpoint import Checkpoint, remember
from dart_llm.models.devices import parse_device
from dart_llm.models.loading import parse_dtype
from dart_llm.models.packed_loading import random_packed
from dart_llm.reporting.console import Ui
from dart_llm.studies.speed.settings import SpeedSettings

PLAIN = Format("dense", "dense")
"""What plain transformers runs on."""


def prepare_all(settings: SpeedSettings, ui: Ui) -> list[Held]:
    """A model for every format, in the order that was asked for.

    Where none is dense a dense one follows, for plain transformers.  Raises ``LoadError`` for what
    cannot be had, and ``ConfigError`` for files that hold another model.
    """
    every = [_held(settings, form, ui) for form in settings.format_list()]
    kinds = [one.kind for one in every if one.form.file]
    every = [
        replace(one, form=replace(one.form, name=f"file {one.kind}"))
        if one.form.file and kinds.count(one.kind) == 1
        else one
        for one in every
    ]
    found = list({one.form.name: one for one in every}.values())
    if all(one.blocks for one in found):
        found.append(replace(_held(settings, PLAIN, ui), asked=False))
    sizes = [one.model.config.get_text_config().vocab_size for one in found]
    if len(set(sizes)) > 1:
        names = ", ".join(
            f"{one.form.name} ({size:,})" for one, size in zip(found, sizes, strict=True)
        )
        raise ConfigError(f"these differ in their vocabularies: {names}; give files of one model")
    return found


def _held(settings: SpeedSettings, form: Format, ui: Ui) -> Held:
    changes: dict[str, Any] = {"weights": form.weights}
    if form.file is not None:
        changes["model"] = str(form.file)
    return named(Held(form, *prepare_model(settings.model_copy(update=changes), ui)))


def plain_of(models: Sequence[Held]) -> Held:
    """The model that plain transformers runs on: the first that is dense."""
    return next((one for one in models if not one.blocks), models[-1])


def prepare_model(settings: SpeedSettings, ui: Ui) -> tuple[Any, Any]:
    """Model and tokenizer, None for random weights; raises ``LoadError`` for what cannot be had."""
    if not settings.is_random:
        model, tokenizer, _ = load_model(settings, ui)
        return model, tokenizer
    with ui.status(f"making random weights of the shape of {settings.name}"):
        return _random(settings, ui), None


def _random(settings: SpeedSettings, ui: Ui) -> Any:
    from transformers import AutoModelForCausalLM

    shape = settings.shape
    config = _shape_file(Path(shape)) if shape else configuration(settings, ui.say)
    dtype = parse_dtype(settings.dtype)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.bfloat16
    device, attention = parse_device(settings.device).first, settings.attn_implementation
    chosen = {"attn_implementation": attention} if attention else {}
    torch.manual_seed(settings.seed)
    try:
        make: Any = AutoModelForCausalLM.from_config
        if settings.weights in ROUNDED:
            if device != "cpu":
                raise ConfigError("weights in blocks lie on a CPU alone: give --device cpu")
            make = functools.partial(random_packed, kind=settings.weights)
        with torch.device(device):  # billions of weights are drawn there at once
            model = make(config, dtype=dtype, **chosen)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise LoadError(f"no model can be made of {settings.name}: {plain(error)}") from None
    model = model.eval().to(device)
    about = f"{settings.name} (random weights)"
    remember(model, Checkpoint(about, "random weights", settings.name, None, "none"))
    return model


def _shape_file(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoadError(f"{path} holds no model's configuration: {plain(error)}") from None
