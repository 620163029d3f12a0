"""The flags of ``dart-llm sweep`` and ``compare``; from a specification to cells in table order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from pydantic import (
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dart_llm.errors import ConfigError, check_name
from dart_llm.evaluation.measurement import PROTOCOLS, MeasureOptions
from dart_llm.evaluation.tasks import SHORTCUTS, protocols
from dart_llm.experiments.cell import Cell, removes_nothing
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.trackers import TRACKERS
from dart_llm.experiments.variants import NEVER
from dart_llm.pruning.config import DEFAULT_METHOD, check_sparsity, first_problem, unknown_key
from dart_llm.pruning.layer_table import parse_layer_spec
from dart_llm.pruning.registry import METHODS, SETTING
from dart_llm.pruning.setting_file import kept_setting
from dart_llm.reporting.figures import STYLES
from dart_llm.settings import LOADING, MASKED, STYLE, Settings, check_seed, setting

GRID, TASK, RUN, MODEL = "Grid", "Tasks", "Run", "Model"

OPTIONS = tuple(one.name for one in fields(MeasureOptions) if one.name not in ("protocol", "seed"))
"""Fields that are options of the grid's tasks."""

PLACE = ("experiment_name", "results_dir", "style", "engine", "workers", "tracker")
"""Fields that say where and how the cells run."""


class SweepFlags(Settings):
    """Every flag; None means "not given".  Lists are written with commas."""

    models: str | None = setting(GRID, "Models (default: smollm2-135m).")
    methods: str | None = setting(GRID, "Methods; dart-llm methods lists them.")
    sparsities: str | None = setting(GRID, "Fractions of FFN neurons to remove, e.g. 0.3,0.5.")
    tasks: str | None = setting(
        GRID, "lm-eval tasks, perplexity:TEXT, summarize:DATA; e.g. arc_easy,perplexity:embedded."
    )
    seeds: str | None = setting(GRID, "Seeds (default: 0).")
    protocols: str | None = setting(GRID, "decode, full, published, standard (default: decode).")
    layers: str | None = setting(GRID, "Prune layers by themselves: each, or ranges 0-3,4-7.")
    keep: str | None = setting(GRID, "Fraction that such a layer keeps, e.g. 0.5.")
    base_keep: float | None = setting(GRID, "Fraction that the other layers keep (default: all).")
    compensation: bool | None = setting(GRID, "For every method: with or without compensation.")
    budget: str | None = setting(GRID, "For every method: this allocator over layers.")
    drift: str | None = setting(GRID, "For every method: this drift rule.")
    calibration: str | None = setting(GRID, "Text for methods that calibrate.")
    limit: int | None = setting(TASK, "Items per task (default: all).")
    sample_seed: int | None = setting(TASK, "Choose the items at random with this seed.")
    num_fewshot: int | None = setting(TASK, "Examples before each item.")
    include_path: str | None = setting(TASK, "Folder with further lm-eval task files.")
    batch_size: int | None = setting(TASK, "Continuations in one forward (default: 8).")
    apply_chat_template: bool | None = setting(TASK, "Wrap contexts in the model's template.")
    prompt_tokens: int | None = setting(TASK, "Prompt tokens of a slice (default: 256).")
    scored_tokens: int | None = setting(TASK, "Scored tokens of a slice (default: 256).")
    window: int | None = setting(TASK, "Window of protocol standard (default: 2048).")
    stride: int | None = setting(TASK, "Its stride (default: the window).")
    max_output: int | None = setting(TASK, "Tokens per summary (default: 256).")
    dtype: str | None = setting(MODEL, "float32, float16, bfloat16 (default: the checkpoint's).")
    weights: str | None = setting(
        MODEL, "auto, file (a GGUF's own blocks), dense, or rounded: q8_0, q4_0, q4_1."
    )
    device: str | None = setting(MODEL, "0, cuda:0, cpu or mps (default: GPU 0, else CPU).")
    device_map: str | None = setting(MODEL, "How layers are spread over devices, e.g. auto.")
    revision: str | None = setting(MODEL, "Branch, tag or commit of a hub model.")
    attn_implementation: str | None = setting(MODEL, "Attention kernel: eager, sdpa, ...")
    trust_remote_code: bool | None = setting(MODEL, "Run code that comes with the checkpoint.")
    cache_dir: str | None = setting(MODEL, "Where weights are kept.")
    experiment_name: str | None = setting(RUN, "Folder under --results-dir (default: the command).")
    results_dir: str = setting(RUN, "Folder for results.", "results")
    style: str = setting(RUN, STYLE, "screen")
    engine: str = setting(RUN, "local, or ray: spread cells over a cluster.", "local")
    workers: int | None = setting(RUN, "Worker processes of the ray engine.")
    tracker: str | None = setting(RUN, "trackio, wandb, mlflow or tensorboard.")

    @model_validator(mode="after")
    def _check_tracker(self) -> SweepFlags:
        check_name("tracker", self.tracker or None, TRACKERS)
        check_name("style", self.style, STYLES)
        return self

    def grid_flags(self) -> dict[str, Any]:
        """What ``grid.collect`` takes."""
        data = self.model_dump(exclude_none=True, exclude=set(PLACE))
        options = {name: data.pop(name) for name in OPTIONS if name in data}
        names = ("compensation", "budget", "drift")
        overrides = {name: data.pop(name) for name in names if name in data}
        return {**data, "options": options, "overrides": overrides}


