"""The settings of ``dart-llm bench quality``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import model_validator

from dart_llm.data.documents import REPORT, SETS
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.experiments.variants import Variant, parse
from dart_llm.settings import (
    BaseSettings,
    Settings,
    check_least,
    check_seed,
    given_of,
    read_sparsities,
    setting,
    words,
)
from dart_llm.studies.quality.slices import CELLS, Shape

STUDY, MODEL, RESULTS = "Study", "Model", "Results"

LISTS = ("model", "text")
"""Options that may be repeated; commas do as well."""

LEAST = {"slices": 1, "prompt_tokens": 16, "tokens": 1}
"""The least value of each whole number."""


class QualitySettings(Settings):
    """What ``dart-llm bench quality`` is asked to do; None means "not given"."""

    COMMAS: ClassVar = ("methods", "oracle", "sparsities", "pool", "cells")

    methods: str = setting(
        STUDY, "Methods, comma-separated; griffin, the yardstick, always runs.", "griffin,dart"
    )
    variants: str | None = setting(
        STUDY, "YAML file: LABEL: {SETTING: VALUE}, changes of method (default: dart)."
    )
    oracle: str | None = setting(
        STUDY,
        "Methods told the moment of the change too, or none (default: all with a live drift rule).",
    )
    sparsities: str = setting(
        STUDY, "Fractions of FFN neurons to remove, comma-separated.", "0.3,0.5,0.7"
    )
    pool: str = setting(STUDY, "Sparsities whose gaps are added up, where measured.", "0.5,0.7")
    cells: str = setting(
        STUDY, "continuation, topic-shift, or both, comma-separated.", ",".join(CELLS)
    )
    text: list[str] = setting(
        STUDY,
        "A text file, JSONL (FILE:COLUMN names the column), or data name; repeat for several.",
        ["embedded"],
    )
    set: str = setting(STUDY, "choose: first half of a text's documents; report: second.", REPORT)
    slices: int | None = setting(
        STUDY, "Slices of each text (default: 16; of the embedded texts alone, what there is)."
    )
    prompt_tokens: int = setting(STUDY, "Prompt tokens of a slice.", 256)
    tokens: int = setting(STUDY, "Scored tokens of a slice.", 256)
    calibration: str | None = setting(STUDY, "Text for methods that calibrate.")
    executor: str | None = setting(STUDY, "auto, masked, compact, native, slim or graph.")
    # model
    model: list[str] = setting(
        MODEL,
        "Hub id, local folder, .gguf file, or smollm2-135m; repeat for several.",
        ["smollm2-135m"],
    )
    cache_dir: str | None = setting(MODEL, "Where weights are kept.")
    device: str | None = setting(MODEL, "0, cuda:0, cpu or mps (default: GPU 0, else CPU).")
    device_map: str | None = setting(MODEL, "How layers are spread over devices, e.g. auto.")
    dtype: str | None = setting(MODEL, "float32, float16, bfloat16 (default: the checkpoint's).")
    revision: str | None = setting(MODEL, "Branch, tag or commit of a hub model.")
    attn_implementation: str | None = setting(MODEL, "Attention kernel: eager, sdpa, ...")
    trust_remote_code: bool = setting(MODEL, "Run code that comes with the checkpoint.", False)
    # results
    seed: int = setting(RESULTS, "Seed of everything random, the intervals among it.", 0)
    experiment_name: str | None = setting(RESULTS, "Default: quality-<set>-<model>.")
    results_dir: str = setting(RESULTS, "Folder for results.", "results")

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        return super().read({k: _parts(v) if k in LISTS else v for k, v in data.items()})

    @model_validator(mode="after")
    def _check(self) -> QualitySettings:
        check_least(self, LEAST)
        if self.set not in SETS:
            raise UnknownName("set", self.set, SETS)
        if not self.model:
            raise ConfigError("no model is named: give --model one, or leave it out")
        check_seed(self.seed)
        self.cell_list()
        self.pool_list()
        self.variant_list()
        return self

    @property
    def shape(self) -> Shape:
        """Tokens of a slice."""
        return Shape(self.prompt_tokens, self.tokens)

    def cell_list(self) -> tuple[str, ...]:
        """The cells in order; raises ``UnknownName``."""
        found = tuple(dict.fromkeys(words(self.cells)))
        for name in found:
            if name not in CELLS:
                raise UnknownName("cell", name, CELLS)
        if not found:
            raise ConfigError(f"--cells is empty: give {' or '.join(CELLS)}")
        return found

    def sparsity_list(self) -> tuple[float, ...]:
        """The sparsities, each once; raises ``ConfigError`` for what is none."""
        return read_sparsities("sparsities", self.sparsities)

    def pool_list(self) -> tuple[float, ...]:
        """The measured sparsities whose gaps are pooled; may be empty."""
        pool, measured = read_sparsities("pool", self.pool), self.sparsity_list()
        return tuple(value for value in measured if value in pool)

    def variant_list(self) -> tuple[Variant, ...]:
        """What is compared, GRIFFIN first; raises ``ConfigError`` or ``UnknownName``."""
        changes = {"seed": self.seed, "executor": self.executor}
        given = {name: value for name, value in changes.items() if value is not None}
        first = self.sparsity_list()[0]
        return parse(self.methods, self.variants, self.oracle, given, first)

    def names(self) -> dict[str, str]:
        """What each model is called in the results, without its folders, and where it lies."""
        found: dict[str, str] = {}
        for model in self.model:
            name = Path(model.rstrip("/")).name.lower()
            if name in found:
                raise ConfigError(f'the model "{name}" was given twice: leave one out')
            found[name] = model
        return found

    def base(self, model: str) -> BaseSettings:
        """How one of the models is loaded."""
        return BaseSettings.model_validate({**given_of(self), "model": model})

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        return self.experiment_name or f"quality-{self.set}-{'-'.join(self.names())}"


def _parts(value: Any) -> Any:
    """A list of texts, also from one text with commas."""
    given = [value] if isinstance(value, str | Path) else value
    if not isinstance(given, list | tuple):
        return value
    return [word for item in given for word in words(str(item))]
