"""The settings of ``dart-llm bench speed``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.experiments.llama_bench import LLAMA_CPP
from dart_llm.experiments.timed_cases import Case, Format, method_cases, rebuilding
from dart_llm.experiments.variants import Variant, parse
from dart_llm.pruning.config import DEFAULT_METHOD, DEFAULT_SPARSITY
from dart_llm.settings import (
    MASKED,
    ModelOptions,
    StudyOptions,
    read_sparsities,
    setting,
    words,
)

STUDY, MODEL = "Study", "Model"

EXECUTORS = ("masked", "compact", "native", "slim", "graph", "triton")


class SpeedSettings(StudyOptions, ModelOptions):
    """What ``dart-llm bench speed`` is asked to do; None means "not given"."""

    COMMAS: ClassVar = ("methods", "sparsities", "executors", "weights")
    UNUSED: ClassVar = ("device_map",)
    LATER: ClassVar = ("weights", "prefill_tokens", "reference", "reference_file")
    """Settings that came later: left out where they are not given, or older runs would not resume.
    """

    weights: str | None = setting(
        MODEL,
        "As of other commands, or a GGUF file; several are timed in turns: file,q8_0,q4_0,dense.",
    )

    random_weights: bool = setting(
        MODEL, "Only the configuration is read; weights are random: nothing is downloaded.", False
    )
    shape: str | None = setting(
        MODEL, "A config.json in place of --model; weights are random, nothing else is read."
    )
    seed: int = setting("Results", "Seed of the order, and of random weights.", 0)
    experiment_name: str | None = setting("Results", "Default: speed-<model>.")
    methods: str = setting(
        STUDY,
        f"Methods, comma-separated; dense always runs (with --rebuild-every: {MASKED}).",
        DEFAULT_METHOD,
    )
    variants: str | None = setting(
        STUDY, "YAML file: LABEL: {SETTING: VALUE}, changes of method (default: dart)."
    )
    sparsities: str = setting(
        STUDY, "Fractions of FFN neurons to remove, comma-separated.", str(DEFAULT_SPARSITY)
    )
    executors: str = setting(
        STUDY, "Of masked, compact, native, slim, graph, triton.", "compact,native,slim"
    )
    rebuild_every: int | None = setting(
        STUDY,
        "Rebuild masks every N pruned tokens, from one observed token; no other drift rule.",
        ge=1,
    )
    reference: str | None = setting(
        STUDY, "llama.cpp: its llama-bench (on PATH, or LLAMA_BENCH) takes turns with our rows."
    )
    reference_file: list[str] | None = setting(
        STUDY, "GGUF file for --reference; repeat for several (default: those of the model)."
    )
    prompt_tokens: int = setting(STUDY, "Tokens of the prompt.", 128, ge=1)
    prefill_tokens: int | None = setting(
        STUDY,
        "Time the first token of a prompt of N tokens too, dense rows alone (with --reference:"
        " 512; 0: not).",
        ge=0,
    )
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
        if self.is_random and any(one.weights == "file" for one in self.format_list()):
            raise ConfigError("random weights are in no file: give --weights q8_0, or a model")
        self._check_reference()
        return self

    def _check_reference(self) -> None:
        if self.reference not in (None, LLAMA_CPP):
            raise UnknownName("reference", str(self.reference), [LLAMA_CPP])
        if self.reference_file and self.reference is None:
            raise ConfigError(f"--reference-file has no effect without --reference {LLAMA_CPP}")
        for name in self.reference_file or ():
            if not Path(name).expanduser().is_file():
                raise ConfigError(f"--reference-file {name} is no file: give a GGUF file")

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
            if executor not in EXECUTORS:
                raise UnknownName("executor", executor, EXECUTORS)
        if not executors:
            raise ConfigError(f"--executors is empty: give some of {', '.join(EXECUTORS)}")
        return executors

    def sparsity_list(self) -> tuple[float, ...]:
        """The sparsities, each once; raises ``ConfigError`` for what is none."""
        return read_sparsities("sparsities", self.sparsities)

    def variant_list(self) -> tuple[Variant, ...]:
        """Methods, then variants; raises ``ConfigError`` or ``UnknownName``."""
        flags = {"executor": "--executors"}
        every = self.rebuild_every
        usual = every is not None and "methods" not in self.model_fields_set
        methods = [MASKED] if usual else words(self.methods)
        variants = parse(methods, self.variants, {"seed": self.seed}, flags)
        if not variants:
            raise ConfigError("--methods is empty: give at least one, e.g. dart")
        if every is not None:
            variants = [replace(one, config=rebuilding(one.config, every)) for one in variants]
        return tuple(variants)

    def format_list(self) -> tuple[Format, ...]:
        """How the weights are held, each once; raises ``ConfigError`` or ``UnknownName``."""
        found = [Format.of(word) for word in dict.fromkeys(words(self.weights))]
        if len({one.name for one in found}) < len(found):
            raise ConfigError(f"--weights {self.weights} names two files alike: rename one")
        return tuple(found) or (Format("auto"),)

    @property
    def prefill(self) -> int:
        """Tokens of the longer prompt whose first token is timed; 0: none."""
        given = self.prefill_tokens
        return (512 if self.reference else 0) if given is None else given

    def case_list(self) -> tuple[Case, ...]:
        """Every method at every sparsity under every executor."""
        return method_cases(self.variant_list(), self.sparsity_list(), self.executor_list())

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        return self.experiment_name or f"speed-{self.name}"
