"""The settings of ``dart-llm bench speed`` and ``dart-llm tune``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, get_args

from pydantic import field_validator, model_validator

from dart_llm.data import documents
from dart_llm.errors import ConfigError, check_name
from dart_llm.experiments.variants import Variant, parse
from dart_llm.models.gguf_file import ROUNDED
from dart_llm.pruning.config import DEFAULT_METHOD, DEFAULT_SPARSITY, PruneConfig
from dart_llm.settings import (
    MASKED,
    ModelOptions,
    StudyOptions,
    read_sparsities,
    setting,
    words,
)

STUDY, MODEL = "Study", "Model"

REFERENCE = "llama.cpp"

FORMATS = ("auto", "file", "dense", *ROUNDED)
"""Weight formats by name; ``bench speed`` takes GGUF files too."""

GPU_EXECUTORS = ("cuda",)

EXECUTORS = tuple(get_args(PruneConfig.model_fields["executor"].annotation))[1:]
"""All but ``auto``."""

USUAL_EXECUTORS = tuple(name for name in EXECUTORS if name not in ("masked", *GPU_EXECUTORS))

METHODS = "dart-token,dart,griffin"
"""Methods that ``tune`` tries by default."""

HEADS = ("full", "screened")

QUICK_TOKENS = 24
"""Timed tokens of a repetition of ``tune --quick``."""


class BenchOptions(StudyOptions, ModelOptions):
    """What both commands can be set to; None means "not given"."""

    COMMAS: ClassVar = ("weights", "methods", "sparsities", "executors", "heads")
    UNUSED: ClassVar = ("device_map",)
    KIND: ClassVar[str]

    experiment_name: str | None = setting("Results", "Default: the command and the model's name.")
    variants: str | None = setting(STUDY, "YAML file of changed methods: LABEL: {SETTING: VALUE}.")
    repeats: int = setting(STUDY, "Repetitions of every row, in shuffled order.", 5, ge=1)
    reference: str | None = setting(STUDY, "llama.cpp: also time its llama-bench (LLAMA_BENCH).")
    threads: int | None = setting(STUDY, "Threads (default: torch's own number).", ge=1, le=4096)
    calibration: str | None = setting(STUDY, "Text for methods that calibrate.")

    @field_validator("reference")
    @classmethod
    def _check_reference(cls, name: str | None) -> str | None:
        if name is not None:
            check_name("reference", name, [REFERENCE])
        return name

    def format_list(self) -> tuple[str, ...]:
        """Requested weight formats, and paths of GGUF files; raises ``ConfigError``."""
        return tuple(dict.fromkeys(map(_format, words(self.weights))))

    @property
    def name(self) -> str:
        """What the model is called in the results, without its folders."""
        return Path(self.model.rstrip("/")).name.lower()

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        return self.experiment_name or f"{self.KIND}-{self.name}"


def is_file(weights: str) -> bool:
    """Whether a weight format is a GGUF file that replaces the model."""
    return weights.lower().endswith(".gguf")


def _format(word: str) -> str:
    if not is_file(word):
        check_name("weights", word.lower(), (*FORMATS, "FILE.gguf"))
        return word.lower()
    if not Path(word).expanduser().is_file():
        known = ", ".join(FORMATS)
        raise ConfigError(f"--weights {word} is not a file: give one, or some of {known}")
    return str(Path(word).expanduser())


def _names(flag: str, text: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names in a text with commas, each once; raises ``ConfigError``."""
    requested = tuple(dict.fromkeys(words(text)))
    for name in requested:
        check_name(flag, name, names)
    if not requested:
        raise ConfigError(f"--{flag}s is empty: give some of {', '.join(names)}")
    return requested


class SpeedSettings(BenchOptions):
    """What ``dart-llm bench speed`` measures."""

    KIND: ClassVar = "speed"

    weights: str | None = setting(MODEL, f"Formats: {', '.join(FORMATS)}, or GGUF files.")
    random_weights: bool = setting(MODEL, "Random weights: only the configuration is read.", False)
    shape: str | None = setting(MODEL, "A config.json in place of --model: random weights.")
    methods: str = setting(
        STUDY,
        f"Methods, comma-separated; dense always runs (with --rebuild-every: {MASKED}).",
        DEFAULT_METHOD,
    )
    sparsities: str = setting(STUDY, "Fractions to remove, e.g. 0.3,0.5.", str(DEFAULT_SPARSITY))
    executors: str = setting(STUDY, f"Of {', '.join(EXECUTORS)}.", ",".join(USUAL_EXECUTORS))
    rebuild_every: int | None = setting(
        STUDY, "Rebuild masks every N pruned tokens, and by no other drift rule.", ge=1
    )
    reference_file: list[str] | None = setting(
        STUDY, "GGUF file for --reference; repeatable (default: those of the model)."
    )
    prompt_tokens: int = setting(STUDY, "Tokens of the prompt.", 128, ge=1)
    prefill_tokens: int | None = setting(
        STUDY, "Also time the first token after N, dense rows alone (--reference: 512).", ge=0
    )
    tokens: int = setting(STUDY, "Timed tokens of a repetition, after two that are not.", 128, ge=4)
    warmup: bool = setting(STUDY, "Run every row once, untimed, before the first repetition.", True)

    @model_validator(mode="after")
    def _check(self) -> SpeedSettings:
        if self.shape is not None and "model" in self.model_fields_set:
            raise ConfigError("--model-config replaces --model: give one of them")
        if self.is_random and "file" in self.format_list():
            raise ConfigError("random weights do not come from a file: give --weights q8_0")
        if self.reference_file and self.reference is None:
            raise ConfigError(f"--reference-file has no effect without --reference {REFERENCE}")
        files = [("model-config", self.shape)]
        files += [("reference-file", name) for name in self.reference_file or ()]
        for flag, name in files:
            if name is not None and not Path(name).expanduser().is_file():
                raise ConfigError(f"--{flag} {name} is not a file")
        self.method_list()
        return self

    @property
    def is_random(self) -> bool:
        """Whether the weights are random."""
        return self.random_weights or self.shape is not None

    @property
    def name(self) -> str:
        if self.shape is None:
            return super().name
        path = Path(self.shape)
        is_usual = path.name == "config.json" and path.parent.name
        return (path.parent.name if is_usual else path.stem).lower()

    @property
    def prefill(self) -> int:
        """Tokens of the longer prompt whose first token is timed; 0: none."""
        usual = 512 if self.reference else 0
        return usual if self.prefill_tokens is None else self.prefill_tokens

    def variant_list(self) -> tuple[Variant, ...]:
        """Methods, then variants; raises ``ConfigError`` or ``UnknownName``."""
        every = self.rebuild_every
        usual = every is not None and "methods" not in self.model_fields_set
        methods = [MASKED] if usual else words(self.methods)
        variants = parse(methods, self.variants, {"seed": self.seed}, {"executor": "--executors"})
        if not variants:
            raise ConfigError("--methods is empty: give at least one, e.g. dart")
        if every is not None:
            variants = [replace(v, config=rebuilding(v.config, every)) for v in variants]
        return tuple(variants)

    def method_list(self) -> list[tuple[str, PruneConfig]]:
        """Every variant at every sparsity under every executor: label and configuration."""
        executors = _names("executor", self.executors, EXECUTORS)
        return [
            (variant.label, variant.at(sparsity, executor=executor))
            for variant in self.variant_list()
            for sparsity in read_sparsities("sparsities", self.sparsities)
            for executor in executors
        ]


