"""The settings of ``dart-llm bench quality``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import model_validator

from dart_llm.data.documents import SETS
from dart_llm.errors import ConfigError, check_name
from dart_llm.experiments.variants import GRIFFIN, Variant, oracles, parse
from dart_llm.pruning.config import DEFAULT_METHOD
from dart_llm.settings import ModelOptions, StudyOptions, read_sparsities, setting, words

STUDY = "Study"

LISTS = ("model", "text")
"""Options that may be repeated; commas do as well."""

CONTINUATION, SHIFT = "continuation", "topic-shift"

CELLS = {
    CONTINUATION: "the text goes on after the prompt",
    SHIFT: "after the prompt and a little more, another text begins",
}

LEAD = 64
"""Tokens of the first topic that are decoded before the second one begins."""


@dataclass(frozen=True)
class Shape:
    """Tokens of a slice: ``prompt`` of the prompt, ``scored`` of what is scored."""

    prompt: int
    scored: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that a model reads."""
        return self.prompt + LEAD + self.scored

    @property
    def size(self) -> int:
        """Tokens of a slice: enough for its part in either cell."""
        return self.prompt + max(LEAD, self.scored)


@dataclass(frozen=True)
class Rounding:
    """The dense model with weights of ``bits`` bits: the FFNs' alone (``ffn``), or all."""

    bits: int
    ffn: bool

    @property
    def label(self) -> str:
        """What it is called among the variants."""
        return f"dense, {'FFN ' if self.ffn else ''}{self.bits} bits"


BITS = range(2, 9)

ROUNDED = ("ffn", "all")


class QualitySettings(StudyOptions, ModelOptions):
    """What ``dart-llm bench quality`` is asked to do; None means "not given"."""

    COMMAS: ClassVar = ("methods", "oracle", "sparsities", "pool", "cells")

    model: list[str] = setting(  # type: ignore[assignment]
        "Model",
        "Hub id, local folder, .gguf file, or smollm2-135m; repeat for several.",
        ["smollm2-135m"],
    )
    seed: int = setting("Results", "Seed of everything random, the intervals among it.", 0)
    experiment_name: str | None = setting("Results", "Default: quality-<set>-<model>.")
    methods: str = setting(
        STUDY, "Methods, comma-separated; griffin, the yardstick, always runs.", DEFAULT_METHOD
    )
    variants: str | None = setting(
        STUDY, "YAML file: LABEL: {SETTING: VALUE}, changes of method (default: dart)."
    )
    oracle: str | None = setting(
        STUDY,
        "Methods told the moment of the change too, or none (default: all with a live drift rule).",
    )
    sparsities: str = setting(
        STUDY, "Fractions of FFN neurons to remove, comma-separated.", "0.3,0.5,0.7"
    )
    pool: str = setting(STUDY, "Sparsities whose gaps are added up, where measured.", "0.5,0.7")
    cells: str = setting(
        STUDY, "continuation, topic-shift, or both, comma-separated.", "continuation,topic-shift"
    )
    roundings: str = setting(
        STUDY,
        "Bits of dense weights measured beside, 2 to 8, comma-separated, or none.",
        "8,6,5,4,3",
    )
    rounded: str = setting(
        STUDY, "What is rounded: ffn, the weights that methods leave out of, or all.", "ffn"
    )
    text: list[str] = setting(
        STUDY,
        "A text file, JSONL (FILE:COLUMN names the column), or data name; repeat for several.",
        ["embedded"],
    )
    set: str = setting(STUDY, "choose: first half of a text's documents; report: second.", "report")
    slices: int | None = setting(
        STUDY,
        "Slices of each text (default: 16; of the embedded texts alone, what there is).",
        ge=1,
    )
    prompt_tokens: int = setting(STUDY, "Prompt tokens of a slice.", 256, ge=16)
    tokens: int = setting(STUDY, "Scored tokens of a slice.", 256, ge=1)
    calibration: str | None = setting(STUDY, "Text for methods that calibrate.")
    executor: str | None = setting(STUDY, "auto, masked, compact, native or cuda.")

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        return super().read({k: _parts(v) if k in LISTS else v for k, v in data.items()})

    @model_validator(mode="after")
    def _check(self) -> QualitySettings:
        check_name("set", self.set, SETS)
        if not self.model:
            raise ConfigError("no model is named: give --model one, or leave it out")
        check_name("part for --rounded", self.rounded, ROUNDED)
        self.cell_list()
        self.pool_list()
        self.rounding_list()
        self.variant_list()
        return self

    @property
    def shape(self) -> Shape:
        """Tokens of a slice."""
        return Shape(self.prompt_tokens, self.tokens)

    def cell_list(self) -> tuple[str, ...]:
        """The cells in order; raises ``UnknownName``."""
        found = tuple(dict.fromkeys(words(self.cells)))
        for name in found:
            check_name("cell", name, CELLS)
        if not found:
            raise ConfigError(f"--cells is empty: give {' or '.join(CELLS)}")
        return found

    def sparsity_list(self) -> tuple[float, ...]:
        """The sparsities, each once; raises ``ConfigError`` for what is none."""
        return read_sparsities("sparsities", self.sparsities)

    def pool_list(self) -> tuple[float, ...]:
        """The measured sparsities whose gaps are pooled; may be empty."""
        pool, measured = read_sparsities("pool", self.pool), self.sparsity_list()
        return tuple(value for value in measured if value in pool)

    def rounding_list(self) -> tuple[Rounding, ...]:
        """Dense models with fewer bits; raises ``ConfigError`` for what is no number of bits."""
        asked = [] if words(self.roundings) == ["none"] else words(self.roundings)
        known = {str(bits): bits for bits in BITS}
        for one in asked:
            if one not in known:
                raise ConfigError(
                    f'--roundings "{self.roundings}" must be whole numbers of bits, 2 to 8, or none'
                )
        return tuple(Rounding(known[one], self.rounded == "ffn") for one in dict.fromkeys(asked))

    def variant_list(self) -> tuple[Variant, ...]:
        """What is compared, GRIFFIN first; raises ``ConfigError`` or ``UnknownName``."""
        changes = {"seed": self.seed, "executor": self.executor}
        given = {name: value for name, value in changes.items() if value is not None}
        methods = [GRIFFIN, *(name for name in words(self.methods) if name != GRIFFIN)]
        variants = parse(methods, self.variants, given)
        for variant in variants:
            variant.at(self.sparsity_list()[0])
        return (*variants, *oracles(variants[1:], self.oracle))

    def names(self) -> dict[str, str]:
        """What each model is called in the results, without its folders, and where it lies."""
        found: dict[str, str] = {}
        for model in self.model:
            name = Path(model.rstrip("/")).name.lower()
            if name in found:
                raise ConfigError(f'the model "{name}" was given twice: leave one out')
            found[name] = model
        return found

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        return self.experiment_name or f"quality-{self.set}-{'-'.join(self.names())}"


def _parts(value: Any) -> Any:
    """A list of texts, also from one text with commas."""
    given = [value] if isinstance(value, str | Path) else value
    if not isinstance(given, list | tuple):
        return value
    return [word for item in given for word in words(str(item))]