# From the specification (flags or a YAML file) to the cells.


EACH = "each"

OF_SOME_TASKS = ("standard",)
"""Protocols that not every task has."""

SINGULAR = {
    "models": "model",
    "methods": "method",
    "sparsities": "sparsity",
    "tasks": "task",
    "seeds": "seed",
    "protocols": "protocol",
}
"""Lists, and the names by which a single entry may be given."""

_PLURAL = {single: name for name, single in SINGULAR.items()}

_FROM_ZERO = ("sample_seed", "num_fewshot", "seed")


class GridSpec(Settings):
    """What a sweep runs over.  Lists may be written as one text with commas.

    ``layers``: ``each``, or groups such as ``0-3,4-7``; every group is pruned to ``keep`` by
    itself, while the other layers stay dense or are pruned to ``base_keep``.  ``options``: fields
    of ``MeasureOptions``; ``task_options``: more of them for single tasks.  ``overrides``: changes
    to every preset, as in a run's settings.
    """

    models: tuple[str, ...] = ("smollm2-135m",)
    methods: tuple[str, ...] = ("dense", DEFAULT_METHOD)
    sparsities: tuple[float, ...] = ()
    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    protocols: tuple[str, ...] = ("decode",)
    layers: tuple[str, ...] = ()
    keep: tuple[float, ...] = ()
    base_keep: float | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    task_options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    overrides: dict[str, Any] = Field(default_factory=dict)
    calibration: str | None = None
    dtype: str | None = None
    weights: str | None = None
    device: str | None = None
    device_map: str | None = None
    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    cache_dir: str | None = None

    @field_validator(*SINGULAR, "layers", "keep", mode="before")
    @classmethod
    def _as_list(cls, value: Any, info: ValidationInfo) -> Any:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            parts = [parts]
        parts = [part.strip() if isinstance(part, str) else part for part in parts]
        for part in parts:
            if isinstance(part, list | dict):
                raise ConfigError(f"{info.field_name} must be a plain list, and holds {part}")
        if info.field_name == "layers":
            parts = [str(part) for part in parts]
        return tuple(dict.fromkeys(part for part in parts if part != ""))

    @model_validator(mode="after")
    def _check(self) -> GridSpec:
        for name in ("models", "methods", "tasks", "seeds", "protocols"):
            if not getattr(self, name):
                raise ConfigError(
                    f"no {name} are named: give at least one ({name} in the file, or --{name})"
                )
        for method in self.methods:
            METHODS.check(method)
        for protocol in self.protocols:
            check_name("protocol", protocol, (*PROTOCOLS, *OF_SOME_TASKS))
        for sparsity in self.sparsities:
            check_sparsity(sparsity)
        for seed in self.seeds:
            check_seed(seed)
        self._check_layers()
        measure_options(self.options)
        for task, options in self.task_options.items():
            check_name("task in task_options", task, self.tasks)
            measure_options({**self.options, **options})
        return self

    def _check_layers(self) -> None:
        if not self.layers:
            if self.keep or self.base_keep is not None:
                raise ConfigError(
                    "keep and base_keep belong to layers: add layers (each, or ranges such as "
                    "0-3,4-7), or give sparsities"
                )
            return
        if not self.keep:
            raise ConfigError("layers needs keep, the fraction that a layer keeps, e.g. 0.5")
        if self.sparsities:
            raise ConfigError("layers and keep set the counts themselves: drop the sparsities")
        if EACH in self.layers and len(self.layers) > 1:
            raise ConfigError("layers is either each or a list of ranges, not both")
        for group in self.layers:
            if ":" in group:
                raise ConfigError(f'"{group}" in layers: write the range alone, the value in keep')
            for keep in self.keep:
                parse_layer_spec(_table("0" if group == EACH else group, keep, self.base_keep))
        if all(removes_nothing(method) for method in self.methods):
            raise ConfigError("layers needs a method that prunes, such as griffin")


