"""The settings of ``dart-llm bench quality``."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, model_validator

from dart_llm.data.documents import SETS
from dart_llm.errors import ConfigError, check_name
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.evaluation.tasks import CONTINUATION, SHIFT, SLICED
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


Repeated = Annotated[
    list[str], BeforeValidator(lambda v: [w for part in split_commas(v) for w in words(str(part))])
]
"""A list whose flag may be repeated; values may also be separated by commas."""

Removed = Annotated[Fractions, AfterValidator(check_removed)]


class QualitySettings(SliceOptions, MeasureSettings, StudyOptions, ModelOptions):
    """The settings of ``dart-llm bench quality``; None means that a setting was not given."""

    kind, document = "quality", "quality.json"
    UNUSED: ClassVar = ("limit", "sample_seed", "scored_tokens")

    methods: Texts = setting(
        STUDY, "Run these methods; griffin, the baseline, always runs.", (DEFAULT_METHOD,)
    )
    variants: str | None = setting(
        STUDY,
        "Also run the variants in this YAML file: LABEL: {SETTING: VALUE} (method: dart if unset).",
    )
    oracle: str | None = setting(
        STUDY,
        "Run these methods also with a re-mask at the known topic change, or none (default: all "
        "with a drift rule).",
    )
    sparsities: Removed = setting(
        STUDY, "Remove these fractions of the FFN neurons, comma-separated.", (0.3, 0.5, 0.7)
    )
    pool: Removed = setting(STUDY, "Sum the gaps at these sparsities, if measured.", (0.5, 0.7))
    tasks: Texts = setting(
        STUDY, "Run continuation, shift (the topic changes), or both, comma-separated.", SLICED
    )
    text: Repeated = setting(
        STUDY,
        "Use this text: a text file, JSONL (FILE:COLUMN names the column), or data name; "
        "repeatable.",
        ["embedded"],
    )
    set: str = setting(
        STUDY, "Use the first half of a text's documents (choose) or the second (report).", "report"
    )
    slices: int | None = setting(
        STUDY,
        "Number of slices per text (default: 16, or fewer if only the embedded texts are used).",
        ge=1,
    )
    prompt_tokens: int = setting(STUDY, "Number of prompt tokens per slice.", 256, ge=16)
    tokens: int = setting(STUDY, "Number of scored tokens per slice.", 256, ge=1)
    executor: str | None = setting(STUDY, "Use auto, masked, compact, native or cuda.")

    @model_validator(mode="after")
    def _check(self) -> QualitySettings:
        check_name("set", self.set, SETS)
        for name in self.tasks:
            check_name("task", name, (CONTINUATION, SHIFT))
        for name in ("text", "tasks", "sparsities"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is empty: give at least one value, or omit it")
        self.variant_list()
        return self

    @property
    def pooled(self) -> tuple[float, ...]:
        """The measured sparsities whose gaps are pooled, possibly none."""
        return tuple(value for value in self.sparsities if value in self.pool)

    def task(self, kind: str) -> str:
        """The name of the task ``kind`` on the texts."""
        return f"{kind}:{'+'.join(self.text)}#{self.set}"

    def options(self) -> MeasureOptions:
        """The options with which the tasks are measured."""
        options = replace(super().options(), limit=self.slices, seed=self.seed)
        return replace(options, scored_tokens=self.tokens)

    def variant_list(self) -> tuple[Variant, ...]:
        """The variants to compare, GRIFFIN first; raises ``ConfigError`` or ``UnknownName``."""
        common: dict[str, Any] = {"seed": self.seed}
        if self.executor is not None:
            common["executor"] = self.executor
        methods = [GRIFFIN, *(name for name in self.methods if name != GRIFFIN)]
        variants = parse(methods, self.variants, common)
        for variant in variants:
            variant.at(self.sparsities[0])
        return (*variants, *oracles(variants[1:], self.oracle))

    @property
    def experiment(self) -> str:
        """The name of the experiment's folder."""
        model = self.model.rstrip("/").rpartition("/")[2].lower()
        return self.experiment_name or f"quality-{self.set}-{model}"
