"""The settings of ``dart-llm drift``: sources, methods side by side, seeds, and where it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import model_validator

from dart_llm import settings
from dart_llm.errors import ConfigError, UnknownName, check_name
from dart_llm.pruning.config import PruneConfig, check_sparsity
from dart_llm.pruning.registry import METHODS
from dart_llm.reporting.figures import STYLES
from dart_llm.settings import (
    MASKED,
    STYLE,
    BaseSettings,
    ModelOptions,
    given_of,
    merge,
    setting,
    words,
)

DENSE, NEVER, DART = "dense", "never", MASKED

SPARSITY = 0.5
"""Where a method names none: at half of the neurons a mask that went stale shows in the loss."""

UNGUARDED = {"min_distance": 0, "max_dense_share": None, "allowance": 0}

VARIANTS: dict[str, Callable[[int], Mapping[str, Any]]] = {
    NEVER: lambda n: {"drift": {"rule": "never"}},
    "paper": lambda n: {"drift": {"rule": "paper", "signal": "attention", **UNGUARDED}},
    "interval": lambda n: {"drift": {"rule": f"interval {n}", **UNGUARDED}},
    "fresh": lambda n: _timed("fresh", n),
    "decay": lambda n: _timed("decay", n),
}

NUMBERED = ("interval", "fresh", "decay")

TIMED = ("fresh", "decay")
"""New masks at a known moment."""


def _timed(evidence: str, tokens: int) -> Mapping[str, Any]:
    return {"drift": {"rule": "never"}, "remask": {"evidence": evidence, "observe_tokens": tokens}}


@dataclass(frozen=True)
class DriftMethod:
    """One method of a study.

    ``config``: None for the untouched model.  ``observed``: tokens that a timed method observes
    before its new masks hold, ``moment`` tokens after a change; None for every other method.
    """

    name: str
    config: PruneConfig | None
    observed: int | None = None
    moment: int | None = None

    @property
    def sparsity(self) -> float | None:
        """What was asked for; None where a table or ``auto`` sets the counts."""
        config = self.config
        if config is None:
            return 0.0
        fixed = config.budget.table is not None or config.score.strategy == "auto"
        return None if fixed and config.sparsity is None else config.target

    @property
    def label(self) -> str:
        """``dense``, or name and sparsity as in ``interval:64@0.5``."""
        if self.config is None or self.config.weight_bits is not None:
            return self.name
        return f"{self.name}@{'table' if self.sparsity is None else f'{self.sparsity:g}'}"


def parse_methods(text: str, base: BaseSettings, moment: int) -> tuple[DriftMethod, ...]:
    """The methods that ``text`` names, with commas between them; dense is the first.

    ``base``: settings of dart and its variants, with the study's sparsity.  ``moment``: tokens
    after a change at which new masks of the timed ones hold.  Raises ``ConfigError`` for a name
    that does not exist (with the near one), a number that does not fit, a name that occurs twice.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError("no method is named: give --methods one or more, e.g. never,dart")
    found = {DENSE: DriftMethod(DENSE, None)}
    for word in words:
        method = _parse(word, base, moment)
        if method.label in found and method.label != DENSE:
            raise ConfigError(f'the method "{method.label}" was given twice: leave one out')
        found[method.label] = method
    return tuple(found.values())


def _parse(word: str, base: BaseSettings, moment: int) -> DriftMethod:
    name, at, amount = word.partition("@")
    sparsity = _sparsity(word, amount) if at else None
    kind, colon, number = name.partition(":")
    if kind in VARIANTS:
        tokens = _tokens(word, kind, number if colon else None)
        config = _own(base, sparsity).replace({"method": name, **VARIANTS[kind](tokens)})
        if kind not in TIMED:
            return DriftMethod(name, config)
        if tokens > moment:
            raise ConfigError(
                f"{name} observes {tokens} tokens of the new topic, and its masks are due after "
                f"{moment}: give --remask-at-change {tokens} or more"
            )
        return DriftMethod(name, config, tokens, moment)
    if colon or name not in METHODS:
        names = [*METHODS.names(), *(f"{v}:N" if v in NUMBERED else v for v in VARIANTS)]
        raise UnknownName("method", name, names)
    return DriftMethod(name, _preset(name, base, sparsity))


def _own(base: BaseSettings, sparsity: float | None) -> PruneConfig:
    """Preset dart with the study's settings."""
    config = base.prune_config()
    return config if sparsity is None else config.replace({"sparsity": sparsity})