def measure_options(data: Mapping[str, Any]) -> MeasureOptions:
    """Options from plain data; raises ``ConfigError`` for unknown names and useless values."""
    known = [one.name for one in fields(MeasureOptions)]
    for name, value in data.items():
        if name in ("protocol", "seed"):
            raise ConfigError(f"{name} is not an option of the sweep: write {name}s, a list")
        check_name("measuring option", str(name), known)
        if isinstance(value, bool) and name != "apply_chat_template":
            raise ConfigError(f"option {name} = {value} must be a number or a text")
        least = 0 if name in _FROM_ZERO else 1
        if type(value) is int and value < least:
            raise ConfigError(f"option {name} = {value} must be {least} or more")
    try:
        return TypeAdapter(MeasureOptions).validate_python(dict(data))
    except ValidationError as error:
        raise ConfigError(f"option {first_problem(error)}") from None


def collect(*sources: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> GridSpec:
    """The specification of a sweep, later ``sources`` win; None: not given.

    ``options`` and ``overrides`` are merged name by name.  Layers set the counts: no default
    sparsity stands beside them.  Raises ``ConfigError``, one sentence.
    """
    merged: dict[str, Any] = {}
    for source in map(_with_full_names, sources):
        for name in ("options", "overrides"):
            if isinstance(merged.get(name), Mapping) and isinstance(source.get(name), Mapping):
                source[name] = {**merged[name], **source[name]}
        merged |= source
    usual = dict(defaults or {})
    if merged.get("layers"):
        usual.pop("sparsities", None)
    grid = GridSpec.model_validate({**usual, **merged})
    if "methods" not in merged and grid.overrides.get("drift") not in (None, NEVER):
        methods = [MASKED if name == DEFAULT_METHOD else name for name in grid.methods]
        note = f"--drift: method {MASKED} is used instead of {DEFAULT_METHOD}, which has no masks"
        grid = grid.noted({"methods": tuple(methods)}, note)
    return _held_as_kept(grid)


def _held_as_kept(grid: GridSpec) -> GridSpec:
    """The weights of the settings in files hold for all methods, or they could not be compared.

    Raises ``ConfigError`` for files that want different ones.
    """
    kept = [one for name in grid.methods if (one := kept_setting(name)) and one.weights]
    formats = list(dict.fromkeys(str(one.weights) for one in kept))
    if grid.weights is not None or not formats:
        return grid
    if len(formats) > 1:
        raise ConfigError(
            f"the settings of these files hold weights as {' and '.join(formats)}: give --weights "
            "one of them"
        )
    return grid.noted({"weights": formats[0]})


def _with_full_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, with every list by its plural name."""
    given: dict[str, Any] = {}
    for name, value in data.items():
        full = _PLURAL.get(name, name)
        if full not in GridSpec.model_fields:
            raise unknown_key(GridSpec, str(name))
        if full in given:
            raise ConfigError(f"the sweep gives {full} twice: write one list")
        if value is not None:
            given[full] = value
    return given


def expand(grid: GridSpec) -> tuple[Cell, ...]:
    """All cells in table order: model, task, protocol, seed, method, then sparsity or layers.

    A form of the dense model is one cell per (model, task, protocol, seed).  Reads the files that
    cells point at, for their digests; with ``layers: each`` also the models' configurations.
    Raises ``ConfigError`` or ``LoadError``.
    """
    digests = Digests()
    found: dict[str, Cell] = {}
    tasks = [(one, task) for task in grid.tasks for one in SHORTCUTS.get(task, (task,))]
    for model in grid.models:
        base = Cell(model, "dense", "", **{name: getattr(grid, name) for name in LOADING})
        groups: Sequence[str] = grid.layers
        if EACH in groups:
            from dart_llm.experiments.model_facts import layer_count  # which loads torch

            groups = [str(layer) for layer in range(layer_count(base))]
        for (task, name), protocol in itertools.product(tasks, grid.protocols):
            if protocol in OF_SOME_TASKS and protocol not in protocols(task):
                raise ConfigError(f'task {task} has no protocol "{protocol}": drop one of them')
            options = measure_options({**grid.options, **grid.task_options.get(name, {})})
            for seed in grid.seeds:
                here = replace(options, protocol=protocol, seed=seed)
                one = replace(base, task=task, seed=seed, options=here)
                for cell in _methods(grid, one, groups):
                    complete = replace(cell, inputs=digests.of(cell, cell.config()))
                    found.setdefault(complete.key, complete)
    return tuple(found.values())


def _methods(grid: GridSpec, base: Cell, groups: Sequence[str]) -> Iterator[Cell]:
    curve = bool(grid.layers) and "dense" not in grid.methods  # which has the dense line
    for method in (*(("dense",) if curve else ()), *grid.methods):
        cell = replace(base, method=method)
        if removes_nothing(method):
            yield cell
            continue
        cell = replace(cell, overrides=grid.overrides)
        for one in _amounts(grid, cell, groups):
            learns = one.config().calibration  # raises before anything is loaded
            reads = learns is not None and learns.source == "text"
            yield replace(one, calibration=grid.calibration) if reads else one


def _amounts(grid: GridSpec, cell: Cell, groups: Sequence[str]) -> Iterator[Cell]:
    if not groups and cell.method.startswith(SETTING):  # which has its own
        yield cell
        return
    if not groups:
        for sparsity in grid.sparsities or (None,):
            yield replace(cell, sparsity=sparsity)
        return
    budget = cell.overrides.get("budget", {})
    budget = {"name": budget} if isinstance(budget, str) else budget
    for keep, group in itertools.product(grid.keep, groups):
        table = _table(group, keep, grid.base_keep)
        overrides = {**cell.overrides, "budget": {**budget, "table": table}}
        yield replace(cell, layers=group, keep=keep, base_keep=grid.base_keep, overrides=overrides)


def _table(group: str, keep: float, base: float | None) -> str:
    """A layer table; layers outside ``group`` stay dense, or keep ``base`` of their neurons."""
    own = f"{group}:{keep:.12g}"
    return own if base is None else f"all:{base:.12g},{own}"
