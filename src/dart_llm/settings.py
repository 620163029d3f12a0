"""Option classes that commands combine (model, pruning, study, task), and the sources of options.

The sources are defaults, settings file, ``DART_*`` environment variables and flags; each overrides
those before it.  Every field has a flag of the same name in kebab case, and a variable
``DART_<FIELD>``.  Pydantic collects the fields of several bases in the bases' reverse order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from dart_llm.errors import ConfigError, check_name
from dart_llm.files import read_yaml
from dart_llm.pruning.config import (
    BOUNDS,
    DEFAULT_METHOD,
    DEFAULT_SPARSITY,
    PruneConfig,
    check_sparsity,
    first_problem,
    unknown_key,
)
from dart_llm.pruning.layer_table import parse_layer_spec, read_table
from dart_llm.pruning.registry import METHODS, SCORES, SETTING
from dart_llm.pruning.setting_file import KeptSetting, kept_setting, path_of
from dart_llm.reporting.figures import STYLES

if TYPE_CHECKING:
    from dart_llm.models.capture import Wanted


class Settings(BaseModel):
    """Immutable settings; for an unknown name, an error suggests a similar one."""

    UNUSED: ClassVar[tuple[str, ...]] = ()
    """Fields of a base class that the command does not use and offers no flags for."""

    RIVALS: ClassVar[tuple[set[str], ...]] = (
        {"sparsity", "total_prune_percent", "sparsities"},
        {"knowledge_drift", "drift"},
        {"prompt", "prompt_file", "custom_prompt_text"},
    )
    """Groups of settings that exclude each other: one source may set only one of a group."""

    ALIASES: ClassVar[Mapping[str, str]] = {}
    """Other names for fields in files and variables, such as ``task`` for ``tasks``."""

    _notes: tuple[str, ...] = PrivateAttr(())

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="wrap")
    @classmethod
    def _validated(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Validate; raise the first problem as a ``ConfigError`` of one sentence."""
        try:
            return validate(data)
        except ValidationError as error:
            raise ConfigError(_problem_text(error)) from None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        return cls.read(cls.named(data))

    @classmethod
    def named(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``data`` with aliases replaced by field names; drops None where not allowed."""
        values: dict[str, Any] = {}
        for key, value in data.items():
            name = cls.ALIASES.get(key, key)
            if name not in cls.model_fields:
                raise cls.unknown(str(name))
            optional = type(None) in get_args(cls.model_fields[name].annotation)
            if value is None and (name in values or not optional):
                continue
            if values.get(name) is not None:
                raise ConfigError(f"{name} is given under two names: write one list")
            values[name] = value
        return values

    @model_validator(mode="after")
    def _check_rivals(self) -> Self:
        for group in self.RIVALS:
            names = [name for name in sorted(group) if getattr(self, name, None) is not None]
            if len(names) > 1:
                raise ConfigError(f"give {' or '.join(map(_flag, names))}, not both")
        return self

    @classmethod
    def unknown(cls, name: str) -> ConfigError:
        """Return the error for an unknown setting; its message suggests a similar one."""
        return unknown_key(cls, name)

    def fitted(self) -> Self:
        """Return settings that fit together; the result's ``notes`` explain what was changed."""
        return self

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values, converted to what the fields expect; for subclasses to override."""
        return dict(data)

    def noted(self, changes: Mapping[str, Any], *notes: str) -> Self:
        """Return a copy with ``changes``, and with notes that explain them."""
        copy = self.model_copy(update=dict(changes))
        copy._notes = (*self._notes, *notes)
        return copy

    @property
    def given(self) -> list[str]:
        """Names of the settings that differ from their defaults."""
        fields = type(self).model_fields
        return [name for name in fields if getattr(self, name) != fields[name].default]

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages for the log, which explain changed settings."""
        return self._notes


def setting(panel: str, text: str, default: Any = None, **bounds: Any) -> Any:
    """Define a setting by its help panel, help text and default.

    ``bounds``: limits of a number, as for pydantic's ``Field``, such as ``ge=1`` or ``lt=1``.
    """
    return Field(default, description=text, json_schema_extra={"panel": panel}, **bounds)


def _problem_text(error: ValidationError) -> str:
    """Return the first problem as text, which names the flag if a number is out of bounds."""
    problem, text = error.errors()[0], first_problem(error)
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "finite_number":
        return f"{_flag(name)} {problem['input']} must be a finite number"
    bounded = BOUNDS.keys() & problem.get("ctx", {}).keys()
    return text.replace(name, _flag(name), 1) if bounded else text


def split_commas(value: Any) -> Any:
    """Return a comma-separated text, a list or a single value as a tuple without duplicates."""
    parts = words(value) if isinstance(value, str) else value
    parts = parts if isinstance(parts, list | tuple) else [parts]
    for part in parts:
        if isinstance(part, list | dict):
            raise ConfigError(f"a list must contain single values, not {part}")
    return tuple(dict.fromkeys(parts))


Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: (*map(str, split_commas(value)),))]
Numbers = Annotated[tuple[int, ...], BeforeValidator(split_commas)]
Fractions = Annotated[tuple[float, ...], BeforeValidator(split_commas)]
Sparsities = Annotated[
    tuple[Annotated[float, AfterValidator(check_sparsity)], ...], BeforeValidator(split_commas)
]
"""Types of settings that are comma-separated lists, in flags, variables and files."""


