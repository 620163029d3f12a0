"""What ``dart-llm tune`` measures: methods x sparsities x weight formats x heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dart_llm.errors import ConfigError
from dart_llm.experiments.model_facts import held_weights
from dart_llm.experiments.timed_cases import Format
from dart_llm.experiments.variants import DENSE, Variant
from dart_llm.models.block_types import ROUNDED
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting.words import percent
from dart_llm.studies.tune.settings import BY_TOKEN, OTHERWISE, TuneSettings

SCREENED = "screened"

QUICK_SEQUENCES = 8
"""Sequences of self-generated text that ``--quick`` learns from."""

REFERENCE = Format(DENSE, DENSE)
"""What losses are counted from where every format rounds: the weights in the model's dtype."""


@dataclass(frozen=True)
class Candidate:
    """One setting.  ``form``: name of the format in which the weights are held."""

    label: str
    config: PruneConfig
    form: str

    @property
    def dense(self) -> bool:
        """Whether nothing is left out: neither neurons nor words of the head."""
        return self.config.target == 0 and not self.config.screens


@dataclass(frozen=True)
class Formats:
    """The formats to try, the model's own first; and those that methods are tried on."""

    every: tuple[Format, ...]
    pruned: tuple[Format, ...]

    @classmethod
    def of(cls, settings: TuneSettings) -> Formats:
        """Those that were asked for, methods on each; else what suits the model and this machine.

        A GGUF file, in whatever dtype: as it is, where methods are tried too, and in 4 bits.  A
        checkpoint: dense, and in 8 bits, where methods are tried too, and in 4.  Where no kernels
        can read blocks: dense alone.  Raises ``ConfigError`` or ``LoadError``.
        """
        asked = settings.format_list()
        if asked:
            return cls(asked, asked)
        own = held_weights(settings.model_copy(update={"dtype": None}))
        if own == "file":
            file = Format("file", "file")
            return cls((file, Format("q4_0", "q4_0")), (file,))
        blocks = tuple(Format(word, word) for word in ("q8_0", "q4_0") if _can(settings, word))
        return cls((REFERENCE, *blocks), blocks[:1] or (REFERENCE,))

    @property
    def reference(self) -> Format:
        """The format whose dense model losses are counted from: the first that rounds nothing.

        The blocks of a file are exact in forwards of many tokens, which dequantise them.
        """
        return next((one for one in self.every if one.weights not in ROUNDED), REFERENCE)


def _can(settings: TuneSettings, weights: str) -> bool:
    """Whether this machine can hold the model so."""
    try:
        held_weights(settings.model_copy(update={"weights": weights}))
    except ConfigError:
        return False
    return True


def candidates(settings: TuneSettings, formats: Formats) -> tuple[Candidate, ...]:
    """Dense on every format first, the model's own before the others; then what leaves out.

    Raises ``ConfigError`` for a method that cannot be run at a sparsity.
    """
    dense = PruneConfig.build(DENSE, seed=settings.seed)
    heads, several = settings.head_list(), len(formats.pruned) > 1 or len(formats.every) > 1
    found = [
        Candidate(_label(DENSE, "full", form, several), dense, form.name) for form in formats.every
    ]
    for form in formats.pruned:
        for name, config in ((DENSE, dense), *_methods(settings)):
            for head in heads or _usual_heads(name, config):
                if name == DENSE and head == "full":
                    continue
                one = config.replace({"head": head})
                found.append(Candidate(_label(name, head, form, several), one, form.name))
    return tuple(found)


def quick_candidates(
    every: Sequence[Candidate], settings: TuneSettings, formats: Formats
) -> tuple[Candidate, ...]:
    """Those of ``every`` that ``--quick`` measures: a first answer, in minutes.

    Dense as the model is loaded and in the first format that methods are tried on; in that format
    dense with a screened head, and the first method (each one, where some were named) at the
    lowest of its sparsities.  What learns does so from a quarter of the usual text.
    """
    own, tried = formats.every[0], formats.pruned[0]
    named = settings.methods is not None or settings.variants is not None
    first = [
        f"{variant.label} {percent(min(_sparsities(settings, variant)), 0)}"
        for variant in settings.variant_list()[: None if named else 1]
    ]
    several = len(formats.pruned) > 1 or len(formats.every) > 1
    labels = {_label(DENSE, "full", own, several), _label(DENSE, "full", tried, several)}
    labels |= {_label(DENSE, SCREENED, tried, several)}
    labels |= {_label(name, "full", tried, several) for name in first}
    return tuple(_learning_less(one) for one in every if one.label in labels)


def _learning_less(one: Candidate) -> Candidate:
    if one.config.prior is None and not one.config.screens:
        return one
    prior = {"sequences": QUICK_SEQUENCES} | ({} if one.config.prior else {"tokens": 0})
    return replace(one, config=one.config.replace({"prior": prior}))


def _sparsities(settings: TuneSettings, variant: Variant) -> Sequence[float]:
    usual = OTHERWISE if variant.config.token is None else BY_TOKEN
    return settings.sparsity_list() or usual


def _methods(settings: TuneSettings) -> Iterator[tuple[str, PruneConfig]]:
    for variant in settings.variant_list():
        for sparsity in _sparsities(settings, variant):
            yield f"{variant.label} {percent(sparsity, 0)}", variant.at(sparsity)


def _usual_heads(name: str, config: PruneConfig) -> Sequence[str]:
    return ("full", SCREENED) if name == DENSE or config.token is not None else ("full",)


def _label(name: str, head: str, form: Format, several: bool) -> str:
    parts = [
        name,
        *(["screened head"] if head == SCREENED else []),
        *([f"weights {form.name}"] if several else []),
    ]
    return ", ".join(parts)
