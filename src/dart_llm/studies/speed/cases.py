"""What ``dart-llm bench speed`` times: the untouched model, our own dense path, methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dart_llm.experiments.variants import Variant
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting.words import percent

TRANSFORMERS = "transformers"

OWN = ("dense, slim", "dense, native", "dense, graph")
"""Labels of our own dense path, the better first."""


@dataclass(frozen=True)
class Case:
    """One row.  ``config`` None: the untouched model.

    ``whole``: masks that keep everything, so that the executor runs although nothing is removed.
    ``variant``: label of the method; None for what is dense.
    """

    label: str
    config: PruneConfig | None = None
    whole: bool = False
    variant: str | None = None

    @property
    def executor(self) -> str | None:
        return None if self.config is None else self.config.executor


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
            f"{variant.label} {percent(sparsity)}, {executor}",
            variant.at(sparsity, executor=executor),
            variant=variant.label,
        )
        for variant in variants
        for sparsity in sparsities
        for executor in executors
    )


def dense_cases() -> tuple[Case, ...]:
    """The untouched model, then candidates for our own dense path, the better first."""
    griffin = PruneConfig.build("griffin", sparsity=0.0)
    return (
        Case(TRANSFORMERS),
        *(
            Case(label, griffin.replace({"executor": executor}), whole=executor == "native")
            for label, executor in zip(OWN, ("slim", "native", "graph"), strict=True)
        ),
    )
