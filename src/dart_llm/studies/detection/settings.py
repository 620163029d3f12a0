"""The settings of ``dart-llm detect``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from pydantic import model_validator

from dart_llm.errors import ConfigError
from dart_llm.settings import ModelOptions, PruningOptions, StudyOptions, setting, words

PANEL = "Detection"

T = TypeVar("T")


class DetectSettings(StudyOptions, ModelOptions):
    """``dart-llm detect``: the model runs dense, so nothing about pruning can be set."""

    passages: str | None = setting(
        PANEL, "shipped, or a JSONL file of passages with known changes (default: shipped)."
    )
    limit: int | None = setting(PANEL, "The first N passages (default: all).", ge=1)
    signals: str = setting(
        PANEL,
        "Signals, comma-separated; attention-scores needs eager attention.",
        "attention,attention-80,attention-several,hidden,attention-scores",
    )
    rules: str | None = setting(
        PANEL,
        'Drift rules, or methods whose rule and guards to take, e.g. paper,dart,"interval 64" '
        "(default: every rule, interval 64, and dart-prompt).",
    )
    # a shorter prompt has no attention distribution
    prompt_tokens: int = setting(PANEL, "Prompt: the first tokens of a passage.", 256, ge=16)
    observe_tokens: int = setting(
        PANEL, "Tokens observed after a trigger, by rules that are no method's.", 32, ge=1
    )
    horizon: int = setting(PANEL, "A change is detected within so many tokens.", 128, ge=1)
    windows: str = setting(PANEL, "Curves: tokens of a window.", "10")
    counts: str = setting(PANEL, "Curves: low windows to a trigger (n0).", "1,2,3")
    thresholds: str = setting(
        PANEL, "Curves: k of theta = mu - k sigma.", "0,0.25,0.5,0.75,1,1.5,2,2.5,3,4,6"
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_about_pruning(cls, data: Any) -> Any:
        for name in sorted(PruningOptions.model_fields.keys() & set(data)):
            raise ConfigError(f"detect runs the model dense: leave out {name}")
        return data

    @model_validator(mode="after")
    def _check_detect(self) -> DetectSettings:
        self._check_kernel()
        for least, values in ((2, self.window_list()), (1, self.count_list())):
            if min(values) < least:
                raise ConfigError(f"{min(values)} is too small: give {least} or more")
        self.threshold_list()
        return self

    def _check_kernel(self) -> None:
        from dart_llm.studies.detection.signals import SCORES

        kernel = self.attn_implementation
        if SCORES in self.signal_names() and kernel not in (None, "eager"):
            raise ConfigError(
                f"attention-scores needs the attention weights, which only eager attention gives: "
                f"drop --attn-implementation {kernel}, or leave attention-scores out of --signals"
            )

    def signal_names(self) -> tuple[str, ...]:
        """Names in the order given; raises ``UnknownName``."""
        from dart_llm.studies.detection.signals import check_signal

        return _list("signals", self.signals, check_signal)

    def rule_names(self) -> tuple[str, ...]:
        """Rules and methods in the order given."""
        from dart_llm.pruning.registry import DRIFT_RULES

        if self.rules is not None:
            return _list("rules", self.rules, str)
        others = ("interval", "never", "windows")  # need numbers, or never trigger
        plain = (name for name in DRIFT_RULES.names() if name not in others)
        return (*plain, "interval 64", "dart-prompt")

    def window_list(self) -> tuple[int, ...]:
        """Window lengths of the curves."""
        return _list("windows", self.windows, int)

    def count_list(self) -> tuple[int, ...]:
        """Low windows to a trigger, of the curves."""
        return _list("counts", self.counts, int)

    def threshold_list(self) -> tuple[float, ...]:
        """Rising; raises ``ConfigError`` for what is no finite number."""
        thresholds = _list("thresholds", self.thresholds, float)
        if not all(abs(k) < float("inf") for k in thresholds):
            raise ConfigError(f'--thresholds "{self.thresholds}" must hold finite numbers')
        return tuple(sorted(thresholds))

    def sweep_list(self) -> list[tuple[int, int, float]]:
        """(window, n0, k) of every point of the curves."""
        return list(product(self.window_list(), self.count_list(), self.threshold_list()))

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        return self.experiment_name or f"detect-{Path(self.model.rstrip('/')).name.lower()}"


def _list(name: str, text: str, kind: Callable[[str], T]) -> tuple[T, ...]:
    """The parts of a comma-separated list, without repetitions."""
    parts = words(text)
    if not parts:
        raise ConfigError(f"--{name} is empty: give at least one")
    try:
        return tuple(dict.fromkeys(kind(part) for part in parts))
    except ValueError:
        raise ConfigError(f'--{name} "{text}" must be numbers, comma-separated') from None
