"""What a run is asked to do: one frozen ``PruneConfig`` with its parts, validated on creation."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from dart_llm.errors import ConfigError
from dart_llm.layer_spec import parse_layer_spec
from dart_llm.registry import BUDGETS, DRIFT_RULES, METHODS, SCORES

DEFAULT_SPARSITY = 0.1
"""Fraction of FFN neurons that ``prune(model)`` removes when nothing is said (README: why)."""


class _Part(BaseModel):
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


class ScoreConfig(_Part):
    """How neurons are ranked (docs/method.md, "Scores")."""

    name: str = "normalized"
    ema_decay: float | None = None
    strategy: Literal["topk", "auto"] = "topk"
    proxy_embedding: Literal["output", "input"] = "output"

    @model_validator(mode="after")
    def _check(self) -> ScoreConfig:
        SCORES.check(self.name)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"ema_decay {self.ema_decay} must lie strictly between 0 and 1")
        return self


class BudgetConfig(_Part):
    """How many neurons each layer keeps (docs/method.md, "Budgets")."""

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


class DriftConfig(_Part):
    """When masks are rebuilt (docs/method.md, "Drift").

    ``rule``: ``never``, ``published``, ``paper`` or ``interval N`` (tokens).
    ``min_distance``: tokens between two triggers.  ``max_dense_share``: at most this share of the
    decoded tokens is spent, dense, on re-masks; None: no cap.
    """

    rule: str = "never"
    min_distance: int = 0
    max_dense_share: float | None = None

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
        if self.max_dense_share is not None and not 0 < self.max_dense_share <= 1:
            raise ConfigError(f"max_dense_share {self.max_dense_share} must lie in (0, 1]")
        return self


class RemaskConfig(_Part):
    """What happens to the evidence on a re-mask (docs/method.md, "Evidence").

    ``observe_tokens``: dense tokens observed after a trigger; None: ``max(1, masking_step)``.
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


_SHORT = {"score": "name", "budget": "name", "drift": "rule", "remask": "evidence"}


def _expand(data: Mapping[str, Any]) -> dict[str, Any]:
    """Parts that are given as their name alone become mappings."""
    return {
        key: {_SHORT[key]: value} if key in _SHORT and isinstance(value, str) else value
        for key, value in data.items()
    }


class PruneConfig(_Part):
    """Everything that decides a run's masks.  A part may be given as its name alone.

    ``sparsity``: fraction of all FFN neurons to remove, [0, 1); None: ``DEFAULT_SPARSITY``, unless
    a table or the ``auto`` strategy sets the counts.  ``masking_step``: dense decode tokens before
    the first mask.  ``release_step``: decode step from which everything runs dense.
    ``min_evidence``: tokens (prompt + observed) wanted before the first mask.
    """

    method: str = "dart"
    sparsity: float | None = None
    score: ScoreConfig = ScoreConfig()
    budget: BudgetConfig = BudgetConfig()
    drift: DriftConfig = DriftConfig()
    remask: RemaskConfig = RemaskConfig()
    masking_step: int = 0
    release_step: int | None = None
    min_evidence: int = 0
    compensation: bool = False
    batch: Literal["shared", "per_row"] = "shared"
    executor: Literal["auto", "masked", "compact"] = "auto"
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any) -> Any:
        return _expand(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _check(self) -> PruneConfig:
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
            self._check_exclusive()
        if self.masking_step < 0:
            raise ConfigError(f"masking step {self.masking_step} must not be negative")
        if self.release_step is not None and self.release_step <= self.masking_step:
            raise ConfigError(
                f"release step {self.release_step} must come after masking step "
                f"{self.masking_step}: nothing would ever be pruned"
            )
        if self.min_evidence < 0:
            raise ConfigError(f"min_evidence {self.min_evidence} must not be negative")
        if self.executor == "compact" and self.batch == "per_row":
            raise ConfigError('batch "per_row" has a mask per row: use executor "masked" or "auto"')
        if self.score.strategy == "auto" and self.budget.table is not None:
            raise ConfigError('strategy "auto" sets the counts itself: drop the layer table')
        if self.score.strategy == "auto" and self.budget.name != "uniform":
            raise ConfigError(
                f'strategy "auto" sets the counts itself: drop the budget "{self.budget.name}"'
            )
        return self

    def _check_exclusive(self) -> None:
        if self.score.strategy == "auto":
            raise ConfigError('strategy "auto" sets the counts itself: drop the sparsity')
        if self.budget.table is not None and not parse_layer_spec(self.budget.table).has_auto:
            raise ConfigError(
                f'the layer table "{self.budget.table}" fixes every count: drop the sparsity, or '
                'hand layers to the allocator with "auto"'
            )

    @property
    def target(self) -> float:
        """The sparsity in force: what was asked for, or the default."""
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    def replace(self, changes: Mapping[str, Any]) -> PruneConfig:
        """A copy with ``changes``; a mapping for a part changes only the keys that it holds."""
        data, changes = self.model_dump(), _expand(changes)
        score = changes.get("score")
        if isinstance(score, Mapping) and score.get("strategy") == "auto":
            data["budget"] = BudgetConfig().model_dump()  # the preset's budget has no part in it
        for key, value in changes.items():
            nested = key in _SHORT and isinstance(value, Mapping)
            data[key] = {**data[key], **value} if nested else value
        return PruneConfig.from_mapping(data)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> PruneConfig:
        """Build from plain data; raises ``ConfigError`` (an unknown key suggests the near one)."""
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise ConfigError(first_problem(error)) from None

    @classmethod
    def build(cls, method: str | PruneConfig = "dart", /, **changes: Any) -> PruneConfig:
        """A preset's configuration (or a given one) with ``changes`` on top of it."""
        base = METHODS.get(method) if isinstance(method, str) else method
        if not isinstance(base, PruneConfig):
            raise ConfigError(f"method {method!r} must be a name or a PruneConfig")
        given = {key: value for key, value in changes.items() if value is not None}
        return base.replace(given) if given else base

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; ``from_mapping`` reads it back."""
        return self.model_dump(mode="json")

    def save(self, path: str | Path) -> None:
        """Write as YAML."""
        import yaml

        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PruneConfig:
        """Read what ``save`` wrote; raises ``ConfigError`` when the file cannot be read."""
        return cls.from_mapping(read_yaml(Path(path)))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ``ConfigError`` when there is none."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read the settings file {path}: {reason}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"the settings file {path} must hold names and values")
    return data


def check_sparsity(value: float) -> float:
    """Return ``value`` when it lies in [0, 1); raise ``ConfigError`` otherwise."""
    if not 0 <= value < 1:
        hint = f" (did you mean {value / 100:g}?)" if 2 <= value < 100 else ""
        raise ConfigError(f"sparsity {value:g} must lie in [0, 1): the fraction removed{hint}")
    return value


def first_problem(error: ValidationError) -> str:
    """The first validation problem as one sentence."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where} = {problem['input']!r}: {problem['msg'].lower()}"
