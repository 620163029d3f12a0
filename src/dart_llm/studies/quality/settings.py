"""The settings of ``dart-llm bench quality``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, model_validator

from dart_llm.data.documents import SETS
from dart_llm.errors import ConfigError, check_name
from dart_llm.experiments.variants import GRIFFIN, Variant, oracles, parse
from dart_llm.pruning.config import DEFAULT_METHOD
from dart_llm.settings import (
    Fractions,
    ModelOptions,
    StudyOptions,
    Texts,
    check_removed,
    setting,
    split_commas,
    words,
)
from dart_llm.studies.sweep.settings import MeasureSettings, SliceOptions

STUDY = "Study"

CONTINUATION, SHIFT = "continuation", "topic-shift"

CELLS = {
    CONTINUATION: "the text continues after the prompt",
    SHIFT: "after the prompt and a little more, another text begins",
}

TASKS = {CONTINUATION: "continuation", SHIFT: "shift"}
"""The task that measures each cell."""

ROUNDED = ("ffn", "all")


def _split_each(value: Any) -> list[str]:
    return [word for part in split_commas(value) for word in words(str(part))]


Repeated = Annotated[list[str], BeforeValidator(_split_each)]
"""A list whose flag may be repeated; commas do as well."""

Removed = Annotated[Fractions, AfterValidator(check_removed)]


@dataclass(frozen=True)
class Rounding:
    """The dense model with weights of ``bits`` bits: the FFNs' alone (``ffn``), or all."""

    bits: int
    part: str

    @property
    def label(self) -> str:
        """Its row's name."""
        return f"dense, {'FFN ' if self.part == 'ffn' else ''}{self.bits} bits"


class QualitySettings(SliceOptions, MeasureSettings, StudyOptions, ModelOptions):
    """``dart-llm bench quality``; None means "not given"."""

    kind, document = "quality", "quality.json"
    UNUSED: ClassVar = ("limit", "sample_seed", "scored_tokens")

    model: Repeated = setting(  # type: ignore[assignment]
        "Model",
        "Hub id, local folder, .gguf file, or smollm2-135m; repeat for several.",
        ["smollm2-135m"],
    )
    methods: Texts = setting(
        STUDY, "Methods, comma-separated; griffin, the baseline, always runs.", (DEFAULT_METHOD,)
    )
    variants: str | None = setting(
        STUDY, "YAML file: LABEL: {SETTING: VALUE}, changes of method (default: dart)."
    )
    oracle: str | None = setting(
        STUDY,
        "Methods to re-mask at the known change of topic too, or none (default: all with a live "
        "drift rule).",
    )
    sparsities: Removed = setting(
        STUDY, "Fractions of FFN neurons to remove, comma-separated.", (0.3, 0.5, 0.7)
    )
    pool: Removed = setting(
        STUDY, "Sparsities whose gaps are added up, where measured.", (0.5, 0.7)
    )
    cells: Texts = setting(
        STUDY, "continuation, topic-shift, or both, comma-separated.", (CONTINUATION, SHIFT)
    )
    roundings: Texts = setting(
        STUDY,
        "Bits of dense weights measured for comparison, 2 to 8, comma-separated, or none.",
        ("8", "6", "5", "4", "3"),
    )
    rounded: str = setting(STUDY, "Which weights to round: ffn, or all.", "ffn")
    text: Repeated = setting(
        STUDY,
        "A text file, JSONL (FILE:COLUMN names the column), or data name; repeat for several.",
        ["embedded"],
    )
    set: str = setting(STUDY, "choose: first half of a text's documents; report: second.", "report")
    slices: int | None = setting(
        STUDY,
        "Slices of each text (default: 16; of the embedded texts alone, as many as there are).",
        ge=1,
    )
    prompt_tokens: int = setting(STUDY, "Prompt tokens of a slice.", 256, ge=16)
    tokens: int = setting(STUDY, "Scored tokens of a slice.", 256, ge=1)
    executor: str | None = setting(STUDY, "auto, masked, compact, native or cuda.")

    @model_validator(mode="after")
    def _check(self) -> QualitySettings:
        check_name("set", self.set, SETS)
        check_name("part for --rounded", self.rounded, ROUNDED)
        for name in self.cells:
            check_name("cell", name, CELLS)
        for name in ("model", "text", "cells", "sparsities"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is empty: give at least one, or leave it out")
        self.rounding_list()
        self.variant_list()
        return self

    @property
    def pooled(self) -> tuple[float, ...]:
        """The measured sparsities whose gaps are pooled; may be empty."""
        return tuple(value for value in self.sparsities if value in self.pool)

    def task(self, cell: str) -> str:
        """The task that measures ``cell``."""
        return f"{TASKS[cell]}:{'+'.join(self.text)}#{self.set}"

    def rounding_list(self) -> tuple[Rounding, ...]:
        """Dense models with fewer bits; raises ``ConfigError`` for other numbers of bits."""
        wanted = () if self.roundings == ("none",) else self.roundings
        if any(bits not in map(str, range(2, 9)) for bits in wanted):
            raise ConfigError(
                f'--roundings "{",".join(self.roundings)}" must be whole numbers of bits, 2 to 8, '
                "or none"
            )
        return tuple(Rounding(int(bits), self.rounded) for bits in wanted)

    def variant_list(self) -> tuple[Variant, ...]:
        """What is compared, GRIFFIN first; raises ``ConfigError`` or ``UnknownName``."""
        changes = {"seed": self.seed, "executor": self.executor}
        given = {name: value for name, value in changes.items() if value is not None}
        methods = [GRIFFIN, *(name for name in self.methods if name != GRIFFIN)]
        variants = parse(methods, self.variants, given)
        for variant in variants:
            variant.at(self.sparsities[0])
        return (*variants, *oracles(variants[1:], self.oracle))

    def names(self) -> dict[str, str]:
        """Each model's name in the results, without its folders, and where it is."""
        found: dict[str, str] = {}
        for model in self.model:
            name = model_name(model)
            if name in found:
                raise ConfigError(f'the model "{name}" was given twice: leave one out')
            found[name] = model
        return found

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        return self.experiment_name or f"quality-{self.set}-{'-'.join(self.names())}"


def model_name(model: str) -> str:
    """A model's name in the results."""
    return Path(model.rstrip("/")).name.lower()
