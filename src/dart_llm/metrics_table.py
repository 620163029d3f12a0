"""Numbers of texts averaged per method, with intervals, beside what was really removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from dart_llm import stats
from dart_llm.merge import merge_reports, slim
from dart_llm.stats import Interval
from dart_llm.text_metrics import NAMES, NUMBERS


@dataclass(frozen=True)
class MethodMeans:
    """One method's numbers: means over ids, with seeds of one id averaged first.

    ``n``: ids for which the number is defined.  ``intervals``: 95 % over ids; None with fewer than
    two of them.  ``accounting``: the merged report of the runs; None where there was none.
    """

    method: str
    texts: int
    means: Mapping[str, float | None]
    intervals: Mapping[str, Interval | None]
    n: Mapping[str, int]
    accounting: Mapping[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data: every number with its interval, beside what was really removed."""
        report = self.accounting or {}
        numbers = {}
        for name in NAMES:
            found = self.intervals[name]
            numbers[name] = {
                "mean": self.means[name],
                "low": found.low if found else None,
                "high": found.high if found else None,
                "n": self.n[name],
            }
        return {
            "method": self.method,
            "texts": self.texts,
            "achieved_sparsity": report.get("achieved_sparsity"),
            "dense_token_share": report.get("dense_token_share"),
            "remasks": report.get("remasks"),
            "numbers": numbers,
        }


def means(cells: Iterable[Mapping[str, Any]]) -> list[MethodMeans]:
    """One row per label, in the order of ``cells``, the lines of a drift study's results.jsonl.

    Cells without metrics (forced mode, the dense text itself, failed ones) are left out.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        if cell.get("metrics") is not None:
            groups.setdefault(str(cell["label"]), []).append(cell)
    return [_means(label, group) for label, group in groups.items()]


def _means(label: str, cells: Sequence[Mapping[str, Any]]) -> MethodMeans:
    samples = {name: _sample(cells, name) for name in NAMES}
    reports = [slim(dict(cell["accounting"])) for cell in cells if cell.get("accounting")]
    return MethodMeans(
        method=label,
        texts=len(cells),
        means={name: stats.mean(sample) for name, sample in samples.items()},
        intervals={name: stats.known(dict(sample)) for name, sample in samples.items()},
        n={name: len(sample) for name, sample in samples.items()},
        accounting=merge_reports(reports) if reports else None,
    )


def _sample(cells: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """The number by id, averaged over seeds; without those for which it is not defined."""
    values: dict[str, list[float]] = {}
    for cell in cells:
        value = cell["metrics"].get(name)
        if value is not None:
            values.setdefault(str(cell["cell"]["source"]), []).append(float(value))
    return {source: sum(found) / len(found) for source, found in values.items()}


def table(rows: Sequence[MethodMeans], title: str = "texts against dense") -> Table:
    """Every number of every method, with its interval beside what was really removed."""
    found = Table(title=Text(title), title_justify="left")
    for name in ("method", "number"):
        found.add_column(name, overflow="fold")
    for name in ("mean", "95 %", "n", "achieved", "dense tokens", "re-masks"):
        found.add_column(name, justify="right")
    for row in rows:
        for place, number in enumerate(NUMBERS):
            cells = _cells(row, number.name)
            # Text, because names may hold the square brackets of rich's markup
            first = Text("" if place else row.method)
            found.add_row(first, number.title, *cells, end_section=place == len(NUMBERS) - 1)
    return found


def _cells(row: MethodMeans, name: str) -> list[str]:
    mean, interval, report = row.means[name], row.intervals[name], row.accounting
    return [
        "" if mean is None else f"{mean:.3f}",
        f"{interval.low:.3f}-{interval.high:.3f}" if interval else "",
        str(row.n[name]),
        f"{report['achieved_sparsity']:.1%}" if report else "",
        f"{report['dense_token_share']:.1%}" if report else "",
        str(report["remasks"]) if report else "",
    ]
