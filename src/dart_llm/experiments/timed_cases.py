"""What ``dart-llm bench speed`` times: the untouched model, our own dense path, methods.

Each on weights in one or several formats, and llama.cpp beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.experiments.llama_bench import LLAMA_CPP
from dart_llm.experiments.variants import Variant
from dart_llm.models.block_types import ROUNDED
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting.words import percent

TRANSFORMERS = "transformers"

OWN = ("dense, slim", "dense, native", "dense, graph")
"""Labels of our own dense path, the better first."""


FORMATS = ("auto", "file", "dense", *ROUNDED)
"""How weights may be held; or the name of a GGUF file."""


@dataclass(frozen=True)
class Format:
    """One way to hold the weights.

    ``weights``: as ``load`` takes it; ``file``: a GGUF file that stands in place of the model.
    """

    name: str
    weights: str | None = None
    file: Path | None = None

    @classmethod
    def of(cls, word: str) -> Format:
        """A word of ``--weights``; raises ``ConfigError`` for what it cannot be."""
        if not word.lower().endswith(".gguf"):
            if word.lower() not in FORMATS:
                raise UnknownName("weights", word, (*FORMATS, "FILE.gguf"))
            return cls(word.lower(), word.lower())
        if not (file := Path(word).expanduser()).is_file():
            raise ConfigError(
                f"--weights {word} is no file: give one, or some of {', '.join(FORMATS)}"
            )
        return cls(file.stem, "file", file)


@dataclass(frozen=True)
class Case:
    """One row.  ``config`` None: the untouched model.

    ``whole``: masks that keep everything, so that the executor runs although nothing is removed.
    ``variant``: label of the method; None for what is dense.  ``form``: name of the format in which
    the weights are held.  ``file``: what llama.cpp reads; nothing else is said then.
    """

    label: str
    config: PruneConfig | None = None
    whole: bool = False
    variant: str | None = None
    form: str = ""
    file: Path | None = None

    @property
    def executor(self) -> str | None:
        if self.file is not None:
            return LLAMA_CPP
        return None if self.config is None else self.config.executor

    def on(self, form: Format, suffix: str = "") -> Case:
        """The same on weights in a format; ``suffix`` names it in the label."""
        label = f"{self.label}, {suffix}" if suffix else self.label
        return replace(self, label=label, form=form.name)


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
