"""Option mixins of all commands (model, pruning, study, task), and how their sources are merged.

Order of precedence: defaults < file < ``DART_*`` environment < flags.  Every field is a flag of the
same name in kebab case and ``DART_<FIELD>``.  Where a class has several mixins, their fields come
in the reversed order of the bases, as pydantic collects them.
"""

from __future__ import annotations

import os
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
from dart_llm.pruning.registry import METHODS, SETTING
from dart_llm.pruning.setting_file import KeptSetting, kept_setting, path_of
from dart_llm.reporting.figures import STYLES

if TYPE_CHECKING:
    from dart_llm.models.capture import Wanted


class Settings(BaseModel):
    """Frozen settings; a name that is none of them is an error that suggests a similar one."""

    COMMAS: ClassVar[tuple[str, ...]] = ()
    """Texts with commas, which may be lists in a YAML file."""

    UNUSED: ClassVar[tuple[str, ...]] = ()
    """Fields of a base class that the command has no use for: they are not among its flags."""

    RIVALS: ClassVar[tuple[set[str], ...]] = ()
    """Rivals only in this command, like ``RIVALS`` below."""

    ALIASES: ClassVar[Mapping[str, str]] = {}
    """Other names of fields in files and variables, such as ``task`` of ``tasks``."""

    _notes: tuple[str, ...] = PrivateAttr(())

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="wrap")
    @classmethod
    def _validated(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Raises ``ConfigError`` for the first problem, as one sentence."""
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
        """The values by the names of their fields; None only where a field may be None."""
        given: dict[str, Any] = {}
        for key, value in data.items():
            name = cls.ALIASES.get(key, key)
            if name not in cls.model_fields:
                raise cls.unknown(str(name))
            optional = type(None) in get_args(cls.model_fields[name].annotation)
            if value is None and (name in given or not optional):
                continue
            if given.get(name) is not None:
                raise ConfigError(f"{name} is given twice: write one list")
            given[name] = value
        return given

    @classmethod
    def unknown(cls, name: str) -> ConfigError:
        """The error for a setting that these settings do not have."""
        return unknown_key(cls, name)

    def fitted(self) -> Self:
        """The same with what its settings require of others; ``notes`` reports changes."""
        return self

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """The values as the fields take them."""
        return {name: joined(v) if name in cls.COMMAS else v for name, v in data.items()}

    def noted(self, changes: Mapping[str, Any], *notes: str) -> Self:
        """A copy with ``changes``, and notes that explain them."""
        copy = self.model_copy(update=dict(changes))
        copy._notes = (*self._notes, *notes)
        return copy

    @property
    def given(self) -> list[str]:
        """Names of the settings that differ from their default."""
        fields = type(self).model_fields
        return [name for name in fields if getattr(self, name) != fields[name].default]

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the log."""
        return self._notes


def setting(panel: str, text: str, default: Any = None, **bounds: Any) -> Any:
    """One setting: the help panel that it belongs to, its help text, its default.

    ``bounds``: of a number, as pydantic's ``Field`` takes them: ``ge=1``, ``lt=1``.
    """
    return Field(default, description=text, json_schema_extra={"panel": panel}, **bounds)


def _problem_text(error: ValidationError) -> str:
    """The first problem; a number out of bounds is named as the flag that sets it."""
    problem = error.errors()[0]
    for bound, words in BOUNDS.items():
        if bound in problem.get("ctx", {}):
            value, limit = problem["input"], problem["ctx"][bound]
            return f"{_flag(str(problem['loc'][0]))} {value} must be {words} {limit}"
    if problem["type"] == "finite_number":
        return f"{_flag(str(problem['loc'][0]))} {problem['input']} must be a finite number"
    return first_problem(error)


def split_commas(value: Any) -> Any:
    """A list without doubles, from a text with commas, a list or one value."""
    parts = words(value) if isinstance(value, str) else value
    parts = parts if isinstance(parts, list | tuple) else [parts]
    for part in parts:
        if isinstance(part, list | dict):
            raise ConfigError(f"lists must be plain, and one has {part} in it")
    return tuple(dict.fromkeys(parts))


def check_fractions(values: tuple[float, ...]) -> tuple[float, ...]:
    """Raises ``ConfigError`` for sparsities outside of 0 to 1."""
    for value in values:
        check_sparsity(value)
    return values


Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: (*map(str, split_commas(value)),))]
Numbers = Annotated[tuple[int, ...], BeforeValidator(split_commas)]
Fractions = Annotated[tuple[float, ...], BeforeValidator(split_commas)]
Sparsities = Annotated[Fractions, AfterValidator(check_fractions)]
"""Lists that are written with commas, in flags, variables and files alike."""


