"""What a sweep would do, before it does it: cells, downloads, disk and time (``--dry-run``)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dart_llm import catalogue
from dart_llm.cache import free_bytes, size_text
from dart_llm.cell import Cell
from dart_llm.model_facts import ModelSize, model_size
from dart_llm.rough import rough_tokens
from dart_llm.sweep import SweepPlace, duration
from dart_llm.sweep_cell import RESULT
from dart_llm.sweep_files import CELLS, finished_before, read_timing
from dart_llm.task_names import split

FINISHED, TO_DO = "finished", "to do"
MEASURED, ROUGH = "measured", "rough"
_LOADING = 5.0
_CELL_BYTES = 500_000
"""Results of a cell, when none is known."""


@dataclass(frozen=True)
class PlanRow:
    """One cell.  ``seconds``: what it will take, None when nothing is known; ``basis``: how that
    is known (``measured`` on finished cells, or ``rough``)."""

    key: str
    label: str
    model: str
    task: str
    protocol: str
    seed: int
    status: str
    seconds: float | None = None
    basis: str = ""


@dataclass(frozen=True)
class Download:
    """Something that must be fetched; ``size``: bytes, None when it cannot be known."""

    name: str
    size: int | None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """``seconds``: of all cells that are to do, on ``workers`` workers; None when not known."""

    rows: tuple[PlanRow, ...]
    downloads: tuple[Download, ...]
    disk_bytes: int
    free_bytes: int
    seconds: float | None
    rough: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            **asdict(self),
            "rows": [asdict(row) for row in self.rows],
            "downloads": [asdict(download) for download in self.downloads],
        }

    def sentences(self) -> list[str]:
        """The plan's totals, one line each."""
        todo = sum(row.status == TO_DO for row in self.rows)
        lines = [f"{len(self.rows)} cells: {len(self.rows) - todo} finished, {todo} to do"]
        for one in self.downloads:
            size = "size unknown" if one.size is None else size_text(one.size)
            lines.append(f"download: {one.name}, {size}{f' ({one.note})' if one.note else ''}")
        if not self.downloads:
            lines.append("download: nothing")
        disk = f"disk: about {size_text(self.disk_bytes)}; {size_text(self.free_bytes)} are free"
        lines.append(disk)
        how = (
            "a rough guess for this machine as busy as it is"
            if self.rough
            else "from finished cells"
        )
        known = "not known" if self.seconds is None else f"about {duration(self.seconds)}, {how}"
        lines.append(f"time: {known}")
        return lines


@dataclass(frozen=True)
class _Past:
    """A finished cell of an earlier sweep."""

    model: str
    task: str
    method: str
    seconds: float
    items: int


def plan(cells: Sequence[Cell], place: SweepPlace, workers: int = 1) -> Plan:
    """What ``run_sweep`` would do.  Nothing is downloaded, loaded or written.

    Raises ``LoadError`` for a model that does not exist or that the disk has no room for.
    """
    experiment = place.root / place.experiment
    done = set[str]()
    if not place.fresh:
        done = {cell.key for cell in cells if finished_before(experiment, cell.key) is not None}
    todo = [cell for cell in cells if cell.key not in done]
    sizes = {cell.model: model_size(cell) for cell in _distinct(todo)}
    history, speed = _history(place.root), flops() if todo else 1.0
    rows = tuple(
        _row(cell, FINISHED) if cell.key in done else _estimated(cell, sizes, history, speed)
        for cell in cells
    )
    downloads = (*_models(sizes), *_data(todo))
    known = [row.seconds for row in rows if row.status == TO_DO]
    total = sum(s for s in known if s is not None) / max(1, min(workers, len(todo)))
    return Plan(
        rows=rows,
        downloads=downloads,
        disk_bytes=sum(d.size or 0 for d in downloads) + _CELL_BYTES * len(todo),
        free_bytes=free_bytes(place.root),
        seconds=None if None in known else total,
        rough=any(row.basis == ROUGH for row in rows),
    )


