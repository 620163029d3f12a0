"""Pictures and page of a run: its numbers, escaped, in one file that asks nobody."""

import re
import sys
from copy import deepcopy
from dataclasses import replace
from importlib import resources

import pytest

from dart_llm.errors import MissingExtra
from dart_llm.reporting import figures
from dart_llm.studies.generate import plots, report
from fake_results import PROMPT, fake_view, perplexity, timing
from html_page import Page

PICTURES = ("kept_neurons", "similarity")


@pytest.fixture(scope="module")
def view():
    return fake_view()


def test_every_picture_is_written(view, tmp_path):
    paths = figures.save(tmp_path, plots.available(view))
    names = [path.relative_to(tmp_path).as_posix() for path in paths]
    assert names == [f"plots/{name}.png" for name in PICTURES]
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20], "big") == 1600  # pixels wide: 8 inches at 200
    for plot in plots.available(view):
        svg = figures.render(plot, "svg")
        assert len(svg) < 150_000
        assert not any(word in svg for word in (b"<script", b"matplotlib.org", b"@import"))
    assert plots.available(replace(view, generations=(), checks=())) == []


def test_the_style_for_paper_adds_the_figure_in_vectors(view, tmp_path):
    plot = next(iter(plots.available(view)))
    found = figures.save(tmp_path, [plot], "paper")
    assert [path.name for path in found] == [f"{plot.name}.png", f"{plot.name}.pdf"]
    data = found[1].read_bytes()
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) [\d.]+ \]", data)
    assert float(box[1]) == pytest.approx(72 * figures.WIDE)
    assert b"/Subtype /Type0" in data and b"/Subtype /Image" not in data
    assert data == figures.render(plot, "pdf")  # no date in it


def test_a_missing_package_is_one_sentence(view, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"needs matplotlib.*'dart-llm\[plots\]'"):
        figures.save(tmp_path, plots.available(view))
    page = Page(report.render(view))
    assert page.attributes("img") == []
    assert "No plots: this needs matplotlib, which is not installed" in page.text
    assert page.row("dart", "50 %")[5] == "37.00"


def test_two_slices_have_no_interval_and_say_so():
    document = perplexity()
    for row in document["rows"]:
        row |= {"interval": None, "no_interval": "too few (n = 2)"}
    page = Page(report.render(fake_view(perplexity=document)))
    assert page.row("dart", "50 %")[6:8] == ["2.10", "too few (n = 2)"]


def test_pictures_that_say_nothing_are_left_out(view):
    even = deepcopy(list(view.generations))
    for mask in even[1]["accounting"]["sequences"][0]["remasks"]:
        mask["kept"] = [768 + layer % 2 for layer in range(30)]
    windows = view.checks
    for kept, shown in ((windows[:8], True), (windows[:7], False), (windows[:4] * 2, False)):
        names = [plot.name for plot in plots.available(fake_view(generations=even, checks=kept))]
        assert names == ["similarity"] * shown
    page = Page(report.render(fake_view(generations=even, checks=())))
    assert "Kept neurons per layer" not in page.text


@pytest.fixture(scope="module")
def html(view):
    return report.render(view)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_page_tells_the_run(html, page):
    text = page.text.replace("\xa0", " ")
    for fact in (
        "dart at 50 % on SmolLM2-135M-Instruct",
        "2026-03-04 05:06:07 UTC, took 132 s",
        "dart-llm run --prompt 'Why is the sky blue? <script>' --sparsity 0.5",
        "50 % of the FFN neurons requested, 43.8 % removed on average = 26 % fewer weight bytes",
        "400 tokens, 43.8 % of the FFN neurons removed, 2 re-masks",
        "embedded: 6 slices of 256 prompt + 256 scored tokens, protocol decode",
        "Loading took 2.5 s, the whole run 132.0 s, peak memory 1.2 GiB.",
        PROMPT,
    ):
        assert fact in text
    assert "&lt;script&gt;alert(&#39;prompt&#39;)&lt;/script&gt; &amp; &#34;quotes&#34;" in html
    assert "light &lt;b&gt;is&lt;/b&gt; bent" in html


def test_tables(page, snapshot):
    """Costs beside every number, seconds, and the provenance of the run."""
    assert [" | ".join(row) for row in page.rows] == snapshot
    assert len(page.attributes("caption")) == len(page.attributes("table")) > 6


def test_what_was_not_measured_is_left_out(view):
    document = perplexity()
    document["rows"][2] |= {"perplexity": None, "ratio_to_dense": None, "accounting": None}
    document["rows"][3] |= {"sparsity": None}
    record = {"variant": "pruned", "method": "dart", "sparsity": 0.3, "text": "hi <i>"}
    record |= {"tokens": ["h"], "phases": ["pruned"], "prompt": "p", "accounting": None}
    config = {**view.config, "status": "failed"}
    times = {name: timing()[name] for name in ("load_s", "total_s")}
    changes = {"perplexity": document, "generations": [record], "timing": times}
    html = report.render(fake_view(config=config, checks=(), **changes))
    assert '<div class="text">hi &lt;i&gt;</div>' in html  # its tokens are not the text
    page = Page(html)
    assert "This run is failed." in page.text and page.attributes("img") == []
    assert page.row("dart", "50 %")[2:] == ["–", "–", "–", "–", "–", "1.98 to 2.25", "3.611"]
    assert page.row("griffin", "set by the method")[2:4] == ["50 %", "0 %"]


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_colour_of_a_mark_reads_on_white():
    assert len(set(figures.PALETTE)) == len(figures.PALETTE) == 17
    for shade in (*figures.PALETTE, figures.GREY, figures.INK, figures.SOFT):
        assert 1.05 / (luminance(shade) + 0.05) >= 2.98, shade


@pytest.mark.parametrize("theme", [0, 1])
def test_contrast_in_light_and_dark(theme):
    css = (resources.files("dart_llm.reporting") / "templates" / "report.css").read_text(
        encoding="utf-8"
    )
    block = re.findall(r":root \{(.*?)\}", css, re.S)[theme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    grounds = ["paper", "raised", "strong", "prefill", "observe", "pruned", "released"]
    pairs = [("ink", ground) for ground in grounds]
    pairs += [("soft", "paper"), ("soft", "raised"), ("accent", "raised"), ("warn", "warn-paper")]
    for front, back in pairs:
        light, dark = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)
