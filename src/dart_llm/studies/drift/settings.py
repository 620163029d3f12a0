"""The settings of ``dart-llm drift``: sources, methods side by side, seeds, and where it runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

from pydantic import model_validator

from dart_llm import settings
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.settings import BaseSettings, ModelOptions, given_of, merge, setting, words
from dart_llm.studies.drift.methods import DriftMethod, parse_methods

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
        PRUNING, "Fraction of FFN neurons to remove, where a method names none (default: 0.5)."
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
    executor: str | None = setting(PRUNING, "auto, masked, compact, native, slim or graph.")
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
    detection: str | None = setting(
        RESULTS, "A results folder of dart-llm detect that the report shows too."
    )

    @model_validator(mode="after")
    def _check(self) -> DriftSettings:
        if self.mode is not None and self.mode not in MODES:
            raise UnknownName("mode", self.mode, MODES)
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
            given["sparsity"] = 0.5
        return BaseSettings.model_validate(given)

    @property
    def _fixed(self) -> bool:
        """Whether something else than a sparsity sets the counts."""
        table = self.layer_topk or "auto"
        return self.prune_strategy == "auto" or ("auto" not in table and table[:1] != "@")


collect = partial(merge, DriftSettings)
"""The settings merged from all sources: defaults < file < ``DART_*`` < flags."""
