"""The methods of a drift study: presets, and variants of ``dart`` that differ in re-masking alone.

========================  =========================================================================
``dense``                 the untouched model; always part of a study
``never``                 dart that keeps its first masks
``interval:N``            dart with new masks every N pruned tokens
``paper``                 dart with the paper's rule and signal as they are, without dart's guards
``fresh:N``, ``decay:N``  dart with new masks at a known moment after each change of topic, from N
                          tokens observed right before it: those alone, or on top of decayed
                          evidence; forced mode alone
a preset                  as it is (``dart``, ``published``, ``griffin``, ...)
========================  =========================================================================

The variants share dart's score, budget, compensation and evidence.  ``NAME@0.3`` asks for another
sparsity than the study's.  ``interval`` and ``paper`` do without the guards of dart, the distance
between re-masks and the cap on dense tokens: an interval of N is N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.pruning.config import PruneConfig, check_sparsity
from dart_llm.pruning.registry import METHODS
from dart_llm.settings import BaseSettings

DENSE, NEVER, DART = "dense", "never", "dart"

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
    return PruneConfig.build(name, sparsity=0.5 if asked is None else asked, executor=base.executor)


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