def check_removed(values: tuple[float, ...]) -> tuple[float, ...]:
    """Return ``values``, fractions to remove; raises ``ConfigError`` if one is not in (0, 1)."""
    for value in values:
        if not 0 < value < 1:
            raise ConfigError(f"{value:g} must be between 0 and 1: the fraction to remove")
    return values


def words(text: str | None) -> list[str]:
    """Return the parts of a comma-separated text."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def check_seed(seed: int) -> None:
    """Raise ``ConfigError`` for a seed that random number generators reject."""
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed {seed} must be a whole number from 0 to 2^63 - 1")


SEQUENCE_METHOD = "dart"
"""Default method of commands that study sequence masks (one for many tokens), e.g. ``drift``."""

FITTING_METHODS = (SEQUENCE_METHOD, "dart-prompt", "griffin", "published")
"""If the default method does not support a setting, the first of these that does is used."""

MASK_SETTINGS = ("masks", "knowledge_drift", "drift", "ranking_method")
"""Settings of sequence masks.  Methods with per-token selection do not support them."""


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _decay_problem(config: PruneConfig) -> str | None:
    """Return why the score does not support the configured ``ema_decay``; None if it does."""
    why = SCORES.get(config.score.name).no_decay_reason
    if config.score.ema_decay is None or config.target == 0 or not why:
        return None
    return f'score "{config.score.name}" {why}'


class LoadOptions(Settings):
    """How a model is loaded."""

    cache_dir: str | None = setting("Model", "Folder for downloads (default: the hub's cache).")
    device: str | None = setting("Model", "Use 0, cuda:0, cpu or mps (default: GPU 0, else CPU).")
    device_map: str | None = setting("Model", "Spread the layers over devices, e.g. auto.")
    dtype: str | None = setting("Model", "Use float32, float16 or bfloat16 (default: as stored).")
    weights: str | None = setting("Model", "Format: auto, file (GGUF), dense, q8_0, q4_0, q4_1.")
    revision: str | None = setting("Model", "Load this branch, tag or commit of a hub model.")
    attn_implementation: str | None = setting("Model", "Attention kernel to use: eager, sdpa, ...")
    trust_remote_code: bool = setting("Model", "Run code that comes with the checkpoint.", False)


class ModelOptions(LoadOptions):
    """Which model, and how it is loaded."""

    model: str = setting("Model", "Hub id, folder, .gguf file or smollm2-135m.", "smollm2-135m")


LOADING = tuple(LoadOptions.model_fields)


def load_arguments(settings: Any) -> dict[str, Any]:
    """Keyword arguments for ``dart_llm.load``; ``settings`` has the fields of ``ModelOptions``."""
    arguments = {name: getattr(settings, name) for name in ("model", *LOADING)}
    return {**arguments, "device": settings.device or (None if settings.device_map else "auto")}


PRUNING = "Pruning"


class MaskOptions(Settings):
    """How many neurons a method removes, which ones, and when."""

    sparsity: float | None = setting(
        PRUNING, f"Fraction of FFN neurons to remove (default: {DEFAULT_SPARSITY})."
    )
    total_prune_percent: float | None = setting(PRUNING, "The same as a percentage.", ge=0, lt=100)
    layer_topk: str | None = setting(PRUNING, "Keep per layer: 0-5:0.6,6-11:0.8, 3:#512 or @FILE.")
    masking_step: int | None = setting(PRUNING, "Decode this many tokens dense, then mask.")
    release_step: int | None = setting(PRUNING, "Run dense from this decode step on.")
    min_evidence: int | None = setting(PRUNING, "Observe this many tokens, then mask.")
    ema_decay: float | None = setting(PRUNING, "Decay of averaged activations (default: sums).")
    ranking_method: str | None = setting(PRUNING, "Neuron score; dart-llm methods lists them.")
    prune_strategy: str | None = setting(PRUNING, "topk, or auto to keep scores above the mean.")
    budget: str | None = setting(PRUNING, 'Split over layers: uniform, "blend energy depth".')
    compensation: bool | None = setting(PRUNING, "Add the removed neurons' mean contribution.")
    executor: str | None = setting(PRUNING, "Executor: auto, masked, compact, native or cuda.")


class PruningOptions(MaskOptions):
    """How the model is pruned."""

    method: str = setting(PRUNING, "Preset, or file:SETTING.yaml written by tune.", DEFAULT_METHOD)
    save_layer_topk: str | None = setting(PRUNING, "Write each layer's keep count to this file.")
    masks: str | None = setting(PRUNING, "Apply the newest masks in this masks.safetensors.")
    knowledge_drift: bool | None = setting(PRUNING, "Re-mask on drift by the preset's rule.")
    drift: str | None = setting(PRUNING, 'Rule: never, published, paper, dart, "interval 64", ...')
    head: str | None = setting(PRUNING, 'Output head: full, or "screened 0.25" to read 25 %.')

    @model_validator(mode="after")
    def _check_pruning(self) -> Self:
        if self.masks and self.target_sparsity() is not None:
            raise ConfigError("--masks already says which neurons to keep: drop the sparsity")
        PruningOptions.fitted(self).prune_config()
        return self

    def misfit(self) -> tuple[str, str] | None:
        """Return the first setting that the method does not support, and why; None if all fit."""
        method = METHODS.get(self.method)
        if method.selects_per_token:
            for name in MASK_SETTINGS:
                if getattr(self, name) not in (None, False, "", "never", method.score.name):
                    return name, f"with method {self.method} every token selects its own neurons"
        why = _decay_problem(self.prune_config())
        return ("ema_decay", why) if why else None

    def fitted(self) -> Self:
        """Return settings whose method supports them; ``notes`` reports a change of the method.

        Raises ``ConfigError`` if the user chose the method, or if no method supports the settings.
        """
        problem = self.misfit()
        if problem is None:
            return self
        flag, why = _flag(problem[0]), problem[1]
        fitting = next(filter(self._is_supported_by, FITTING_METHODS), None)
        if fitting is None or "method" in self.model_fields_set:
            instead = "" if fitting is None else f", or leave the method out: {fitting} can"
            raise ConfigError(f"{why}: drop {flag}{instead}")
        note = f"{flag}: method {fitting} is used instead of {self.method}, because {why}"
        return self.noted({"method": fitting}, note)

    def _is_supported_by(self, method: str) -> bool:
        try:
            return self.model_copy(update={"method": method}).misfit() is None
        except ConfigError:  # other settings do not fit this method
            return False

    def target_sparsity(self) -> float | None:
        """Return the requested sparsity as a fraction; None if it is not set."""
        percent = self.total_prune_percent
        if percent is None:
            return None if self.sparsity is None else check_sparsity(self.sparsity)
        if 0 < percent < 1:
            flag = f"--total-prune-percent {percent:g} is a percentage"
            raise ConfigError(f"{flag}: did you mean {100 * percent:g}?")
        return percent / 100

    def prune_config(self) -> PruneConfig:
        """Return the configuration of ``method``, with the changes of ``prune_changes``."""
        changes = self.prune_changes()
        if changes["sparsity"] and METHODS.get(self.method).method == "dense":
            raise ConfigError("method dense removes nothing: drop the sparsity")
        return PruneConfig.build(self.method, **changes)

    def prune_changes(self) -> dict[str, Any]:
        """Return the settings that change the method, as arguments of ``PruneConfig.build``."""
        names = ("masking_step", "release_step", "min_evidence", "compensation", "executor")
        parts: dict[str, dict[str, Any]] = {
            "score": {
                "name": self.ranking_method,
                "ema_decay": self.ema_decay,
                "strategy": self.prune_strategy,
            },
            "budget": {"name": self.budget, "table": self._table()},
            "drift": {"rule": self._drift_rule()},
            "head": {"kind": self.head},
        }
        changed: dict[str, Any] = {
            part: {key: value for key, value in values.items() if value is not None} or None
            for part, values in parts.items()
        }
        changed |= {"sparsity": self.target_sparsity(), "seed": getattr(self, "seed", None)}
        return {**{name: getattr(self, name) for name in names}, **changed}

    def _table(self) -> str | None:
        spec = (self.layer_topk or "").strip()
        if spec in ("", "all:auto"):
            return None
        return read_table(Path(spec[1:])) if spec.startswith("@") else str(parse_layer_spec(spec))

    def _drift_rule(self) -> str | None:
        if self.knowledge_drift is None:
            return self.drift
        if not self.knowledge_drift:
            return "never"
        rule: str = METHODS.get(self.method).drift.rule
        return "paper" if rule == "never" else rule


class ResultOptions(Settings):
    """Where results are written."""

    experiment_name: str | None = setting("Results", "Default name: <model>-<method>-<sparsity>.")
    results_dir: str = setting("Results", "Write results to this folder.", "results")
    style: str = setting("Results", "Plot style: screen, or paper (also as PDF).", "screen")

    @model_validator(mode="after")
    def _check_results(self) -> Self:
        check_name("style", self.style, STYLES)
        path = Path(self.experiment_name or "a")
        if path.is_absolute() or ".." in path.parts or path == Path():
            name = f"--experiment-name {self.experiment_name}"
            raise ConfigError(f"{name} leaves the results folder: name a folder in --results-dir")
        return self

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        raise NotImplementedError


class StudyOptions(ResultOptions):
    """Where results are written, and the seed for random numbers."""

    seed: int = setting("Results", "Seed of all random numbers.", 0, ge=0, lt=2**63)


class TaskOptions(Settings):
    """Which items of a task are measured, what methods calibrate on, and which tracker logs."""

    limit: int | None = setting("Evaluation", "Use only N items per task (default: all).", ge=1)
    sample_seed: int | None = setting(
        "Evaluation", "Draw the items at random, with this seed.", ge=0
    )
    calibration: str | None = setting("Evaluation", "Text to calibrate on (default: c4).")
    tracker: str | None = setting("Results", "Log to trackio, wandb, mlflow or tensorboard.")


class BaseSettings(StudyOptions, PruningOptions, ModelOptions):
    """Which model, how it is pruned, and where results are written (the order of the fields)."""

    @property
    def kept(self) -> KeptSetting | None:
        """The content of the setting file if ``method`` is ``file:...``; None for other methods."""
        return kept_setting(self.method)

    def fitted(self) -> Self:
        """Also use a setting file's weight format, unless another is set; ``notes`` tells which."""
        settings, kept = super().fitted(), self.kept
        if kept is None or kept.weights in (None, self.weights):
            return settings
        name = Path(str(path_of(self.method))).name
        weights = f"--weights {kept.weights}"
        if "weights" not in self.model_fields_set:
            return settings.noted({"weights": kept.weights}, f"{name} sets {weights}")
        return settings.noted(
            {}, f"{name} was measured with {weights}, not {self.weights}: expect other times"
        )

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        if self.experiment_name:
            return self.experiment_name
        config = self.prune_config()
        method = config.method if self.method.startswith(SETTING) else self.method
        table = config.budget.table or config.score.strategy == "auto"
        counted = f"{config.target:g}" if config.sparsity is not None or not table else "table"
        amount = "masks" if self.masks else counted
        return f"{Path(self.model.rstrip('/')).name.lower()}-{method}-{amount}"


