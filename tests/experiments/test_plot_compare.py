"""Plots of comparisons show the rows' numbers, and can be read without colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dart_llm.experiments import comparison as compare
from dart_llm.experiments import comparison_plots as plot_compare
from dart_llm.experiments import comparison_plots as plot_layers
from dart_llm.experiments.comparison import Row
from dart_llm.reporting import figures as plot_lines
from dart_llm.reporting import figures as plots
from dart_llm.reporting.figures import Plot
from fake_cells import ACC, METHODS, PPL, ROUGE, cell, failed, grid, layer_curve, measured, report

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("cmcrameri")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return compare.rows(grid())


def panels(plot: Plot, narrow: bool = False) -> list[Any]:
    """The drawn axes without the legend's."""
    from matplotlib.figure import Figure

    figure = Figure()
    with plots._style() as palette:
        plot.draw(figure, palette, narrow)
    return list(figure.axes[1:])


def lines(axes: Any) -> dict[str, Any]:
    """The data line of each legend entry."""
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    return {
        name: handle[0] if hasattr(handle, "lines") else handle for name, handle in found.items()
    }


def test_one_panel_per_task_and_one_line_per_method(rows: list[Row]) -> None:
    (plot,) = plot_compare.make_comparison(rows)
    assert plot.name == "quality" and plot.narrow_height is not None
    drawn = panels(plot)
    assert [axes.get_title(loc="left").partition(":")[0] for axes in drawn] == [
        *(ACC, "mmlu_local", "perplexity", "summarize")
    ]
    for axes in drawn:
        assert set(lines(axes)) == {*METHODS, "dense"}
    assert [axes.get_yscale() for axes in drawn] == ["linear", "linear", "log", "linear"]
    assert len(panels(plot, narrow=True)) == 4


def test_points_are_at_the_achieved_sparsity(rows: list[Row]) -> None:
    axes = panels(plot_compare.make_comparison(rows)[0])[3]
    own = [row for row in rows if row.method == "dart" and row.task == ROUGE]
    data = lines(axes)["dart"]
    assert list(data.get_xdata()) == pytest.approx([26.25, 43.75, 61.25], abs=1.3)
    assert list(data.get_ydata()) == pytest.approx([row.value for row in own])
    dense = next(row for row in rows if row.method == "dense" and row.task == ROUGE)
    assert list(lines(axes)["dense"].get_ydata()) == pytest.approx([dense.value] * 2)


def test_bars_are_the_paired_intervals(rows: list[Row]) -> None:
    axes = panels(plot_compare.make_comparison(rows)[0])[0]
    own = [row for row in rows if row.method == "flap" and row.task == ACC]
    dense = next(row.value for row in rows if row.method == "dense" and row.task == ACC)
    container = next(c for c in axes.containers if c.get_label() == "flap")
    ends = [[tuple(point)[1] for point in path] for path in container.lines[2][0].get_segments()]
    for end, row in zip(ends, own, strict=True):
        assert row.to_dense is not None and dense is not None
        assert end == pytest.approx([dense + row.to_dense.low, dense + row.to_dense.high])


def test_without_dense_the_bars_are_the_metrics_own() -> None:
    cells = [c for c in grid(tasks=(PPL,), methods=("dart",)) if c["label"] != "dense"]
    found = compare.rows(cells)
    (plot,) = plot_compare.make_comparison(found)
    container = panels(plot)[0].containers[0]
    ends = [tuple(point)[1] for point in container.lines[2][0].get_segments()[0]]
    assert found[0].interval is not None
    assert ends == pytest.approx([found[0].interval.low, found[0].interval.high])


def test_methods_differ_without_colours() -> None:
    looks = plot_lines.looks_of(
        [*plot_lines.METHODS, "griffin-refresh", "own-1", "own-2"], [str(i) for i in range(100)]
    )
    styles = [(look["marker"], str(look["linestyle"])) for look in looks.values()]
    assert len(set(styles)) == len(styles)
    assert len({marker for marker, _ in styles}) == len(styles)
    alone = plot_lines.looks_of(["flap"], [str(i) for i in range(100)])
    assert alone["flap"] == looks["flap"]  # the same in every plot


