"""The settings of ``dart-llm bench speed``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import model_validator

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.settings import (
    BaseSettings,
    Settings,
    check_least,
    check_seed,
    given_of,
    read_sparsities,
    setting,
    words,
)
from dart_llm.studies.speed.cases import Case, Variant, method_cases, parse

STUDY, MODEL, RESULTS = "Study", "Model", "Results"

EXECUTORS = ("masked", "compact", "native", "slim", "graph")

LEAST = {"prompt_tokens": 1, "tokens": 4, "repeats": 1, "rebuild_every": 1, "threads": 1}

MOST_THREADS = 4096
"""More than any machine has; far more of them cannot be started."""
"""The least value of each whole number."""


class SpeedSettings(Settings):
    """What ``dart-llm bench speed`` is asked to do; None means "not given"."""

    COMMAS: ClassVar = ("methods", "sparsities", "executors")

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
        STUDY, "Rebuild masks every N pruned tokens, from one observed token; no other drift rule."
    )
    prompt_tokens: int = setting(STUDY, "Tokens of the prompt.", 128)
    tokens: int = setting(STUDY, "Timed tokens of a repetition, after two that are not.", 128)
    repeats: int = setting(STUDY, "Repetitions of every row, in shuffled order.", 5)
    threads: int | None = setting(STUDY, "Threads (default: torch's own number).")
    warmup: bool = setting(STUDY, "Run every row once, untimed, before the first repetition.", True)
    costs: bool = setting(STUDY, "Measure attaching, observing, drift checks, re-masks.", True)
    calibration: str | None = setting(STUDY, "Text for methods that calibrate.")
    # model
    model: str = setting(
        MODEL, "Hub id, local folder, .gguf file, or smollm2-135m.", "smollm2-135m"
    )
    random_weights: bool = setting(
        MODEL, "Only the configuration is read; weights are random: nothing is downloaded.", False
    )
    shape: str | None = setting(
        MODEL, "A config.json in place of --model; weights are random, nothing else is read."
    )
    cache_dir: str | None = setting(MODEL, "Where weights are kept.")
    device: str | None = setting(MODEL, "0, cuda:0, cpu or mps (default: GPU 0, else CPU).")
    dtype: str | None = setting(MODEL, "float32, float16, bfloat16 (default: the checkpoint's).")
    revision: str | None = setting(MODEL, "Branch, tag or commit of a hub model.")
    attn_implementation: str | None = setting(MODEL, "Attention kernel: eager, sdpa, ...")
    trust_remote_code: bool = setting(MODEL, "Run code that comes with the checkpoint.", False)
    # results
    seed: int = setting(RESULTS, "Seed of the order, and of random weights.", 0)
    experiment_name: str | None = setting(RESULTS, "Default: speed-<model>.")
    results_dir: str = setting(RESULTS, "Folder for results.", "results")

    @model_validator(mode="after")
    def _check(self) -> SpeedSettings:
        check_least(self, LEAST)
        check_seed(self.seed)
        if (self.threads or 1) > MOST_THREADS:
            raise ConfigError(f"--threads {self.threads} must be at most {MOST_THREADS}")
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
        found = tuple(dict.fromkeys(words(self.executors)))
        for one in found:
            if one not in EXECUTORS:
                raise UnknownName("executor", one, EXECUTORS)
        if not found:
            raise ConfigError(f"--executors is empty: give some of {', '.join(EXECUTORS)}")
        return found

    def sparsity_list(self) -> tuple[float, ...]:
        """The sparsities, each once; raises ``ConfigError`` for what is none."""
        return read_sparsities("sparsities", self.sparsities)

    def variant_list(self) -> tuple[Variant, ...]:
        """Methods, then variants; raises ``ConfigError`` or ``UnknownName``."""
        return parse(self.methods, self.variants, self.rebuild_every, self.seed)

    def case_list(self) -> tuple[Case, ...]:
        """Every method at every sparsity under every executor."""
        return method_cases(self.variant_list(), self.sparsity_list(), self.executor_list())

    def base(self) -> BaseSettings:
        """How the model is loaded."""
        return BaseSettings.model_validate(given_of(self))

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        return self.experiment_name or f"speed-{self.name}"
