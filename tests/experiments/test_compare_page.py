"""The plots and the page of a comparison: the rows' numbers, readable in grey, self-contained."""

import sys

import pytest

from dart_llm.experiments import comparison, comparison_plots, comparison_report
from dart_llm.experiments.comparison_report import LEAK_NOTE
from dart_llm.reporting import figures
from fake_cells import ACC, METHODS, PPL, ROUGE, failed, grid, layer_curve, one
from fake_results import config
from html_page import Page, check_alone
from written import axes_of

CELLS = [
    *grid(tasks=(ACC, PPL, ROUGE), methods=("griffin", "dart")),
    failed("wanda", 0.5, ACC, "no <b>calibration</b> text"),
]


def lines(axes):
    """The data line of each legend entry."""
    entries = zip(*axes.get_legend_handles_labels(), strict=True)
    return {name: line[0] if hasattr(line, "lines") else line for line, name in entries}


def test_one_panel_per_task_and_one_line_per_method():
    rows = comparison.rows(grid())
    drawn = axes_of(comparison_plots.make(rows)[0])[1:]
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


def whiskers(axes):
    """The whiskers of the first panel, in its units."""
    drawn = [
        segment for one in axes.containers for line in one[2] for segment in line.get_segments()
    ]
    return [segment[:, 1].tolist() for segment in drawn if len(segment)]


def test_equal_sparsities_have_a_place_each_and_the_tables_intervals():
    rows = comparison.rows(grid(tasks=(ACC,), methods=("griffin", "dart"), sparsities=(0.5,)))
    (plot,) = comparison_plots.make(rows)
    axes = axes_of(plot)[1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["griffin", "dart"]
    assert axes.get_xlabel() == "each with 50 % achieved sparsity"
    assert [list(lines(axes)[name].get_xdata()) for name in ("griffin", "dart")] == [[0], [1]]
    assert "against" not in plot.title and "sideways" not in plot.small
    assert "whiskers: 95 % bootstrap intervals of the difference to dense, paired" in plot.small
    dense, *own = rows
    drawn = [[dense.value + end for end in row.to_dense.ends] for row in own]
    assert whiskers(axes) == [pytest.approx(ends) for ends in drawn]
    head = comparison_report.tables(rows)[0].head
    assert (
        "against dense (95 %, paired)" in head and "acc (higher is better; 95 % of itself)" in head
    )
    cells = [row[5:7] for row in comparison_report.tables(rows)[0].cells()]
    told = [f"({' to '.join(f'{end:+.3f}' for end in row.to_dense.ends)})" for row in own]
    assert " (" in cells[0][0]  # only dense has an interval of its own
    assert [cell[0] for cell in cells[1:]] == [row.quantity for row in own]
    assert all(ends in cell[1] for ends, cell in zip(told, cells[1:], strict=True))


def test_few_items_have_no_whiskers_and_say_so():
    made = [one("dense", 0.0, 1), one("griffin", 0.5, 0), one("dart", 0.5, 1)]
    for cut in made:
        cut["measurement"]["items"] = cut["measurement"]["items"][:2]
    rows = comparison.rows(made)
    (plot,) = comparison_plots.make(rows)
    assert whiskers(axes_of(plot)[1]) == [] and "no whiskers: too few (n = 2)" in plot.small
    cells = comparison_report.tables(rows)[0].cells()
    assert [row[5] for row in cells] == ["0.025 (too few: n = 2) §", "0.000", "0.025 §"]
    assert [row[6] for row in cells] == ["–", "-0.500 (too few: n = 2)", "2 of 2 alike"]
    told = "better on 0 of 1 task, no clear difference on 1."
    assert comparison_report.conclusion(rows) == f"dart at 50 % against griffin: {told}"


def test_methods_differ_without_colours():
    palette = [str(place) for place in range(100)]
    looks = figures.looks_of([*figures.METHODS, "griffin-refresh", "own-1", "own-2"], palette)
    assert len({look["marker"] for look in looks.values()}) == len(looks)
    assert figures.looks_of(["flap"], palette)["flap"] == looks["flap"]  # the same in every plot


def html_of(cells, **changes):
    return comparison_report.page_text({**config(), **changes}, comparison.rows(cells))


def page_of(cells, **changes):
    return Page(html_of(cells, **changes))


def test_the_page(monkeypatch):
    html, rows = html_of(CELLS), comparison.rows(CELLS)
    assert len(html) < 3_000_000
    page = Page(html)
    text = page.text.replace("\xa0", " ")
    assert "3 methods compared on SmolLM2-135M-Instruct" in text and "21 done, 1 failed" in text
    assert page.row("torch")[1] == "2.13.0"
    assert page.row("SmolLM2-135M-Instruct")[1:5:3] == ["Q4_K_M", "ab12" * 10]
    cells = [row for row in page.rows if row and row[0] == "dart@0.5"]
    known = next(row for row in rows if (row.label, row.task) == ("dart@0.5", ROUGE))
    assert cells[2][1:6] == ["50 %", "43.8 % †", "12.5 %", "0", f"{known.value:.3f}"]
    low, high = known.to_dense.ends  # the table has the interval that the picture draws
    assert f"{known.to_dense.estimate:+.3f} worse{low:+.3f} to {high:+.3f}" in page.text
    # hostile text is escaped, and nothing is fetched
    check_alone(html)
    assert "<script" not in html and "no &lt;b&gt;calibration&lt;/b&gt; text" in html
    (image,) = page.attributes("img")
    assert "arc_easy_local (acc): dense 0.487" in str(image["alt"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    without = page_of(CELLS)
    assert without.attributes("img") == []
    assert "No plots: this needs matplotlib" in without.text


def test_the_leak_is_impossible_to_overlook():
    asked = ((ACC,), ("published",))
    cells = [*grid(*asked, protocol="full"), *grid(*asked, protocol="published")]
    page = page_of(cells)
    assert page.text.index(LEAK_NOTE) < page.text.index("Quality")
    assert "LEAK, arc_easy_local" in page.text
    assert "published@0.5 on arc_easy_local: published against full" in page.text
    assert "LEAK" not in page_of(CELLS[:3]).text


def test_other_pages():
    page = page_of(layer_curve(count=14))
    assert "Layer by layer on SmolLM2-135M-Instruct" in page.text
    assert len(page.attributes("img")) == 1
    assert page.row("griffin, layer 13, keep 25 %")[1] == "–"
    page = page_of([], status="interrupted")
    assert "Nothing was measured." in page.text and "This run is interrupted." in page.text
