"""The parts of a ``PruneConfig``, each validated on creation."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from dart_llm.errors import ConfigError
from dart_llm.layer_spec import parse_layer_spec
from dart_llm.registry import BUDGETS, DRIFT_RULES, SCORES


class Part(BaseModel):
    """A frozen group of settings; a bad value or an unknown key raises ``ConfigError``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(first_problem(error)) from None

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise unknown_key(cls, str(key))
        return data


def unknown_key(part: type[BaseModel], key: str) -> ConfigError:
    """The error for a setting that does not exist; suggests the near one."""
    known = sorted(part.model_fields)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f'did you mean "{near[0]}"?' if near else f"known settings: {', '.join(known)}"
    return ConfigError(f'unknown setting "{key}" in {part.__name__}; {hint}')


class ScoreConfig(Part):
    """How neurons are ranked (docs/method.md, "Scores").

    ``ema_decay``: weight that an older token keeps with each new one, (0, 1); None: all count
    alike.  ``strategy``: ``topk``, or ``auto``: neurons whose score reaches the layer's mean.
    ``proxy_embedding``: whose rows the scores ``max`` to ``product`` read.
    ``prior_weight``: ranks by the text and by a calibrated prior are averaged, the prior with this
    weight; None: the text alone.
    """

    name: str = "normalized"
    ema_decay: float | None = None
    strategy: Literal["topk", "auto"] = "topk"
    proxy_embedding: Literal["output", "input"] = "output"
    prior_weight: float | None = None

    @model_validator(mode="after")
    def _check(self) -> ScoreConfig:
        SCORES.check(self.name)
        if self.prior_weight is not None and not 0 <= self.prior_weight <= 1:
            raise ConfigError(f"prior_weight {self.prior_weight} must lie in [0, 1]")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"ema_decay {self.ema_decay} must lie strictly between 0 and 1")
        return self


class BudgetConfig(Part):
    """How many neurons each layer keeps (docs/method.md, "Budgets").

    ``name``: a budget, or ``blend A B``.  ``table``: a layer table such as ``0-3:0.9,4-29:auto``.
    ``multiple``: counts are multiples of it, or the width.  ``refresh``: whether counts stay as at
    the ``first`` mask, or are set anew with ``every`` one.
    """

    name: str = "uniform"
    table: str | None = None
    multiple: int = 1
    refresh: Literal["first", "every"] = "first"

    @model_validator(mode="after")
    def _check(self) -> BudgetConfig:
        self.parts()
        if self.table is not None:
            parse_layer_spec(self.table)
        if self.multiple < 1:
            raise ConfigError(f"multiple {self.multiple} must be at least 1")
        return self

    def parts(self) -> tuple[str, ...]:
        """The budgets behind the name: one, or the two of ``blend A B``."""
        words = self.name.split()
        if words and words[0] == "blend":
            if len(words) != 3:
                raise ConfigError(
                    f'"{self.name}" must name two budgets, as in "blend energy depth"'
                )
            words = words[1:]
        elif len(words) != 1:
            raise ConfigError(f'"{self.name}" is not a budget; write "blend A B" to mix two')
        return tuple(BUDGETS.check(word) for word in words)


class DriftConfig(Part):
    """When masks are rebuilt (docs/method.md, "Drift").

    ``rule``: ``never``, ``published``, ``paper``, ``dart`` or ``interval N`` (tokens).  ``signal``:
    what is watched, the last layer's ``attention`` output or the last ``hidden`` state.
    ``min_distance``: tokens between two triggers.  ``max_dense_share``: at most this share of the
    decoded tokens is spent, dense, on re-masks, and ``allowance`` tokens beside it; None: no cap.
    """

    rule: str = "never"
    signal: Literal["attention", "hidden"] = "attention"
    min_distance: int = 0
    max_dense_share: float | None = None
    allowance: int = 0

    @model_validator(mode="after")
    def _check(self) -> DriftConfig:
        name, _, argument = self.rule.partition(" ")
        DRIFT_RULES.check(name)
        if (name == "interval") != bool(argument):
            raise ConfigError(
                f'drift rule "{self.rule}": write "interval N" with N tokens; no other rule takes '
                "a number"
            )
        if argument and (not argument.isdigit() or int(argument) < 1):
            raise ConfigError(f'drift rule "{self.rule}": N must be a whole number of tokens >= 1')
        if self.min_distance < 0:
            raise ConfigError(f"min_distance {self.min_distance} must not be negative")
        if self.allowance < 0:
            raise ConfigError(f"allowance {self.allowance} must not be negative")
        if self.max_dense_share is not None and not 0 < self.max_dense_share <= 1:
            raise ConfigError(f"max_dense_share {self.max_dense_share} must lie in (0, 1]")
        return self


