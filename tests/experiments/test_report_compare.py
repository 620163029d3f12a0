"""The page of a comparison: conclusion first, the folder's numbers, escaped, self-contained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dart_llm.errors import ResultsError
from dart_llm.experiments import comparison, comparison_report
from dart_llm.experiments.comparison_report import LEAK_NOTE
from fake_cells import ACC, PPL, ROUGE, failed, grid, layer_curve, write_comparison
from html_page import Page

CELLS = [
    *grid(tasks=(ACC, PPL, ROUGE), methods=("griffin", "dart")),
    failed("wanda", 0.5, ACC, "no <b>calibration</b> text"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(tmp_path_factory.mktemp("results") / "run", CELLS)


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    path = comparison_report.write(folder)
    assert path == folder / "report.html" and path.stat().st_size < 3_000_000
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def written(folder: Path) -> Page:
    return Page(comparison_report.write(folder).read_text("utf-8"))


def test_the_conclusion_comes_first_and_everything_is_there(page: Page) -> None:
    text = page.text.replace("\xa0", " ")
    told = comparison_report.conclusion(comparison.rows(CELLS))
    places = [text.index(part) for part in (told, "Quality", "In words", "Tables", "Notes")]
    assert places == sorted(places)
    assert "3 methods compared on SmolLM2-135M-Instruct" in text
    assert "21 cells" not in text and "20 done, 1 failed" not in text
    assert "21 done, 1 failed" in text and "no <b>calibration</b> text" in text
    assert page.row("torch")[1] == "2.13.0" and page.row("processor")[1] == "Fast CPU"
    assert page.row("SmolLM2-135M-Instruct")[1:3] == ["Q4_K_M", "float32"]
    assert page.row("SmolLM2-135M-Instruct")[4] == "ab12" * 10


def test_tables_hold_the_numbers(page: Page) -> None:
    rows = [row for row in page.rows if row and row[0] == "dart@0.5"]
    known = next(
        row for row in comparison.rows(CELLS) if (row.label, row.task) == ("dart@0.5", ROUGE)
    )
    assert len(rows) == 3 and known.interval is not None
    assert rows[2][1:6] == ["50 %", "43.8 % †", "12.5 %", "0", f"{known.value:.3f}"]
    assert f"{known.value:.3f}{known.interval.low:.3f} to {known.interval.high:.3f}" in page.text


def test_hostile_text_is_escaped_and_nothing_is_fetched(html: str, page: Page) -> None:
    assert "<script" not in html and "no &lt;b&gt;calibration&lt;/b&gt; text" in html
    for _, attributes in page.seen:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "srcset"):
                assert str(value).startswith("data:image/")
            if name == "href":
                assert str(value).startswith("#")
    assert not any(part in html for part in ("url(", "@import", "http://", "https://"))
    policy = next(a["content"] for a in page.attributes("meta") if a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")


def test_plots_are_inline_wide_and_narrow(
    page: Page, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image,), (source,) = page.attributes("img"), page.attributes("source")
    assert "arc_easy_local (acc): dense 0.487" in str(image["alt"])
    assert source["media"] == "(max-width: 600px)" and source["srcset"] != image["src"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    without = written(folder)
    assert without.attributes("img") == []
    assert "No plots: this needs matplotlib" in without.text


def test_the_leak_is_impossible_to_overlook(tmp_path: Path) -> None:
    cells = []
    for protocol in ("full", "published"):
        own = grid(tasks=(ACC,), methods=("published",), protocol=protocol)
        for made in own:
            made["measurement"]["protocol"] = protocol
        cells += own
    page = written(write_comparison(tmp_path / "run", cells))
    assert page.text.index(LEAK_NOTE) < page.text.index("Quality")
    assert "LEAK, arc_easy_local" in page.text
    assert "published@0.5 on arc_easy_local: published against full" in page.text
    assert "LEAK" not in written(write_comparison(tmp_path / "two", CELLS[:3])).text


def test_a_layer_sweep_has_its_page(tmp_path: Path) -> None:
    page = written(write_comparison(tmp_path / "run", layer_curve(count=14)))
    assert "Layer by layer on SmolLM2-135M-Instruct" in page.text
    assert len(page.attributes("img")) == 1
    assert page.row("griffin, layer 13, keep 25 %")[1] == "–"


@pytest.mark.parametrize("lines", ["", "{broken\n", "[]\n7\nnull\n", '{"key": "x"}\n'])
def test_a_damaged_folder_still_has_a_page(tmp_path: Path, lines: str) -> None:
    folder = write_comparison(tmp_path / "run", [], status="interrupted")
    (folder / "results.jsonl").write_text(lines, encoding="utf-8")
    page = written(folder)
    assert "Nothing was measured." in page.text and "This run is interrupted." in page.text


def test_a_line_being_written_is_left_out(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "run", CELLS[:2])
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(CELLS[2])[:100])
    labels = [cell["label"] for cell in comparison_report.read_cells(folder)]
    assert labels == ["dense", "griffin@0.3"]
    with pytest.raises(ResultsError, match="is not a results folder: give the folder"):
        comparison_report.write(tmp_path / "nowhere")