def rebuilding(config: PruneConfig, every: int) -> PruneConfig:
    """``config`` with a new mask after every ``every`` pruned tokens and one observed token."""
    unguarded = {"min_distance": 0, "max_dense_share": None, "allowance": 0}
    return config.replace(
        {"drift": {"rule": f"interval {every}", **unguarded}, "remask": {"observe_tokens": 1}}
    )


def first_slices(count: int) -> tuple[int, ...]:
    """Numbers of the slices, of ``count``, that ``--quick`` scores: the first and a middle one."""
    return tuple(dict.fromkeys((0, count // 2)))


class TuneSettings(BenchOptions):
    """What ``dart-llm tune`` measures."""

    KIND: ClassVar = "tune"

    weights: str | None = setting(MODEL, f"Of {', '.join(FORMATS[1:])} (default: what suits).")
    max_loss: float = setting(  # at most 1: whoever gives 2 means 2 %
        STUDY, "Loss budget in perplexity: 0.02 is 2 %.", 0.02, gt=0, le=1, allow_inf_nan=False
    )
    save: str | None = setting(STUDY, "Also write the recommended setting to this file.")
    quick: bool = setting(
        STUDY,
        "Answer in minutes: dense, a screened head, dart-token at 30 %, on two slices of each "
        "text; the same command without it continues from there.",
        False,
    )
    methods: str | None = setting(
        STUDY, f"Methods, comma-separated, or none; dense always runs (default: {METHODS})."
    )
    sparsities: str | None = setting(STUDY, "Fractions to remove (default: by method).")
    heads: str | None = setting(STUDY, "Output heads: full,screened (default: by method).")
    text: str = setting(STUDY, "Your text: a file, JSONL or data name.", documents.EMBEDDED)
    slices: int = setting(STUDY, "Slices of each of the two texts.", 8, ge=2)
    prompt_tokens: int = setting(STUDY, "Prompt tokens, of a slice.", 64, ge=16)
    tokens: int = setting(STUDY, "Scored tokens of a slice.", 96, ge=1)
    timed_tokens: int = setting(STUDY, "Timed tokens of a repetition.", 64, ge=4)
    noise: float = setting(STUDY, "Ignore speed-ups smaller than this fraction.", 0.03, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> TuneSettings:
        self.variant_list()
        self.sparsity_list()
        self.head_list()
        for weights in self.format_list():
            if is_file(weights) or weights == "auto":
                raise ConfigError(
                    f"--weights {weights}: tune measures formats of one model: give that file as "
                    "--model, and formats such as file, q8_0, dense"
                )
        documents.names(self.text)
        return self

    def variant_list(self) -> tuple[Variant, ...]:
        """What prunes; raises ``ConfigError`` or ``UnknownName``."""
        methods = METHODS if self.methods is None and self.variants is None else self.methods
        names = [] if words(methods) == ["none"] else words(methods)
        flags = {"executor": "dart-llm bench speed", "head": "--heads"}
        return tuple(parse(names, self.variants, {"seed": self.seed}, flags))

    def sparsity_list(self) -> tuple[float, ...]:
        """The requested sparsities, each once; empty: those of each method."""
        return () if self.sparsities is None else read_sparsities("sparsities", self.sparsities)

    def head_list(self) -> tuple[str, ...]:
        """The requested heads, each once; empty: the default."""
        return () if self.heads is None else _names("head", self.heads, HEADS)

    @property
    def scored_slices(self) -> int:
        """Slices of each text that are scored."""
        return len(first_slices(self.slices)) if self.quick else self.slices

    @property
    def repetition_tokens(self) -> int:
        """Timed tokens of a repetition."""
        return min(self.timed_tokens, QUICK_TOKENS) if self.quick else self.timed_tokens
