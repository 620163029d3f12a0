"""What ``dart-llm bench speed`` runs: the untouched model, our own dense path, methods, costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm.errors import ConfigError
from dart_llm.experiments.variants import NEVER, read_variants
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.registry import METHODS
from dart_llm.reporting.words import percent

TRANSFORMERS = "transformers"

OWN = ("dense, slim", "dense, native", "dense, graph")
"""Labels of our own dense path, the better first."""

IDLE = "attached, sparsity 0"
"""Label of the model that is attached and never pruned."""

FASTEST = ("slim", "native", "graph", "compact")
"""Executors for what is measured under one of them alone, the better first."""

FOREVER = 10**6
"""Tokens before the first mask where only observing is measured."""

Kind = str
"""``dense``, ``method`` or ``cost``."""


@dataclass(frozen=True)
class Variant:
    """One way to prune, at any sparsity."""

    label: str
    config: PruneConfig


@dataclass(frozen=True)
class Case:
    """One row.  ``config`` None: the untouched model.

    ``whole``: masks that keep everything, so that the executor runs although nothing is removed.
    ``against``: of a cost, the label of the row that is subtracted.  ``variant``: of a method.
    """

    label: str
    kind: Kind
    config: PruneConfig | None = None
    whole: bool = False
    against: str = ""
    variant: str | None = None

    @property
    def executor(self) -> str | None:
        return None if self.config is None else self.config.executor


def parse(methods: str, file: str | None, every: int | None, seed: int) -> tuple[Variant, ...]:
    """Methods by name, then the variants of ``file``; ``every``: rebuild masks that often.

    Raises ``ConfigError`` for a label that occurs twice, a method that removes nothing, and a
    setting that cannot be used; ``UnknownName`` for a method that does not exist.
    """
    found: list[Variant] = []
    for name in (word.strip() for word in methods.split(",")):
        if name:
            _add(found, METHODS.check(name), {"method": name}, every, seed)
    for label, own in (read_variants(Path(file)) if file else {}).items():
        try:
            if "executor" in own:
                raise ConfigError("it sets an executor, which --executors does: drop it")
            _add(found, label, own, every, seed)
        except ConfigError as error:
            raise ConfigError(f'the variant "{label}" of {file}: {error}') from None
    if not found:
        raise ConfigError("--methods is empty: give at least one, e.g. dart")
    return tuple(found)


def _add(
    found: list[Variant], label: str, own: dict[str, Any], every: int | None, seed: int
) -> None:
    method = str(own.get("method", "dart"))
    if METHODS.get(method).sparsity == 0:
        raise ConfigError(f"method {method} removes nothing, and dense runs anyway: leave it out")
    if label in (one.label for one in found) or not label.strip():
        raise ConfigError(f'the label "{label}" is taken: give each variant its own')
    given = {key: value for key, value in own.items() if key != "method"}
    config = PruneConfig.build(method, seed=seed).replace(given)
    found.append(Variant(label, config if every is None else rebuilding(config, every)))


def rebuilding(config: PruneConfig, every: int) -> PruneConfig:
    """``config`` with a new mask after every ``every`` pruned tokens and one observed token."""
    free = {"min_distance": 0, "max_dense_share": None, "allowance": 0}
    return config.replace(
        {"drift": {"rule": f"interval {every}", **free}, "remask": {"observe_tokens": 1}}
    )


def method_cases(
    variants: Sequence[Variant], sparsities: Sequence[float], executors: Sequence[str]
) -> tuple[Case, ...]:
    """Every variant at every sparsity under every executor; raises ``ConfigError``."""
    return tuple(
        Case(
            name(one.label, sparsity, executor),
            "method",
            _at(one, sparsity, executor),
            variant=one.label,
        )
        for one in variants
        for sparsity in sparsities
        for executor in executors
    )


def name(label: str, sparsity: float, executor: str) -> str:
    """ "dart 50 %, native"."""
    return f"{label} {percent(sparsity)}, {executor}"


def _at(one: Variant, sparsity: float, executor: str) -> PruneConfig:
    try:
        return one.config.replace({"sparsity": sparsity, "executor": executor})
    except ConfigError as error:
        raise ConfigError(f'the variant "{one.label}" cannot be run so: {error}') from None


def dense_cases() -> tuple[Case, ...]:
    """The untouched model, then candidates for our own dense path, the better first."""
    griffin = PruneConfig.build("griffin", sparsity=0.0)
    slim, native, graph = OWN
    return (
        Case(TRANSFORMERS, "dense"),
        Case(slim, "dense", griffin.replace({"executor": "slim"})),
        Case(native, "dense", griffin.replace({"executor": "native"}), whole=True),
        Case(graph, "dense", griffin.replace({"executor": "graph"})),
    )


def cost_cases(
    one: Variant, sparsity: float, own: str, executors: Sequence[str], tokens: int
) -> tuple[Case, ...]:
    """What is subtracted from one another to tell what parts of the method cost.

    ``own``: label of our own dense path; ``executors``: those that run here and were asked for.
    """
    griffin = PruneConfig.build("griffin", sparsity=0.0)
    config = one.config.replace({"sparsity": sparsity})
    watching = config.replace({"masking_step": FOREVER, "release_step": None})
    found = [
        Case(IDLE, "cost", griffin, against=TRANSFORMERS),
        # masked: observed tokens run through the model's own modules, as in the other row
        Case(
            f"{one.label} observing", "cost", watching.replace({"executor": "masked"}), against=IDLE
        ),
    ]
    if own == OWN[0]:
        slim = watching.replace({"executor": "slim"})
        found.append(Case(f"{one.label} observing, slim", "cost", slim, against=own))
    best = next((each for each in FASTEST if each in executors), None)
    if best is None:
        return tuple(found)
    fixed = config.replace({"executor": best})
    if config.drift.rule.split()[0] not in (NEVER, "interval"):
        never = fixed.replace({"drift": {"rule": NEVER}})
        row = name(one.label, sparsity, best)
        found.append(Case(f"{one.label} without drift checks, {best}", "cost", never, against=row))
    often = rebuilding(fixed, max(1, tokens // 6))
    found.append(Case(f"{one.label} re-masking, {best}", "cost", often, against=""))
    return tuple(found)