def _preset(name: str, base: BaseSettings, sparsity: float | None) -> PruneConfig | None:
    if name == DART:
        return _own(base, sparsity)
    preset = METHODS.get(name)
    if preset.sparsity == 0:  # a form of the dense model, which no sparsity changes
        if sparsity:
            raise ConfigError(f"method {name} removes nothing: drop the @{sparsity:g}")
        return None if name == DENSE else preset
    asked = base.target_sparsity() if sparsity is None else sparsity
    return PruneConfig.build(
        name, sparsity=SPARSITY if asked is None else asked, executor=base.executor
    )


def _sparsity(word: str, amount: str) -> float:
    try:
        return check_sparsity(float(amount))
    except ValueError:
        raise ConfigError(
            f'the method "{word}" needs a number after @: the fraction of neurons to remove, as '
            "in dart@0.5"
        ) from None


def _tokens(word: str, kind: str, number: str | None) -> int:
    """N of ``kind:N``; 0 where the kind has none."""
    if kind not in NUMBERED and number is not None:
        raise ConfigError(f'the method "{word}" takes no number: write "{kind}"')
    if kind in NUMBERED and (number is None or not number.isdecimal() or int(number) < 1):
        raise ConfigError(
            f'the method "{word}" needs a whole number of tokens, 1 or more: write "{kind}:N"'
        )
    return int(number or 0)


FREE, FORCED = "free", "forced"

MODES = {
    FREE: "the model writes after every prompt",
    FORCED: "every method reads the same passages; the loss of each token is kept",
}

STUDIED_METHODS = "dense,never,interval:64,published,paper,dart"

STUDY, PRUNING, METRICS, RESULTS = "Study", "Pruning", "Metrics", "Results"

DETECTION = "detection.json"