def check_removed(values: tuple[float, ...]) -> tuple[float, ...]:
    """Raises ``ConfigError`` for fractions that remove nothing, or everything."""
    for value in values:
        if not 0 < value < 1:
            raise ConfigError(f"{value:g} must be between 0 and 1: the fraction to remove")
    return values


def words(text: str | None) -> list[str]:
    """The parts between commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def joined(value: Any) -> Any:
    """A text with commas, also from a list of a YAML file."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, int | float) else value


def check_seed(seed: int) -> None:
    """Raises ``ConfigError`` for seeds that generators of random numbers reject."""
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed {seed} must be a whole number from 0 to 2^63 - 1")


def read_sparsities(name: str, text: str) -> tuple[float, ...]:
    """The sparsities of ``--name``, each once; raises ``ConfigError`` for anything else."""
    try:
        sparsities = tuple(dict.fromkeys(float(word) for word in words(text)))
    except ValueError:
        raise ConfigError(
            f'--{name} "{text}" must be numbers with commas between them, e.g. 0.5,0.7'
        ) from None
    if not sparsities and name == "sparsities":
        raise ConfigError("--sparsities is empty: give at least one, e.g. 0.5")
    for value in sparsities:
        if not 0 < value < 1:
            raise ConfigError(
                f"--{name} {value:g} must lie between 0 and 1: the fraction of neurons to remove"
            )
    return sparsities


# What a setting requires: a method that can honour it.
#
# A single setting works with the defaults: where the default method cannot honour it, the first of
# ``FITTING_METHODS`` that can is used and logged.  A named method is never replaced: then a setting
# that does not fit is an error.

MASKED = "dart"
"""The method of commands that look at sequence masks, such as ``inspect`` and ``drift``."""

FITTING_METHODS = (MASKED, "dart-prompt", "griffin", "published")
"""In the order in which they are tried."""

MASK_SETTINGS = ("masks", "knowledge_drift", "drift", "ranking_method")
"""Settings of sequence masks, which methods with per-token selection do not have."""


def misfit(settings: PruningOptions) -> tuple[str, str] | None:
    """The first setting that the method cannot honour, and why; None if it honours all.

    Everything else that is set overrides its part of any method.  Raises ``ConfigError`` for
    settings that do not fit each other.
    """
    method = METHODS.get(settings.method)
    if method.selects_per_token:
        for name in MASK_SETTINGS:
            if getattr(settings, name) not in (None, False, "", "never", method.score.name):
                return name, f"with method {settings.method} every token selects its own neurons"
    return None


def method_for(settings: PruningOptions) -> tuple[str, str | None]:
    """The method that honours ``settings``, and a note for the log where it is another one.

    Raises ``ConfigError`` where the named method, or every one, cannot.
    """
    problem = misfit(settings)
    if problem is None:
        return settings.method, None
    name, why = problem
    able = next((method for method in FITTING_METHODS if _honours(settings, method)), None)
    if able is None:
        raise ConfigError(f"{why}: drop {_flag(name)}")
    if "method" in settings.model_fields_set:
        raise ConfigError(f"{why}: drop {_flag(name)}, or leave the method out: {able} can")
    return able, f"{_flag(name)}: method {able} is used instead of {settings.method}, because {why}"


