"""The settings that every command shares: model, pruning, results; and how sources are merged.

Order of precedence: defaults < file < ``DART_*`` environment < flags.  Every field is a flag of the
same name in kebab case and ``DART_<FIELD>``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, model_validator

from dart_llm import settings_fit
from dart_llm.config import PruneConfig, check_sparsity, first_problem, read_yaml
from dart_llm.errors import ConfigError
from dart_llm.layer_spec import parse_layer_spec, read_table
from dart_llm.registry import METHODS
from dart_llm.settings_checks import Settings, check_seed

RIVALS = (
    {"sparsity", "total_prune_percent"},
    {"knowledge_drift", "drift"},
    {"prompt", "prompt_file", "custom_prompt_text"},
)
"""Settings of which one source may give only one."""


def setting(panel: str, text: str, default: Any = None) -> Any:
    """One setting: the help panel that it belongs to, its help text, its default."""
    return Field(default, description=text, json_schema_extra={"panel": panel})


class BaseSettings(Settings):
    """What every command is asked: which model, how it is pruned, where results go."""

    _notes: tuple[str, ...] = PrivateAttr(())
    # model
    model: str = setting(
        "Model", "Hub id, local folder, .gguf file, or smollm2-135m.", "smollm2-135m"
    )
    cache_dir: str | None = setting(
        "Model", "Where weights are kept (default: the hub's own cache)."
    )
    device: str | None = setting("Model", "0, 0,1, cuda:0, cpu or mps (default: GPU 0, else CPU).")
    device_map: str | None = setting("Model", "How layers are spread over devices, e.g. auto.")
    dtype: str | None = setting("Model", "float32, float16, bfloat16 (default: the checkpoint's).")
    revision: str | None = setting("Model", "Branch, tag or commit of a hub model.")
    attn_implementation: str | None = setting("Model", "Attention kernel: eager, sdpa, ...")
    trust_remote_code: bool = setting("Model", "Run code that comes with the checkpoint.", False)
    # pruning
    method: str = setting("Pruning", "Preset; dart-llm methods lists them.", "dart")
    sparsity: float | None = setting("Pruning", "Fraction of FFN neurons to remove, e.g. 0.5.")
    total_prune_percent: float | None = setting(
        "Pruning", "Percent of FFN neurons to remove, 0 to 100."
    )
    layer_topk: str | None = setting(
        "Pruning", "Keep ratios per layer: all:auto, 0-5:0.6,6-11:0.8, 3:#512, or @FILE."
    )
    save_layer_topk: str | None = setting(
        "Pruning", "Write the keep counts of the run to this file."
    )
    masks: str | None = setting(
        "Pruning", "A masks.safetensors: use its newest masks, choose none."
    )
    masking_step: int | None = setting("Pruning", "Dense decode tokens before the first mask.")
    release_step: int | None = setting("Pruning", "Decode step from which all runs dense.")
    min_evidence: int | None = setting("Pruning", "Tokens to observe before the first mask.")
    ranking_method: str | None = setting("Pruning", "Neuron score; dart-llm methods lists them.")
    ema_decay: float | None = setting("Pruning", "Decay of averaged activations (default: sums).")
    prune_strategy: str | None = setting("Pruning", "topk, or auto: keep scores above the mean.")
    budget: str | None = setting(
        "Pruning", 'Allocator over layers, e.g. uniform, "blend energy depth".'
    )
    knowledge_drift: bool | None = setting("Pruning", "Re-mask on drift by the preset's rule.")
    drift: str | None = setting("Pruning", 'Drift rule: never, published, paper, "interval 64".')
    compensation: bool | None = setting("Pruning", "Add the removed neurons' mean contribution.")
    executor: str | None = setting("Pruning", "auto, masked, compact, native, slim or graph.")
    # results
    seed: int = setting("Results", "Seed of everything random.", 0)
    experiment_name: str | None = setting("Results", "Default: <model>-<method>-<sparsity>.")
    results_dir: str = setting("Results", "Folder for results.", "results")

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        every = {k for k, v in data.items() if k.endswith("_max_samples") and v == "all"}
        return super().read({k: v for k, v in data.items() if k not in every})

    @model_validator(mode="after")
    def _check_shared(self) -> BaseSettings:
        METHODS.check(self.method)
        if self.sparsity is not None and self.total_prune_percent is not None:
            raise ConfigError("give --sparsity or --total-prune-percent, not both")
        check_seed(self.seed)
        if self.masks and self.target_sparsity() is not None:
            raise ConfigError("--masks names the neurons themselves: drop the sparsity")
        if self.knowledge_drift is not None and self.drift is not None:
            raise ConfigError("give --knowledge-drift or --drift, not both")
        self.prune_config()
        return self

    def fitted(self) -> Self:
        """The same with what its settings ask of others; ``notes`` says what was taken.

        Raises ``ConfigError`` where the method that was named cannot honour them.
        """
        method, note = settings_fit.method_for(self)
        if not note:
            return self
        return self.noted({"method": method}, note)

    def noted(self, changes: Mapping[str, Any], *notes: str) -> Self:
        """A copy with ``changes`` that says why."""
        found = self.model_copy(update=dict(changes))
        found._notes = (*self._notes, *notes)
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """What the log says of the settings."""
        return self._notes

    def target_sparsity(self) -> float | None:
        """The sparsity that was asked for, as a fraction; None when nothing was said."""
        percent = self.total_prune_percent
        if percent is None:
            return None if self.sparsity is None else check_sparsity(self.sparsity)
        if 0 < percent < 1:
            raise ConfigError(
                f"--total-prune-percent {percent:g} is a percentage: did you mean "
                f"{100 * percent:g}? (--sparsity takes fractions)"
            )
        if not 0 <= percent < 100:
            raise ConfigError(
                f"--total-prune-percent {percent:g} must lie in [0, 100): every layer keeps a "
                "neuron or more"
            )
        return percent / 100

    def prune_config(self) -> PruneConfig:
        """The preset with every setting that was given on top of it."""
        changes: dict[str, Any] = {
            "sparsity": self.target_sparsity(),
            "masking_step": self.masking_step,
            "release_step": self.release_step,
            "min_evidence": self.min_evidence,
            "compensation": self.compensation,
            "executor": self.executor,
            "seed": self.seed,
        }
        parts: dict[str, dict[str, Any]] = {
            "score": {
                "name": self.ranking_method,
                "ema_decay": self.ema_decay,
                "strategy": self.prune_strategy,
            },
            "budget": {"name": self.budget, "table": self._table()},
            "drift": {"rule": self._drift_rule()},
        }
        for part, values in parts.items():
            given = {key: value for key, value in values.items() if value is not None}
            changes[part] = given or None
        if self.method == "dense" and changes["sparsity"]:
            raise ConfigError("method dense removes nothing: drop the sparsity")
        return PruneConfig.build(self.method, **changes)

    def _table(self) -> str | None:
        spec = self.layer_topk
        if spec is None or spec.strip() in ("", "all:auto"):
            return None
        if spec.startswith("@"):
            return read_table(Path(spec[1:]))
        return str(parse_layer_spec(spec))

    def _drift_rule(self) -> str | None:
        if self.knowledge_drift is None:
            return self.drift
        rule = METHODS.get(self.method).drift.rule
        if not self.knowledge_drift:
            return "never"
        return "paper" if rule == "never" else rule

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        if self.experiment_name:
            return self.experiment_name
        config = self.prune_config()
        fixed = config.budget.table is not None or config.score.strategy == "auto"
        amount = (
            "masks"
            if self.masks
            else "table"
            if fixed and config.sparsity is None
            else f"{config.target:g}"
        )
        model = Path(self.model.rstrip("/")).name.lower()
        return f"{model}-{self.method}-{amount}"


def given_of(settings: BaseModel) -> dict[str, Any]:
    """What ``settings`` of another kind were given for fields that ``BaseSettings`` has too."""
    shared = BaseSettings.model_fields.keys() & type(settings).model_fields.keys()
    return {name: getattr(settings, name) for name in shared & settings.model_fields_set}


S = TypeVar("S", bound=BaseModel)


def from_environment(
    kind: type[BaseModel], environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """``DART_<FIELD>`` variables that ``kind`` knows.  Empty means not given."""
    found = {}
    for field in kind.model_fields:
        value = environment.get(f"DART_{field.upper()}", "")
        if value:
            found[field] = value
    return found


def read_file(path: Path) -> dict[str, Any]:
    """Settings of a YAML file; names may be written as flags are."""
    return {str(key).replace("-", "_").lower(): value for key, value in read_yaml(path).items()}


def merge(
    kind: type[S],
    flags: Mapping[str, Any],
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> S:
    """Merge the sources into settings of one kind; ``flags`` holds None for what was not given.

    A setting also replaces its rivals of weaker sources: --sparsity beats DART_TOTAL_PRUNE_PERCENT.
    """
    variables = from_environment(kind, os.environ if environment is None else environment)
    merged: dict[str, Any] = {}
    for source in (read_file(file) if file else {}, variables, flags):
        given = {key: value for key, value in source.items() if value is not None}
        beaten = {name for group in RIVALS if given.keys() & group for name in group}
        merged = {key: value for key, value in merged.items() if key not in beaten} | given
    try:
        found = kind.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(first_problem(error)) from None
    check_folder(getattr(found, "experiment_name", None))
    return found.fitted() if isinstance(found, BaseSettings) else found


def check_folder(name: str | None) -> str | None:
    """``name``; raises ``ConfigError`` for an experiment outside the results folder."""
    path = Path(name or "a")
    if path.is_absolute() or ".." in path.parts or path == Path():
        raise ConfigError(
            f"--experiment-name {name} leaves the results folder: give the name of a folder in it, "
            "and the place with --results-dir"
        )
    return name
