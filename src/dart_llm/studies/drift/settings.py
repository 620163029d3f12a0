"""The settings of ``dart-llm drift`` and ``dart-llm detect``; the methods that drift compares."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import model_validator

from dart_llm import settings
from dart_llm.errors import ConfigError, check_name
from dart_llm.pruning.config import PruneConfig, check_sparsity
from dart_llm.pruning.registry import DRIFT_RULES, METHODS
from dart_llm.settings import (
    MASKED,
    BaseSettings,
    Fractions,
    MaskOptions,
    ModelOptions,
    Numbers,
    ResultOptions,
    StudyOptions,
    Texts,
    given_of,
    merge,
    setting,
)

DENSE, NEVER, DART = "dense", "never", MASKED

SPARSITY = 0.5
"""Where a method names none: at half of the neurons a mask that went stale shows in the loss."""

UNGUARDED = {"min_distance": 0, "max_dense_share": None, "allowance": 0}

VARIANTS: dict[str, Callable[[int], Mapping[str, Any]]] = {
    NEVER: lambda n: {"drift": {"rule": "never"}},
    "paper": lambda n: {"drift": {"rule": "paper", "signal": "attention", **UNGUARDED}},
    "interval:N": lambda n: {"drift": {"rule": f"interval {n}", **UNGUARDED}},
    "fresh:N": lambda n: _timed("fresh", n),
    "decay:N": lambda n: _timed("decay", n),
}
"""Forms of dart by name: what they change, from the number N of tokens."""

TIMED = ("fresh:N", "decay:N")
"""New masks at a known moment."""


def _timed(evidence: str, tokens: int) -> Mapping[str, Any]:
    return {"drift": {"rule": "never"}, "remask": {"evidence": evidence, "observe_tokens": tokens}}


@dataclass(frozen=True)
class Candidate:
    """One method of a drift study.

    ``config``: None for the untouched model.  ``observed``: tokens that a timed method observes
    before its new masks are in force, ``moment`` tokens after a change; None for other methods.
    """

    name: str
    config: PruneConfig | None = None
    observed: int | None = None
    moment: int = 0

    @property
    def sparsity(self) -> float | None:
        """The requested one; None where a table or ``auto`` sets the counts."""
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


def parse_methods(names: Sequence[str], base: BaseSettings, moment: int) -> tuple[Candidate, ...]:
    """The methods of these names; dense is the first.

    ``base``: settings of dart and its variants, with the study's sparsity.  ``moment``: tokens
    after a change at which new masks of the timed ones are in force.  Raises ``ConfigError`` for
    an unknown name, a number that does not fit, a name that occurs twice.
    """
    candidates = {DENSE: Candidate(DENSE)}
    for name in names:
        candidate = _parse(name, base, moment)
        if candidate.label in candidates and candidate.label != DENSE:
            raise ConfigError(f'the method "{candidate.label}" was given twice: leave one out')
        candidates[candidate.label] = candidate
    return tuple(candidates.values())


def _parse(text: str, base: BaseSettings, moment: int) -> Candidate:
    parts = re.fullmatch(
        r"(?P<name>[^:@]+(:(?P<tokens>[1-9]\d*))?)(@(?P<sparsity>\d*\.?\d+))?", text
    )
    if parts is None:
        raise ConfigError(
            f'cannot read the method "{text}": write NAME, or NAME:N with a whole number of tokens '
            "from 1 on, and behind it @SPARSITY if it has its own, as in interval:64@0.5"
        )
    name, tokens = parts["name"], int(parts["tokens"] or 0)
    sparsity = None if parts["sparsity"] is None else check_sparsity(float(parts["sparsity"]))
    dart = base.prune_config()
    dart = dart if sparsity is None else dart.replace({"sparsity": sparsity})
    kind = f"{name.partition(':')[0]}:N" if tokens else name
    if kind in VARIANTS:
        config = dart.replace({"method": name, **VARIANTS[kind](tokens)})
        if kind not in TIMED:
            return Candidate(name, config)
        if tokens > moment:
            raise ConfigError(
                f"{name} observes {tokens} tokens of the new topic, and its masks are due after "
                f"{moment}: give --remask-at-change {tokens} or more"
            )
        return Candidate(name, config, tokens, moment)
    check_name("method", name, {*METHODS.names(), *VARIANTS})
    if name == DENSE and sparsity:
        raise ConfigError(f"method dense removes nothing: drop the @{sparsity:g}")
    if name in (DENSE, DART):
        return Candidate(name, None if name == DENSE else dart)
    if sparsity is None:
        sparsity = base.target_sparsity()
    requested = SPARSITY if sparsity is None else sparsity
    return Candidate(name, PruneConfig.build(name, sparsity=requested, executor=base.executor))


class PassageOptions(ModelOptions):
    """Passages with known changes of topic, which both commands read."""

    passages: str | None = setting("Passages", "shipped, or a JSONL file of passages.")
    limit: int | None = setting(
        "Passages", "The first N passages, or prompts (default: all).", ge=1
    )
    # a shorter prompt has no attention distribution
    prompt_tokens: int = setting("Passages", "Tokens of a passage that are its prompt.", 256, ge=16)


FREE, FORCED = "free", "forced"

STUDY, METRICS, RESULTS = "Study", "Metrics", "Results"

DETECTION = "detection.json"


def check_named(settings: PassageOptions, *fields: str) -> None:
    """Raise ``ConfigError`` for a list that is empty."""
    for name in fields:
        if not getattr(settings, name):
            raise ConfigError(f"--{name} is empty: give at least one")


class DriftSettings(ResultOptions, MaskOptions, PassageOptions):
    """A drift study; its pruning options are those of dart and its variants."""

    mode: str | None = setting(
        STUDY, "free: write after prompts; forced: read passages (default: by the source)."
    )
    methods: Texts = setting(
        STUDY,
        "Methods side by side: presets, never, interval:N, paper, fresh:N, decay:N; any with "
        "@SPARSITY. Pruning options concern dart and its variants, presets stay as they are.",
        ("dense", "never", "interval:64", "published", "paper", "dart"),
    )
    seeds: Numbers = setting(STUDY, "Seeds, comma-separated.", (0,))
    prompt: str | None = setting(STUDY, "One prompt: its text.")
    prompts: str | None = setting(STUDY, "shipped, or a JSONL file of prompts.")
    remask_at_change: int = setting(
        STUDY, "Tokens after a change at which fresh:N and decay:N have new masks.", 64, ge=1
    )
    generation: int = setting(STUDY, "Tokens to write after a prompt, at most.", 300, ge=2)
    temperature: float | None = setting(
        STUDY, "Sample at this temperature (default: greedy).", ge=0, allow_inf_nan=False
    )
    chat: bool | None = setting(STUDY, "Use the model's chat template (default: if it has one).")
    sparsity: float | None = setting(
        "Pruning",
        f"Fraction of FFN neurons to remove, where a method names none (default: {SPARSITY}).",
    )
    calibration: str | None = setting("Pruning", "Text for presets that calibrate.")
    metrics: bool = setting(METRICS, "Compare every free text with the dense one.", True)
    embedder: str | None = setting(
        METRICS, "Encoder of texts: a folder or a hub id (default: all-MiniLM-L6-v2)."
    )
    experiment_name: str | None = setting(RESULTS, "Default: drift-<mode>-<model>.")
    detection: str | None = setting(
        RESULTS, "A results folder of dart-llm detect that the report shows too."
    )

    @model_validator(mode="after")
    def _check(self) -> DriftSettings:
        check_name("mode", self.mode, (FREE, FORCED))
        check_named(self, "methods", "seeds")
        self._check_sources()
        if self.detection is not None and not (Path(self.detection) / DETECTION).is_file():
            raise ConfigError(
                f"there is no {DETECTION} in --detection {self.detection}: give the results folder "
                "of a finished dart-llm detect"
            )
        for seed in self.seeds:
            settings.check_seed(seed)
        candidates = self.candidates()
        timed = [c.name for c in candidates if c.observed is not None]
        if timed and self.kind == FREE:
            raise ConfigError(
                f"{timed[0]} makes new masks at a known change of topic, and what a model writes "
                "has none: use --passages shipped, or leave it out of --methods"
            )
        if "remask_at_change" in self.model_fields_set and not timed:
            raise ConfigError(
                "--remask-at-change concerns fresh:N and decay:N, and --methods names neither: "
                "add one, e.g. decay:32"
            )
        return self

    def _check_sources(self) -> None:
        given = [name for name in ("prompt", "prompts", "passages") if getattr(self, name)]
        read = given == ["passages"] or (self.mode == FORCED and not given)
        if len(given) > 1 or read != (self.kind == FORCED) or not (given or read):
            raise ConfigError(
                f"mode {self.kind} does not fit {len(given) or 'no'} source(s): give one of "
                "--prompt TEXT, --prompts (shipped, or a JSONL file) to write after, or --passages "
                "(shipped, or a JSONL file) to read in mode forced"
            )
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError("the prompt is empty: give at least one word")

    @property
    def kind(self) -> str:
        """The mode: as given, else ``forced`` where passages are."""
        return self.mode or (FORCED if self.passages else FREE)

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        model = Path(self.model.rstrip("/")).name.lower()
        return self.experiment_name or f"drift-{self.kind}-{model}"

    def candidates(self) -> tuple[Candidate, ...]:
        """The methods in order, dense first; raises ``ConfigError`` or ``UnknownName``."""
        return parse_methods(self.methods, self.base(), self.remask_at_change)

    def base(self) -> BaseSettings:
        """What dart and its variants start from, and how the model is loaded."""
        given = given_of(self)
        table = self.layer_topk or "auto"
        fixed = self.prune_strategy == "auto" or ("auto" not in table and table[:1] != "@")
        if self.sparsity is None and self.total_prune_percent is None and not fixed:
            given["sparsity"] = SPARSITY
        return BaseSettings.model_validate(given).model_copy(update={"method": DART})


collect = partial(merge, DriftSettings)
"""The settings merged from all sources: defaults < file < ``DART_*`` < flags."""

PANEL = "Detection"

SCORES = "attention-scores"

SIGNALS = {
    "attention": "last layer's attention output, as published",
    "attention-80": "attention output of the layer at 80 % of the depth",
    "attention-several": "attention outputs of the upper half of the layers, each of unit length",
    "hidden": "last hidden state, after the last norm",
    SCORES: "last layer's attention distribution over the first half of the prompt",
}
"""What a drift rule can watch, by name."""


class DetectSettings(StudyOptions, PassageOptions):
    """``dart-llm detect``: the model runs dense, so it has no pruning options."""

    signals: Texts = setting(
        PANEL,
        "Signals, comma-separated; attention-scores needs eager attention.",
        tuple(SIGNALS),
    )
    rules: Texts = setting(
        PANEL,
        'Drift rules, or methods whose rule and guards to take, e.g. paper,dart,"interval 64" '
        "(default: every rule, interval 64, and dart-prompt).",
        (),
    )
    observe_tokens: int = setting(
        PANEL, "Tokens observed after a trigger, by rules that are not a method's.", 32, ge=1
    )
    horizon: int = setting(PANEL, "A change is detected within so many tokens.", 128, ge=1)
    windows: Numbers = setting(PANEL, "Curves: tokens of a window.", (10,))
    counts: Numbers = setting(PANEL, "Curves: low windows to a trigger (n0).", (1, 2, 3))
    thresholds: Fractions = setting(
        PANEL,
        "Curves: k of theta = mu - k sigma.",
        (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4, 6),
    )

    @model_validator(mode="after")
    def _check_detect(self) -> DetectSettings:
        check_named(self, "signals", "windows", "counts", "thresholds")
        for name in self.signals:
            check_name("signal", name, SIGNALS)
        kernel = self.attn_implementation
        if SCORES in self.signals and kernel not in (None, "eager"):
            raise ConfigError(
                f"attention-scores needs the attention weights, which only eager attention gives: "
                f"drop --attn-implementation {kernel}, or leave attention-scores out of --signals"
            )
        for least, values in ((2, self.windows), (1, self.counts)):
            if min(values) < least:
                raise ConfigError(f"{min(values)} is too small: give {least} or more")
        if not all(map(math.isfinite, self.thresholds)):
            raise ConfigError("--thresholds must be finite numbers")
        return self

    def rule_names(self) -> tuple[str, ...]:
        """Rules and methods in the order given."""
        if self.rules:
            return self.rules
        others = ("interval", "never", "windows")  # need numbers, or never trigger
        plain = (name for name in DRIFT_RULES.names() if name not in others)
        return (*plain, "interval 64", "dart-prompt")

    def curve_points(self) -> list[tuple[int, int, float]]:
        """(window, n0, k) of every point of the curves, k rising."""
        return list(product(self.windows, self.counts, sorted(self.thresholds)))

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        return self.experiment_name or f"detect-{Path(self.model.rstrip('/')).name.lower()}"
