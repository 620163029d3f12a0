"""What ``dart-llm tune`` takes, roughly, before it starts; ``--dry-run``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dart_llm.errors import DartError
from dart_llm.experiments.model_facts import configuration
from dart_llm.files import size_text
from dart_llm.models.gguf_file import read_gguf
from dart_llm.models.loading import is_default
from dart_llm.pruning.config import PriorConfig
from dart_llm.reporting.console import Ui
from dart_llm.reporting.words import count, duration, percent
from dart_llm.studies.tune.candidates import (
    QUICK_SEQUENCES,
    Candidate,
    Formats,
    candidates,
    quick_candidates,
)
from dart_llm.studies.tune.quality import first_of
from dart_llm.studies.tune.settings import TuneSettings

DEFAULT_PARAMETERS = 135e6

SCORED, TIMED, WRITTEN, LOADED, LEARNED = 20.0, 200.0, 60.0, 60.0, 500.0
"""Guesses, which no table rests on: seconds of two CPU cores per billion parameters for 256 tokens
of a slice by one candidate, for 1,000 timed tokens, for 1,000 that the model writes, for loading,
for what is learned of a model.
"""

WEIGHT_BYTES = {"dense": 2.0, "own": 2.0, "file": 0.8, "q8_0": 1.1, "q4_0": 0.6, "q4_1": 0.7}
"""Of a format, roughly."""

OTHER_BYTES = 0.7e9
"""PyTorch, caches and logits, roughly."""


def plan(settings: TuneSettings, ui: Ui) -> dict[str, Any]:
    """Says it, and gives it as JSON-able data; ``seconds`` is None where the size is not known."""
    formats = Formats.of(settings)
    found = candidates(settings, formats)
    if settings.quick:
        found = quick_candidates(found, settings, formats)
    billions = parameters(settings)
    seconds = None if billions is None else rough_seconds(settings, len(found), billions)
    ui.say(f"{count(len(found), 'candidate')} on {settings.name}:")
    for one in found:
        ui.say(f"  {one.label}")
    ui.say(
        f"{count(_slices(settings), 'slice')} of the model's own text and of {settings.text}; then "
        f"each candidate that may lose {percent(settings.max_loss)} or less is timed "
        f"{settings.repeats} times"
    )
    ui.say(f"{estimate(settings, found, billions)}; nothing was run")
    return {
        "model": settings.name,
        "candidates": [one.label for one in found],
        "formats": list(dict.fromkeys(one.form for one in found)),
        "slices": 2 * _slices(settings),
        "repeats": settings.repeats,
        "seconds": seconds,
    }


def estimate(settings: TuneSettings, found: Sequence[Candidate], billions: float | None) -> str:
    """How long it takes and how much memory, in words; ``billions`` of parameters."""
    if billions is None:
        return "how long it takes is not known: the size of the model is not"
    told = f"roughly {duration(rough_seconds(settings, len(found), billions))} on two CPU cores"
    size = sum(WEIGHT_BYTES[form] for form in dict.fromkeys(one.form for one in found))
    if learns := any(one.config.prior is not None or one.config.screens for one in found):
        share = QUICK_SEQUENCES / PriorConfig().sequences if settings.quick else 1.0
        took = duration(share * billions * LEARNED)
        told += f", and {took} to learn from the model's own text, once"
    size += 12.0 * learns  # a copy of the model in float32, and what a backward pass holds
    return f"{told}; about {size_text(int(size * billions * 1e9 + OTHER_BYTES))} of memory"


def _slices(settings: TuneSettings) -> int:
    """Slices of each text."""
    return len(first_of(settings.slices)) if settings.quick else settings.slices


def rough_seconds(settings: TuneSettings, number: int, billions: float) -> float:
    """For ``number`` candidates, most of which are timed."""
    slices = 2 * _slices(settings) * (number + 1)
    size = (settings.prompt_tokens + settings.tokens) / 256
    timed = number * settings.repeats * settings.turn_tokens / 1000
    written = (settings.prompt_tokens + settings.tokens) / 1000
    return billions * (slices * size * SCORED + timed * TIMED + written * WRITTEN + LOADED)


def parameters(settings: TuneSettings) -> float | None:
    """Billions, as a file or a configuration says; nothing is fetched but a configuration."""
    if is_default(settings.model):
        return DEFAULT_PARAMETERS / 1e9
    path = Path(settings.model).expanduser()
    try:
        if path.is_file():
            return read_gguf(path).float32_bytes / 4 / 1e9
        shape = configuration(settings).get_text_config(decoder=True)
        width, layers = shape.hidden_size, shape.num_hidden_layers
        inner = getattr(shape, "intermediate_size", None) or 4 * width
        block = 4 * width**2 + 3 * width * inner
        return float(layers * block + width * shape.vocab_size) / 1e9
    except (DartError, AttributeError, OSError):
        return None