def _honours(settings: PruningOptions, method: str) -> bool:
    try:
        return misfit(settings.model_copy(update={"method": method})) is None
    except ConfigError:  # other settings do not fit this one
        return False


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


RIVALS = (
    {"sparsity", "total_prune_percent", "sparsities"},
    {"knowledge_drift", "drift"},
    {"prompt", "prompt_file", "custom_prompt_text"},
)
"""Settings of which one source may give only one."""


class ModelName(Settings):
    """Which model."""

    model: str = setting(
        "Model", "Hub id, local folder, .gguf file, or smollm2-135m.", "smollm2-135m"
    )


class LoadOptions(Settings):
    """How a model is loaded."""

    cache_dir: str | None = setting(
        "Model", "Where weights are kept (default: the hub's own cache)."
    )
    device: str | None = setting("Model", "0, cuda:0, cpu or mps (default: GPU 0, else CPU).")
    device_map: str | None = setting("Model", "How layers are spread over devices, e.g. auto.")
    dtype: str | None = setting("Model", "float32, float16, bfloat16 (default: the checkpoint's).")
    weights: str | None = setting(
        "Model", "auto, file (a GGUF's own blocks), dense, or rounded: q8_0, q4_0, q4_1."
    )
    revision: str | None = setting("Model", "Branch, tag or commit of a hub model.")
    attn_implementation: str | None = setting("Model", "Attention kernel: eager, sdpa, ...")
    trust_remote_code: bool = setting("Model", "Run code that comes with the checkpoint.", False)


class ModelOptions(LoadOptions, ModelName):
    """Which model, and how it is loaded."""


LOADING = tuple(LoadOptions.model_fields)


def load_arguments(settings: Any) -> dict[str, Any]:
    """Keyword arguments of ``dart_llm.load``, from what has the fields of ``ModelOptions``."""
    arguments = {name: getattr(settings, name) for name in ("model", *LOADING)}
    return {**arguments, "device": settings.device or (None if settings.device_map else "auto")}


class MethodName(Settings):
    """Which method."""

    method: str = setting(
        "Pruning",
        "Preset (dart-llm methods lists them), or file:SETTING.yaml of tune.",
        DEFAULT_METHOD,
    )


class MaskOptions(Settings):
    """How many neurons a method removes, which ones, and when."""

    sparsity: float | None = setting(
        "Pruning", f"Fraction of FFN neurons to remove (default: {DEFAULT_SPARSITY})."
    )
    total_prune_percent: float | None = setting(
        "Pruning", "Percent of FFN neurons to remove, 0 to 100."
    )
    layer_topk: str | None = setting(
        "Pruning", "Keep ratios per layer: all:auto, 0-5:0.6,6-11:0.8, 3:#512, or @FILE."
    )
    masking_step: int | None = setting("Pruning", "Dense decode tokens before the first mask.")
    release_step: int | None = setting("Pruning", "Decode step from which all runs dense.")
    min_evidence: int | None = setting("Pruning", "Tokens to observe before the first mask.")
    ranking_method: str | None = setting("Pruning", "Neuron score; dart-llm methods lists them.")
    prune_strategy: str | None = setting("Pruning", "topk, or auto: keep scores above the mean.")
    budget: str | None = setting(
        "Pruning", 'Allocator over layers, e.g. uniform, "blend energy depth".'
    )
    compensation: bool | None = setting("Pruning", "Add the removed neurons' mean contribution.")
    executor: str | None = setting("Pruning", "auto, masked, compact, native or cuda.")


