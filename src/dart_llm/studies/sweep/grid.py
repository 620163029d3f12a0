"""Make the cells of a grid from its settings; show the plan of ``--dry-run``.

A cell is a model, pruned in one way and measured on one task.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from dart_llm.errors import ConfigError, MissingExtra
from dart_llm.evaluation.tasks import SHORTCUTS, check_calibration, check_task, protocols
from dart_llm.experiments.cell import Cell, removes_nothing
from dart_llm.experiments.provenance import Digests
from dart_llm.experiments.variants import DENSE
from dart_llm.files import size_text
from dart_llm.pruning.registry import SETTING
from dart_llm.reporting.console import Ui
from dart_llm.settings import LOADING
from dart_llm.studies.sweep.settings import (
    EACH,
    CompareSettings,
    MeasureSettings,
    MethodSettings,
    SweepSettings,
)


def cells_of(settings: MeasureSettings) -> tuple[Cell, ...]:
    """All cells that a command measures, in table order.

    Before a model is loaded, raises ``ConfigError`` for invalid tasks and for a calibration text
    that is also evaluated.
    """
    if isinstance(settings, MethodSettings):
        cells = method_cells(settings)
    else:
        assert isinstance(settings, SweepSettings)
        cells = expand(settings)
    check_cells(cells)
    return cells


def check_cells(cells: Sequence[Cell]) -> None:
    """Raise ``ConfigError`` for unknown tasks, and for calibration texts that are evaluated."""
    with contextlib.suppress(MissingExtra):  # lm-eval may be only on the Ray cluster that measures
        for task, options in dict.fromkeys((cell.task, cell.options) for cell in cells):
            check_task(task, options)
    for cell in cells:
        check_calibration(cell.config(), cell.calibration, [cell.task])


def method_cells(settings: MethodSettings) -> tuple[Cell, ...]:
    """Cells of the untouched model, if requested, then of the method, on every task."""
    loading = {name: getattr(settings, name) for name in LOADING}
    dense = Cell(settings.model, DENSE, "", seed=settings.seed, **loading)
    pruned = _method_cell(settings, replace(dense, method=settings.method))
    methods = [dense, pruned] if settings.dense and pruned.label != DENSE else [pruned]
    digests, options = Digests(), replace(settings.options(), seed=settings.seed)
    cells = [
        replace(cell, task=task, options=options)
        for cell in methods
        for task in settings.task_names()
    ]
    return tuple(replace(cell, inputs=digests.of(cell)) for cell in cells)


def _method_cell(settings: MethodSettings, cell: Cell) -> Cell:
    """``cell`` with the options of the method; the label includes the requested sparsity."""
    config = settings.prune_config()
    changes = {k: v for k, v in settings.prune_changes().items() if v is not None}
    sets_amount = config.budget.table is not None or config.score.strategy == "auto"
    is_dense = removes_nothing(settings.method)
    no_amount = is_dense or settings.masks or (sets_amount and config.sparsity is None)
    cell = replace(
        cell,
        sparsity=None if no_amount else config.target,
        overrides={k: v for k, v in changes.items() if k not in ("sparsity", "seed")},
        calibration=settings.calibration,
        masks=settings.masks,
    )
    if settings.method != config.method:  # a setting file (``file:PATH``), as ``tune`` saves it
        return replace(cell, name=f"{config.method}@{config.target:g}", sparsity=None)
    if is_dense and not settings.masks and config.executor != "auto":
        return replace(cell, name=f"{config.method}, {config.executor}")
    return cell


def expand(grid: SweepSettings) -> tuple[Cell, ...]:
    """All cells, ordered by model, weights, task, protocol, seed, method, sparsity or layers.

    A method that removes no neurons, such as ``dense``, has one cell per (model, weights, task,
    protocol, seed).  Reads the files that cells name, to compute the files' digests.  If ``layers``
    contains "each", also reads the models' configurations, for the number of layers.  Raises
    ``ConfigError`` or ``LoadError``.
    """
    if isinstance(grid, CompareSettings) and DENSE not in grid.methods:
        grid = grid.model_copy(update={"methods": (DENSE, *grid.methods)})
    digests = Digests()
    cells: dict[str, Cell] = {}
    tasks = [(task, name) for name in grid.tasks for task in SHORTCUTS.get(name, (name,))]
    for model, weights in itertools.product(grid.models, grid.weights or (None,)):
        loading = {name: getattr(grid, name) for name in LOADING}
        base = Cell(model, DENSE, "", **{**loading, "weights": weights})
        for (task, name), protocol, seed in itertools.product(tasks, grid.protocols, grid.seeds):
            if protocol not in protocols(task):
                raise ConfigError(
                    f'task {task} has no protocol "{protocol}": omit the task or the protocol'
                )
            options = replace(grid.options_of(name), protocol=protocol, seed=seed)
            for cell in _methods(grid, replace(base, task=task, seed=seed, options=options)):
                complete = replace(cell, inputs=digests.of(cell))
                cells.setdefault(complete.key, complete)
    return tuple(cells.values())


def _methods(grid: SweepSettings, base: Cell) -> Iterator[Cell]:
    """The cells of all methods with the model and task of ``base``."""
    add_dense = bool(grid.layers) and DENSE not in grid.methods  # for the plot's dense line
    for method in (*((DENSE,) if add_dense else ()), *grid.methods):
        cell = replace(base, method=method)
        amounts = [cell] if removes_nothing(method) else _amounts(grid, cell)
        for pruned in amounts:
            # ``config()`` raises ``ConfigError`` for invalid options, here before a model is loaded
            calibration = pruned.config().calibration
            if calibration is not None and calibration.source == "text":
                pruned = replace(pruned, calibration=grid.calibration)
            if pruned.weights not in (None, *grid.weights[:1]):  # label all but the first format
                name, at, amount = pruned.label.partition("@")
                pruned = replace(pruned, name=f"{name} {pruned.weights}{at}{amount}")
            yield pruned


def _amounts(grid: SweepSettings, cell: Cell) -> Iterator[Cell]:
    """The cell at every sparsity, or with every layer group and every fraction to keep."""
    cell = replace(cell, overrides=grid.overrides)
    if not grid.layers:
        has_sparsity = cell.method.startswith(SETTING)
        for sparsity in (None,) if has_sparsity else grid.sparsities or (None,):
            yield replace(cell, sparsity=sparsity)
        return
    groups: Sequence[str] = grid.layers
    if EACH in groups:
        from dart_llm.experiments.cell import layer_count  # imports torch

        groups = [str(layer) for layer in range(layer_count(cell))]
    budget = cell.overrides.get("budget", {})
    budget = {"name": budget} if isinstance(budget, str) else budget
    for keep, group in itertools.product(grid.keep, groups):
        overrides = {**cell.overrides, "budget": {**budget, "table": grid.layer_table(group, keep)}}
        yield replace(cell, layers=group, keep=keep, base_keep=grid.base_keep, overrides=overrides)


def execution_order(cells: Sequence[Cell]) -> list[Cell]:
    """Cells sorted by model and method, so that each is loaded or prepared only once."""
    ranks: dict[tuple[Any, ...], int] = {}

    def rank(*key: Any) -> int:
        return ranks.setdefault(key, len(ranks))

    def order(cell: Cell) -> tuple[int, int]:
        model = repr(cell.load_arguments)
        return rank(model), rank(model, cell.label, cell.seed)

    return sorted(cells, key=order)


# The plan.


def show_plan(cells: Sequence[Cell], done: set[str], ui: Ui) -> dict[str, Any]:
    """Print, and return as data, the cells to measure and the models to download.

    ``done``: keys of finished cells.  Raises ``LoadError`` for a model that does not exist or that
    does not fit on the disk.
    """
    from dart_llm.experiments.cell import download_size  # imports torch

    rows = [
        {
            "status": "finished" if cell.key in done else "to do",
            "key": cell.key,
            "label": cell.label,
            "task": cell.task,
            "protocol": cell.options.protocol,
            "seed": cell.seed,
            "model": cell.model,
        }
        for cell in cells
    ]
    for row in rows:
        ui.result("{status}: {model}, {label} on {task}, {protocol}, seed {seed}".format(**row))
    models = {cell.model: cell for cell in cells if cell.key not in done}
    downloads = {model: download_size(cell) for model, cell in models.items()}
    for model, size in downloads.items():
        if size != 0:
            ui.result(f"download: {model}, {'size unknown' if size is None else size_text(size)}")
    ui.result(f"{len(done)} of {len(cells)} cells are finished")
    return {"rows": rows, "downloads": downloads}
