"""The settings of ``dart-llm drift`` and ``dart-llm detect``, and the methods for ``drift``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, FiniteFloat, model_validator

from dart_llm.errors import ConfigError, check_name
from dart_llm.pruning.config import PruneConfig, check_sparsity, rule_form
from dart_llm.pruning.registry import DRIFT_RULES, METHODS
from dart_llm.settings import (
    SEQUENCE_METHOD,
    BaseSettings,
    MaskOptions,
    ModelOptions,
    ResultOptions,
    StudyOptions,
    Texts,
    given_of,
    merge,
    setting,
    split_commas,
)

DENSE, NEVER, DART = "dense", "never", SEQUENCE_METHOD

FREE, FORCED = "free", "forced"

SPARSITY = 0.5
"""Default sparsity: with half of the neurons removed, stale masks visibly raise the loss."""

UNGUARDED = {"min_distance": 0, "max_dense_share": None, "allowance": 0}
"""Drift settings without the guards that suppress triggers."""

VARIANTS: dict[str, Callable[[int], Mapping[str, Any]]] = {
    NEVER: lambda n: {"rule": "never"},
    "paper": lambda n: {"rule": "paper", "signal": "attention", **UNGUARDED},
    "interval:N": lambda n: {"rule": f"interval {n}", **UNGUARDED},
}
"""Maps each variant of dart to a function from N (of ``interval:N``) to changed drift settings."""

METHOD = re.compile(r"(?P<name>[^:@]+(:(?P<tokens>[1-9]\d*))?)(@(?P<sparsity>\d*\.?\d+))?")


@dataclass(frozen=True)
class Candidate:
    """A method of a drift study; ``config``: None for the untouched model."""

    name: str
    config: PruneConfig | None = None

    @property
    def sparsity(self) -> float | None:
        """The requested sparsity; None if a layer table or strategy ``auto`` sets the counts."""
        config = self.config
        if config is None:
            return 0.0
        fixed = config.budget.table is not None or config.score.strategy == "auto"
        return None if fixed and config.sparsity is None else config.target

    @property
    def label(self) -> str:
        """``dense``, or name and sparsity as in ``interval:64@0.5``."""
        if self.config is None:
            return self.name
        return f"{self.name}@{'table' if self.sparsity is None else f'{self.sparsity:g}'}"


def parse_methods(names: Sequence[str], base: BaseSettings) -> tuple[Candidate, ...]:
    """The methods with these names, dense first.

    ``base``: the settings of dart and its variants, with the study's sparsity.  Raises
    ``ConfigError`` for an unknown or repeated name, or an invalid number.
    """
    candidates = {DENSE: Candidate(DENSE)}
    for name in names:
        candidate = _parse(name, base)
        if candidate.label in candidates and candidate.label != DENSE:
            raise ConfigError(f'the method "{candidate.label}" was given twice: remove one')
        candidates[candidate.label] = candidate
    return tuple(candidates.values())


def _parse(text: str, base: BaseSettings) -> Candidate:
    parts = METHOD.fullmatch(text)
    if parts is None:
        raise ConfigError(
            f'cannot parse the method "{text}": write NAME or interval:N (N tokens), optionally '
            "followed by @SPARSITY, as in interval:64@0.5"
        )
    name, tokens = parts["name"], int(parts["tokens"] or 0)
    sparsity = None if parts["sparsity"] is None else check_sparsity(float(parts["sparsity"]))
    dart = base.prune_config()
    dart = dart if sparsity is None else dart.replace({"sparsity": sparsity})
    kind = f"{name.partition(':')[0]}:N" if tokens else name
    if kind in VARIANTS:
        return Candidate(name, dart.replace({"method": name, "drift": VARIANTS[kind](tokens)}))
    check_name("method", name, {*METHODS.names(), *VARIANTS})
    if name == DENSE and sparsity:
        raise ConfigError(f"method dense removes nothing: drop the @{sparsity:g}")
    if name in (DENSE, DART):
        return Candidate(name, None if name == DENSE else dart)
    requested = base.target_sparsity() if sparsity is None else sparsity
    requested = SPARSITY if requested is None else requested
    return Candidate(name, PruneConfig.build(name, sparsity=requested, executor=base.executor))


Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], BeforeValidator(split_commas)]
WindowSizes = Annotated[tuple[Annotated[int, Field(ge=2)], ...], BeforeValidator(split_commas)]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(split_commas)]
Thresholds = Annotated[tuple[FiniteFloat, ...], BeforeValidator(split_commas)]


class PassageOptions(ModelOptions):
    """Options of both commands that select passages, which are texts with known topic changes."""

    passages: str | None = setting("Passages", "Read these passages: shipped, or a JSONL file.")
    limit: int | None = setting(
        "Passages", "Use only the first N passages or prompts (default: all).", ge=1
    )
    prompt_tokens: int = setting("Passages", "Use this many tokens as the prompt.", 256, ge=16)

    def experiment_of(self, kind: str) -> str:
        """The default name of the experiment's folder."""
        return f"{kind}-{Path(self.model.rstrip('/')).name.lower()}"


STUDY, METRICS = "Study", "Metrics"


