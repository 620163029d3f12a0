"""The pictures of a drift study show the numbers of its folder, on paper and to point at."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_drift
from dart_llm.errors import MissingExtra
from dart_llm.files import write_json
from dart_llm.reporting import figures
from dart_llm.reporting.figures import Drawing, Kit
from dart_llm.studies.drift import flow_plot, plots, report
from dart_llm.studies.drift.view import DriftView, Flow, periods, read, read_masks
from fake_drift import FIRST, SECOND

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("cmcrameri")

NAMES = [
    "methods", "loss", "similarity", "overlap", "neurons", "flow", "detection_rates", "detection",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_drift.with_detection(tmp_path_factory.mktemp("drift") / "run")


@pytest.fixture(scope="module")
def view(folder: Path) -> DriftView:
    return read(folder)


@pytest.fixture(scope="module")
def drawings(view: DriftView) -> dict[str, Drawing]:
    firsts = (next(kind, None) for kind in report.kinds(view))
    return {one.plot.name: one for one in firsts if one is not None}


@pytest.fixture(scope="module")
def kit() -> Kit:
    pytest.importorskip("plotly")
    return figures.kit()


def drawn(drawing: Drawing, narrow: bool = False) -> Any:
    from matplotlib.figure import Figure

    figure = Figure()
    with figures._style() as palette:
        drawing.plot.draw(figure, palette, narrow)
    return figure


def interactive(drawing: Drawing, kit: Kit) -> dict[str, Any]:
    return dict(json.loads(figures.to_json(drawing, kit)))


def test_every_picture_is_written(folder: Path) -> None:
    paths = report.write_all(folder)
    assert [path.stem for path in paths] == NAMES
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path) -> None:
    free = fake_drift.build(tmp_path / "free", ("a",), ("dense", "never", "dart"), mode="free")
    names = [one.plot.name for kind in report.kinds(read(free)) if (one := next(kind, None))]
    assert names == ["methods", "similarity", "overlap", "neurons", "flow"]
    assert report.write_all(fake_drift.build(tmp_path / "dense", ("01",), ("dense",))) == []
    detect = tmp_path / "detect"
    detect.mkdir()
    write_json(detect / "config.json", {"kind": "detect"})
    write_json(detect / "detection.json", fake_drift.detection())
    names = [one.plot.name for kind in report.kinds(read(detect)) for one in kind]
    assert names == ["detection_rates", "detection"]


@pytest.mark.parametrize("narrow", [False, True])
def test_axes_are_labelled(drawings: dict[str, Drawing], narrow: bool) -> None:
    units = "tokens sparsity nats % layer".split()
    for name, drawing in drawings.items():
        words = [axes.get_xlabel() for axes in drawn(drawing, narrow).axes]
        assert name == "flow" or any(unit in text for unit in units for text in words), name
        assert drawing.plot.alt.endswith((".", ")"))


def test_bars_hold_the_summary(view: DriftView, drawings: dict[str, Drawing]) -> None:
    lines = {line["label"]: line for line in view.lines}
    estimates = [line["loss"]["after_minus_dense"] for line in lines.values()]
    quality, removed = drawn(drawings["methods"]).axes
    means = [estimate["mean"] for estimate in estimates]
    assert [bar.get_width() for bar in quality.patches] == pytest.approx(means)
    assert len({bar.get_hatch() for bar in quality.patches}) == 3  # legible without colours
    whiskers = [list(line.get_xdata()) for line in quality.lines if line.get_marker() == "|"]
    assert whiskers[::2] == [[one["low"], one["high"]] for one in estimates]
    achieved = [100 * line["achieved_sparsity"] for line in lines.values()]
    assert [bar.get_width() for bar in removed.patches] == pytest.approx(achieved)
    assert achieved[2] == pytest.approx(50 * (1 - 16 / (FIRST + SECOND)))
    assert "3.8 % dense, 1 re-mask" in removed.texts[2].get_text()


def test_a_panel_per_curve_of_losses(drawings: dict[str, Drawing]) -> None:
    panels = [axes for axes in drawn(drawings["loss"]).axes if axes.get_title(loc="left")]
    labels = [axes.get_title(loc="left") for axes in panels]
    assert labels == ["never@0.5", "published@0.5", "dart@0.5"]
    curve = next(line for line in panels[2].lines if line.get_marker() != "None")
    assert list(curve.get_xdata()[:2]) == [-120, -104]
    markers = {line.get_marker() for axes in panels for line in axes.lines} - {"None"}
    assert len(markers) == 3  # legible without colours


def test_timeline_shows_windows_masks_and_topics(drawings: dict[str, Drawing], kit: Kit) -> None:
    figure = drawn(drawings["similarity"])
    assert [axes.get_title(loc="right") for axes in figure.axes] == ["published@0.5", "dart@0.5"]
    texts = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert texts == {"first", "drift", "tides", "double-entry bookkeeping"}
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert {"threshold", "window", "trigger", "low window", "change of topic"} <= set(labels)
    data = interactive(drawings["similarity"], kit)["data"]
    marks = [trace for trace in data if trace.get("name") in ("window", "low window", "trigger")]
    checks = [c for m in ("published", "dart") for c in fake_drift.checks("01", m)]
    assert sum(len(trace["x"]) for trace in marks) == len(checks)
    legend = [trace["name"] for trace in data if trace.get("showlegend")]
    assert len(legend) == len(set(legend))


def test_overlap_is_hatched_where_tokens_ran_dense(drawings: dict[str, Drawing]) -> None:
    axes = drawn(drawings["overlap"]).axes[0]
    (mesh,) = axes.collections
    own = fake_drift.masks("01", "dart", 0, fake_drift.LAYERS, fake_drift.WIDTH)
    overlaps = [len({*a} & {*b}) / len({*a} | {*b}) for a, b in zip(*own, strict=True)]
    values = np.asarray(mesh.get_array()).reshape(fake_drift.LAYERS, 4)
    assert values[:, 0].tolist() == [1.0] * fake_drift.LAYERS
    assert values[:, 3] == pytest.approx(overlaps)
    spans = [patch for patch in axes.patches if patch.get_hatch()]
    assert [(span.get_x(), span.get_width()) for span in spans] == [(220, 4), (224, 16)]
    assert {text.get_text() for text in axes.texts} == {"tides", "double-entry bookkeeping"}


def test_raster_sorts_neurons_by_when_they_live(
    view: DriftView, drawings: dict[str, Drawing], kit: Kit
) -> None:
    live = np.array([[1, 0, 1, 0, 0], [1, 0, 0, 1, 0]], dtype=np.bool_)
    assert plots.order(live).tolist() == [0, 2, 3, 1, 4]
    dart = next(cell for cell in view.of("dart@0.5") if cell.source == "01")
    masks = read_masks(dart)
    assert masks is not None
    cells = plots.raster(masks.live[2], periods(dart))
    assert cells.shape == (fake_drift.WIDTH, 4)
    assert cells.sum(0).tolist() == [32, 64, 64, 32]  # dense tokens use all neurons
    page = interactive(drawings["neurons"], kit)
    assert page["data"][0]["x"] == [0, 220, 224, FIRST + 48, FIRST + SECOND]
    names = [note["text"] for note in page["layout"]["annotations"]]
    assert names == ["tides", "double-entry bookkeeping"]


def test_flows_fill_both_sides(drawings: dict[str, Drawing], kit: Kit) -> None:
    bounds = flow_plot.bounds(Flow(kept=30, left=20, joined=10, out=40))
    for side, live in ((0, 0.5), (1, 0.4)):
        ends = sorted((ends[side], ends[side] + ends[2]) for ends in bounds.values())
        assert sum(high - low for low, high in ends) == pytest.approx(1.0)
        assert ends[-1][1] == pytest.approx(1 + flow_plot.GAP)
        above = [low for low, _ in ends if low >= 1 - live]
        assert min(above) == pytest.approx(1 + flow_plot.GAP - live)
    link = interactive(drawings["flow"], kit)["data"][0]["link"]
    total = fake_drift.LAYERS * fake_drift.WIDTH
    assert sum(link["value"]) == total
    assert link["label"] == ["kept", "left", "joined", "pruned in both"]
    assert link["source"] == [0, 0, 1, 1] and link["target"] == [2, 3, 2, 3]
    assert link["value"][0] + link["value"][1] == total // 2


def test_detection_rates_are_in_percent(drawings: dict[str, Drawing]) -> None:
    lines = drawn(drawings["detection_rates"]).axes[0].lines
    rates = [line.get_xdata()[0] for line in lines if line.get_marker() != "None"]
    assert rates == pytest.approx([90, 60, 80, 80])


def test_interactive_figures_keep_to_their_room(view: DriftView, kit: Kit) -> None:
    everything, cut = figures.figures(plots.make_raster(view), kit)
    assert len(everything) == 8 and not cut
    size = len(everything[0].data) + len(everything[1].data)
    for room, number in ((size, 2), (1, 1)):
        some, cut = figures.figures(plots.make_raster(view), kit, room=room)
        assert len(some) == number and cut


@pytest.mark.parametrize("package", ["plotly", "matplotlib", "cmcrameri"])
def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in [package, *(["plotly.graph_objects"] if package == "plotly" else [])]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=rf"needs {package}.*'dart-llm\[plots\]'"):
        figures.kit()
