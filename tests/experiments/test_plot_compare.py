"""Plots of comparisons show the rows' numbers, and can be read without colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dart_llm.experiments import comparison, comparison_plots
from dart_llm.experiments.comparison import Row
from dart_llm.reporting import figures
from dart_llm.reporting.figures import Plot
from fake_cells import ACC, METHODS, PPL, ROUGE, cell, failed, grid, layer_curve, measured, report


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return comparison.rows(grid())


def panels(plot: Plot, narrow: bool = False) -> list[Any]:
    """The drawn axes without the legend's."""
    from matplotlib.figure import Figure

    figure = Figure()
    with figures._style() as palette:
        plot.draw(figure, palette, narrow)
    return list(figure.axes[1:])


def lines(axes: Any) -> dict[str, Any]:
    """The data line of each legend entry."""
    entries = zip(*axes.get_legend_handles_labels(), strict=True)
    return {name: line[0] if hasattr(line, "lines") else line for line, name in entries}


def test_one_panel_per_task_and_one_line_per_method(rows: list[Row]) -> None:
    (plot,) = comparison_plots.make(rows)
    drawn = panels(plot)
    assert [axes.get_title(loc="left").partition(":")[0] for axes in drawn] == [
        *(ACC, "mmlu_local", "perplexity", "summarize")
    ]
    assert all(set(lines(axes)) == {*METHODS, "dense"} for axes in drawn)
    assert [axes.get_yscale() for axes in drawn] == ["linear", "linear", "log", "linear"]
    assert len(panels(plot, narrow=True)) == 4
    own = [row for row in rows if row.method == "dart" and row.task == ROUGE]
    data = lines(drawn[3])["dart"]  # at the achieved sparsity
    assert list(data.get_xdata()) == pytest.approx([26.25, 43.75, 61.25], abs=1.3)
    assert list(data.get_ydata()) == pytest.approx([row.value for row in own])
    dense = next(row for row in rows if row.method == "dense" and row.task == ROUGE)
    assert list(lines(drawn[3])["dense"].get_ydata()) == pytest.approx([dense.value] * 2)
    assert [text.get_text() for text in drawn[2].texts] == ["static 1,780 ↑", "static 1.1e5 ↑"]
    assert drawn[2].get_ylim()[1] < 1000  # what lies far beyond is named at the edge


def bars(plot: Plot, method: str) -> list[Any]:
    container = next(c for c in panels(plot)[0].containers if c.get_label() == method)
    return [[tuple(point)[1] for point in path] for path in container.lines[2][0].get_segments()]


def test_bars_are_the_paired_intervals_or_the_metrics_own(rows: list[Row]) -> None:
    own = [row for row in rows if row.method == "flap" and row.task == ACC]
    dense = next(row.value for row in rows if row.method == "dense" and row.task == ACC)
    for end, row in zip(bars(comparison_plots.make(rows)[0], "flap"), own, strict=True):
        assert row.to_dense is not None and dense is not None
        assert end == pytest.approx([dense + row.to_dense.low, dense + row.to_dense.high])
    alone = comparison.rows(
        [c for c in grid(tasks=(PPL,), methods=("dart",)) if c["label"] != "dense"]
    )
    assert alone[0].interval is not None
    ends = [alone[0].interval.low, alone[0].interval.high]
    assert bars(comparison_plots.make(alone)[0], "dart")[0] == pytest.approx(ends)


def test_methods_differ_without_colours() -> None:
    palette = [str(place) for place in range(100)]
    looks = figures.looks_of([*figures.METHODS, "griffin-refresh", "own-1", "own-2"], palette)
    assert len({look["marker"] for look in looks.values()}) == len(looks)
    assert figures.looks_of(["flap"], palette)["flap"] == looks["flap"]  # the same in every plot


def test_many_tasks_and_other_protocols_have_plots_of_their_own() -> None:
    tasks = [f"task_{number}" for number in range(8)]
    found = comparison_plots.make(comparison.rows(grid(tasks, ("griffin",), (0.3, 0.5))))
    assert [plot.name for plot in found] == ["quality", "quality_2"]
    assert [len(panels(plot)) for plot in found] == [6, 2]
    leaking = grid((ACC,), ("griffin",), (0.3, 0.5), protocol="published")
    for made in leaking:
        made["measurement"]["protocol"] = "published"
    cells = [*grid((ACC,), ("griffin",), (0.3, 0.5)), *leaking]
    found = comparison_plots.make(comparison.rows(cells))
    assert ["LEAK" in plot.title for plot in found] == [False, True]


def test_a_single_point_or_nothing_is_no_plot() -> None:
    dense = cell("dense", 0.0, ACC, measured(ACC, "dense", 0.0))
    single = cell("dart", 0.5, ACC, measured(ACC, "dart", 0.5, report=report("dart", 0.5)))
    for cells in ([], [dense], [dense, single], [dense, single, failed("dart", 0.7, ACC, "no")]):
        assert comparison_plots.make(comparison.rows(cells)) == []


def test_layers_are_on_the_x_axis_and_groups_are_named() -> None:
    rows = comparison.rows(layer_curve(count=12))
    (plot,) = comparison_plots.make(rows)
    (axes,) = panels(plot)
    assert plot.name == "layers" and "layer 0 costs the most (perplexity" in plot.alt
    assert set(lines(axes)) == {"dense", "griffin, keep 50 %", "griffin, keep 25 %"}
    data = lines(axes)["griffin, keep 25 %"]
    assert list(data.get_xdata()) == list(range(12))
    assert list(data.get_ydata()) == pytest.approx([r.value for r in rows if r.keep == 0.25])
    assert axes.get_yscale() == "log" and len(axes.get_yticks()) >= 4
    cells = layer_curve(count=3)
    for made in cells[1:]:
        first = 4 * int(made["cell"]["layers"])
        made["cell"].update(layers=f"{first}-{first + 3}", base_keep=0.9)
    (axes,) = panels(comparison_plots.make(comparison.rows(cells))[0])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0-3", "4-7", "8-11"]
    assert "griffin, keep 50 % (others 90 %)" in lines(axes)


def test_files(rows: list[Row], tmp_path: Path) -> None:
    wanted = comparison_plots.make([row for row in rows if row.task == ACC])
    (path,) = figures.save(tmp_path, wanted)
    assert path == tmp_path / "plots" / "quality.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    tall = figures.render(comparison_plots.make(rows)[0], "png", narrow=True)
    width, height = (int.from_bytes(tall[at : at + 4], "big") for at in (16, 20))
    assert width == 820 and height > 2000  # one column of four panels
    assert figures.render(wanted[0], "svg") == figures.render(wanted[0], "svg")
