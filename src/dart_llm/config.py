"""What a run is asked to do: one frozen ``PruneConfig`` with its parts, validated on creation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from dart_llm.config_parts import (
    BudgetConfig,
    CalibrationConfig,
    DriftConfig,
    Part,
    PriorConfig,
    RemaskConfig,
    ScoreConfig,
    TokenConfig,
    first_problem,
    unknown_key,
)
from dart_llm.errors import ConfigError
from dart_llm.layer_spec import parse_layer_spec
from dart_llm.registry import METHODS

__all__ = [
    "DEFAULT_SPARSITY",
    "BudgetConfig",
    "CalibrationConfig",
    "DriftConfig",
    "PriorConfig",
    "PruneConfig",
    "RemaskConfig",
    "ScoreConfig",
    "TokenConfig",
    "check_prepared",
    "check_sparsity",
    "first_problem",
    "read_yaml",
    "unknown_key",
]

DEFAULT_SPARSITY = 0.1
"""Fraction of FFN neurons that ``prune(model)`` removes when nothing is said (README: why)."""


_SHORT = {
    "score": "name",
    "budget": "name",
    "drift": "rule",
    "remask": "evidence",
    "calibration": "source",
}
_PARTS = frozenset({*_SHORT, "prior", "token"})


def _expand(data: Mapping[str, Any]) -> dict[str, Any]:
    """Parts that are given as their name alone become mappings."""
    return {
        key: {_SHORT[key]: value} if key in _SHORT and isinstance(value, str) else value
        for key, value in data.items()
    }


class PruneConfig(Part):
    """Everything that decides a run's masks.  A part may be given as its name alone.

    A bad value, an unknown key or settings that contradict each other raise ``ConfigError``.

    ``sparsity``: fraction of all FFN neurons to remove, [0, 1); None: ``DEFAULT_SPARSITY``, unless
    a table or the ``auto`` strategy sets the counts.  ``masking_step``: dense decode tokens before
    the first mask.  ``release_step``: decode step from which everything runs dense.
    ``min_evidence``: tokens (prompt + observed) wanted before the first mask.  ``skip_sinks``: the
    first tokens of a sequence, which draw attention whatever they say, leave no evidence.
    ``calibration``: what ``prepare`` does before a run.  ``prior``: what is learnt of the model
    when it is first pruned.  ``token``: every token chooses its own neurons; None: masks of the
    sequence.  ``compensation_rank``: features of the FFN's input from which compensation predicts
    the removed neurons' output; 0: their mean alone.  ``weight_bits``: the dense model with weights
    of 8 or 4 bits.  ``batch``: one mask for all rows, or one each.  ``executor``: what runs pruned
    FFNs (docs/performance.md, "Executors"); ``auto``: the fastest that can.  ``seed``: of whatever
    is drawn by chance.
    """

    method: str = "dart"
    sparsity: float | None = None
    score: ScoreConfig = ScoreConfig()
    budget: BudgetConfig = BudgetConfig()
    drift: DriftConfig = DriftConfig()
    remask: RemaskConfig = RemaskConfig()
    calibration: CalibrationConfig | None = None
    prior: PriorConfig | None = None
    token: TokenConfig | None = None
    weight_bits: Literal[4, 8] | None = None
    masking_step: int = 0
    release_step: int | None = None
    min_evidence: int = 0
    skip_sinks: bool = False
    compensation: bool = False
    compensation_rank: int = 0
    batch: Literal["shared", "per_row"] = "shared"
    executor: Literal["auto", "masked", "compact", "native", "slim", "graph"] = "auto"
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
        if self.executor not in ("auto", "masked") and self.batch == "per_row":
            raise ConfigError('batch "per_row" has a mask per row: use executor "masked" or "auto"')
        self._check_calibration()
        self._check_prior()
        self._check_candidates()
        if self.score.strategy == "auto" and self.budget.table is not None:
            raise ConfigError('strategy "auto" sets the counts itself: drop the layer table')
        if self.score.strategy == "auto" and self.budget.name != "uniform":
            raise ConfigError(
                f'strategy "auto" sets the counts itself: drop the budget "{self.budget.name}"'
            )
        return self

    def _check_calibration(self) -> None:
        prior = self.calibration is not None and self.calibration.purpose == "prior"
        if prior != (self.score.prior_weight is not None):
            raise ConfigError(
                'prior_weight and a calibration with purpose "prior" belong together: give both '
                "or neither"
            )
        if self.weight_bits is not None and self.sparsity != 0:
            raise ConfigError(
                f"weight_bits {self.weight_bits} stands for the dense model: drop the sparsity"
            )

    def _check_prior(self) -> None:
        if self.compensation_rank < 0:
            raise ConfigError(f"compensation_rank {self.compensation_rank} must not be negative")
        if self.token is not None and self.compensation_rank:
            raise ConfigError(
                "tokens that choose their own neurons have no low-rank compensation: drop "
                "compensation_rank"
            )
        if self.prior is not None:
            return
        wants = {
            f"compensation_rank {self.compensation_rank}": self.compensation_rank > 0,
            "skip_sinks": self.skip_sinks,  # a prompt of sinks alone would leave nothing at all
        }
        for what, wanted in wants.items():
            if wanted:
                raise ConfigError(f"{what} needs a prior: give prior={{}} too")

    def _check_candidates(self) -> None:
        share = None if self.token is None else self.token.candidates
        if share is None or self.target == 0 or not self._keeps_one_share:
            return
        if share < 1 - self.target - 1e-9:
            raise ConfigError(
                f"token.candidates {share:g} leaves fewer neurons than sparsity {self.target:g} "
                f"keeps: give at least {1 - self.target:g}, or None"
            )

    @property
    def _keeps_one_share(self) -> bool:
        """Whether every layer keeps ``1 - target`` of its neurons."""
        alone = self.budget.name == "uniform" and self.budget.table is None
        return alone and self.score.strategy == "topk"

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
        """A copy with ``changes``; a mapping for a part changes only the keys that it holds.

        Raises ``ConfigError`` for what does not fit.
        """
        data, changes = self.model_dump(), _expand(changes)
        score = changes.get("score")
        if isinstance(score, Mapping) and score.get("strategy") == "auto":
            data["budget"] = BudgetConfig().model_dump()  # the preset's budget has no part in it
        for key, value in changes.items():
            nested = key in _PARTS and isinstance(value, Mapping)
            data[key] = {**(data[key] or {}), **value} if nested else value
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
        """A preset's configuration (or a given one) with ``changes`` on top of it.

        A change to None is none.  Raises ``UnknownName`` for a method that does not exist,
        ``ConfigError`` for what does not fit.
        """
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


def check_prepared(config: PruneConfig, chooses: bool, prior: bool) -> None:
    """Raise ``ConfigError`` for a run of what only ``prepare`` makes ready.

    ``chooses``: whether the run is to choose masks itself; ``prior``: whether it has a prior.
    """
    if config.weight_bits is not None:
        why = f"rounds the weights of a copy of the model to {config.weight_bits} bits"
        option = ""
    elif chooses and config.calibration is not None and not prior:
        what = "masks" if config.calibration.purpose == "masks" else "prior"
        why, option = f"takes its {what} from calibration", ""
        if config.calibration.source == "text":
            option = " --calibration FILE"
    else:
        return
    argument = ", calibration=FILE" if option else ""
    raise ConfigError(
        f'method "{config.method}" {why}, which prune does not do: use '
        f"dart_llm.prepare.prepare(model, tokenizer, config{argument}), or "
        f"dart-llm eval --method {config.method}{option}"
    )


def check_sparsity(value: float) -> float:
    """Return ``value`` when it lies in [0, 1); raise ``ConfigError`` otherwise."""
    if not 0 <= value < 1:
        hint = f" (did you mean {value / 100:g}?)" if 2 <= value < 100 else ""
        raise ConfigError(f"sparsity {value:g} must lie in [0, 1): the fraction removed{hint}")
    return value
