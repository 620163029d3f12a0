"""The settings of ``dart-llm bench speed``, and what it times: dense paths and methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from dart_llm.errors import ConfigError, check_name
from dart_llm.experiments.variants import Variant, parse
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting.words import percent
from dart_llm.settings import ModelOptions, StudyOptions, read_sparsities, setting, words

TRANSFORMERS = "transformers"

OWN = ("dense, slim", "dense, native", "dense, graph")
"""Labels of our own dense path, the better first."""


@dataclass(frozen=True)
class Case:
    """One row.  ``config`` None: the untouched model.

    ``whole``: masks that keep everything, so that the executor runs although nothing is removed.
    ``variant``: label of the method; None for what is dense.
    """

    label: str
    config: PruneConfig | None = None
    whole: bool = False
    variant: str | None = None

    @property
    def executor(self) -> str | None:
        return None if self.config is None else self.config.executor


def rebuilding(config: PruneConfig, every: int) -> PruneConfig:
    """``config`` with a new mask after every ``every`` pruned tokens and one observed token."""
    free = {"min_distance": 0, "max_dense_share": None, "allowance": 0}
    return config.replace(
        {"drift": {"rule": f"interval {every}", **free}, "remask": {"observe_tokens": 1}}
    )


def method_cases(
    variants: Sequence[Variant], sparsities: Sequence[float], executors: Sequence[str]
) -> tuple[Case, ...]:
    """Every variant at every sparsity under every executor; raises ``ConfigError``."""
    return tuple(
        Case(
            f"{variant.label} {percent(sparsity)}, {executor}",
            variant.at(sparsity, executor=executor),
            variant=variant.label,
        )
        for variant in variants
        for sparsity in sparsities
        for executor in executors
    )


def dense_cases() -> tuple[Case, ...]:
    """The untouched model, then candidates for our own dense path, the better first."""
    griffin = PruneConfig.build("griffin", sparsity=0.0)
    return (
        Case(TRANSFORMERS),
        *(
            Case(label, griffin.replace({"executor": executor}), whole=executor == "native")
            for label, executor in zip(OWN, ("slim", "native", "graph"), strict=True)
        ),
    )


STUDY, MODEL = "Study", "Model"

EXECUTORS = ("masked", "compact", "native", "slim", "graph")


class SpeedSettings(StudyOptions, ModelOptions):
    """What ``dart-llm bench speed`` is asked to do; None means "not given"."""

    COMMAS: ClassVar = ("methods", "sparsities", "executors")
    UNUSED: ClassVar = ("device_map",)

    random_weights: bool = setting(
        MODEL, "Only the configuration is read; weights are random: nothing is downloaded.", False
    )
    shape: str | None = setting(
        MODEL, "A config.json in place of --model; weights are random, nothing else is read."
    )
    seed: int = setting("Results", "Seed of the order, and of random weights.", 0)
    experiment_name: str | None = setting("Results", "Default: speed-<model>.")
    methods: str = setting(STUDY, "Methods, comma-separated; dense always runs.", "dart")
    variants: str | None = setting(
        STUDY, "YAML file: LABEL: {SETTING: VALUE}, changes of method (default: dart)."
    )
    sparsities: str = setting(
        STUDY, "Fractions of FFN neurons to remove, comma-separated.", "0.5,0.7"
    )
    executors: str = setting(
        STUDY, "Of masked, compact, native, slim, graph; comma-separated.", "compact,native,slim"
    )
    rebuild_every: int | None = setting(
        STUDY,
        "Rebuild masks every N pruned tokens, from one observed token; no other drift rule.",
        ge=1,
    )
    prompt_tokens: int = setting(STUDY, "Tokens of the prompt.", 128, ge=1)
    tokens: int = setting(STUDY, "Timed tokens of a repetition, after two that are not.", 128, ge=4)
    repeats: int = setting(STUDY, "Repetitions of every row, in shuffled order.", 5, ge=1)
    threads: int | None = setting(STUDY, "Threads (default: torch's own number).", ge=1, le=4096)
    warmup: bool = setting(STUDY, "Run every row once, untimed, before the first repetition.", True)
    costs: bool = Field(True, description="Without effect.", json_schema_extra={"hidden": True})
    """Once asked for costs (benchmarks/costs.py); recorded commands and unfinished runs have it."""
    calibration: str | None = setting(STUDY, "Text for methods that calibrate.")

    @model_validator(mode="after")
    def _check(self) -> SpeedSettings:
        if self.shape is not None and "model" in self.model_fields_set:
            raise ConfigError("--model-config stands in place of --model: give one of them")
        if self.shape is not None and not Path(self.shape).is_file():
            raise ConfigError(f"--model-config {self.shape} is no file: give a model's config.json")
        self.executor_list()
        self.case_list()
        return self

    @property
    def is_random(self) -> bool:
        """Whether the weights are random."""
        return self.random_weights or self.shape is not None

    @property
    def name(self) -> str:
        """What the model is called in the results, without its folders."""
        path = Path((self.shape or self.model).rstrip("/"))
        own = path.parent.name if path.name == "config.json" and path.parent.name else path.stem
        return (own if self.shape else path.name).lower()

    def executor_list(self) -> tuple[str, ...]:
        """The executors, each once; raises ``UnknownName``."""
        executors = tuple(dict.fromkeys(words(self.executors)))
        for executor in executors:
            check_name("executor", executor, EXECUTORS)
        if not executors:
            raise ConfigError(f"--executors is empty: give some of {', '.join(EXECUTORS)}")
        return executors

    def sparsity_list(self) -> tuple[float, ...]:
        """The sparsities, each once; raises ``ConfigError`` for what is none."""
        return read_sparsities("sparsities", self.sparsities)

    def variant_list(self) -> tuple[Variant, ...]:
        """Methods, then variants; raises ``ConfigError`` or ``UnknownName``."""
        flags = {"executor": "--executors"}
        variants = parse(words(self.methods), self.variants, {"seed": self.seed}, flags)
        if not variants:
            raise ConfigError("--methods is empty: give at least one, e.g. dart")
        every = self.rebuild_every
        if every is not None:
            variants = [replace(one, config=rebuilding(one.config, every)) for one in variants]
        return tuple(variants)

    def case_list(self) -> tuple[Case, ...]:
        """Every method at every sparsity under every executor."""
        return method_cases(self.variant_list(), self.sparsity_list(), self.executor_list())

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        return self.experiment_name or f"speed-{self.name}"
