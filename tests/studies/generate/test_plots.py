"""Plots are drawn from the files that exist, and show the numbers that stand in them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dart_llm.errors import MissingExtra, ResultsError
from dart_llm.experiments import store as results_view
from dart_llm.experiments.store import ResultsView
from dart_llm.reporting import figures as plot_bars__figures
from dart_llm.reporting import figures as plots
from dart_llm.studies.generate import plots as plots__plots
from fake_results import drift_checks, kept_counts, write_results

pytest.importorskip("matplotlib")
pytest.importorskip("cmcrameri")

NAMES = ["kept_neurons", "similarity", "perplexity", "time_per_token"]
FILES = ["masks.json", "drift.csv", "perplexity.json", "timing.json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("results") / "run")


@pytest.fixture(scope="module")
def view(folder: Path) -> ResultsView:
    return results_view.read(folder)


def drawn(view: ResultsView, name: str, narrow: bool = False) -> Any:
    """The first axes of one plot."""
    from matplotlib.figure import Figure

    plot = next(plot for plot in plots__plots.available(view) if plot.name == name)
    figure = Figure()
    with plots._style() as palette:
        plot.draw(figure, palette, narrow)
    return figure.axes[0]


def words(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def labels(axes: Any) -> list[str]:
    return list(axes.get_legend_handles_labels()[1])


def test_every_plot_is_written(folder: Path) -> None:
    paths = plots__plots.write_all(folder)
    assert [path.relative_to(folder).as_posix() for path in paths] == [
        f"plots/{name}.png" for name in NAMES
    ]
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20], "big") == 1600  # pixels wide: 8 inches at 200


@pytest.mark.parametrize(("name", "file"), list(zip(NAMES, FILES, strict=True)))
@pytest.mark.parametrize("content", [None, "{"])
def test_a_missing_or_broken_file_only_costs_its_plot(
    tmp_path: Path, name: str, file: str, content: str | None
) -> None:
    folder = write_results(tmp_path / "run")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content, encoding="utf-8")
    found = [plot.name for plot in plots__plots.available(results_view.read(folder))]
    assert found == [other for other in NAMES if other != name]


def test_an_empty_folder_has_no_plots(tmp_path: Path) -> None:
    assert plots__plots.write_all(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_no_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="is not a results folder: give the folder"):
        plots__plots.write_all(tmp_path / "nowhere")


def test_kept_neurons_shows_the_counts(view: ResultsView) -> None:
    axes = drawn(view, "kept_neurons")
    heights = [bar.get_height() for bar in axes.patches[:30]]
    assert heights == pytest.approx([100 * kept / 1536 for kept in kept_counts()])
    assert labels(axes) == ["spread evenly: 50 %", "all 3 masks (re-masks keep the counts)"]


def test_kept_neurons_shows_a_last_mask_that_differs(view: ResultsView) -> None:
    other = {**view.remasks[2], "kept": [800] * 30}
    axes = drawn(replace(view, remasks=(*view.remasks[:2], other)), "kept_neurons")
    assert "first mask (step 12)" in labels(axes)
    assert "last mask (step 286, drift)" in labels(axes)


def test_similarity_marks_every_kind_of_window(view: ResultsView) -> None:
    axes = drawn(view, "similarity")
    counts = {line.get_label(): len(line.get_xdata()) for line in axes.lines}
    assert counts["low window"] == 4
    assert counts["trigger"] == 2
    assert counts["held: guards put it off"] == 1
    assert counts["arming: no threshold yet"] == 4
    total = sum(counts[name] for name in counts if not str(name).startswith(("_", "thr")))
    assert total == len(drift_checks())
    assert words(axes) == ["first", "drift", "drift"]
    assert "dense, observing" in labels(axes)
    assert axes.get_ylabel() == "cosine similarity"


def test_similarity_shows_at_most_four_sequences(view: ResultsView) -> None:
    from matplotlib.figure import Figure

    checks = [replace(c, sequence=s, trigger=False) for s in range(6) for c in drift_checks()]
    checks += [replace(drift_checks()[-1], sequence=9, trigger=True)]
    plot = plots__plots.available(replace(view, drift=tuple(checks)))[1]
    figure = Figure()
    with plots._style() as palette:
        plot.draw(figure, palette, False)
    titles = [axes.get_title(loc="right") for axes in figure.axes]
    assert titles == [f"sequence {number}, row 0" for number in (0, 1, 2, 9)]
    assert plot.small.startswith("each mark: the 10 tokens before it · 4 of 7 sequences shown")


def test_many_masks_are_lines_without_names(view: ResultsView) -> None:
    masks = tuple({**view.remasks[0], "step": step} for step in range(0, 400, 10))
    axes = drawn(replace(view, remasks=masks), "similarity")
    assert words(axes) == []
    assert "40 masks" in labels(axes)


def test_perplexity_bars_and_numbers(view: ResultsView) -> None:
    axes = drawn(view, "perplexity")
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert ends == pytest.approx([17.62, 17.62 * 1.08, 17.62 * 2.1, 17.62 * 2.52])
    assert axes.get_xscale() == "log"
    assert words(axes) == ["17.6", "19.0  (x 1.08)", "37.0  (x 2.10)", "44.4  (x 2.52)"]
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "dense",
        "dart 20 %",
        "dart 50 %",
        "griffin 50 %",
    ]
    hatches = [bar.get_hatch() for bar in axes.patches]
    assert hatches[1] == hatches[2] != hatches[3]  # methods differ without colours


def test_times_and_the_byte_limit(view: ResultsView) -> None:
    axes = drawn(view, "time_per_token")
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([54.2, 44.5])
    assert labels(axes) == ["least that the bytes read allow: 40.2 ms"]
    assert words(axes) == ["54.2 ms", "44.5 ms"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (10.0, 60.0, [10, 20, 50]),
        (15.0, 70.0, [20, 30, 40, 50, 60, 70]),
        (17.0, 19.0, [17, 18, 19]),
        (10.0, 1e9, [10, 100, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9]),
    ],
)
def test_log_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert plot_bars__figures._log_ticks(low, high, 9) == pytest.approx(ticks)


@pytest.mark.parametrize("narrow", [False, True])
def test_svg_is_small_and_closed(view: ResultsView, narrow: bool) -> None:
    for plot in plots__plots.available(view):
        data = plots.render(plot, "svg", narrow)
        assert len(data) < 150_000
        assert b"<script" not in data
        assert b"matplotlib.org" not in data
        assert b"@import" not in data


def test_a_name_with_dollars_is_not_mathematics(view: ResultsView) -> None:
    config = {**view.config, "checkpoint": {"name": "a$\\frac$b_{c"}}
    plot = plots__plots.available(replace(view, config=config))[0]
    assert plots.render(plot, "png").startswith(b"\x89PNG")


@pytest.mark.parametrize("package", ["matplotlib", "cmcrameri"])
def test_a_missing_package_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"needs {package}.*'dart-llm\[plots\]'"):
        plots__plots.write_all(folder)


def test_importing_is_lean() -> None:
    code = "import sys, dart_llm.studies.generate.report, dart_llm.reporting.figures; "
    code += "print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
