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
from dart_llm.reporting import figures as plotly_page
from dart_llm.reporting import figures as plots
from dart_llm.reporting.figures import Drawing, Kit
from dart_llm.studies.drift import flow_plot as plot_sankey
from dart_llm.studies.drift import plots as plot_raster
from dart_llm.studies.drift import plots as plot_topics
from dart_llm.studies.drift import report as drift_plots
from dart_llm.studies.drift import view as drift_masks
from dart_llm.studies.drift import view as drift_view
from dart_llm.studies.drift.view import DriftView, Flow
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
    return drift_view.read(folder)


@pytest.fixture(scope="module")
def drawings(view: DriftView) -> dict[str, Drawing]:
    firsts = (next(kind, None) for kind in drift_plots.kinds(view))
    return {one.plot.name: one for one in firsts if one is not None}


@pytest.fixture(scope="module")
def kit() -> Kit:
    pytest.importorskip("plotly")
    return plotly_page.kit()


def drawn(drawing: Drawing, narrow: bool = False) -> Any:
    from matplotlib.figure import Figure

    figure = Figure()
    with plots._style() as palette:
        drawing.plot.draw(figure, palette, narrow)
    return figure


def interactive(drawing: Drawing, kit: Kit) -> dict[str, Any]:
    return dict(json.loads(plotly_page.to_json(drawing, kit)))


