"""Picture and page of a run: its numbers, escaped, in one file that asks nobody."""

import re
import sys
from dataclasses import replace

import pytest

from dart_llm.errors import MissingExtra
from dart_llm.experiments.line_plots import drift_sentence
from dart_llm.pruning.records import DriftCheck
from dart_llm.reporting import figures, words
from dart_llm.studies.generate import report
from fake_results import PROMPT, REMASKS, accounting, drift_checks, fake_view, perplexity, timing
from html_page import Page

VIEW = fake_view()


def test_the_picture_is_written_in_both_styles(tmp_path):
    (plot,) = report.pictures(VIEW)
    paths = figures.save(tmp_path, [plot], "paper")
    assert [path.name for path in paths] == ["similarity.png", "similarity.pdf"]
    png, pdf = (path.read_bytes() for path in paths)
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == 1600  # pixels wide: 8 inches at 200
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) [\d.]+ \]", pdf)
    assert float(box[1]) == pytest.approx(72 * figures.WIDE)
    assert b"/Subtype /Type0" in pdf and b"/Subtype /Image" not in pdf
    assert pdf == figures.render(plot, "pdf")  # no date in it
    svg = figures.render(plot, "svg")
    assert len(svg) < 150_000
    assert not any(word in svg for word in (b"<script", b"matplotlib.org", b"@import"))
    windows = VIEW.checks
    for kept, shown in ((windows[:8], True), (windows[:7], False), (windows[:4] * 2, False)):
        assert bool(report.pictures(replace(VIEW, checks=kept))) == shown
    assert report.pictures(replace(VIEW, generations=(), checks=())) == []


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"needs matplotlib.*'dart-llm\[plots\]'"):
        figures.save(tmp_path, report.pictures(VIEW))
    page = Page(report.render(VIEW))
    assert page.attributes("img") == []
    assert "No plots: this needs matplotlib, which is not installed" in page.text


def test_the_page_tells_the_run():
    html = report.render(VIEW)
    page = Page(html)
    text = page.text.replace("\xa0", " ")
    for fact in (
        "dart 50 % on SmolLM2-135M-Instruct",
        "2026-03-04 05:06:07 UTC, took 132 s",
        "dart-llm run --prompt 'Why is the sky blue? <script>' --sparsity 0.5",
        "50 % of the FFN neurons requested, 43.8 % removed on average = 26 % fewer weight bytes",
        "embedded: 6 slices of 256 prompt + 256 scored tokens, protocol decode",
        "The whole run took 132.0 s, peak memory 1.2 GiB.",
        PROMPT,
    ):
        assert fact in text
    assert "&lt;script&gt;alert(&#39;prompt&#39;)&lt;/script&gt; &amp; &#34;quotes&#34;" in html
    assert "light &lt;b&gt;is&lt;/b&gt; bent" in html
    row = page.row("dart", "50 %")
    assert row[2] == "50 %" and row[5].startswith("37") and re.match(r"2\.10 \[", row[6])
    heads = page.row("decoding")
    pruned = dict(zip(heads, page.row("dart pruned"), strict=True))
    assert pruned["achieved"] == "43.8 %" and pruned["requested"] == "50 %"


def test_what_was_not_measured_is_left_out():
    document = perplexity()
    document["rows"][2] |= {"perplexity": None, "ratio_to_dense": None, "accounting": None}
    record = {"variant": "pruned", "method": "dart", "sparsity": 0.3, "text": "hi <i>"}
    record |= {"prompt": "p", "accounting": None}
    changes = {"perplexity": document, "generations": [record], "checks": ()}
    changes["timing"] = {name: timing()[name] for name in ("load_s", "total_s")}
    html = report.render(fake_view(config={**VIEW.config, "status": "failed"}, **changes))
    assert '<div class="text">hi &lt;i&gt;</div>' in html
    page = Page(html)
    assert "This run is failed." in page.text and page.attributes("img") == []
    assert page.row("dart", "50 %")[2:] == ["–"] * 5
    assert page.row("griffin", "50 %")[2:4] == ["50 %", "0 %"]


def test_sentences():
    masked = {**accounting("dart", 0.5, 0.5, 0.0), "executor": "masked"}
    assert "by masking, which skips no work" in words.bytes_sentence(masked)
    masks = [{"cause": mask.cause, "row": None} for mask in REMASKS]
    assert drift_sentence(drift_checks(), masks) != drift_sentence(drift_checks(), masks[:1])
    rows = [DriftCheck(0, r, 30, 3, 3, 0.5, 0.8, 3, True, "armed") for r in range(4)]
    together = drift_sentence(rows, [{"cause": "drift", "row": None}])  # a shared batch counts once
    assert together != drift_sentence(rows, [{"cause": "drift", "row": r} for r in range(4)])
