"""The settings of a run: one frozen ``PruneConfig`` with its parts, validated on creation."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from dart_llm.errors import ConfigError
from dart_llm.pruning.layer_table import parse_layer_spec
from dart_llm.pruning.registry import BUDGETS, DRIFT_RULES, METHODS, SCORES, TOKEN_RULES

AtLeast0 = Annotated[int, Field(ge=0)]
AtLeast1 = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
"""(0, 1]."""
From0To1 = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def check_sparsity(value: float) -> float:
    """Return ``value`` if it is in [0, 1); raise ``ConfigError`` otherwise."""
    if not 0 <= value < 1:
        hint = f" (did you mean {value / 100:g}?)" if 2 <= value < 100 else ""
        raise ConfigError(f"sparsity {value:g} must lie in [0, 1): the fraction removed{hint}")
    return value


class Part(BaseModel):
    """A frozen group of settings; a bad value or an unknown key raises ``ConfigError``.

    ``called``: prefix of the settings' names in messages, or "".  ``short``: the setting that a
    plain string sets if it is given instead of the group; "" if there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    called: ClassVar[str] = ""
    short: ClassVar[str] = ""

    @model_validator(mode="wrap")
    @classmethod
    def _validated(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        data = cls.expanded(data)
        for key in data if isinstance(data, Mapping) else ():
            if key not in cls.model_fields:
                raise unknown_key(cls, str(key))
        try:
            return validate(data)
        except ValidationError as error:
            is_group = not error.errors()[0]["loc"]  # the group itself is bad, not one setting
            name = cls.__name__.removesuffix("Config").lower() if is_group else cls.called
            raise ConfigError(first_problem(error, name)) from None

    @classmethod
    def expanded(cls, data: Any) -> Any:
        """Return ``data``, with a plain string replaced by the mapping that it abbreviates."""
        return {cls.short: data} if cls.short and isinstance(data, str) else data


def unknown_key(part: type[BaseModel], key: str) -> ConfigError:
    """The error for a setting that does not exist, which suggests a similar name."""
    settings = sorted(part.model_fields)
    near = difflib.get_close_matches(key, settings, n=1, cutoff=0.5)
    hint = f'did you mean "{near[0]}"?' if near else f"known settings: {', '.join(settings)}"
    return ConfigError(f'unknown setting "{key}" in {part.__name__}; {hint}')


class ScoreConfig(Part):
    """How neurons are ranked (docs/reference.md, "Scores").

    ``ema_decay``: with each new token, the weights of all older tokens are multiplied by this
    factor, (0, 1); None means that all tokens weigh the same.  ``strategy``: ``topk`` keeps the
    neurons with the largest scores, ``auto`` those whose score is at least the layer's mean.
    ``proxy_embedding``: the embedding (output or input) that the scores ``max``, ``mean``,
    ``combined`` and ``product`` read.  ``prior_weight``: weight of a calibrated ranking when it is
    averaged with the ranking from the text; None means that there is no calibrated ranking.
    """

    short: ClassVar[str] = "name"

    name: Annotated[str, AfterValidator(SCORES.check)] = "normalized"
    ema_decay: float | None = Field(default=None, gt=0, lt=1, allow_inf_nan=False)
    strategy: Literal["topk", "auto"] = "topk"
    proxy_embedding: Literal["output", "input"] = "output"
    prior_weight: From0To1 | None = None


class BudgetConfig(Part):
    """How many neurons each layer keeps (docs/reference.md, "Budgets").

    ``name``: a budget, or ``blend A B``, the mean of two.  ``table``: a layer table, which sets the
    counts of some layers, such as ``0-3:0.9,4-29:auto``.
    """

    short: ClassVar[str] = "name"

    name: str = "uniform"
    table: str | None = None

    @model_validator(mode="after")
    def _check(self) -> BudgetConfig:
        self.parts()
        if self.table is not None:
            parse_layer_spec(self.table)
        return self

    def parts(self) -> tuple[str, ...]:
        """Names of the budgets that ``name`` refers to: one, or two for ``blend A B``."""
        words = self.name.split()
        if len(words) == 3 and words[0] == "blend":
            words = words[1:]
        elif len(words) != 1:
            raise ConfigError(
                f'"{self.name}" is not a budget; write "blend A B" to mix two, as in "blend energy '
                'depth"'
            )
        return tuple(BUDGETS.check(word) for word in words)


RULE_FORMS = {
    "interval": ("interval N", r"[1-9]\d*", "N whole tokens >= 1"),
    "windows": (
        "windows W N K",
        r"([2-9]|[1-9]\d+) [1-9]\d* \d+(\.\d+)?",
        "W whole tokens >= 2, N whole windows >= 1, K a number >= 0",
    ),
}
"""Maps each built-in drift rule that takes numbers to its form, a regular expression for the
numbers, and their bounds in words.  It is here because importing the rules' module imports torch.
"""


def rule_form(name: str) -> tuple[str, str, str]:
    """The form, pattern and bounds of a drift rule, as in ``RULE_FORMS``.

    A rule that is not built in takes one number >= 0 per parameter of its function; the number must
    be whole if the parameter is annotated as ``int``.
    """
    if DRIFT_RULES.is_built_in(name):
        return RULE_FORMS.get(name, (name, "", "it takes no numbers"))
    is_int = {
        parameter: details.annotation in (int, "int")
        for parameter, details in signature(DRIFT_RULES.get(name)).parameters.items()
    }
    form = " ".join([name, *map(str.upper, is_int)])
    pattern = " ".join(r"\d+" if whole else r"\d+(\.\d+)?" for whole in is_int.values())
    bounds = (f"{p.upper()} a {'whole ' * whole}number >= 0" for p, whole in is_int.items())
    return form, pattern, ", ".join(bounds) or "it takes no numbers"


class DriftConfig(Part):
    """When masks are rebuilt (docs/reference.md, "Drift").

    ``rule``: ``never``, ``published``, ``paper``, ``dart``, ``interval N`` (every N tokens) or
    ``windows W N K`` (N windows of W tokens whose similarity is below mu - K sigma).  ``signal``:
    what the detector watches: the last layer's ``attention`` output, or the last ``hidden`` state.
    ``min_distance``: minimum number of tokens between two triggers.  ``max_dense_share``: largest
    share of the decoded tokens that may run dense for re-masks, in addition to ``allowance``
    tokens; None means no limit.
    """

    short: ClassVar[str] = "rule"

    rule: str = "never"
    signal: Literal["attention", "hidden"] = "attention"
    min_distance: AtLeast0 = 0
    max_dense_share: Share | None = None
    allowance: AtLeast0 = 0

    @model_validator(mode="after")
    def _check(self) -> DriftConfig:
        name, _, numbers = self.rule.partition(" ")
        DRIFT_RULES.check(name)
        form, pattern, what = rule_form(name)
        if not re.fullmatch(pattern, numbers, re.ASCII):
            raise ConfigError(f'drift rule "{self.rule}": write "{form}", {what}')
        return self


class RemaskConfig(Part):
    """What happens to the evidence when masks are rebuilt (docs/reference.md, "Evidence").

    Evidence is the sums over observed tokens from which masks are made.  ``evidence``: with
    ``fresh``, new masks use only the tokens after the trigger; with ``decay``, older tokens count
    too, multiplied by ``decay``, (0, 1].  ``observe_tokens``: number of dense tokens observed after
    a trigger; None means ``max(1, masking_step)``.
    """

    short: ClassVar[str] = "evidence"

    evidence: Literal["fresh", "decay"] = "fresh"
    decay: Share = 0.1
    observe_tokens: AtLeast1 | None = None


class CalibrationConfig(Part):
    """Which statistics are collected before any prompt (docs/reference.md, "Self-calibration").

    The dense model runs sequences of text, whose activations are observed.  ``source``: a given
    ``text``, or text that the model generates (``self``).  ``sequences``: number of sequences.
    ``length``: tokens per sequence.  ``purpose``: ``masks`` makes static masks; ``prior`` makes a
    ranking of the neurons that is averaged with the ranking from each text.
    """

    short: ClassVar[str] = "source"

    source: Literal["text", "self"] = "text"
    sequences: AtLeast1 = 128
    length: int = Field(default=256, ge=2)
    purpose: Literal["masks", "prior"] = "masks"


class SelfStatsConfig(Part):
    """What is learned about a model once, from self-generated text (docs/method.md).

    The model samples text at ``temperature`` and ``top_p``.  ``sequences``: number of sequences.
    ``length``: tokens per sequence.  ``opening``: number of tokens at the start of a sequence that
    come from a passage shipped with this package; with 0, or without a tokenizer, a sequence starts
    with the model's start token.  ``tokens``: the learned sums weigh as much as this many observed
    tokens.
    """

    sequences: AtLeast1 = 32
    length: int = Field(default=128, ge=16)
    opening: AtLeast0 = 24
    temperature: Above0 = 0.8
    top_p: Share = 0.95
    tokens: AtLeast0 = 32

    @model_validator(mode="after")
    def _check(self) -> SelfStatsConfig:
        if self.opening >= self.length:
            raise ConfigError(
                f"self_stats: opening {self.opening} must be less than length {self.length}"
            )
        return self


class TokenConfig(Part):
    """Every token selects its own neurons or inputs (docs/reference.md, "Per-token selection").

    ``rule``: name of a class in ``TOKEN_RULES``, whose ``options`` name the settings that it uses.
    Low-bit proxies are rough copies of gate and up, which rank the neurons.  ``bits``: 4 or 8 bits
    per weight of a proxy.  ``group``: number of inputs with the same scale.  ``inputs``: share of
    the inputs, (0, 1], that proxies are multiplied with; the inputs of largest magnitude are used.
    ``proxy``: ``always`` makes proxies; ``auto`` makes none if gate and up are quantized, because
    the quantized weights then rank the neurons.
    """

    rule: Annotated[str, AfterValidator(TOKEN_RULES.check)] = "low-bit"
    proxy: Literal["auto", "always"] = "auto"
    bits: Literal[4, 8] = 4
    group: AtLeast1 = 32
    inputs: Share = 1.0


class HeadConfig(Part):
    """How decoded tokens are scored (docs/reference.md, "Screened head").

    ``kind``: ``full`` uses the whole output head; ``screened`` computes rough scores for the whole
    vocabulary, and exact scores for entries near the best.  ``bytes``: share of the head's bytes
    that a screened head reads, on average over self-generated text, (0, 1].  The string ``screened
    0.2`` sets both.
    """

    called: ClassVar[str] = "head"

    kind: Literal["full", "screened"] = "full"
    bytes: Share = 0.25

    @classmethod
    def expanded(cls, data: Any) -> Any:
        if not isinstance(data, str):
            return data
        kind, _, share = data.partition(" ")
        return {"kind": kind, "bytes": share} if share else {"kind": kind}


SECRET = ("api_key",)
"""Names of settings; messages do not show the values of these settings."""

BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
"""Maps pydantic's bounds of a field to words."""


def first_problem(error: ValidationError, called: str = "") -> str:
    """The first validation problem, in words; ``called``: name of the group of settings."""
    problem = error.errors()[0]
    parts = (called, *problem["loc"])  # without the index into a list
    where = ".".join(part for part in parts if part and isinstance(part, str))
    for bound, words in BOUNDS.items():
        if bound in problem.get("ctx", {}):
            return f"{where} {problem['input']} must be {words} {problem['ctx'][bound]:g}"
    value = repr(problem["input"])
    value = value if len(value) <= 200 else f"{value[:200]}..."
    shown = "" if where in SECRET else f" = {value}"
    return f"{where}{shown}: {problem['msg'].lower()}"


USER_MASKS = "fixed masks"
"""Shown instead of a method's name if the user chose the neurons."""

DEFAULT_METHOD = "dart-token"
"""The default method of every command and of ``prune``: its perplexity is within 2 % of the dense
model's (README).
"""

DEFAULT_SPARSITY = 0.3
"""The fraction of FFN neurons that every command and ``prune`` remove by default."""

PARTS: dict[str, type[Part]] = {
    "score": ScoreConfig,
    "budget": BudgetConfig,
    "drift": DriftConfig,
    "remask": RemaskConfig,
    "calibration": CalibrationConfig,
    "self_stats": SelfStatsConfig,
    "token": TokenConfig,
    "head": HeadConfig,
}
"""Fields of ``PruneConfig`` that are groups of settings."""


class PruneConfig(Part):
    """All settings that decide a run's masks.

    A plain string, given for a group of settings, sets the group's main setting.  A bad value, an
    unknown key or settings that contradict each other raise ``ConfigError``.

    ``sparsity``: fraction of all FFN neurons to remove, [0, 1); None means ``DEFAULT_SPARSITY``,
    unless a table or the ``auto`` strategy sets the counts.
    ``masking_step``: number of dense decode tokens before the first mask.  ``release_step``: decode
    step from which everything runs dense again.  ``min_evidence``: number of observed tokens
    (including the prompt) required before the first mask.  ``skip_sinks``: exclude the attention
    sinks, the first tokens of a sequence, from the evidence.
    ``calibration``: statistics that ``prepare`` collects before a run.  ``self_stats``: what is
    learned about the model when it is first pruned.  ``token``: how every token selects its own
    neurons; None means that a sequence's tokens share a mask.  ``compensation``: add an estimate of
    the removed neurons' output.  ``compensation_rank``: number of features of the FFN's input from
    which this output is predicted; with 0, the estimate is the mean.  ``head``: how decoded tokens
    are scored.  ``batch``: one mask for all rows, or one per row.  ``executor``: the code that runs
    pruned FFNs (docs/performance.md, "Executors"); ``auto`` is the fastest executor that supports
    the model, ``slim`` an alias of ``native``.  ``seed``: random seed.
    """

    method: str = "dart"
    sparsity: Annotated[float, AfterValidator(check_sparsity)] | None = None
    score: ScoreConfig = ScoreConfig()
    budget: BudgetConfig = BudgetConfig()
    drift: DriftConfig = DriftConfig()
    remask: RemaskConfig = RemaskConfig()
    calibration: CalibrationConfig | None = None
    self_stats: SelfStatsConfig | None = None
    token: TokenConfig | None = None
    head: HeadConfig = HeadConfig()
    masking_step: AtLeast0 = 0
    release_step: int | None = None
    min_evidence: AtLeast0 = 0
    skip_sinks: bool = False
    compensation: bool = False
    compensation_rank: AtLeast0 = 0
    batch: Literal["shared", "per_row"] = "shared"
    executor: Annotated[
        Literal["auto", "masked", "compact", "native", "cuda"],
        BeforeValidator(lambda name: "native" if name == "slim" else name),
    ] = "auto"
    seed: int = Field(default=0, lt=2**63)

    @model_validator(mode="after")
    def _check(self) -> PruneConfig:
        for problem in (*self._contradictions(), *self._double_counts()):
            raise ConfigError(problem)
        return self

    def _contradictions(self) -> Iterator[str]:
        """Yield a message for each pair of settings that exclude or require each other."""
        if self.release_step is not None and self.release_step <= self.masking_step:
            yield (
                f"release step {self.release_step} must come after masking step "
                f"{self.masking_step}: nothing would ever be pruned"
            )
        if self.executor not in ("auto", "masked") and self.batch == "per_row":
            yield 'batch "per_row" builds a mask for each row: use executor "masked" or "auto"'
        if self.selects_per_token and self.drift.rule != "never":
            yield (
                f"with method {self.method} every token selects its own neurons, so there is no "
                "mask to rebuild: drop the drift rule, or use a method with masks, such as dart"
            )
        prior = self.calibration is not None and self.calibration.purpose == "prior"
        if prior != (self.score.prior_weight is not None):
            yield 'prior_weight and a calibration with purpose "prior" require each other'
        if self.token is not None and self.compensation_rank:
            yield "per-token selection has no low-rank compensation: drop compensation_rank"
        # without learned statistics, a prompt that has only sinks would give no evidence
        if self.self_stats is None and (self.compensation_rank or self.skip_sinks):
            yield "compensation_rank and skip_sinks need learned statistics: give self_stats={} too"

    def _double_counts(self) -> Iterator[str]:
        """Yield a message if several settings set the keep counts."""
        table, sparse = self.budget.table, self.sparsity is not None
        uniform = self.budget.name == "uniform" and table is None
        if self.score.strategy == "auto" and (sparse or not uniform):
            yield 'strategy "auto" sets the counts: drop the sparsity, layer table and budget'
        elif sparse and table is not None and not parse_layer_spec(table).has_auto:
            yield (
                f'the layer table "{table}" fixes every count: drop the sparsity, or let the '
                'budget decide some layers with "auto"'
            )

    @property
    def target(self) -> float:
        """The requested sparsity, or the default if none was requested."""
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    @property
    def selects_per_token(self) -> bool:
        """Whether every token selects its own neurons, so that no mask serves a whole sequence."""
        return self.token is not None

    @property
    def screens(self) -> bool:
        """Whether decoded tokens are scored by a screened head."""
        return self.head.kind == "screened"

    def replace(self, changes: Mapping[str, Any]) -> PruneConfig:
        """A copy with ``changes``; a mapping for a group of settings changes only its own keys.

        Raises ``ConfigError`` for settings that contradict each other.
        """
        data = self.model_dump()
        for key, value in changes.items():
            value = PARTS[key].expanded(value) if key in PARTS else value
            nested = key in PARTS and isinstance(value, Mapping)
            data[key] = {**(data[key] or {}), **value} if nested else value
            if key == "score" and nested and value.get("strategy") == "auto":
                # this strategy replaces the preset's budget
                data["budget"] = {**BudgetConfig().model_dump(), **changes.get("budget", {})}
        return PruneConfig.from_mapping(data)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> PruneConfig:
        """Build from plain data; a ``ConfigError`` for an unknown key suggests a similar name."""
        return cls.model_validate(dict(data))

    @classmethod
    def build(cls, method: str | PruneConfig = DEFAULT_METHOD, /, **changes: Any) -> PruneConfig:
        """The preset named ``method``, or ``method`` itself, with ``changes`` that are not None.

        Raises ``UnknownName`` for a method that does not exist, ``ConfigError`` for settings that
        contradict each other.
        """
        base = METHODS.get(method) if isinstance(method, str) else method
        if not isinstance(base, PruneConfig):
            raise ConfigError(f"method {method!r} must be a name or a PruneConfig")
        changes = {key: value for key, value in changes.items() if value is not None}
        return base.replace(changes) if changes else base

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data for ``from_mapping``; has ``head`` only if the head is screened."""
        return self.model_dump(mode="json", exclude={"head"} if not self.screens else set())
