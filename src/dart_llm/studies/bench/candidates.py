"""Candidates: rows of a grid of methods, sparsities, weight formats, executors and heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError, DartError
from dart_llm.experiments.cell import configuration, requested_format
from dart_llm.experiments.llama_bench import LLAMA_CPP
from dart_llm.experiments.variants import DENSE
from dart_llm.files import size_text
from dart_llm.models.gguf_file import ROUNDED, read_gguf
from dart_llm.models.loading import is_default
from dart_llm.pruning.config import PruneConfig, SelfStatsConfig
from dart_llm.reporting.console import Ui
from dart_llm.reporting.words import count, duration, percent
from dart_llm.studies.bench.settings import SpeedSettings, TuneSettings

SCREENED = "screened"

LOADED = "own"
"""The weight format of a model that is loaded already."""

BY_TOKEN, BY_MASK = (0.3, 0.5, 0.7), (0.2, 0.3)
"""Sparsities that ``tune`` tries by default: of per-token selection, of one mask per sequence."""

QUICK_SEQUENCES = 8
"""Self-generated sequences that ``--quick`` learns from."""


@dataclass(frozen=True)
class Candidate:
    """One row: a model whose weights are in a format, under a configuration.

    ``config`` None: the untouched model.  ``weights``: name of the format.  ``method``: label of
    the method that prunes; None: dense.  ``file``: a GGUF file that llama.cpp reads, and then no
    configuration applies.
    """

    label: str
    config: PruneConfig | None = None
    weights: str = ""
    method: str | None = None
    file: Path | None = None

    @property
    def executor(self) -> str | None:
        """What decodes; None: transformers."""
        if self.file is not None:
            return LLAMA_CPP
        return None if self.config is None else self.config.executor

    @property
    def dense(self) -> bool:
        """Whether nothing is left out: neither neurons nor rows of the head."""
        return self.config is None or (self.config.target == 0 and not self.config.screens)


def make_candidate(
    config: PruneConfig, weights: str, suffix: str = "", method: str | None = None
) -> Candidate:
    """A candidate named by what it does; ``suffix`` names the weights where there are several."""
    parts = [f"{method} {percent(config.target)}" if method else DENSE]
    parts += [config.executor] if config.executor != "auto" else []
    parts += ["screened head"] if config.head.kind == SCREENED else []
    return Candidate(", ".join(parts) + suffix, config, weights, method)


def native_dense(weights: str, suffix: str, device: str) -> Iterator[Candidate]:
    """Candidates of ``bench speed`` for dense (native), the faster first."""
    griffin = PruneConfig.build("griffin", sparsity=0.0)
    for executor in ("cuda",) if device == "cuda" else ("native",):
        yield make_candidate(griffin.replace({"executor": executor}), weights, suffix)


def speed_grid(settings: SpeedSettings, weights: str, suffix: str) -> list[Candidate]:
    """Every method at every sparsity under every executor."""
    return [
        make_candidate(config, weights, suffix, label) for label, config in settings.method_list()
    ]


@dataclass(frozen=True)
class Formats:
    """The weight formats that ``tune`` tries, the model's own first; and those that methods are
    tried on."""

    every: tuple[str, ...]
    pruned: tuple[str, ...]

    @classmethod
    def from_settings(cls, settings: TuneSettings) -> Formats:
        """The requested formats, methods on each; else what suits the model and this machine.

        A GGUF file, in whatever dtype: as it is, where methods are tried too, and in 4 bits.  A
        checkpoint: dense, and in 8 bits, where methods are tried too, and in 4.  Where no kernels
        can read blocks: dense alone.  Raises ``ConfigError`` or ``LoadError``.
        """
        if requested := settings.format_list():
            return cls(requested, requested)
        if requested_format(settings.model_copy(update={"dtype": None})) == "file":
            return cls(("file", "q4_0"), ("file",))
        blocks = tuple(name for name in ("q8_0", "q4_0") if _is_possible(settings, name))
        return cls((DENSE, *blocks), blocks[:1] or (DENSE,))

    @property
    def reference(self) -> str:
        """The format whose dense model losses are counted from: the first that rounds nothing.

        The blocks of a file are exact in forwards of many tokens, which dequantise them.
        """
        return next((name for name in self.every if name not in ROUNDED), DENSE)


def _is_possible(settings: TuneSettings, weights: str) -> bool:
    """Whether this machine can load the model in a format."""
    try:
        requested_format(settings.model_copy(update={"weights": weights}))
    except ConfigError:
        return False
    return True


def tune_grid(settings: TuneSettings, formats: Formats) -> tuple[Candidate, ...]:
    """Dense in every format first, the model's own before the others; then what leaves out.

    Raises ``ConfigError`` for a method that cannot be run at a sparsity.
    """
    several = len({*formats.every, *formats.pruned}) > 1
    suffix = {name: f", weights {name}" if several else "" for name in formats.every}
    dense = PruneConfig.build(DENSE, seed=settings.seed)
    grid = [make_candidate(dense, weights, suffix[weights]) for weights in formats.every]
    methods: list[tuple[str | None, PruneConfig]] = [(None, dense)]
    for variant in settings.variant_list():
        usual = BY_MASK if variant.config.token is None else BY_TOKEN
        for sparsity in settings.sparsity_list() or usual:
            methods.append((variant.label, variant.at(sparsity)))
    for weights in formats.pruned:
        for method, config in methods:
            screens = method is None or config.token is not None
            for head in settings.head_list() or ("full", *([SCREENED] if screens else [])):
                if method or head == SCREENED:
                    headed = config.replace({"head": head})
                    grid.append(make_candidate(headed, weights, suffix[weights], method))
    return tuple(grid)


def quick_grid(
    grid: Sequence[Candidate], settings: TuneSettings, formats: Formats
) -> tuple[Candidate, ...]:
    """Those of ``grid`` that ``--quick`` measures: a first answer, in minutes.

    Dense as the model is loaded and in the first format that methods are tried on; in that format
    dense with a screened head, and the first method (each one, where some were named) at the
    lowest of its sparsities.  What learns does so from a quarter of the usual text.
    """
    named = settings.methods is not None or settings.variants is not None
    methods = [variant.label for variant in settings.variant_list()][: None if named else 1]
    lowest = {
        method: min(one.config.target for one in grid if one.config and one.method == method)
        for method in methods
    }

    def is_quick(one: Candidate) -> bool:
        if one.weights != formats.pruned[0] or one.config is None:
            return one.dense and one.weights == formats.every[0]
        if one.method is None:
            return True
        return one.config.head.kind == "full" and lowest.get(one.method) == one.config.target

    return tuple(_learning_less(one) for one in grid if is_quick(one))


def _learning_less(candidate: Candidate) -> Candidate:
    config = candidate.config
    if config is None or (config.self_stats is None and not config.screens):
        return candidate
    prior = {"sequences": QUICK_SEQUENCES} | ({} if config.self_stats else {"tokens": 0})
    return replace(candidate, config=config.replace({"self_stats": prior}))


# What ``tune`` takes, before it starts


DEFAULT_BILLIONS = 0.135

SCORE_S, TIME_S, LOAD_S, LEARN_S = 0.08, 0.2, 60.0, 500.0
"""Rough seconds of two CPU cores per billion parameters: to score a token by one candidate, to time
one, to load a model, to learn its statistics."""

WEIGHT_BYTES = {"q8_0": 1.1, "file": 0.8, "q4_0": 0.6, "q4_1": 0.7}
"""Rough bytes per weight; of other formats 2."""

OTHER_BYTES = 0.7e9
"""PyTorch, caches and logits, roughly."""


def plan(settings: TuneSettings, ui: Ui) -> dict[str, Any]:
    """What would be measured, and how long: shown, and as JSON-able data.

    ``seconds`` is None where the size of the model is not known.
    """
    formats = Formats.from_settings(settings)
    grid = tune_grid(settings, formats)
    grid = quick_grid(grid, settings, formats) if settings.quick else grid
    billions = model_billions(settings)
    labels = [candidate.label for candidate in grid]
    ui.say(f"{count(len(grid), 'candidate')} on {settings.name}:")
    for label in labels:
        ui.say(f"  {label}")
    ui.say(f"{estimate(settings, grid, billions)}; nothing was run")
    return {
        "model": settings.name,
        "candidates": labels,
        "formats": list(dict.fromkeys(candidate.weights for candidate in grid)),
        "slices": 2 * settings.scored_slices,
        "repeats": settings.repeats,
        "seconds": None if billions is None else rough_seconds(settings, len(grid), billions),
    }


def estimate(settings: TuneSettings, grid: Sequence[Candidate], billions: float | None) -> str:
    """How long it takes and how much memory, in words; ``billions`` of parameters."""
    if billions is None:
        return "the size of the model is not known, nor how long it takes"
    text = f"roughly {duration(rough_seconds(settings, len(grid), billions))} on two CPU cores"
    width = sum(WEIGHT_BYTES.get(name, 2.0) for name in {one.weights for one in grid})
    if any(one.config and (one.config.self_stats or one.config.screens) for one in grid):
        share = QUICK_SEQUENCES / SelfStatsConfig().sequences if settings.quick else 1.0
        text += f", and {duration(share * billions * LEARN_S)} to learn from self-generated text"
        width += 12.0  # a copy of the model in float32, and what a backward pass stores
    return f"{text}; about {size_text(int(width * billions * 1e9 + OTHER_BYTES))} of memory"


def rough_seconds(settings: TuneSettings, candidates: int, billions: float) -> float:
    """For so many candidates, most of which are timed."""
    tokens = settings.prompt_tokens + settings.tokens
    scored = 2 * settings.scored_slices * (candidates + 1) * tokens * SCORE_S
    timed = candidates * settings.repeats * settings.repetition_tokens * TIME_S
    return billions * (scored + timed + LOAD_S)


def model_billions(settings: TuneSettings) -> float | None:
    """Parameters, by a file or a configuration; only a configuration is downloaded."""
    if is_default(settings.model):
        return DEFAULT_BILLIONS
    path = Path(settings.model).expanduser()
    try:
        if path.is_file():
            return read_gguf(path).float32_bytes / 4 / 1e9
        shape = configuration(settings).get_text_config(decoder=True)
        width, inner = shape.hidden_size, getattr(shape, "intermediate_size", None)
        layer = 4 * width**2 + 3 * width * (inner or 4 * width)
        return float(shape.num_hidden_layers * layer + width * shape.vocab_size) / 1e9
    except (DartError, AttributeError, OSError):
        return None