class RemaskConfig(Part):
    """What happens to the evidence on a re-mask (docs/method.md, "Evidence").

    ``evidence``: masks are made ``fresh`` from what is observed after the trigger, or older tokens
    count too, less by ``decay``, (0, 1].  ``observe_tokens``: dense tokens observed after a
    trigger; None: ``max(1, masking_step)``.
    """

    evidence: Literal["fresh", "decay"] = "fresh"
    decay: float = 0.1
    observe_tokens: int | None = None

    @model_validator(mode="after")
    def _check(self) -> RemaskConfig:
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay {self.decay} must lie in (0, 1]")
        if self.observe_tokens is not None and self.observe_tokens < 1:
            raise ConfigError(f"observe_tokens {self.observe_tokens} must be at least 1")
        return self


class CalibrationConfig(Part):
    """What is learnt from tokens that are no part of a prompt (docs/method.md, "Calibration").

    ``source``: a ``text``, or what the model writes by ``self``.  ``sequences`` of ``length``
    tokens are run dense and observed.  ``purpose``: static ``masks``, or a ``prior`` of the score.
    """

    source: Literal["text", "self"] = "text"
    sequences: int = 128
    length: int = 256
    purpose: Literal["masks", "prior"] = "masks"

    @model_validator(mode="after")
    def _check(self) -> CalibrationConfig:
        for name, least in (("sequences", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least {least}")
        return self


class PriorConfig(Part):
    """What is learnt of a model once, from text that it writes itself (docs/method.md, "Prior").

    ``sequences`` of ``length`` tokens, sampled at ``temperature`` from the likeliest tokens that
    together have the chance ``top_p``.  Each goes on from the first ``opening`` tokens of a text
    that is shipped for this; 0, or no tokenizer at hand: from the model's start token.
    ``tokens``: the prior weighs as much as so many observed tokens.
    """

    sequences: int = 32
    length: int = 128
    opening: int = 24
    temperature: float = 0.8
    top_p: float = 0.95
    tokens: int = 32

    @model_validator(mode="after")
    def _check(self) -> PriorConfig:
        least_of = {"sequences": 1, "length": 16, "opening": 0, "tokens": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ConfigError(f"prior: {name} {getattr(self, name)} must be at least {least}")
        if self.opening >= self.length:
            raise ConfigError(
                f"prior: opening {self.opening} must be less than length {self.length}"
            )
        if not self.temperature > 0:
            raise ConfigError(f"prior: temperature {self.temperature} must be more than 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"prior: top_p {self.top_p} must lie in (0, 1]")
        return self


class TokenConfig(Part):
    """Every token chooses its own neurons (docs/method.md, "Token-level tracing").

    ``bits`` (4 or 8) per weight and ``group`` inputs per scale of the copies that rank neurons;
    ``candidates``: fraction of each layer's neurons, by the sequence's scores, out of which tokens
    choose, (0, 1]; None: all.
    """

    bits: Literal[4, 8] = 4
    group: int = 32
    candidates: float | None = None

    @model_validator(mode="after")
    def _check(self) -> TokenConfig:
        if self.group < 1:
            raise ConfigError(f"group {self.group} must be at least 1: inputs that share a scale")
        if self.candidates is not None and not 0 < self.candidates <= 1:
            raise ConfigError(
                f"candidates {self.candidates:g} must lie in (0, 1]: the fraction of a layer's "
                "neurons out of which every token chooses"
            )
        return self


SECRET = ("api_key",)
"""Settings whose value no message shows."""


def first_problem(error: ValidationError) -> str:
    """The first validation problem as one sentence."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    shown = "" if where in SECRET else f" = {problem['input']!r}"
    return f"{where}{shown}: {problem['msg'].lower()}"