class DriftSettings(ResultOptions, MaskOptions, PassageOptions):
    """The settings of ``dart-llm drift``; pruning options apply to dart and its variants."""

    mode: str | None = setting(
        STUDY, "Continue prompts (free) or read passages (forced); default: depends on the source."
    )
    methods: Texts = setting(
        STUDY,
        "Methods to compare: presets, never, interval:N, paper; each may have @SPARSITY. "
        "Pruning options apply to dart and its variants, not to presets.",
        ("dense", "never", "interval:64", "published", "paper", "dart"),
        min_length=1,
    )
    seeds: Seeds = setting(STUDY, "Run with each of these seeds.", (0,), min_length=1)
    prompt: str | None = setting(STUDY, "Continue this single prompt.")
    prompts: str | None = setting(STUDY, "Continue these prompts: shipped, or a JSONL file.")
    generation: int = setting(STUDY, "Maximum number of tokens to generate per prompt.", 300, ge=2)
    temperature: float | None = setting(
        STUDY, "Sample at this temperature (default: greedy).", ge=0, allow_inf_nan=False
    )
    chat: bool | None = setting(STUDY, "Use the model's chat template (default: if it has one).")
    sparsity: float | None = setting(
        "Pruning",
        f"Fraction of FFN neurons to remove, for methods without @SPARSITY (default: {SPARSITY}).",
    )
    calibration: str | None = setting("Pruning", "Calibrate on this text, if a preset calibrates.")
    metrics: bool = setting(METRICS, "Compare generated texts with the dense model's.", True)
    embedder: str | None = setting(
        METRICS, "Encoder that computes BERTScore and embeddings (default: all-MiniLM-L6-v2)."
    )
    experiment_name: str | None = setting("Results", "Folder name (default: drift-MODE-MODEL).")

    @model_validator(mode="after")
    def _check_drift(self) -> DriftSettings:
        check_name("mode", self.mode, (FREE, FORCED))
        sources = [name for name in ("prompt", "prompts", "passages") if getattr(self, name)]
        passages = sources == ["passages"] or (self.mode == FORCED and not sources)
        if len(sources) > 1 or passages != (self.kind == FORCED) or not (sources or passages):
            flags = " and ".join(f"--{name}" for name in sources)
            problem = f"does not accept {flags}" if sources else "needs a prompt"
            raise ConfigError(
                f"mode {self.kind} {problem}: give --prompt TEXT or --prompts "
                "(shipped, or a JSONL file) in mode free, or --passages (shipped, or a JSONL file) "
                "in mode forced"
            )
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError("the prompt is empty: give at least one word")
        self.candidates()  # raises for invalid methods
        return self

    @property
    def kind(self) -> str:
        """The mode; by default ``forced`` if passages are given, else ``free``."""
        return self.mode or (FORCED if self.passages else FREE)

    @property
    def experiment(self) -> str:
        """The name of the experiment's folder."""
        return self.experiment_name or self.experiment_of(f"drift-{self.kind}")

    def candidates(self) -> tuple[Candidate, ...]:
        """The methods in order, dense first; raises ``ConfigError`` or ``UnknownName``."""
        return parse_methods(self.methods, self.base())

    def base(self) -> BaseSettings:
        """The pruning settings that dart and its variants share, and the loading settings."""
        values = given_of(self)
        table = self.layer_topk or "auto"
        fixed = self.prune_strategy == "auto" or ("auto" not in table and table[:1] != "@")
        if self.sparsity is None and self.total_prune_percent is None and not fixed:
            values["sparsity"] = SPARSITY
        return BaseSettings.model_validate(values).model_copy(update={"method": DART})


collect = partial(merge, DriftSettings)
"""Merges the settings from all sources, in rising priority: defaults, file, ``DART_*``, flags."""

PANEL = "Detection"

SIGNALS = {
    "attention": "last layer's attention output, as published",
    "attention-80": "attention output of the layer at 80 % of the depth",
    "attention-several": "attention outputs of the upper half of the layers, each of unit length",
    "hidden": "last hidden state, after the last norm",
}
"""The signals that a drift rule can watch, by name."""


class DetectSettings(StudyOptions, PassageOptions):
    """The settings of ``dart-llm detect``; the model always runs dense."""

    signals: Texts = setting(PANEL, "Watch these signals.", tuple(SIGNALS), min_length=1)
    rules: Texts = setting(
        PANEL,
        'Test these drift rules, or the rule of these methods, e.g. paper,dart,"interval 64" '
        "(default: every rule, interval 64, and dart-prompt).",
        (),
    )
    observe_tokens: int = setting(
        PANEL, "Observe this many tokens after a trigger (methods have their own number).", 32, ge=1
    )
    horizon: int = setting(
        PANEL, "Count a change as detected only within this many tokens.", 128, ge=1
    )
    windows: WindowSizes = setting(PANEL, "Curves: tokens per window.", (10,), min_length=1)
    counts: Counts = setting(
        PANEL, "Curves: number of low windows that trigger (n0).", (1, 2, 3), min_length=1
    )
    thresholds: Thresholds = setting(
        PANEL,
        "Curves: values of k in the threshold theta = mu - k sigma.",
        (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4, 6),
        min_length=1,
    )

    @model_validator(mode="after")
    def _check_detect(self) -> DetectSettings:
        for name in self.signals:
            check_name("signal", name, SIGNALS)
        return self

    def rule_names(self) -> tuple[str, ...]:
        """The names of rules and methods to test, in order."""
        if self.rules:
            return self.rules
        # leave out rules that need numbers, and ``never``, which does not trigger
        rules = (n for n in DRIFT_RULES.names() if n != "never" and not rule_form(n)[1])
        return (*rules, "interval 64", "dart-prompt")

    def curve_points(self) -> list[tuple[int, int, float]]:
        """A tuple (window, n0, k) for every point of the curves, with ascending k."""
        return list(product(self.windows, self.counts, sorted(self.thresholds)))

    @property
    def experiment(self) -> str:
        """The name of the experiment's folder."""
        return self.experiment_name or self.experiment_of("detect")
