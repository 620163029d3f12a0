"""A drift folder read back, its pictures and page: the study's numbers, and what damage costs."""

import re
import shutil
import sys
from copy import deepcopy
from itertools import pairwise
from statistics import fmean

import numpy as np
import pytest

from dart_llm.errors import MissingExtra, ResultsError
from dart_llm.files import write_json, write_lines
from dart_llm.pruning.records import DriftCheck
from dart_llm.reporting import figures
from dart_llm.studies.detection.study import summary_document
from dart_llm.studies.drift import report, summary
from dart_llm.studies.drift import view as drift_view
from dart_llm.studies.drift.view import DriftView, Flow, Masked, MaskSpan
from drift_cases import finished
from html_page import Page
from written import axes_of, lines

OWN = "forced/two/interval:40@0.5/0"
"""A cell whose masks were made anew."""

SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
BLOCK = re.compile(r'<script type="application/json"[^>]*>(.*?)</script>', re.DOTALL)


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
    return summary_document([line, line], settings, {"name": "tiny", "dtype": "float32"}, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The finished study beside what ``dart-llm detect`` found, with a text to be escaped."""
    found = copy(tmp_path_factory.mktemp("drift"))
    write_json(found / "detection.json", detection())
    rows = lines(found / "tokens.jsonl")
    for row in rows:
        row["pieces"][1] = " <i>&"
    write_lines(found / "tokens.jsonl", rows)
    return found


def copy(place):
    return shutil.copytree(finished().path, place / "run")


@pytest.fixture(scope="module")
def view(folder):
    return drift_view.read(folder)


def cell(view, key=OWN):
    return next(c for c in view.done if c.key == key)


def page(html):
    """Without the contents of its scripts."""
    return Page(BLOCK.sub("", SCRIPT.sub("", html)))


def test_everything_is_read(view, folder):
    assert view.problems == () and len(view.done) == 12
    labels = ("dense", "never@0.5", "interval:40@0.5", "dart@0.3", "fresh:4@0.5", "decay:8@0.5")
    assert view.labels == labels
    tokens = {row["key"]: row for row in lines(folder / "tokens.jsonl")}
    for found, row in zip(view.cells, lines(folder / "results.jsonl"), strict=True):
        assert (found.key, found.decoded_tokens) == (row["key"], row["decoded_tokens"])
        assert list(found.losses) == tokens[row["key"]]["losses"]
        assert found.changes == tuple(topic["start"] for topic in row["topics"][1:])
    assert view.dense_of(cell(view)) is cell(view, "forced/two/dense/0")


DAMAGE = [
    ("results.jsonl", None, ""),
    ("results.jsonl", "{half", "results.jsonl is damaged"),
    ("results.jsonl", '{"key": "x"}\n', "The cell x of results.jsonl lacks what it needs"),
    ("tokens.jsonl", b"\xff", "tokens.jsonl cannot be read"),
    ("config.json", "{half", "config.json is damaged"),
    ("detection.json", '{"rows": [1]}', "detection.json is not what"),
    ("masks/forced-two-never@0.5-0.safetensors", "x", "masks/forced-two-never@0.5-0.safetensors"),
]


@pytest.mark.parametrize(("name", "content", "words"), DAMAGE)
def test_damage_costs_what_it_held(tmp_path, name, content, words):
    folder = copy(tmp_path)
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = drift_view.read(folder)
    assert len(found.problems) == bool(words)
    assert not words or found.problems[0].startswith(words)
    if name == "results.jsonl":
        text = page(report.render(found)).text
        assert "Nothing was measured." in text and words in text


def test_other_folders(tmp_path):
    with pytest.raises(ResultsError, match="is not a results folder: give the folder"):
        drift_view.read(tmp_path / "nowhere")
    write_json(tmp_path / "config.json", {"kind": "sweep"})
    with pytest.raises(ResultsError, match="holds results of `dart-llm sweep`"):
        drift_view.read(tmp_path)


def test_masks_and_their_overlap(view):
    own = cell(view)
    masks = drift_view.read_masks(own)
    assert masks is not None and masks.steps == tuple(mask.step for mask in own.remasks)
    assert drift_view.overlap(masks)[:, 1] == pytest.approx(own.remasks[1].jaccard)
    assert set(drift_view.overlap(masks)[:, 0]) == {1.0}
    assert drift_view.chance(masks) == pytest.approx(
        fmean(k / (2 - k) for k in (kept / 48 for kept in own.remasks[0].kept))
    )
    flow, total = drift_view.flow(masks, 0, 1), 48 * len(masks.live)
    assert flow.total == total and flow.kept + flow.left == sum(own.remasks[0].kept)
    assert flow.kept + flow.joined == sum(own.remasks[1].kept)
    empty, full = np.zeros(4, dtype=np.bool_), np.ones(4, dtype=np.bool_)
    assert (drift_view.jaccard(empty, empty), drift_view.jaccard(empty, full)) == (1.0, 0.0)
    assert Flow(0, 0, 4, 0).share_kept == 0.0 and Flow(3, 1, 1, 3).share_kept == 0.75


def test_periods_and_topics_of_masks(view):
    """A trigger's window ended at 220, and 16 tokens were observed from 224 on."""
    (start,), end = cell(view).changes, cell(view).decoded_tokens
    masks = (Masked(0, "first", (24,)), Masked(240, "drift", (24,), observed=16))
    check = DriftCheck(0, 0, 220, 3, 22, 0.5, 0.7, 1, True, "armed")
    own = cell(view).model_copy(update={"remasks": masks, "checks": (check,), "dense_from": None})
    spans = [MaskSpan(0, 220, 0), MaskSpan(220, 224, None), MaskSpan(224, 240, None)]
    assert drift_view.periods(own) == [*spans, MaskSpan(240, end, 1)]
    assert drift_view.columns(own) == [("two 0", 0), ("two 1", 1)] and start < 240
    free = own.model_copy(update={"topics": ()})
    assert drift_view.columns(free) == [("mask of step 0", 0), ("mask of step 240", 1)]
    never = cell(view, "forced/two/never@0.5/0")
    assert drift_view.periods(never) == [MaskSpan(0, end, 0)]
    released = never.model_copy(update={"dense_from": 100})
    assert drift_view.periods(released) == [MaskSpan(0, 100, 0), MaskSpan(100, end, None)]
    assert drift_view.periods(cell(view, "forced/two/dense/0")) == [MaskSpan(0, end, None)]


def test_loss_around_the_change(view):
    found = drift_view.around(view)
    assert set(found) == set(view.labels) - {"dense"}
    for point in found["dart@0.3"]:
        by_source = []  # a source is one item, however many changes it has
        for source in ("two", "three"):
            own, dense = (cell(view, f"forced/{source}/{m}/0") for m in ("dart@0.3", "dense"))
            excess = np.subtract(own.losses[1:], dense.losses[1:])  # the first token has no loss
            values = []
            for (_, low, start), (_, _, high) in pairwise(own.placed_topics):
                first = start + point.start
                if max(low, 1) <= first <= high - 16:
                    values.append(excess[first - 1 : first + 15].mean())
            by_source += [fmean(values)] if values else []
        assert (point.value, point.n) == (pytest.approx(fmean(by_source)), len(by_source))
    assert {0, 16, -16} <= {point.start for point in found["dart@0.3"]}


def test_pictures_that_a_folder_allows(folder):
    paths = report.write_all(folder)
    shown = ["methods", "loss", "similarity", "overlap", "neurons", "flow"]
    assert [path.stem for path in paths] == [*shown, "detection_rates", "detection"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_bars_and_curves_hold_the_summary(view):
    methods, loss, *_ = (next(kind).plot for _, kind in report.kinds(view))
    estimates = [line["loss"]["after_minus_dense"] for line in view.lines]
    quality, _ = axes_of(methods)
    means = [estimate["mean"] for estimate in estimates]
    assert [bar.get_width() for bar in quality.patches] == pytest.approx(means)
    assert len({bar.get_hatch() for bar in quality.patches}) == 5  # legible without colours
    assert not [line for line in quality.lines if line.get_marker() == "|"]
    assert f"no whiskers: passages too few (n = {estimates[0]['n']})" in methods.small
    known = deepcopy(view)
    for line in known.lines:
        line["loss"]["after_minus_dense"] |= {"low": -0.5, "high": 0.5, "n": 6}
    methods = next(next(kind).plot for _, kind in report.kinds(known))
    quality, _ = axes_of(methods)
    whiskers = [list(line.get_xdata()) for line in quality.lines if line.get_marker() == "|"]
    assert whiskers[::2] == [[-0.5, 0.5]] * len(estimates)
    assert "whiskers: 95 % bootstrap intervals over 6 passages" in methods.small
    panels = [axes for axes in axes_of(loss, narrow=True) if axes.lines]
    curve = next(line for line in panels[2].lines if line.get_marker() != "None")
    points = drift_view.around(view)["dart@0.3"]
    assert list(curve.get_ydata()) == [point.value for point in points]


def test_numbers_stand_beside_their_accounting(view):
    found, own = page(report.render(view)), cell(view)
    assert found.row("dart@0.3") == [*summary.table(view.summary, "").cells()[3]]
    text = found.text.replace("\xa0", " ")
    best = summary.best(view.lines, "loss", "after_minus_dense")
    lost = best["loss"]["after_minus_dense"]["mean"]
    assert summary.sentence(view.summary) in text and f"{lost:.2f} nats" in text
    mask = own.remasks[1]
    row = found.row("passage two, interval:40@0.5", str(mask.step))
    assert row[2:5] == [mask.cause, f"two 0, token {mask.step}", f"{mask.evidence_tokens:.0f}"]
    assert row[7] == f"{sum(mask.kept):,}"
    passages, more = report.passage_texts(view)
    assert len(passages) == 2 and not more and "<" not in passages[0]["data"]
    few, more = report.passage_texts(view, room=1)
    assert len(few) == 1 and more


def test_free_texts_stand_side_by_side(view):
    text = "A ledger <script>alert(1)</script> balances."
    free = [
        cell(view, f"forced/two/{m}/0").model_copy(update={"mode": "free", "text": text})
        for m in ("never@0.5", "dense")
    ]
    found = report.render(DriftView(view.results, tuple(free), {}, {}, ()))
    assert "A ledger &lt;script&gt;alert(1)&lt;/script&gt; balances." in found
    places = [found.index(f"<article><h3>{name}") for name in ("dense", "never@0.5")]
    assert places == sorted(places) and "tokens dense" in page(found).text


def test_without_plotly_the_pictures_are_images(view, monkeypatch):
    for package, extra in (("plotly", "drift"), ("matplotlib", "plots"), ("cmcrameri", "plots")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            patch.setitem(sys.modules, f"{package}.graph_objects", None)
            with pytest.raises(MissingExtra, match=rf"needs {package}.*'dart-llm\[{extra}\]'"):
                figures.kit()
            if package == "plotly":
                patch.setattr(figures, "render", lambda plot, kind, narrow=False: b"drawn")
            text = report.render(view)
            found = page(text)
            assert f"needs {package}, which is not installed" in found.text
            assert bool(found.attributes("img")) is (package == "plotly")
            assert not SCRIPT.search(text) and "script-src" not in text
