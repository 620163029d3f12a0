"""What ``dart-llm tune`` measures: methods x sparsities x weight formats x heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dart_llm.errors import ConfigError
from dart_llm.experiments.model_facts import held_weights
from dart_llm.experiments.timed_cases import Format
from dart_llm.experiments.variants import DENSE
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting.words import percent
from dart_llm.studies.tune.settings import BY_TOKEN, OTHERWISE, TuneSettings

SCREENED = "screened"

REFERENCE = Format(DENSE, DENSE)
"""What losses are counted from: the weights as they are, in the model's own dtype."""


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

        A GGUF file, in whatever dtype: as it is, where methods are tried too, in 4 bits, and dense.
        A checkpoint: dense, and in 8 bits, where methods are tried too, and in 4.  Where no kernels
        can read blocks: dense alone.  Raises ``ConfigError`` or ``LoadError``.
        """
        asked = settings.format_list()
        if asked:
            return cls(asked, asked)
        own = held_weights(settings.model_copy(update={"dtype": None}))
        if own == "file":
            return cls(
                (Format("file", "file"), Format("q4_0", "q4_0"), REFERENCE),
                (Format("file", "file"),),
            )
        blocks = tuple(Format(word, word) for word in ("q8_0", "q4_0") if _can(settings, word))
        return cls((REFERENCE, *blocks), blocks[:1] or (REFERENCE,))


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


def _methods(settings: TuneSettings) -> Iterator[tuple[str, PruneConfig]]:
    for variant in settings.variant_list():
        usual = OTHERWISE if variant.config.token is None else BY_TOKEN
        for sparsity in settings.sparsity_list() or usual:
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
