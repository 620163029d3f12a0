"""The settings of ``dart-llm tune``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import model_validator

from dart_llm.data import documents
from dart_llm.errors import ConfigError, UnknownName, check_name
from dart_llm.experiments.llama_bench import LLAMA_CPP
from dart_llm.experiments.timed_cases import Format
from dart_llm.experiments.variants import Variant, parse
from dart_llm.settings import ModelOptions, StudyOptions, read_sparsities, setting, words

STUDY, MODEL = "Study", "Model"

METHODS = "dart-token,dart,griffin"
"""Methods that are tried where nothing is said."""

BY_TOKEN, OTHERWISE = (0.3, 0.5, 0.7), (0.2, 0.3)
"""Sparsities that are tried where nothing is said: of methods that choose by token, of others."""

HEADS = ("full", "screened")

QUICK_TOKENS = 24
"""Timed tokens of a repetition of ``--quick``."""

OWN = "own"
"""The format of a model that was loaded already."""


class TuneSettings(StudyOptions, ModelOptions):
    """What ``dart-llm tune`` is asked to do; None means "not given"."""

    COMMAS: ClassVar = ("weights", "methods", "sparsities", "heads")
    UNUSED: ClassVar = ("device_map",)

    weights: str | None = setting(
        MODEL,
        "Formats to try, comma-separated: file, dense, q8_0, q4_0, q4_1 (default: what suits).",
    )
    seed: int = setting("Results", "Seed of the model's own text, the order, the intervals.", 0)
    experiment_name: str | None = setting("Results", "Default: tune-<model>.")
    max_loss: float = setting(
        STUDY,
        "Perplexity over dense that may be lost: 0.02 is 2 %.",
        0.02,
        gt=0,
        le=1,  # 2 is meant as 2 % by who types it
        allow_inf_nan=False,
    )
    save: str | None = setting(
        STUDY, "Write the recommended setting here too (setting.yaml lies in the results folder)."
    )
    quick: bool = setting(
        STUDY,
        "Answer in minutes: dense, a screened head, dart-token at 30 %, on two slices of each "
        "text; the same command without it continues from there.",
        False,
    )
    methods: str | None = setting(
        STUDY, f"Methods, comma-separated, or none; dense always runs (default: {METHODS})."
    )
    variants: str | None = setting(
        STUDY, "YAML file: LABEL: {SETTING: VALUE}, changes of method (default: dart)."
    )
    sparsities: str | None = setting(
        STUDY, "Fractions of FFN neurons to remove, comma-separated (default: by method)."
    )
    heads: str | None = setting(
        STUDY, "full, screened, or both (default: screened for dense and methods by token too)."
    )
    text: str = setting(
        STUDY,
        "Your text, beside what the model writes itself: a file, JSONL or data name.",
        documents.EMBEDDED,
    )
    slices: int = setting(STUDY, "Slices of each of the two texts.", 8, ge=2)
    prompt_tokens: int = setting(STUDY, "Prompt tokens, of a slice.", 64, ge=16)
    tokens: int = setting(STUDY, "Scored tokens of a slice.", 96, ge=1)
    timed_tokens: int = setting(STUDY, "Timed tokens of a repetition.", 64, ge=4)
    repeats: int = setting(STUDY, "Repetitions of what is timed, in shuffled order.", 5, ge=1)
    noise: float = setting(
        STUDY, "A gain in time of no more than this counts as none.", 0.03, ge=0, lt=1
    )
    reference: str | None = setting(
        STUDY, "llama.cpp: its llama-bench (on PATH, or LLAMA_BENCH) takes turns where it is found."
    )
    threads: int | None = setting(STUDY, "Threads (default: torch's own number).", ge=1, le=4096)
    calibration: str | None = setting(STUDY, "Text for methods that calibrate.")

    @model_validator(mode="after")
    def _check(self) -> TuneSettings:
        self.variant_list()
        self.sparsity_list()
        self.head_list()
        self.format_list()
        if self.reference not in (None, LLAMA_CPP):
            raise UnknownName("reference", str(self.reference), [LLAMA_CPP])
        documents.names(self.text)
        return self

    @property
    def name(self) -> str:
        """What the model is called in the results, without its folders."""
        return Path(self.model.rstrip("/")).name.lower()

    def variant_list(self) -> tuple[Variant, ...]:
        """What prunes; raises ``ConfigError`` or ``UnknownName``."""
        asked = METHODS if self.methods is None and self.variants is None else self.methods
        named = [] if words(asked) == ["none"] else words(asked)
        flags = {"executor": "dart-llm bench speed", "head": "--heads"}
        return tuple(parse(named, self.variants, {"seed": self.seed}, flags))

    def sparsity_list(self) -> tuple[float, ...] | None:
        """The sparsities that were asked for, each once; None: those of each method."""
        if self.sparsities is None:
            return None
        return read_sparsities("sparsities", self.sparsities)

    def head_list(self) -> tuple[str, ...] | None:
        """The heads that were asked for; None: the default."""
        if self.heads is None:
            return None
        found = tuple(dict.fromkeys(words(self.heads)))
        for name in found:
            check_name("head", name, HEADS)
        if not found:
            raise ConfigError(f"--heads is empty: give {' or '.join(HEADS)}")
        return found

    def format_list(self) -> tuple[Format, ...]:
        """The formats that were asked for, each once; empty: the default."""
        found = tuple(Format.of(word) for word in dict.fromkeys(words(self.weights)))
        for one in found:
            if one.file is not None or one.name == "auto":
                raise ConfigError(
                    f"--weights {one.name}: tune measures formats of one model: give that file as "
                    "--model, and formats such as file, q8_0, dense"
                )
        return found

    @property
    def turn_tokens(self) -> int:
        """Timed tokens of a repetition."""
        return min(self.timed_tokens, QUICK_TOKENS) if self.quick else self.timed_tokens

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        return self.experiment_name or f"tune-{self.name}"