class PruningOptions(MaskOptions, MethodName):
    """How the model is pruned."""

    save_layer_topk: str | None = setting(
        "Pruning", "Write the keep counts of the run to this file."
    )
    masks: str | None = setting(
        "Pruning", "A masks.safetensors: use its newest masks, choose none."
    )
    knowledge_drift: bool | None = setting("Pruning", "Re-mask on drift by the preset's rule.")
    drift: str | None = setting(
        "Pruning", 'Drift rule: never, published, paper, dart, "interval 64", "windows 10 1 3".'
    )
    head: str | None = setting(
        "Pruning", 'Output head of decoded tokens: full, or "screened 0.25" (of its bytes).'
    )

    @model_validator(mode="after")
    def _check_pruning(self) -> Self:
        METHODS.check(self.method)
        if self.sparsity is not None and self.total_prune_percent is not None:
            raise ConfigError("give --sparsity or --total-prune-percent, not both")
        if self.masks and self.target_sparsity() is not None:
            raise ConfigError("--masks names the neurons themselves: drop the sparsity")
        if self.knowledge_drift is not None and self.drift is not None:
            raise ConfigError("give --knowledge-drift or --drift, not both")
        self.model_copy(update={"method": method_for(self)[0]}).prune_config()
        return self

    @classmethod
    def unknown(cls, name: str) -> ConfigError:
        """The error for a setting that these settings do not have."""
        return unknown_key(cls, name)

    def fitted(self) -> Self:
        """The same with a method that honours its settings; ``notes`` reports a change.

        Raises ``ConfigError`` where the named method cannot honour them.
        """
        method, note = method_for(self)
        return self if note is None else self.noted({"method": method}, note)

    def target_sparsity(self) -> float | None:
        """The requested sparsity, as a fraction; None by default."""
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
        """The preset with all explicit settings on top of it."""
        changes = self.prune_changes()
        if changes["sparsity"] and METHODS.get(self.method).method == "dense":
            raise ConfigError("method dense removes nothing: drop the sparsity")
        return PruneConfig.build(self.method, **changes)

    def prune_changes(self) -> dict[str, Any]:
        """The changes to the preset, as ``PruneConfig.build`` takes them."""
        names = ("masking_step", "release_step", "min_evidence", "compensation", "executor")
        changes: dict[str, Any] = {name: getattr(self, name) for name in names}
        changes |= {"sparsity": self.target_sparsity(), "seed": getattr(self, "seed", None)}
        parts: dict[str, dict[str, Any]] = {
            "score": {"name": self.ranking_method, "strategy": self.prune_strategy},
            "budget": {"name": self.budget, "table": self._table()},
            "drift": {"rule": self._drift_rule()},
            "head": {"kind": self.head},
        }
        for part, values in parts.items():
            given = {key: value for key, value in values.items() if value is not None}
            changes[part] = given or None
        return changes

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


STYLE = "Plots for the screen, or paper: also PDFs as wide as a column and a page."


class ResultOptions(Settings):
    """Where results go."""

    experiment_name: str | None = setting("Results", "Default: <model>-<method>-<sparsity>.")
    results_dir: str = setting("Results", "Folder for results.", "results")
    style: str = setting("Results", STYLE, "screen")

    @model_validator(mode="after")
    def _check_style(self) -> Self:
        check_name("style", self.style, STYLES)
        return self

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        raise NotImplementedError


class Seed(Settings):
    """The seed of what is random."""

    seed: int = setting("Results", "Seed of everything random.", 0, ge=0, lt=2**63)


class StudyOptions(ResultOptions, Seed):
    """Where results go, and the seed of what is random in them."""


class TaskOptions(Settings):
    """Which items of a task are measured, what methods calibrate on, which tracker logs."""

    limit: int | None = setting("Evaluation", "Items per task (default: all).", ge=1)
    sample_seed: int | None = setting(
        "Evaluation", "Choose the --limit items at random with this seed, not the first ones.", ge=0
    )
    calibration: str | None = setting(
        "Evaluation",
        "Text for methods that calibrate: a text or JSON-lines file (FILE#100: from row 100)"
        " (default: c4 of the hub).",
    )
    tracker: str | None = setting("Results", "trackio, wandb, mlflow or tensorboard.")