def plan_table(found: Plan) -> Table:
    """The cells of a plan, for people."""
    table = Table(title="cells", title_justify="left")
    for name in ("model", "task", "protocol", "seed", "method", "status"):
        table.add_column(name)
    table.add_column("time", justify="right")
    for row in found.rows:
        known = "" if row.seconds is None else duration(row.seconds)
        mark = "~ " if row.basis == ROUGH else ""
        model = Path(row.model.rstrip("/")).name
        task = ":".join(Path(part).name for part in row.task.split(":"))
        values = (model, task, row.protocol, str(row.seed), row.label, row.status)
        table.add_row(*values, f"{mark}{known}" if known else "")
    return table


def _row(cell: Cell, status: str, seconds: float | None = None, basis: str = "") -> PlanRow:
    return PlanRow(
        key=cell.key,
        label=cell.label,
        model=cell.model,
        task=cell.task,
        protocol=cell.options.protocol,
        seed=cell.seed,
        status=status,
        seconds=seconds,
        basis=basis,
    )


def _distinct(cells: Iterable[Cell]) -> list[Cell]:
    """One cell per model."""
    return list({cell.model: cell for cell in reversed(list(cells))}.values())[::-1]


def _estimated(
    cell: Cell, sizes: dict[str, ModelSize], history: Sequence[_Past], speed: float
) -> PlanRow:
    alike = [one for one in history if (one.model, one.task) == (cell.model, cell.task)]
    alike = [one for one in alike if one.method == cell.method] or alike
    if alike:
        each = [one.seconds / one.items for one in alike]
        items = cell.options.limit or max(one.items for one in alike)
        return _row(cell, TO_DO, items * sum(each) / len(each), MEASURED)
    weights = sizes[cell.model].weights
    if weights is None:
        return _row(cell, TO_DO)
    seconds = 2.0 * weights * rough_tokens(cell) / speed + _LOADING
    return _row(cell, TO_DO, seconds, ROUGH)


def flops(seconds: float = 0.2) -> float:
    """Floating-point operations per second of a matrix product here, measured for ``seconds``."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 512 if device == "cpu" else 4096
    matrix = torch.ones(size, size, device=device)
    float((matrix @ matrix)[0, 0])
    began, products = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds or not products:
        float((matrix @ matrix)[0, 0])  # reading a number waits for the device
        products += 1
    return 2.0 * size**3 * products / spent


def _history(root: Path) -> list[_Past]:
    """Finished cells under all experiments of the results root."""
    found = []
    for path in sorted(root.glob(f"*/*/{CELLS}/*/{RESULT}")):
        times = read_timing(path.parent)
        seconds = (times.get("seconds") or 0.0) - (times.get("load_s") or 0.0)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            cell, items = document["cell"], len(document["measurement"]["items"])
            known = (cell["model"], cell["task"], cell["method"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if seconds > 0 and items and document.get("status") == "done":
            found.append(_Past(*known, seconds=seconds, items=items))
    return found


def _models(sizes: dict[str, ModelSize]) -> list[Download]:
    found = []
    for name, size in sizes.items():
        if size.download is None:
            why = "the hub cannot be asked, and the cache has none"
            if size.weights is None:
                found.append(Download(name, None, why))
            else:
                found.append(Download(name, 2 * size.weights, f"by its name: {why}"))
        elif size.download:
            found.append(Download(name, size.download))
    return found


def _data(cells: Iterable[Cell]) -> list[Download]:
    """Data sets of the hub that the tasks read and that are not in its cache."""
    wanted: dict[tuple[str, str | None], catalogue.DataSet] = {}
    for cell in cells:
        kind, name = split(cell.task)
        for one in catalogue.DATA_SETS.values():
            asked = name in one.tasks if kind == "lm-eval" else (one.name == name)
            if asked and (kind == "lm-eval" or kind in one.uses) and not Path(name).exists():
                wanted[one.hub_id, one.config] = one
    found = []
    for one in wanted.values():
        if not _has_data(one.hub_id):
            size = None if one.megabytes is None else one.megabytes * 10**6
            found.append(Download(f"data set {one.where}", size))
    return found


def _has_data(hub_id: str) -> bool:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{hub_id.replace('/', '--')}"
    return folder.is_dir()
