"""From the settings of a grid to its cells, in table order."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dart_llm.errors import ConfigError, MissingExtra
from dart_llm.evaluation.tasks import SHORTCUTS, check_calibration, check_task, protocols
from dart_llm.experiments.cell import Cell, removes_nothing
from dart_llm.experiments.provenance import Digests
from dart_llm.pruning.registry import SETTING
from dart_llm.settings import LOADING
from dart_llm.studies.sweep.settings import (
    DENSE,
    EACH,
    CompareSettings,
    MeasureSettings,
    MethodSettings,
    SweepSettings,
    layer_table,
)


def cells_of(settings: MeasureSettings) -> tuple[Cell, ...]:
    """Everything that a command measures, in table order.

    Raises ``ConfigError``, before a model is loaded, for tasks that cannot be measured and for a
    calibration text that is evaluated.
    """
    if isinstance(settings, MethodSettings):
        cells = method_cells(settings)
    else:
        assert isinstance(settings, SweepSettings)
        cells = expand(settings)
    check_cells(cells)
    return cells


def check_cells(cells: Sequence[Cell]) -> None:
    """Raise ``ConfigError`` for tasks that do not exist, and for evaluated calibration texts."""
    with contextlib.suppress(MissingExtra):  # a cluster may have lm-eval where this has not
        for task, options in dict.fromkeys((cell.task, cell.options) for cell in cells):
            check_task(task, options)
    for cell in cells:
        check_calibration(cell.config(), cell.calibration, [cell.task])


def method_cells(settings: MethodSettings) -> tuple[Cell, ...]:
    """The untouched model where it is wanted, then the method, on every task."""
    loading = {name: getattr(settings, name) for name in LOADING}
    cell = _method_cell(settings, Cell(settings.model, settings.method, "", **loading))
    methods = [cell]
    if settings.dense and cell.label != DENSE:
        methods.insert(0, Cell(settings.model, DENSE, "", seed=settings.seed, **loading))
    digests, options = Digests(), replace(settings.options(), seed=settings.seed)
    cells = [
        replace(one, task=task, options=options)
        for one in methods
        for task in settings.task_names()
    ]
    return tuple(replace(cell, inputs=digests.of(cell)) for cell in cells)


def _method_cell(settings: MethodSettings, cell: Cell) -> Cell:
    """The method as its options change it; its label has the sparsity that is requested."""
    config = settings.prune_config()
    changes = {k: v for k, v in settings.prune_changes().items() if v is not None}
    by_itself = config.budget.table is not None or config.score.strategy == "auto"
    plain = removes_nothing(settings.method)
    no_amount = plain or settings.masks or (by_itself and config.sparsity is None)
    cell = replace(
        cell,
        sparsity=None if no_amount else config.target,
        seed=settings.seed,
        overrides={k: v for k, v in changes.items() if k not in ("sparsity", "seed")},
        calibration=settings.calibration,
        masks=settings.masks,
    )
    if settings.method != config.method:  # a setting of a file
        return replace(cell, name=f"{config.method}@{config.target:g}", sparsity=None)
    if plain and not settings.masks and config.executor != "auto":
        return replace(cell, name=f"{config.method}, {config.executor}")
    return cell


def expand(grid: SweepSettings) -> tuple[Cell, ...]:
    """All cells: by model, weights, task, protocol, seed, method, then sparsity or layers.

    A form of the dense model is one cell per (model, task, protocol, seed).  Reads the files that
    cells name, for their digests; with ``layers: each`` also the models' configurations.  Raises
    ``ConfigError`` or ``LoadError``.
    """
    if isinstance(grid, CompareSettings) and DENSE not in grid.methods:
        grid = grid.model_copy(update={"methods": (DENSE, *grid.methods)})
    digests = Digests()
    cells: dict[str, Cell] = {}
    tasks = [(one, task) for task in grid.tasks for one in SHORTCUTS.get(task, (task,))]
    for base in _models(grid):
        groups: Sequence[str] = grid.layers
        if EACH in groups:
            from dart_llm.experiments.model_facts import layer_count  # which loads torch

            groups = [str(layer) for layer in range(layer_count(base))]
        for (task, name), protocol in itertools.product(tasks, grid.protocols):
            if protocol not in protocols(task):
                raise ConfigError(f'task {task} has no protocol "{protocol}": drop one of them')
            options = grid.options_of(name)
            for seed in grid.seeds:
                here = replace(options, protocol=protocol, seed=seed)
                one = replace(base, task=task, seed=seed, options=here)
                for cell in _methods(grid, one, groups):
                    complete = replace(cell, inputs=digests.of(cell))
                    cells.setdefault(complete.key, complete)
    return tuple(cells.values())


def _models(grid: SweepSettings) -> Iterator[Cell]:
    """A dense cell per model and weight format, without a task."""
    loading = {name: getattr(grid, name) for name in LOADING}
    for model in grid.models:
        for weights in grid.weights or (None,):
            yield Cell(model, DENSE, "", **{**loading, "weights": weights})


def _methods(grid: SweepSettings, base: Cell, groups: Sequence[str]) -> Iterator[Cell]:
    curve = bool(grid.layers) and DENSE not in grid.methods  # whose plot has the dense line
    for method in (*((DENSE,) if curve else ()), *grid.methods):
        cell = replace(base, method=method)
        if removes_nothing(method):
            yield _named(grid, cell)
            continue
        cell = replace(cell, overrides=grid.changes())
        for one in _amounts(grid, cell, groups):
            learns = one.config().calibration  # raises before anything is loaded
            reads = learns is not None and learns.source == "text"
            yield _named(grid, replace(one, calibration=grid.calibration) if reads else one)


def _named(grid: SweepSettings, cell: Cell) -> Cell:
    """With the weight format in its name, where the grid has several and it is not the first."""
    if cell.weights in (None, *grid.weights[:1]):
        return cell
    method, at, amount = cell.label.partition("@")
    return replace(cell, name=f"{method} {cell.weights}{at}{amount}")


def _amounts(grid: SweepSettings, cell: Cell, groups: Sequence[str]) -> Iterator[Cell]:
    if not groups and cell.method.startswith(SETTING):  # which has a sparsity
        yield cell
        return
    if not groups:
        for sparsity in grid.sparsities or (None,):
            yield replace(cell, sparsity=sparsity)
        return
    budget = cell.overrides.get("budget", {})
    budget = {"name": budget} if isinstance(budget, str) else budget
    for keep, group in itertools.product(grid.keep, groups):
        table = layer_table(group, keep, grid.base_keep)
        overrides = {**cell.overrides, "budget": {**budget, "table": table}}
        yield replace(cell, layers=group, keep=keep, base_keep=grid.base_keep, overrides=overrides)


def execution_order(cells: Sequence[Cell]) -> list[Cell]:
    """By model, then by method: each model is loaded, and each method prepared, once."""

    def model(cell: Cell) -> str:
        return repr(cell.load_arguments)

    def preparation(cell: Cell) -> str:
        return f"{model(cell)} {cell.label} {cell.seed}"

    models = {name: number for number, name in enumerate(dict.fromkeys(map(model, cells)))}
    order = {name: number for number, name in enumerate(dict.fromkeys(map(preparation, cells)))}
    return sorted(cells, key=lambda cell: (models[model(cell)], order[preparation(cell)]))