class BaseSettings(StudyOptions, PruningOptions, ModelOptions):
    """Which model, how it is pruned, where results go; fields come in the order of that."""

    @property
    def kept(self) -> KeptSetting | None:
        """The setting of a file that the method names."""
        return kept_setting(self.method)

    def fitted(self) -> Self:
        """Also applies the weight format stored in a tuned setting, or logs the mismatch."""
        settings, kept = super().fitted(), self.kept
        if kept is None or kept.weights is None:
            return settings
        name = Path(str(path_of(self.method))).name
        if "weights" not in self.model_fields_set:
            note = f"{name} asks for --weights {kept.weights}: taken"
            return settings.noted({"weights": kept.weights}, note)
        if self.weights == kept.weights:
            return settings
        note = (
            f"{name} was found with --weights {kept.weights}, not {self.weights}: neither its loss "
            "nor its time is that of this run"
        )
        return settings.noted({}, note)

    @property
    def experiment(self) -> str:
        """Name of the experiment's folder."""
        if self.experiment_name:
            return self.experiment_name
        config = self.prune_config()
        method = config.method if self.method.startswith(SETTING) else self.method
        amount = f"{config.target:g}"
        if self.masks:
            amount = "masks"
        elif config.sparsity is None and (config.budget.table or config.score.strategy == "auto"):
            amount = "table"
        return f"{Path(self.model.rstrip('/')).name.lower()}-{method}-{amount}"


def given_of(settings: BaseModel) -> dict[str, Any]:
    """The explicitly set fields of ``settings`` that ``BaseSettings`` has too."""
    shared = BaseSettings.model_fields.keys() & type(settings).model_fields.keys()
    return {name: getattr(settings, name) for name in shared & settings.model_fields_set}


S = TypeVar("S", bound=Settings)


def read_file(path: Path) -> dict[str, Any]:
    """Settings of a YAML file; names may be written as flags are."""
    return {str(key).replace("-", "_").lower(): value for key, value in read_yaml(path).items()}


def merge(
    kind: type[S],
    flags: Mapping[str, Any],
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> S:
    """Merge the sources into settings of one kind; in ``flags`` None means not set.

    A setting also replaces its rivals of weaker sources: --sparsity beats DART_TOTAL_PRUNE_PERCENT.
    Raises ``ConfigError``, also for an experiment outside the results folder.
    """
    environ = os.environ if environment is None else environment
    names = {**{name: name for name in kind.model_fields}, **kind.ALIASES}
    variables = {
        field: value
        for name, field in sorted(names.items())  # "models" wins over "model"
        if (value := environ.get(f"DART_{name.upper()}"))
    }
    merged: dict[str, Any] = {}
    rivals = (*RIVALS, *kind.RIVALS)
    for source in (read_file(file) if file else {}, variables, flags):
        given = {name: value for name, value in kind.named(source).items() if value is not None}
        beaten = {name for group in rivals if given.keys() & group for name in group}
        merged = {key: value for key, value in merged.items() if key not in beaten} | given
    settings = kind.model_validate(merged)
    name = getattr(settings, "experiment_name", None)
    path = Path(name or "a")
    if path.is_absolute() or ".." in path.parts or path == Path():
        raise ConfigError(
            f"--experiment-name {name} leaves the results folder: give the name of a folder in it, "
            "and the place with --results-dir"
        )
    return settings.fitted()


class ActivationSettings(BaseSettings):
    """The settings of commands that can keep activations: u of all layers."""

    save_activations: bool = setting(
        "Activations", "Save 256 tokens' neuron values as safetensors (says the size).", False
    )

    def wanted(self, layers: int) -> Wanted:
        """What is kept of a model with this many layers."""
        from dart_llm.models.capture import Wanted

        return Wanted(tuple(range(layers)), 0, 256)
