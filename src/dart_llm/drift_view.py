"""A drift folder as read back: frozen records, whatever is unfinished, failed or damaged.

A file or line that cannot be read costs what it held and leaves one sentence in ``problems``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dart_llm import detection_table, drift_summary
from dart_llm.drift_view_cells import DENSE, DriftCell, parse
from dart_llm.errors import ResultsError
from dart_llm.results_view import ResultsView, mapping
from dart_llm.results_view import read as read_results

KIND = "drift"


@dataclass(frozen=True)
class DriftView:
    """The files of one drift folder."""

    results: ResultsView
    cells: tuple[DriftCell, ...]
    summary: Mapping[str, Any]
    """``drift_summary.summarise`` of the cells; empty where they cannot be summed up."""
    detection: Mapping[str, Any]
    """``detection.json``, if one lies in the folder."""
    problems: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return self.results.folder

    @property
    def done(self) -> tuple[DriftCell, ...]:
        return tuple(cell for cell in self.cells if cell.done)

    @property
    def labels(self) -> tuple[str, ...]:
        """Methods as labelled, dense first, then as they come."""
        found = dict.fromkeys(cell.label for cell in self.done if not cell.dense)
        dense = dict.fromkeys(cell.label for cell in self.done if cell.dense)
        return (*dense, *found)

    def of(self, label: str) -> tuple[DriftCell, ...]:
        return tuple(cell for cell in self.done if cell.label == label)

    def dense_of(self, cell: DriftCell) -> DriftCell | None:
        """The untouched model on the same source; of the same seed where there is one."""
        same = [c for c in self.done if c.dense and (c.mode, c.source) == (cell.mode, cell.source)]
        return next((c for c in same if c.seed == cell.seed), same[0] if same else None)

    @property
    def mode(self) -> str:
        return self.cells[0].mode if self.cells else ""

    @property
    def lines(self) -> list[Mapping[str, Any]]:
        """The summary's rows of pruned methods that have a finished cell."""
        rows = self.summary.get("rows") or []
        return [row for row in rows if row["method"] != DENSE and row["cells"]]

    def prompt(self, source: str) -> str:
        """The text of a source, where config.json holds it."""
        found = self.results.config.get("sources") or []
        return next((str(one.get("text") or "") for one in found if one.get("id") == source), "")


def read(folder: Path) -> DriftView:
    """Read a drift folder, or the folder of `dart-llm detect`, which holds no cells.

    Raises ``ResultsError`` when there is no such folder or ``config.json`` is of another command.
    """
    results = read_results(folder)
    kind = results.config.get("kind", KIND)
    if kind not in (KIND, "detect"):
        raise ResultsError(
            f"{folder} holds results of `dart-llm {kind}`, not of `dart-llm drift`: give the "
            "folder that a drift study wrote"
        )
    problems: list[str] = []
    if not results.config and (folder / "config.json").exists():
        problems.append("config.json is not JSON: settings and versions are not shown.")
    texts = {str(row.get("key")): row for row in _rows(folder / "texts.jsonl", problems)}
    tokens = {str(row.get("key")): row for row in _rows(folder / "tokens.jsonl", problems)}
    cells, good = dict[str, DriftCell](), dict[str, Mapping[str, Any]]()
    for row in _rows(folder / "results.jsonl", problems) if kind == KIND else ():
        key = str(row.get("key"))
        try:
            cell = parse(row, texts.get(key, {}), tokens.get(key, {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            words = f"{type(error).__name__}: {error}"
            problems.append(f"The cell {key} of results.jsonl lacks what it needs ({words}).")
            continue
        cells[key], good[key] = replace(cell, masks=_masks(folder, cell, problems)), row
    summary = _summary(list(good.values()), problems)
    detection = _detection(folder / "detection.json", problems)
    return DriftView(results, tuple(cells.values()), summary, detection, tuple(problems))


def _summary(rows: list[Mapping[str, Any]], problems: list[str]) -> Mapping[str, Any]:
    if not rows:
        return {}
    try:
        return drift_summary.summarise(rows)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        words = f"{type(error).__name__}: {error}"
        problems.append(f"The cells of results.jsonl cannot be summed up ({words}).")
        return {}


def _rows(path: Path, problems: list[str]) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSONL file; lines that are not whole are counted, not used."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path.name} cannot be read as UTF-8 text ({error}): it is left out.")
        return
    broken = []
    for place, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = line
        if isinstance(row, Mapping):
            yield row
        elif row is not None:
            broken.append(place)
    if broken:
        problems.append(f"{path.name}: line {broken[0]} is not a JSON object and is left out.")
        if len(broken) > 1:
            problems[-1] = f"{path.name}: {len(broken)} lines are not JSON objects, left out."


def _masks(folder: Path, cell: DriftCell, problems: list[str]) -> Path | None:
    """The cell's mask file if it is there, whole, and holds as many neurons as the cell says."""
    path = folder / "masks" / f"{cell.key.replace('/', '-')}.safetensors"
    if not cell.done or not path.exists():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            sizes = {
                name: file.get_slice(name).get_shape()[0]
                for name in file.keys()  # noqa: SIM118 - not a mapping
                if name.endswith(".ids")
            }
    except (OSError, SafetensorError) as error:
        problems.append(f"masks/{path.name} cannot be read ({error}): its masks are not shown.")
        return None
    told = {
        f"remask{number}.layer{layer}.ids": kept
        for number, mask in enumerate(cell.remasks)
        for layer, kept in enumerate(mask.kept)
    }
    if any(told.get(name) != size for name, size in sizes.items()):
        problems.append(
            f"masks/{path.name} holds other masks than results.jsonl speaks of: they are not shown."
        )
        return None
    return path


def _detection(path: Path, problems: list[str]) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        detection_table.markdown(found)  # reads every entry that pictures and tables need
    except FileNotFoundError:
        return {}
    except (OSError, LookupError, TypeError, ValueError, AttributeError):
        problems.append("detection.json is not what `dart-llm detect` writes: it is left out.")
        return {}
    return mapping(found)
