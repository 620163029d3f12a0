"""The plots and the page of a comparison: the rows' numbers, readable in grey, self-contained."""

import json
import sys

import pytest

from dart_llm.errors import ResultsError
from dart_llm.experiments import comparison, comparison_plots, comparison_report
from dart_llm.experiments.comparison_report import LEAK_NOTE
from dart_llm.reporting import figures
from fake_cells import ACC, METHODS, PPL, ROUGE, failed, grid, layer_curve, one, write_comparison
from html_page import Page

CELLS = [
    *grid(tasks=(ACC, PPL, ROUGE), methods=("griffin", "dart")),
    failed("wanda", 0.5, ACC, "no <b>calibration</b> text"),
]


@pytest.fixture(scope="module")
def rows():
    return comparison.rows(grid())


def panels(plot, narrow=False):
    """The drawn axes without the legend's."""
    from matplotlib.figure import Figure

    figure = Figure()
    with figures._style() as palette:
        plot.draw(figure, palette, narrow)
    return list(figure.axes[1:])


def lines(axes):
    """The data line of each legend entry."""
    entries = zip(*axes.get_legend_handles_labels(), strict=True)
    return {name: line[0] if hasattr(line, "lines") else line for line, name in entries}


def test_one_panel_per_task_and_one_line_per_method(rows):
    drawn = panels(comparison_plots.make(rows)[0])
    titles = [axes.get_title(loc="left").partition(":")[0] for axes in drawn]
    assert titles == [ACC, "mmlu_local", "perplexity", "summarize"]
    assert all(set(lines(axes)) == {*METHODS, "dense"} for axes in drawn)
    assert [axes.get_yscale() for axes in drawn] == ["linear", "linear", "log", "linear"]
    dense, *own = [r for r in rows if r.method in ("dense", "dart") and r.task == ROUGE]
    data = lines(drawn[3])["dart"]  # at the achieved sparsity
    assert list(data.get_xdata()) == pytest.approx([26.25, 43.75, 61.25], abs=1.3)
    assert list(data.get_ydata()) == pytest.approx([row.value for row in own])
    assert list(lines(drawn[3])["dense"].get_ydata()) == pytest.approx([dense.value] * 2)
    assert [text.get_text() for text in drawn[2].texts] == ["static 1,780 ↑", "static 1.1e5 ↑"]
    assert drawn[2].get_ylim()[1] < 1000  # what lies far beyond is named at the edge


def bars(plot, method):
    container = next(c for c in panels(plot)[0].containers if c.get_label() == method)
    return [[tuple(point)[1] for point in path] for path in container.lines[2][0].get_segments()]


def test_bars_are_the_paired_intervals_or_the_metrics_own(rows):
    own = [row for row in rows if row.method == "flap" and row.task == ACC]
    dense = next(row.value for row in rows if row.method == "dense" and row.task == ACC)
    for end, row in zip(bars(comparison_plots.make(rows)[0], "flap"), own, strict=True):
        assert row.to_dense and dense
        assert end == pytest.approx([dense + row.to_dense.low, dense + row.to_dense.high])
    alone = comparison.rows(grid(tasks=(PPL,), methods=("dart",))[1:])
    assert alone[0].interval
    ends = [alone[0].interval.low, alone[0].interval.high]
    assert bars(comparison_plots.make(alone)[0], "dart")[0] == pytest.approx(ends)


def test_methods_differ_without_colours():
    palette = [str(place) for place in range(100)]
    looks = figures.looks_of([*figures.METHODS, "griffin-refresh", "own-1", "own-2"], palette)
    assert len({look["marker"] for look in looks.values()}) == len(looks)
    assert figures.looks_of(["flap"], palette)["flap"] == looks["flap"]  # the same in every plot


def test_which_plots_there_are():
    tasks = [f"task_{number}" for number in range(8)]
    found = comparison_plots.make(comparison.rows(grid(tasks, ("griffin",), (0.3, 0.5))))
    assert [plot.name for plot in found] == ["quality", "quality_2"]
    assert [len(panels(plot)) for plot in found] == [6, 2]
    asked = ((ACC,), ("griffin",), (0.3, 0.5))
    cells = [*grid(*asked), *grid(*asked, protocol="published")]
    found = comparison_plots.make(comparison.rows(cells))
    assert ["LEAK" in plot.title for plot in found] == [False, True]
    for cells in ([], [one("dense", 0, 20)], [one("dense", 0, 20), one("dart", 0.5, 20)]):
        assert comparison_plots.make(comparison.rows(cells)) == []  # no single point


