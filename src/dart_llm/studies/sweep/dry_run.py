"""What ``compare`` and ``sweep`` would do: cells, downloads and disk space (``--dry-run``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dart_llm.cache import free_bytes
from dart_llm.data import datasets
from dart_llm.evaluation.tasks import split
from dart_llm.experiments.cell import Cell, short_task
from dart_llm.experiments.comparison import short_name
from dart_llm.experiments.model_facts import download_size
from dart_llm.files import size_text
from dart_llm.reporting.console import Ui
from dart_llm.studies.sweep.grid import cells_of
from dart_llm.studies.sweep.settings import SweepSettings
from dart_llm.studies.sweep.study import finished_before

FINISHED, TO_DO = "finished", "to do"

CELL_BYTES = 500_000
"""About what the results of a cell take on the disk."""


@dataclass(frozen=True)
class Download:
    """Something that must be fetched; ``size``: bytes, None when it is not known."""

    name: str
    size: int | None
    note: str = ""

    @property
    def sentence(self) -> str:
        """For people."""
        size = "size unknown" if self.size is None else size_text(self.size)
        return f"download: {self.name}, {size}{f' ({self.note})' if self.note else ''}"


def dry_run(settings: SweepSettings, ui: Ui, fresh: bool = False) -> dict[str, Any]:
    """Print the plan and return it as data.  Nothing is downloaded, loaded or written.

    Raises ``LoadError`` for a model that does not exist or that does not fit on the disk.
    """
    cells = cells_of(settings)
    root = Path(settings.results_dir)
    experiment = root / settings.experiment
    done = set[str]()
    if not fresh:
        done = {cell.key for cell in cells if finished_before(experiment, cell.key) is not None}
    todo = [cell for cell in cells if cell.key not in done]
    downloads = [*_models(todo), *_data(todo)]
    rows = [_row(cell, FINISHED if cell.key in done else TO_DO) for cell in cells]
    disk = sum(one.size or 0 for one in downloads) + CELL_BYTES * len(todo)
    free = free_bytes(root)
    ui.result(_table(rows))
    ui.result(f"{len(cells)} cells: {len(done)} finished, {len(todo)} to do")
    for sentence in [one.sentence for one in downloads] or ["download: nothing"]:
        ui.result(sentence)
    ui.result(f"disk: about {size_text(disk)}; {size_text(free)} are free")
    return {
        "rows": rows,
        "downloads": [asdict(one) for one in downloads],
        "disk_bytes": disk,
        "free_bytes": free,
    }


def _row(cell: Cell, status: str) -> dict[str, Any]:
    return {
        "key": cell.key,
        "label": cell.label,
        "model": cell.model,
        "task": cell.task,
        "protocol": cell.options.protocol,
        "seed": cell.seed,
        "status": status,
    }


def _table(rows: Iterable[dict[str, Any]]) -> Table:
    table = Table(title="cells", title_justify="left")
    for name in ("model", "task", "protocol", "seed", "method", "status"):
        table.add_column(name)
    for row in rows:
        model, task = short_name(row["model"]), short_task(row["task"])
        table.add_row(model, task, row["protocol"], str(row["seed"]), row["label"], row["status"])
    return table


def _models(cells: Iterable[Cell]) -> Iterator[Download]:
    """Models that are not on this machine."""
    for model, cell in {cell.model: cell for cell in cells}.items():
        size = download_size(cell)
        if size != 0:
            note = "the hub cannot be asked, and the cache has none" if size is None else ""
            yield Download(model, size, note)


def _data(cells: Iterable[Cell]) -> Iterator[Download]:
    """Data sets of the hub that the tasks read and that are not in its cache."""
    from huggingface_hub import constants

    wanted: dict[tuple[str, str | None], datasets.DataSet] = {}
    for cell in cells:
        kind, name = split(cell.task)
        for source in datasets.DATA_SETS.values():
            named = name in source.tasks if kind == "lm-eval" else source.name == name
            if named and (kind == "lm-eval" or kind in source.uses) and not Path(name).exists():
                wanted[source.hub_id, source.config] = source
    cache = Path(constants.HF_HUB_CACHE)
    for source in wanted.values():
        if not (cache / f"datasets--{source.hub_id.replace('/', '--')}").is_dir():
            size = source.megabytes and source.megabytes * 10**6
            yield Download(f"data set {source.where}", size)
