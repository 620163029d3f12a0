"""What a sweep would do, before it does it: cells, downloads and disk (``--dry-run``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dart_llm.cache import free_bytes
from dart_llm.data import datasets
from dart_llm.evaluation.task_names import split
from dart_llm.experiments.cell import Cell, short_task
from dart_llm.experiments.model_facts import download_size
from dart_llm.files import size_text
from dart_llm.studies.sweep.cells import SweepPlace, finished_before

FINISHED, TO_DO = "finished", "to do"

CELL_BYTES = 500_000
"""What the results of a cell take on the disk, about."""


@dataclass(frozen=True)
class PlanRow:
    """One cell."""

    key: str
    label: str
    model: str
    task: str
    protocol: str
    seed: int
    status: str


@dataclass(frozen=True)
class Download:
    """Something that must be fetched; ``size``: bytes, None when it cannot be known."""

    name: str
    size: int | None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    rows: tuple[PlanRow, ...]
    downloads: tuple[Download, ...]
    disk_bytes: int
    free_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return asdict(self)

    def sentences(self) -> list[str]:
        """The plan's totals, one line each."""
        todo = sum(row.status == TO_DO for row in self.rows)
        lines = [f"{len(self.rows)} cells: {len(self.rows) - todo} finished, {todo} to do"]
        for download in self.downloads:
            size = "size unknown" if download.size is None else size_text(download.size)
            note = f" ({download.note})" if download.note else ""
            lines.append(f"download: {download.name}, {size}{note}")
        if not self.downloads:
            lines.append("download: nothing")
        disk, free = size_text(self.disk_bytes), size_text(self.free_bytes)
        return [*lines, f"disk: about {disk}; {free} are free"]

    def table(self) -> Table:
        """The cells, for people."""
        table = Table(title="cells", title_justify="left")
        for name in ("model", "task", "protocol", "seed", "method", "status"):
            table.add_column(name)
        for row in self.rows:
            model = Path(row.model.rstrip("/")).name
            task = short_task(row.task)
            table.add_row(model, task, row.protocol, str(row.seed), row.label, row.status)
        return table


def plan(cells: Sequence[Cell], place: SweepPlace) -> Plan:
    """What ``run_sweep`` would do.  Nothing is downloaded, loaded or written.

    Raises ``LoadError`` for a model that does not exist or that the disk has no room for.
    """
    experiment = place.root / place.experiment
    done = set[str]()
    if not place.fresh:
        done = {cell.key for cell in cells if finished_before(experiment, cell.key) is not None}
    todo = [cell for cell in cells if cell.key not in done]
    downloads = (*_models(todo), *_data(todo))
    return Plan(
        rows=tuple(
            PlanRow(
                cell.key,
                cell.label,
                cell.model,
                cell.task,
                cell.options.protocol,
                cell.seed,
                FINISHED if cell.key in done else TO_DO,
            )
            for cell in cells
        ),
        downloads=downloads,
        disk_bytes=sum(d.size or 0 for d in downloads) + CELL_BYTES * len(todo),
        free_bytes=free_bytes(place.root),
    )


def _models(cells: Iterable[Cell]) -> list[Download]:
    """Models that are not on this machine."""
    downloads = []
    for model, cell in {cell.model: cell for cell in cells}.items():
        size = download_size(cell)
        note = "the hub cannot be asked, and the cache has none" if size is None else ""
        if size != 0:
            downloads.append(Download(model, size, note))
    return downloads


def _data(cells: Iterable[Cell]) -> list[Download]:
    """Data sets of the hub that the tasks read and that are not in its cache."""
    from huggingface_hub import constants

    wanted: dict[tuple[str, str | None], datasets.DataSet] = {}
    for cell in cells:
        kind, name = split(cell.task)
        for source in datasets.DATA_SETS.values():
            asked = name in source.tasks if kind == "lm-eval" else source.name == name
            if asked and (kind == "lm-eval" or kind in source.uses) and not Path(name).exists():
                wanted[source.hub_id, source.config] = source
    cache = Path(constants.HF_HUB_CACHE)
    return [
        Download(f"data set {source.where}", source.megabytes and source.megabytes * 10**6)
        for source in wanted.values()
        if not (cache / f"datasets--{source.hub_id.replace('/', '--')}").is_dir()
    ]
