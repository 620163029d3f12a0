"""The page of a comparison: conclusion first, the folder's numbers, escaped, self-contained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dart_llm.errors import ResultsError
from dart_llm.experiments import comparison as compare
from dart_llm.experiments import comparison_report as compare_words
from dart_llm.experiments import comparison_report as report_compare
from dart_llm.experiments.comparison_report import LEAK_NOTE
from fake_cells import ACC, PPL, ROUGE, failed, grid, layer_curve, write_comparison
from html_page import Page

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("cmcrameri")

CELLS = [
    *grid(tasks=(ACC, PPL, ROUGE), methods=("griffin", "dart")),
    failed("wanda", 0.5, ACC, "no <b>calibration</b> text"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(tmp_path_factory.mktemp("results") / "run", CELLS)


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    path = report_compare.write(folder)
    assert path == folder / "report.html" and path.stat().st_size < 3_000_000
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_conclusion_comes_first(page: Page) -> None:
    text = page.text.replace("\xa0", " ")
    told = compare_words.conclusion(compare.rows(CELLS))
    assert told.startswith("At 50 % dart ")
    places = [text.index(part) for part in (told, "Quality", "In words", "Tables", "Notes")]
    assert places == sorted(places)
    assert "3 methods compared on SmolLM2-135M-Instruct" in text


def test_tables_hold_the_numbers(page: Page) -> None:
    rows = [row for row in page.rows if row and row[0] == "dart@0.5"]
    assert len(rows) == 3
    known = next(
        row for row in compare.rows(CELLS) if row.label == "dart@0.5" and row.task == ROUGE
    )
    assert known.interval is not None
    assert rows[2][1:3] == ["50 %", "43.8 % †"]
    ends = f"{known.interval.low:.3f} to {known.interval.high:.3f}"
    assert rows[2][3] == f"{known.value:.3f}"
    assert f"{known.value:.3f}{ends}" in page.text
    assert "no <b>calibration</b> text" in page.text


def test_hostile_text_is_escaped_and_nothing_is_fetched(html: str, page: Page) -> None:
    assert "<script" not in html and "<b>calibration" not in html
    assert "no &lt;b&gt;calibration&lt;/b&gt; text" in html
    for _, attributes in page.seen:
        for name, value in attributes.items():
            if name in ("src", "srcset"):
                assert str(value).startswith("data:image/")
            if name == "href":
                assert str(value).startswith("#")
            assert not name.startswith("on")
    assert "url(" not in html and "@import" not in html
    assert "http://" not in html and "https://" not in html
    policy = next(a["content"] for a in page.attributes("meta") if a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")


def test_plots_are_inline_wide_and_narrow(page: Page) -> None:
    (image,), (source,) = page.attributes("img"), page.attributes("source")
    assert "arc_easy_local (acc): dense 0.487" in str(image["alt"])
    assert source["media"] == "(max-width: 600px)" and source["srcset"] != image["src"]


def test_provenance_is_on_the_page(page: Page) -> None:
    assert page.row("torch")[1] == "2.13.0"
    assert page.row("processor")[1] == "Fast CPU"
    assert page.row("SmolLM2-135M-Instruct")[1:3] == ["Q4_K_M", "float32"]
    assert page.row("SmolLM2-135M-Instruct")[4] == "ab12" * 10
    assert "20 done, 1 failed" not in page.text and "21 done, 1 failed" in page.text


def test_the_leak_is_impossible_to_overlook(tmp_path: Path) -> None:
    cells = []
    for protocol in ("full", "published"):
        own = grid(tasks=(ACC,), methods=("published",), protocol=protocol)
        for made in own:
            made["measurement"]["protocol"] = protocol
        cells += own
    page = Page(report_compare.write(write_comparison(tmp_path / "run", cells)).read_text("utf-8"))
    assert page.text.index(LEAK_NOTE) < page.text.index("Quality")
    assert "LEAK, arc_easy_local" in page.text
    assert "published@0.5 on arc_easy_local: published against full" in page.text
    assert (
        "LEAK"
        not in Page(
            report_compare.write(write_comparison(tmp_path / "two", CELLS[:3])).read_text("utf-8")
        ).text
    )


def test_a_layer_sweep_has_its_page(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "run", layer_curve(count=14))
    page = Page(report_compare.write(folder).read_text("utf-8"))
    assert "Layer by layer on SmolLM2-135M-Instruct" in page.text
    assert len(page.attributes("img")) == 1
    assert page.row("griffin, layer 13, keep 25 %")[1] == "–"


@pytest.mark.parametrize("lines", ["", "{broken\n", "[]\n7\nnull\n", '{"key": "x"}\n'])
def test_a_damaged_folder_still_has_a_page(tmp_path: Path, lines: str) -> None:
    folder = write_comparison(tmp_path / "run", [], status="interrupted")
    (folder / "results.jsonl").write_text(lines, encoding="utf-8")
    page = Page(report_compare.write(folder).read_text("utf-8"))
    assert "Nothing was measured." in page.text
    assert "This run is interrupted." in page.text


def test_a_line_being_written_is_left_out(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "run", CELLS[:2])
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(CELLS[2])[:100])
    assert [cell["label"] for cell in report_compare.read_cells(folder)] == ["dense", "griffin@0.3"]
    (folder / "results.jsonl").unlink()
    (folder / "config.json").unlink()
    assert report_compare.read_cells(folder) == []
    assert "Nothing was measured." in report_compare.write(folder).read_text("utf-8")


def test_no_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="is not a results folder: give the folder"):
        report_compare.write(tmp_path / "nowhere")


def test_without_matplotlib_the_page_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = compare.rows(CELLS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(report_compare.write(folder, rows).read_text("utf-8"))
    assert page.attributes("img") == []
    assert "No plots: this needs matplotlib" in page.text