def test_every_picture_is_written(folder: Path) -> None:
    paths = drift_plots.write_all(folder)
    assert [path.stem for path in paths] == NAMES
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path) -> None:
    free = fake_drift.build(tmp_path / "free", ("a",), ("dense", "never", "dart"), mode="free")
    kinds = drift_plots.kinds(drift_view.read(free))
    found = [one.plot.name for kind in kinds if (one := next(kind, None))]
    assert found == ["methods", "similarity", "overlap", "neurons", "flow"]
    dense = fake_drift.build(tmp_path / "dense", ("01",), ("dense",))
    assert drift_plots.write_all(dense) == []
    detect = tmp_path / "detect"
    detect.mkdir()
    write_json(detect / "config.json", {"kind": "detect"})
    write_json(detect / "detection.json", fake_drift.detection())
    found = [one.plot.name for kind in drift_plots.kinds(drift_view.read(detect)) for one in kind]
    assert found == ["detection_rates", "detection"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("narrow", [False, True])
def test_axes_are_labelled(drawings: dict[str, Drawing], name: str, narrow: bool) -> None:
    figure = drawn(drawings[name], narrow)
    words = [axes.get_xlabel() for axes in figure.axes]
    units = "tokens sparsity nats % layer".split()
    assert name == "flow" or any(unit in text for unit in units for text in words)
    assert drawings[name].plot.alt.endswith((".", ")"))


def test_bars_hold_the_summary(view: DriftView, drawings: dict[str, Drawing], kit: Kit) -> None:
    lines = {line["label"]: line for line in view.lines}
    means = [line["loss"]["after_minus_dense"]["mean"] for line in lines.values()]
    quality, removed = drawn(drawings["methods"]).axes
    assert [bar.get_width() for bar in quality.patches] == pytest.approx(means)
    achieved = [100 * line["achieved_sparsity"] for line in lines.values()]
    assert [bar.get_width() for bar in removed.patches] == pytest.approx(achieved)
    assert achieved[2] == pytest.approx(50 * (1 - 16 / (FIRST + SECOND)))
    hatches = [bar.get_hatch() for bar in quality.patches]
    assert len(set(hatches)) == 3  # methods differ without colours
    data = interactive(drawings["methods"], kit)["data"]
    bars = [trace for trace in data if trace["type"] == "bar" and trace["xaxis"] == "x"]
    assert [bar["x"][0] for bar in bars] == pytest.approx(means)
    assert "48.1 % of the FFN neurons removed" in bars[2]["customdata"][0]
    whiskers = next(trace for trace in data if "error_x" in trace)
    low = lines["dart@0.5"]["loss"]["after_minus_dense"]["low"]
    assert means[2] - whiskers["error_x"]["arrayminus"][2] == pytest.approx(low)


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


def test_overlap_shows_dense_stretches_as_gaps(drawings: dict[str, Drawing], kit: Kit) -> None:
    found = interactive(drawings["overlap"], kit)
    (trace,) = found["data"]
    own = fake_drift.masks("01", "dart", 0, fake_drift.LAYERS, fake_drift.WIDTH)
    expected = [len({*a} & {*b}) / len({*a} | {*b}) for a, b in zip(*own, strict=True)]
    assert trace["x"] == [0, 220, 224, FIRST + 48, FIRST + SECOND]
    for layer, row in enumerate(trace["z"]):
        assert row == [1.0, None, None, pytest.approx(expected[layer], abs=5e-4)]
    assert "chance: 0.33" in trace["colorbar"]["title"]["text"]
    names = [note["text"] for note in found["layout"]["annotations"]]
    assert names == ["tides", "double-entry bookkeeping"]


def test_raster_sorts_neurons_by_when_they_live(view: DriftView) -> None:
    live = np.array([[1, 0, 1, 0, 0], [1, 0, 0, 1, 0]], dtype=np.bool_)
    assert plot_raster.order(live).tolist() == [0, 2, 3, 1, 4]
    dart = next(cell for cell in view.of("dart@0.5") if cell.source == "01")
    masks = drift_masks.read_masks(dart)
    assert masks is not None
    cells = plot_raster._cells(masks.live[2], drift_masks.periods(dart))
    assert cells.shape == (fake_drift.WIDTH, 4)
    assert cells.sum(0).tolist() == [32, 64, 64, 32]  # dense tokens use all neurons


def test_flows_fill_both_sides(drawings: dict[str, Drawing], kit: Kit) -> None:
    flow = Flow(kept=30, left=20, joined=10, out=40)
    found = plot_sankey.bounds(flow)
    for side, live in ((0, 0.5), (1, 0.4)):
        ends = sorted((ends[side], ends[side] + ends[2]) for ends in found.values())
        assert sum(high - low for low, high in ends) == pytest.approx(1.0)
        assert ends[-1][1] == pytest.approx(1 + plot_sankey.GAP)
        above = [low for low, _ in ends if low >= 1 - live]
        assert min(above) == pytest.approx(1 + plot_sankey.GAP - live)
    data = interactive(drawings["flow"], kit)["data"]
    link = data[0]["link"]
    total = fake_drift.LAYERS * fake_drift.WIDTH
    assert sum(link["value"]) == total
    assert link["label"] == ["kept", "left", "joined", "pruned in both"]
    assert link["value"][0] + link["value"][1] == total // 2


def test_loss_curves_stand_in_both(drawings: dict[str, Drawing], kit: Kit) -> None:
    data = interactive(drawings["loss"], kit)["data"]
    lines = {trace["name"]: trace for trace in data if trace.get("name")}
    assert list(lines) == ["never@0.5", "published@0.5", "dart@0.5"]
    assert lines["dart@0.5"]["x"][:2] == [-120, -104]
    dashes = {trace["line"]["dash"] for trace in lines.values()}
    symbols = {trace["marker"]["symbol"] for trace in lines.values()}
    assert len(dashes) >= 2 and len(symbols) == 3  # legible without colours
    panels = [axes for axes in drawn(drawings["loss"]).axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == list(lines)


def test_detection_marks_and_curves(drawings: dict[str, Drawing], kit: Kit) -> None:
    rates = interactive(drawings["detection_rates"], kit)
    assert rates["data"][0]["x"] == pytest.approx([90, 60, 80, 80])
    assert rates["narrow"]["xaxis3.domain"] == [0, 1]  # panels stand below each other on a phone
    assert rates["narrow"]["yaxis.domain"][1] == 1
    curves = interactive(drawings["detection"], kit)["data"]
    first = next(trace for trace in curves if trace["name"] == "last-attention")
    assert first["x"] == sorted(first["x"]) and first["x"][0] == 0.0


def test_colours_are_those_of_the_map() -> None:
    from cmcrameri import cm

    for place, colour in plot_topics.SHADES:
        wanted = "#" + "".join(f"{round(255 * part):02x}" for part in cm.lapaz_r(place)[:3])
        assert colour == wanted
    light = [sum(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in plot_topics.LAPAZ]
    assert light == sorted(light, reverse=True)  # grey reads alike


def test_figures_keep_to_their_room(view: DriftView, kit: Kit) -> None:
    def made() -> Any:
        return drift_plots.plot_overlap.make(view)

    everything, cut = plotly_page.figures(made(), kit)
    assert len(everything) == 8 and not cut
    size = len(everything[0].data) + len(everything[1].data)
    some, cut = plotly_page.figures(made(), kit, room=size)
    assert len(some) == 2 and cut
    one, cut = plotly_page.figures(made(), kit, room=1)
    assert len(one) == 1 and cut


@pytest.mark.parametrize("package", ["plotly", "matplotlib", "cmcrameri"])
def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in [package, *(["plotly.graph_objects"] if package == "plotly" else [])]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=rf"needs {package}.*'dart-llm\[plots\]'"):
        plotly_page.kit()