def test_layers_are_on_the_x_axis_and_groups_are_named():
    rows = comparison.rows(layer_curve(count=12))
    (plot,) = comparison_plots.make(rows)
    (axes,) = panels(plot)
    assert plot.name == "layers" and "layer 0 costs the most (perplexity" in plot.alt
    assert set(lines(axes)) == {"dense", "griffin, keep 50 %", "griffin, keep 25 %"}
    data = lines(axes)["griffin, keep 25 %"]
    assert list(data.get_xdata()) == list(range(12))
    assert list(data.get_ydata()) == pytest.approx([r.value for r in rows if r.keep == 0.25])
    cells = layer_curve(count=2)
    for made, layers in zip(cells[1:], ("0-3", "4-7") * 2, strict=True):
        made["cell"].update(layers=layers, base_keep=0.9)
    (axes,) = panels(comparison_plots.make(comparison.rows(cells))[0])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0-3", "4-7"]
    assert "griffin, keep 50 % (others 90 %)" in lines(axes)


def test_pictures_are_wide_or_narrow_and_the_same_bytes(rows, tmp_path):
    (plot,) = comparison_plots.make(rows)
    assert figures.save(tmp_path, [plot]) == [tmp_path / "plots" / "quality.png"]
    tall = figures.render(plot, "png", narrow=True)
    width, height = (int.from_bytes(tall[at : at + 4], "big") for at in (16, 20))
    assert width == 820 and height > 2000  # one column of four panels
    assert figures.render(plot, "svg") == figures.render(plot, "svg")


# The page.


def written(folder):
    return Page(comparison_report.write(folder).read_text("utf-8"))


def test_the_page(tmp_path, monkeypatch):
    folder = write_comparison(tmp_path / "run", CELLS)
    path = comparison_report.write(folder)
    html, rows = path.read_text("utf-8"), comparison.rows(CELLS)
    assert path == folder / "report.html" and len(html) < 3_000_000
    page = Page(html)
    text = page.text.replace("\xa0", " ")
    told = comparison_report.conclusion(rows)
    places = [text.index(part) for part in (told, "Quality", "In words", "Tables", "Notes")]
    assert places == sorted(places)
    assert "3 methods compared on SmolLM2-135M-Instruct" in text and "21 done, 1 failed" in text
    assert page.row("torch")[1] == "2.13.0" and page.row("processor")[1] == "Fast CPU"
    assert page.row("SmolLM2-135M-Instruct")[1:5:3] == ["Q4_K_M", "ab12" * 10]
    cells = [row for row in page.rows if row and row[0] == "dart@0.5"]
    known = next(row for row in rows if (row.label, row.task) == ("dart@0.5", ROUGE))
    assert cells[2][1:6] == ["50 %", "43.8 % †", "12.5 %", "0", f"{known.value:.3f}"]
    assert f"{known.value:.3f}{known.interval.low:.3f} to {known.interval.high:.3f}" in page.text
    # hostile text is escaped, and nothing is fetched
    assert "<script" not in html and "no &lt;b&gt;calibration&lt;/b&gt; text" in html
    for _, attributes in page.seen:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "srcset", "href"):
                assert str(value).startswith("#" if name == "href" else "data:image/")
    assert not any(part in html for part in ("url(", "@import", "http://", "https://"))
    policy = next(str(a["content"]) for a in page.attributes("meta") if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")
    (image,), (source,) = page.attributes("img"), page.attributes("source")
    assert "arc_easy_local (acc): dense 0.487" in str(image["alt"])
    assert source["media"] == "(max-width: 600px)" and source["srcset"] != image["src"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    without = written(folder)
    assert without.attributes("img") == []
    assert "No plots: this needs matplotlib" in without.text


def test_the_leak_is_impossible_to_overlook(tmp_path):
    asked = ((ACC,), ("published",))
    cells = [*grid(*asked, protocol="full"), *grid(*asked, protocol="published")]
    page = written(write_comparison(tmp_path / "run", cells))
    assert page.text.index(LEAK_NOTE) < page.text.index("Quality")
    assert "LEAK, arc_easy_local" in page.text
    assert "published@0.5 on arc_easy_local: published against full" in page.text
    assert "LEAK" not in written(write_comparison(tmp_path / "two", CELLS[:3])).text


def test_other_pages(tmp_path):
    page = written(write_comparison(tmp_path / "run", layer_curve(count=14)))
    assert "Layer by layer on SmolLM2-135M-Instruct" in page.text
    assert len(page.attributes("img")) == 1
    assert page.row("griffin, layer 13, keep 25 %")[1] == "–"
    folder = write_comparison(tmp_path / "two", [], status="interrupted")
    for text in ("", "{broken\n", "[]\n7\nnull\n", '{"key": "x"}\n'):
        (folder / "results.jsonl").write_text(text, encoding="utf-8")
        page = written(folder)
        assert "Nothing was measured." in page.text and "This run is interrupted." in page.text
    folder = write_comparison(tmp_path / "three", CELLS[:2])
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(CELLS[2])[:100])  # a line that is being written
    assert written(folder).row("griffin@0.3")
    with pytest.raises(ResultsError, match="is not a results folder: give the folder"):
        comparison_report.write(tmp_path / "nowhere")