def test_far_perplexities_are_named_at_the_edge(rows: list[Row]) -> None:
    axes = panels(plot_compare.make_comparison(rows)[0])[2]
    assert [text.get_text() for text in axes.texts] == ["static 1,780 ↑", "static 1.1e5 ↑"]
    assert axes.get_ylim()[1] < 1000
    calm = compare.rows(grid(tasks=(PPL,), methods=("griffin", "dart")))
    assert list(panels(plot_compare.make_comparison(calm)[0])[0].texts) == []


def test_more_than_six_tasks_make_more_plots() -> None:
    tasks = [f"task_{number}" for number in range(8)]
    found = plot_compare.make_comparison(compare.rows(grid(tasks, ("griffin",), (0.3, 0.5))))
    assert [plot.name for plot in found] == ["quality", "quality_2"]
    assert [len(panels(plot)) for plot in found] == [6, 2]


def test_protocols_have_plots_of_their_own_and_the_leak_is_named() -> None:
    cells = grid((ACC,), ("griffin",), (0.3, 0.5))
    leaking = grid((ACC,), ("griffin",), (0.3, 0.5), protocol="published")
    for made in leaking:
        made["measurement"]["protocol"] = "published"
    found = plot_compare.make_comparison(compare.rows([*cells, *leaking]))
    assert ["LEAK" in plot.title for plot in found] == [False, True]


def test_a_single_point_or_nothing_is_no_plot() -> None:
    def made(cells: Sequence[Any]) -> list[Plot]:
        return plot_compare.make_comparison(compare.rows(cells))

    dense = cell("dense", 0.0, ACC, measured(ACC, "dense", 0.0))
    single = cell("dart", 0.5, ACC, measured(ACC, "dart", 0.5, report=report("dart", 0.5)))
    assert made([]) == made([dense]) == made([dense, single]) == []
    assert made([dense, single, failed("dart", 0.7, ACC, "no memory")]) == []


def test_layers_are_on_the_x_axis() -> None:
    found = compare.rows(layer_curve(count=12))
    (plot,) = plot_layers.make_layers(found)
    assert plot.name == "layers" and plot_compare.make_comparison(found) == []
    (axes,) = panels(plot)
    assert set(lines(axes)) == {"dense", "griffin, keep 50 %", "griffin, keep 25 %"}
    data = lines(axes)["griffin, keep 25 %"]
    assert list(data.get_xdata()) == list(range(12))
    own = [row.value for row in found if row.keep == 0.25]
    assert list(data.get_ydata()) == pytest.approx(own)
    assert axes.get_yscale() == "log" and len(axes.get_yticks()) >= 4
    assert "layer 0 (perplexity" in plot.alt


def test_groups_of_layers_are_named() -> None:
    cells = layer_curve(count=3)
    for made in cells[1:]:
        first = 4 * int(made["cell"]["layers"])
        made["cell"].update(layers=f"{first}-{first + 3}", base_keep=0.9)
    (axes,) = panels(plot_layers.make_layers(compare.rows(cells))[0])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0-3", "4-7", "8-11"]
    assert "griffin, keep 50 % (others 90 %)" in lines(axes)


def test_files(rows: list[Row], tmp_path: Path) -> None:
    wanted = plot_compare.make_comparison([row for row in rows if row.task == ACC])
    (path,) = plots.save(tmp_path, wanted)
    assert path == tmp_path / "plots" / "quality.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    tall = plots.render(plot_compare.make_comparison(rows)[0], "png", narrow=True)
    width, height = (int.from_bytes(tall[at : at + 4], "big") for at in (16, 20))
    assert width == 820 and height > 2000  # one column of four panels
    assert plots.render(wanted[0], "svg") == plots.render(wanted[0], "svg")
