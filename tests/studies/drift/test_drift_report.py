"""The pictures and the page of a drift study: the study's numbers, escaped."""

import sys
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import numpy as np
import pytest

from dart_llm.studies.drift import masks, plots, report, summary
from dart_llm.studies.drift.detect import pool
from dart_llm.studies.drift.masks import MaskSpan
from drift_cases import finished
from html_page import Page, check_alone
from written import axes_of

OWN = "forced/two/interval:40@0.5/0"
"""A cell whose masks were made anew."""


def detection():
    """Two signals under two rules, and a curve each for two counts, as `dart-llm detect` writes."""
    passage = {"id": "a", "changes": [300, 700], "prompt_tokens": 256, "tokens": 1000}
    signals, rules = ("attention", "hidden"), {"published": [310, 760, 800], "paper": [310]}
    named = [(s, rule, at) for s in signals for rule, at in rules.items()]
    line = {"passage": passage}
    line["rules"] = [{"signal": s, "rule": rule, "triggers": at} for s, rule, at in named]
    line["sweep"] = [
        {"signal": s, "window": 10, "n0": n0, "k": k, "triggers": [310, 800][:n0]}
        for s in signals
        for n0 in (1, 3)
        for k in (0.5, 2.0)
    ]
    line["auc"] = [{"signal": signal, "window": 10, "auc": 0.7} for signal in signals]
    settings = {"model": "tiny", "prompt_tokens": 256, "horizon": 128, "seed": 0}
    return pool([line, line], settings, {"name": "tiny", "dtype": "float32"}, 30)


@pytest.fixture(scope="module")
def view():
    """The finished study beside a detection, with a text to be escaped."""
    found = finished().view()
    cells = deepcopy(list(found.cells))
    for cell in cells:
        cell.record["pieces"][1] = " <i>&"
    return replace(found, cells=cells, detection=detection())


def cell(view, key=OWN, **changes):
    own = next(c for c in view.cells if c.key == key)
    return replace(own, record={**own.record, **changes})


def test_masks_and_their_overlap(view):
    own = cell(view)
    live = masks.read_masks(own, finished().path)
    first, second = own.record["remasks"][:2]
    assert masks.overlap(live)[:, 1] == pytest.approx(second["jaccard"])
    assert set(masks.overlap(live)[:, 0]) == {1.0}
    ratios = [kept / 48 for kept in first["kept"]]
    assert masks.chance(live) == pytest.approx(fmean(k / (2 - k) for k in ratios))
    moved = [
        kept - left + joined
        for kept, left, joined in zip(first["kept"], second["left"], second["joined"], strict=True)
    ]
    assert moved == second["kept"] == [int(layer[1].sum()) for layer in live]
    empty, full = np.zeros(4, dtype=np.bool_), np.ones(4, dtype=np.bool_)
    assert (masks.jaccard(empty, empty), masks.jaccard(empty, full)) == (1.0, 0.0)


