"""The numbers, pictures and page of a drift study: by hand, as in the records, and escaped."""

import sys
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import numpy as np
import pytest

from dart_llm.studies.drift import report, summary
from dart_llm.studies.drift.runs import EMPTY
from drift_cases import finished
from html_page import Page, check_alone
from written import axes_of

REMASKED = "forced/two/interval:40@0.5/0"


@pytest.fixture(scope="module")
def runs():
    return finished().runs


def run_of(runs, key=REMASKED):
    return next(run for run in runs if run.key == key)


def render(runs):
    job = finished()
    document = summary.summarise(runs, job.settings.model, job.dtype)
    return report.render(runs, job.config, document)


def test_recovery_by_hand():
    flat = [None, *[2.0] * 99]
    assert summary.recovery(flat, flat, [0, 50]) == [0]  # dense itself
    late = [2.0 if loss is None else loss + (50 <= k < 70) for k, loss in enumerate(flat)]
    assert summary.recovery(late, flat, [0, 50]) == [17]  # 3 of 32 tokens, not 4, are within 0.1
    higher = [2.0 if loss is None else loss + 0.11 * (k >= 50) for k, loss in enumerate(flat)]
    assert summary.recovery(higher, flat, [0, 50]) == [None]
    assert summary.recovery(flat[:80], flat[:80], [0, 50]) == [None]  # no window of 32 fits
    assert summary.recovery(flat, flat, [0, 40, 60]) == [None, 0]  # nor before the next change
    assert summary.recovery(flat, flat, [0]) == []


def test_a_method_that_removed_much_less_does_not_win():
    def line(label, achieved, after, closeness=None):
        metrics = None if closeness is None else {"document_similarity": {"mean": closeness}}
        row = {"label": label, "method": label.partition("@")[0], "achieved_sparsity": achieved}
        return {**row, "loss": None if metrics else {"after": {"mean": after}}, "metrics": metrics}

    methods = [("dense", 0.0, 3.0), ("never@0.5", 0.5, 4.0), ("dart@0.5", 0.46, 3.8)]
    methods += [("interval:8@0.5", 0.2, 3.2)]
    rows = [line(*method) for method in methods]
    assert [row["label"] for row in summary.comparable(rows)] == ["never@0.5", "dart@0.5"]
    assert summary.headline({"rows": rows}) == (
        "dart@0.5: loss after the changes 3.800 at 46 % achieved sparsity, the best of 2 methods "
        "that removed about as much."
    )
    closeness = zip(methods, (1.0, 0.6, 0.7, 0.9), strict=True)
    free = {"rows": [line(*method, close) for method, close in closeness]}
    assert summary.headline(free).startswith("dart@0.5: document_similarity 0.700 at 46 %")
    assert summary.headline({"rows": rows[:1]}) == ""


def test_a_failed_run_is_counted_and_named(runs):
    failed = [*runs[:-1], replace(runs[-1], record=EMPTY, error="no <b>memory")]
    document = summary.summarise(failed, "tiny", "float32")
    assert [(row["runs"], row["failed"]) for row in document["rows"]] == [(2, 0)] * 3 + [(1, 1)]
    page = Page(render(failed))
    assert "no <b>memory" in page.text
    lines = summary.result_lines({**document, "rows": [{**document["rows"][3], "runs": 0}]})
    assert lines[0].error.startswith("all 1 runs failed")


def test_loss_around_the_change(runs):
    curves = report.excess_curves(runs)
    assert set(curves) == {run.label for run in runs} - {"dense"}
    for start, interval in curves["dart@0.3"].items():
        by_source = []  # a source is one item, however many changes it has
        for source in ("two", "three"):
            dart, dense = (run_of(runs, f"forced/{source}/{m}/0") for m in ("dart@0.3", "dense"))
            excess = np.subtract(dart.record["losses"][1:], dense.record["losses"][1:])
            values = []
            for (_, low, change), (_, _, high) in pairwise(dart.topics):
                first = change + start
                if max(low, 1) <= first <= high - 16:  # the first token has no loss
                    values.append(excess[first - 1 : first + 15].mean())
            by_source += [fmean(values)] if values else []
        assert (interval.estimate, interval.n) == (pytest.approx(fmean(by_source)), len(by_source))
    assert {0, 16, -16} <= set(curves["dart@0.3"])
    plot = report.plot_loss(runs, "")
    assert "no bands: passages too few (n = 2)" in plot.small
    curve = axes_of(plot)[2].lines[0]
    assert list(curve.get_ydata()) == [mean.estimate for mean in curves["dart@0.3"].values()]


def test_pictures_have_the_numbers(runs):
    sections = report.pictures(runs, finished().config)
    drawn = {plot.name: plot for plots in sections.values() for plot in plots}
    names = ["loss", "similarity", "similarity-2", "overlap", "overlap-2", "overlap-3"]
    assert list(drawn) == names
    remasked = run_of(runs)
    masks = remasked.record["remasks"]
    steps = [mask["step"] for mask in masks]
    assert steps[:3] == [0, 72, 144]  # 40 pruned tokens, 32 observed ones, and again
    plot = next(p for n, p in drawn.items() if n.startswith("overlap") and "two" in p.title)
    (mesh,) = axes_of(plot)[0].collections
    values = mesh.get_array().reshape(4, len(masks))
    assert values[:, 1].tolist() == pytest.approx(masks[1]["jaccard"])
    assert values[:, 0].tolist() == [1.0] * 4
    assert report.chance([0.5, 0.5]) == pytest.approx(1 / 3)


def test_the_page_has_the_numbers_and_escapes_the_names(runs):
    named = deepcopy(list(runs))
    for run in named:
        run.record["topics"][0]["name"] = "<i>&"
    html = render(named)
    check_alone(html)
    page, run = Page(html), run_of(named)
    job = finished()
    assert page.row("dart@0.3") == [*summary.table(job.summary).cells()[3]]
    assert summary.headline(job.summary) in page.text.replace("\xa0", " ")
    mask = run.record["remasks"][1]
    row = page.row("passage two", "interval:40@0.5", str(mask["step"]))
    assert row[3:6] == [
        mask["cause"],
        f"<i>&, token {mask['step']}",
        f"{mask['evidence_tokens']:.0f}",
    ]
    assert row[-1] == f"{sum(mask['kept']):,}" and "<i>" not in html


def test_free_texts_are_side_by_side(runs, monkeypatch):
    text = "A ledger <script>alert(1)</script> balances."
    free = [
        replace(run, mode="free", record={**run.record, "losses": None, "text": text})
        for run in (run_of(runs, f"forced/two/{method}/0") for method in ("dense", "dart@0.3"))
    ]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html = render(free)
    assert "A ledger &lt;script&gt;alert(1)&lt;/script&gt; balances." in html
    positions = [html.index(f"<article><h3>{name}") for name in ("dense", "dart@0.3")]
    assert positions == sorted(positions) and "tokens dense" in Page(html).text
    assert "No plots: this needs matplotlib, which is not installed" in Page(html).text