def given_of(settings: BaseModel) -> dict[str, Any]:
    """Return the fields of ``settings`` that were set and that ``BaseSettings`` has too."""
    shared = BaseSettings.model_fields.keys() & type(settings).model_fields.keys()
    return {name: getattr(settings, name) for name in shared & settings.model_fields_set}


S = TypeVar("S", bound=Settings)


def merge(
    kind: type[S],
    flags: Mapping[str, Any],
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> S:
    """Merge all sources into settings of class ``kind``; in ``flags``, None means not set.

    A setting also replaces its ``RIVALS`` from earlier sources: the flag --sparsity replaces the
    variable DART_TOTAL_PRUNE_PERCENT.
    """
    environ = os.environ if environment is None else environment
    names = {**{name: name for name in kind.model_fields}, **kind.ALIASES}
    variables = {
        field: value
        for name, field in sorted(names.items())  # "models" wins over "model"
        if (value := environ.get(f"DART_{name.upper()}"))
    }
    merged: dict[str, Any] = {}
    document = read_yaml(file) if file else {}
    settings = {str(key).replace("-", "_").lower(): value for key, value in document.items()}
    for source in (settings, variables, flags):
        values = {name: value for name, value in kind.named(source).items() if value is not None}
        replaced = {name for group in kind.RIVALS if values.keys() & group for name in group}
        merged = {key: value for key, value in merged.items() if key not in replaced} | values
    return kind.model_validate(merged).fitted()


TENSORS = ("u", "x", "z", "r")
"""Activations that can be saved; ``models.capture.LayerActivations`` explains the letters."""


class ActivationSettings(BaseSettings):
    """The settings of commands that can save activations."""

    save_activations: bool = setting(
        "Activations", "Save activations as safetensors (logs the size first).", False
    )
    activation_layers: str = setting("Activations", "Layers to save: all, 0-5 or 0,3,7-9.", "all")
    activation_tokens: str = setting(
        "Activations", "Tokens to save: 0:256, or 128: to the end.", "0:256"
    )
    activation_tensors: str = setting(
        "Activations", "Any of u (neurons), x (stream before), z, r (FFN output), e.g. u,x.", "u"
    )

    @model_validator(mode="after")
    def _check_activations(self) -> ActivationSettings:
        _parse_layers(self.activation_layers)
        _parse_tokens(self.activation_tokens)
        for name in words(self.activation_tensors) or [self.activation_tensors]:
            check_name("activation", name, TENSORS)
        return self

    def wanted(self, layers: int) -> Wanted:
        """Return what to save; raises ``ConfigError`` for a layer beyond the model's ``layers``."""
        from dart_llm.models.capture import Wanted

        chosen = _parse_layers(self.activation_layers) or tuple(range(layers))
        if chosen[-1] >= layers:
            raise ConfigError(
                f"--activation-layers: layer {chosen[-1]} is out of range: this model has {layers} "
                "layers"
            )
        tensors = tuple(dict.fromkeys(words(self.activation_tensors)))
        return Wanted(chosen, *_parse_tokens(self.activation_tokens), tensors)


def _parse_layers(text: str) -> tuple[int, ...]:
    """Return the layers that a text such as ``0,3,7-9`` lists, in order; () for ``all``."""
    layers: set[int] = set()
    for part in [] if text.strip() == "all" else text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConfigError(f'"{part}" is not a layer or a range: write all, 0-5 or 0,3,7-9')
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def _parse_tokens(text: str) -> tuple[int, int | None]:
    """Return start and exclusive end of a range such as ``0:256``; the end of ``128:`` is None."""
    match = re.fullmatch(r"\s*(\d*):(\d*)\s*", text)
    start, end = (int(match[1] or 0), int(match[2]) if match[2] else None) if match else (0, 0)
    if end is not None and end <= start:
        raise ConfigError(f'"{text}" is not a range of tokens: write 0:256, or 128: to the end')
    return start, end