class DriftSettings(ModelOptions):
    """What a drift study is asked to do; None means "not given"."""

    COMMAS: ClassVar = ("methods", "seeds")

    mode: str | None = setting(
        STUDY, "free: write after prompts; forced: read passages (default: by the source)."
    )
    methods: str = setting(
        STUDY,
        "Methods side by side: presets, never, interval:N, paper, fresh:N, decay:N; any with "
        "@SPARSITY.",
        STUDIED_METHODS,
    )
    seeds: str = setting(STUDY, "Seeds, comma-separated.", "0")
    prompt: str | None = setting(STUDY, "One prompt: its text.")
    prompts: str | None = setting(STUDY, "shipped, or a JSONL file of prompts.")
    passages: str | None = setting(STUDY, "shipped, or a JSONL file of passages (mode forced).")
    limit: int | None = setting(STUDY, "Prompts or passages, the first ones (default: all).", ge=1)
    prompt_tokens: int = setting(STUDY, "Tokens of a passage that are its prompt.", 256, ge=16)
    remask_at_change: int | None = setting(
        STUDY,
        "Tokens after a change at which fresh:N and decay:N hold new masks (default: 64).",
        ge=1,
    )
    generation: int = setting(STUDY, "Tokens to write after a prompt, at most.", 300, ge=2)
    temperature: float | None = setting(
        STUDY, "Sample at this temperature (default: greedy).", ge=0, allow_inf_nan=False
    )
    chat: bool | None = setting(STUDY, "Use the model's chat template (default: if it has one).")
    # pruning: of dart and of its variants; other presets stay as they are
    sparsity: float | None = setting(
        PRUNING,
        f"Fraction of FFN neurons to remove, where a method names none (default: {SPARSITY}).",
    )
    total_prune_percent: float | None = setting(PRUNING, "The same in percent, 0 to 100.")
    layer_topk: str | None = setting(PRUNING, "dart's keep ratios per layer: all:auto, 3:#512.")
    masking_step: int | None = setting(PRUNING, "dart's dense tokens before the first mask.")
    release_step: int | None = setting(PRUNING, "dart's decode step from which all runs dense.")
    min_evidence: int | None = setting(PRUNING, "dart's tokens to observe before the first mask.")
    ranking_method: str | None = setting(PRUNING, "dart's neuron score.")
    ema_decay: float | None = setting(PRUNING, "dart's decay of averaged activations.")
    prune_strategy: str | None = setting(PRUNING, "dart's: topk, or auto.")
    budget: str | None = setting(PRUNING, "dart's allocator over layers.")
    compensation: bool | None = setting(PRUNING, "dart with or without compensation.")
    executor: str | None = setting(PRUNING, "auto, masked, compact, native, slim, graph or triton.")
    calibration: str | None = setting(PRUNING, "Text for presets that calibrate.")
    # metrics of free texts
    metrics: bool = setting(METRICS, "Compare every free text with the dense one.", True)
    embedder: str | None = setting(
        METRICS, "sentence-transformers model (default: all-MiniLM-L6-v2)."
    )
    bertscore: str | None = setting(
        METRICS, "Model of BERTScore (default: all-MiniLM-L6-v2, labelled as such)."
    )
    # results
    experiment_name: str | None = setting(RESULTS, "Default: drift-<mode>-<model>.")
    results_dir: str = setting(RESULTS, "Folder for results.", "results")
    style: str = setting(RESULTS, STYLE, "screen")
    detection: str | None = setting(
        RESULTS, "A results folder of dart-llm detect that the report shows too."
    )

    @model_validator(mode="after")
    def _check(self) -> DriftSettings:
        check_name("mode", self.mode, MODES)
        check_name("style", self.style, STYLES)
        self._check_sources()
        if self.detection is not None and not (Path(self.detection) / DETECTION).is_file():
            raise ConfigError(
                f"--detection {self.detection} holds no {DETECTION}: give the results folder of a "
                "finished dart-llm detect"
            )
        self.seed_list()
        for config in (method.config for method in self.method_list()):
            if config is not None:
                settings.check(config)
        timed = [method.name for method in self.method_list() if method.observed is not None]
        if timed and self.kind == FREE:
            raise ConfigError(
                f"{timed[0]} makes new masks at a known change of topic, and what a model writes "
                "has none: use --passages shipped, or leave it out of --methods"
            )
        if self.remask_at_change is not None and not timed:
            raise ConfigError(
                "--remask-at-change concerns fresh:N and decay:N, and --methods names neither: "
                "add one, e.g. decay:32"
            )
        return self

    def _check_sources(self) -> None:
        given = [name for name in ("prompt", "prompts", "passages") if getattr(self, name)]
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError("the prompt is empty: give at least one word")
        if len(given) > 1:
            raise ConfigError(f"give one source: --{' and --'.join(given)} were both given")
        if self.kind == FREE and (not given or given == ["passages"]):
            raise ConfigError(
                "nothing to write about: give --prompt TEXT or --prompts shipped (or a JSONL "
                "file), or study passages with --passages shipped"
            )
        if self.kind == FORCED and given and given != ["passages"]:
            raise ConfigError(
                f"mode forced reads passages, whose changes of topic are known, not --{given[0]}: "
                "give --passages shipped or a JSONL file of passages"
            )

    @property
    def kind(self) -> str:
        """The mode: as given, else ``forced`` where passages are."""
        return self.mode or (FORCED if self.passages else FREE)

    @property
    def moment(self) -> int:
        """Tokens after a change at which the timed methods hold new masks."""
        return 64 if self.remask_at_change is None else self.remask_at_change

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        model = Path(self.model.rstrip("/")).name.lower()
        return self.experiment_name or f"drift-{self.kind}-{model}"

    def seed_list(self) -> tuple[int, ...]:
        """The seeds, each once; raises ``ConfigError`` for what is none."""
        seeds = words(self.seeds)
        if not seeds or not all(seed.isdecimal() and int(seed) < 2**63 for seed in seeds):
            raise ConfigError(
                f'--seeds "{self.seeds}" must be whole numbers from 0 to 2^63 - 1 with commas '
                "between them, e.g. 0,1,2"
            )
        return tuple(dict.fromkeys(map(int, seeds)))

    def method_list(self) -> tuple[DriftMethod, ...]:
        """The methods in order, dense first; raises ``ConfigError`` or ``UnknownName``."""
        return parse_methods(self.methods, self.base(), self.moment)

    def base(self) -> BaseSettings:
        """What dart and its variants start from, and how the model is loaded."""
        given = given_of(self)
        if self.sparsity is None and self.total_prune_percent is None and not self._fixed:
            given["sparsity"] = SPARSITY
        return BaseSettings.model_validate(given).model_copy(update={"method": DART})

    @property
    def _fixed(self) -> bool:
        """Whether something else than a sparsity sets the counts."""
        table = self.layer_topk or "auto"
        return self.prune_strategy == "auto" or ("auto" not in table and table[:1] != "@")


collect = partial(merge, DriftSettings)
"""The settings merged from all sources: defaults < file < ``DART_*`` < flags."""
