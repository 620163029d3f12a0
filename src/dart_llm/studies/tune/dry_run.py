"""``dart-llm tune --dry-run``: what would be measured, and roughly how long."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dart_llm.errors import DartError
from dart_llm.experiments.model_facts import configuration
from dart_llm.models.gguf_file import read_gguf
from dart_llm.models.loading import is_default
from dart_llm.reporting.console import Ui
from dart_llm.reporting.words import count, duration
from dart_llm.studies.tune.candidates import Candidate, Formats, candidates
from dart_llm.studies.tune.settings import TuneSettings

DEFAULT_PARAMETERS = 135e6

SCORED, TIMED, WRITTEN, LOADED, LEARNT = 20.0, 200.0, 20.0, 60.0, 300.0
"""Guesses, which no table rests on: seconds of two CPU cores per billion parameters for 256 tokens
of a slice by one candidate, for 1,000 timed tokens, for 1,000 that the model writes, for loading,
for what is learnt of a model.
"""


def plan(settings: TuneSettings, ui: Ui) -> dict[str, Any]:
    """Says it, and gives it as JSON-able data; ``seconds`` is None where the size is not known."""
    formats = Formats.of(settings)
    found = candidates(settings, formats)
    billions = parameters(settings)
    seconds = None if billions is None else rough_seconds(settings, len(found), billions)
    ui.say(f"{count(len(found), 'candidate')} on {settings.name}:")
    for one in found:
        ui.say(f"  {one.label}")
    ui.say(
        f"{count(settings.slices, 'slice')} of the model's own text and of {settings.text}; then "
        f"{count(settings.repeats, 'repetition')} of what does not lose clearly more than "
        f"{settings.max_loss:.1%}"
    )
    told = "not known" if seconds is None else duration(seconds)
    told += _learning(found, billions)
    ui.say(f"roughly, on two CPU cores: {told}; nothing was run")
    return {
        "model": settings.name,
        "candidates": [one.label for one in found],
        "formats": [one.name for one in formats.every],
        "slices": 2 * settings.slices,
        "repeats": settings.repeats,
        "seconds": seconds,
    }


def _learning(found: Sequence[Candidate], billions: float | None) -> str:
    """What comes on top where a candidate needs what is learnt of a model."""
    learns = any(one.config.prior is not None or one.config.screens for one in found)
    if billions is None or not learns:
        return ""
    return f", and {duration(billions * LEARNT)} to learn the model once, if that was not done yet"


def rough_seconds(settings: TuneSettings, number: int, billions: float) -> float:
    """For ``number`` candidates, most of which are timed."""
    slices = 2 * settings.slices * (number + 1)
    size = (settings.prompt_tokens + settings.tokens) / 256
    timed = number * settings.repeats * settings.timed_tokens / 1000
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