def test_spans_of_masks(view):
    """As the run counted them: 40 pruned tokens, 32 observed ones, and again."""
    own = cell(view)
    spans = masks.mask_spans(own)
    starts = [0, 40, 72, 112, 144, 184]
    assert [(span.start, span.mask) for span in spans[:6]] == [
        (start, None if number % 2 else number // 2) for number, start in enumerate(starts)
    ]
    assert [span.start for span in spans if span.mask is not None] == [
        mask["step"] for mask in own.record["remasks"]
    ]
    assert spans[-1].end == own.decoded
    whole = [MaskSpan(0, own.decoded, 0)]
    assert masks.mask_spans(cell(view, "forced/two/never@0.5/0")) == whole
    assert masks.mask_spans(cell(view, "forced/two/dense/0")) == [replace(whole[0], mask=None)]


def test_loss_around_the_change(view):
    curves = plots.excess_curves(view.cells)
    assert set(curves) == {c.label for c in view.cells} - {"dense"}
    for point in curves["dart@0.3"]:
        by_source = []  # a source is one item, however many changes it has
        for source in ("two", "three"):
            own, dense = (cell(view, f"forced/{source}/{m}/0") for m in ("dart@0.3", "dense"))
            excess = np.subtract(own.record["losses"][1:], dense.record["losses"][1:])
            values = []
            for (_, low, start), (_, _, high) in pairwise(own.topics):
                first = start + point.start
                if max(low, 1) <= first <= high - 16:  # the first token has no loss
                    values.append(excess[first - 1 : first + 15].mean())
            by_source += [fmean(values)] if values else []
        assert (point.value, point.n) == (pytest.approx(fmean(by_source)), len(by_source))
    assert {0, 16, -16} <= {point.start for point in curves["dart@0.3"]}


def test_pictures_hold_the_numbers(view):
    drawn = {plot.name: plot for _, kind in report.pictures(view) for plot in kind}
    names = ["methods", "loss", "similarity", "overlap", "neurons", "detection"]
    assert list(drawn) == names
    estimates = [line["loss"]["after_minus_dense"] for line in view.lines]
    quality, _ = axes_of(drawn["methods"])
    means = [estimate["mean"] for estimate in estimates]
    assert [bar.get_width() for bar in quality.patches] == pytest.approx(means)
    assert len({bar.get_hatch() for bar in quality.patches}) == 5  # legible without colours
    assert not [line for line in quality.lines if line.get_marker() == "|"]
    assert f"no whiskers: passages too few (n = {estimates[0]['n']})" in drawn["methods"].small
    known = deepcopy(view)
    for line in known.lines:
        line["loss"]["after_minus_dense"] |= {"low": -0.5, "high": 0.5, "n": 6}
    quality, _ = axes_of(plots.make_methods(known))
    whiskers = [list(line.get_xdata()) for line in quality.lines if line.get_marker() == "|"]
    assert whiskers[::2] == [[-0.5, 0.5]] * len(estimates)
    curve = next(line for line in axes_of(drawn["loss"])[2].lines if line.get_marker() != "None")
    points = plots.excess_curves(view.cells)["dart@0.3"]
    assert list(curve.get_ydata()) == [point.value for point in points]


def test_the_page_has_the_numbers_and_escapes_the_texts(view):
    html = report.render(view)
    check_alone(html)
    page, own = Page(html), cell(view)
    assert page.row("dart@0.3") == [*summary.table(view.summary).cells()[3]]
    assert summary.headline(view.summary) in page.text.replace("\xa0", " ")
    mask = own.record["remasks"][1]
    row = page.row("passage two, interval:40@0.5", str(mask["step"]))
    assert row[2:5] == [
        mask["cause"],
        f"two 0, token {mask['step']}",
        f"{mask['evidence_tokens']:.0f}",
    ]
    assert row[7:] == [f"{sum(mask['kept']):,}", f"{sum(mask['joined']):,}"]
    assert " <i>&" in page.text and "<i>" not in html and "change of topic: two 1" in page.text
    shaded = [span for span in page.attributes("span") if "title" in span]
    over = np.subtract(own.record["losses"][1:], view.cells[0].record["losses"][1:])
    first = int(np.argmax(over >= report.SEEN)) + 1
    words = f"token {first}: {own.record['losses'][first]:.2f} nats, dense "
    assert any(str(span["title"]).startswith(words) for span in shaded)


def test_free_texts_are_side_by_side(view, monkeypatch):
    text = "A ledger <script>alert(1)</script> balances."
    cells = [replace(cell(view, f"forced/two/{m}/0"), mode="free") for m in ("dense", "never@0.5")]
    for one in cells:
        del one.record["losses"]
        one.record["text"] = text
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html = report.render(replace(view, cells=cells, detection={}))
    assert "A ledger &lt;script&gt;alert(1)&lt;/script&gt; balances." in html
    places = [html.index(f"<article><h3>{name}") for name in ("dense", "never@0.5")]
    assert places == sorted(places) and "tokens dense" in Page(html).text
    assert "No plots: this needs matplotlib, which is not installed" in Page(html).text
