"""Comparisons: what is paired with what, what is said of it, the files, the picture, the page."""

import json
import math
import sys

import pytest

from dart_llm.evaluation.measurement import LEAK
from dart_llm.experiments import comparison, comparison_report
from dart_llm.experiments.comparison_report import LEAK_NOTE, conclusion, tables
from dart_llm.reporting import figures
from fake_results import accounting, config
from html_page import Page, check_alone
from written import axes_of

MODEL = "SmolLM2-135M-Instruct"
ACC, PPL = "arc_easy_local", "perplexity:wikitext2"
METHODS = ("static", "griffin", "flap", "published", "dart")
LOSS = {"dense": 0.0, "static": 5.0, "griffin": 1.0, "flap": 1.5, "published": 0.9, "dart": 0.7}
"""How much a method costs, in units that grow with the sparsity."""


def cell(method, sparsity, measurement, protocol="decode", **more):
    """One finished cell; ``more`` overrides entries of the cell's own settings."""
    label = method if sparsity is None or method == "dense" else f"{method}@{sparsity:g}"
    settings = {"model": "smollm2-135m", "dtype": "float32", "method": method, "seed": 0}
    settings |= {"task": (measurement or {}).get("task"), "options": {"protocol": protocol}}
    checkpoint = {"name": MODEL, "file_quantisation": "Q4_K_M", "dtype": "float32"}
    return {
        "key": label,
        "label": label,
        "status": "done",
        "error": None,
        "cell": {**settings, "sparsity": sparsity, **more},
        "measurement": measurement and {**measurement, "protocol": protocol},
        "checkpoint": {**checkpoint, "sha256": "ab12" * 16},
        "facts": {"weight_bytes": 538_060_032},
    }


def measurement(task, values, report=None):
    """``Measurement.to_dict()``: flags, or losses of slices of 256 tokens."""
    metric, value = "acc", sum(values) / len(values)
    items = [{"id": str(n), metric: float(value)} for n, value in enumerate(values)]
    if task.startswith("perplexity"):
        metric, value = "perplexity", math.exp(value)
        items = [{"id": str(n), "mean_loss": v, "tokens": 256} for n, v in enumerate(values)]
    document = {"task": task, "metric": metric, "metrics": {metric: value}, "items": items}
    document |= {"higher_is_better": metric == "acc", "subtasks": {}, "notes": []}
    return {**document, "accounting": report, "masks": 0}


def report(method, sparsity, achieved=None):
    """Accounting; None for the untouched model.  What is not achieved ran dense."""
    if method.startswith("dense"):
        return None
    achieved = sparsity if achieved is None else achieved
    counted = accounting(method, sparsity, achieved, 1 - achieved / sparsity)
    return {name: value for name, value in counted.items() if name != "sequences"}


def measured(task, method, sparsity, report=None):
    """What ``method`` scores on items that all methods share: damage grows with the sparsity."""
    damage = LOSS[method] * sparsity**2
    chance = 0.55 - 0.3 * min(1, damage)
    values = [n * 37 % 150 < 150 * chance for n in range(150)]
    if task == PPL:
        values = [2.6 + 0.04 * n + damage * (3.4 + 0.02 * (n * 7 % 16)) for n in range(16)]
    return measurement(task, values, report)


def grid(methods=METHODS, sparsities=(0.3, 0.5, 0.7)):
    """Dense and every method at every sparsity on both tasks; ``dart`` falls short on one."""
    cells = []
    for task in (ACC, PPL):
        cells.append(cell("dense", 0.0, measured(task, "dense", 0.0)))
        for method, sparsity in ((m, s) for m in methods for s in sparsities):
            achieved = 0.875 * sparsity if (method, task) == ("dart", PPL) else None
            counted = report(method, sparsity, achieved)
            cells.append(cell(method, sparsity, measured(task, method, sparsity, counted)))
    return cells


def answers(method, sparsity, good, achieved=None, task=ACC, **more):
    """The cell of a method that answers ``good`` of 40 questions."""
    flags = [float(number < good) for number in range(40)]
    counted = report(method, sparsity, achieved)
    return cell(method, sparsity, measurement(task, flags, counted), **more)


def failed(method, sparsity, error):
    facts = {"status": "failed", "error": error, "facts": {}}
    return {**cell(method, sparsity, None, task=ACC), **facts}


@pytest.fixture(scope="module")
def rows():
    return comparison.rows(grid())


def find(rows, label, task=ACC):
    (row,) = [row for row in rows if row.label == label and row.task == task]
    return row


def test_rows_come_by_task_dense_first_with_their_accounting(rows):
    assert len(rows) == 2 * (1 + 3 * len(METHODS))
    assert list(dict.fromkeys(row.task for row in rows)) == [ACC, PPL]
    labels = [row.label for row in rows if row.task == ACC]
    assert [*labels[:3], labels[-1]] == ["dense", "static@0.3", "static@0.5", "dart@0.7"]
    row, dense = find(rows, "dart@0.5", PPL), find(rows, "dense")
    counted = (row.requested, row.achieved, row.dense_share, row.while_pruned, row.bytes_share)
    assert counted == pytest.approx((0.5, 0.4375, 0.125, 0.5, 1 - 0.4375 + 0.031))
    assert (row.remasks, row.executor, row.items) == (0, "compact", 16)
    assert (dense.achieved, dense.dense_share, dense.remasks, dense.bytes_share) == (0, 1, 0, 1)
    assert dense.to_dense is None and dense.to_griffin is None
    line = comparison.result_line(row)
    assert (line.value, line.low, line.achieved) == (row.value, row.interval.ends[0], row.achieved)


def test_differences_are_the_items_means_and_perplexities_ratios(rows):
    row, dense, griffin = (find(rows, x) for x in ("dart@0.7", "dense", "griffin@0.7"))
    assert row.interval.estimate == pytest.approx(row.value)
    assert row.to_dense.estimate == pytest.approx(row.value - dense.value)
    assert row.to_griffin.estimate == pytest.approx(row.value - griffin.value)
    assert row.to_dense.n == 150 and row.verdict(row.to_griffin) == "better"
    row, dense = find(rows, "dart@0.5", PPL), find(rows, "dense", PPL)
    assert row.to_dense.estimate == pytest.approx(row.value / dense.value)
    assert row.verdict(row.to_dense) == "worse" and row.verdict(row.to_griffin) == "better"
    assert row.to_griffin.ends[0] < row.to_griffin.ends[1] < 1


def test_equal_sparsity_is_the_nearest_griffin_within_a_point(rows):
    far = find(rows, "dart@0.5", PPL)
    assert far.gap == pytest.approx(-0.0625) and far.unequal
    assert far.equal_sparsity is None  # nothing is interpolated between measured points
    same = find(rows, "dart@0.5", ACC)
    assert (same.equal_sparsity.at, same.equal_sparsity.interval) == (0.5, same.to_griffin)
    near = comparison.rows([answers("griffin", 0.5, 20), answers("dart", 0.5, 22, 0.4905)])[1]
    assert near.gap == pytest.approx(-0.0095) and not near.unequal
    points = [answers("griffin", s, good) for s, good in ((0.42, 30), (0.428, 10), (0.5, 20))]
    for achieved, at, value in ((0.421, 0.42, 0.75), (0.426, 0.428, 0.25)):
        late = comparison.rows([*points, answers("dart", 0.5, 25, achieved)])[-1]
        assert (late.equal_sparsity.at, late.equal_sparsity.value) == (at, value)
        assert late.verdict(late.to_griffin) == "few differ"
    proxies = answers("dart", 0.5, 25)  # reads what GRIFFIN at 42 % reads
    proxies["measurement"]["accounting"]["ffn_bytes_share"] = 0.611
    row = comparison.rows([*points, proxies])[-1]
    assert (row.equal_sparsity.at, row.equal_bytes.at) == (0.5, pytest.approx(0.611))


def test_bytes_are_those_of_compact_where_masking_skips_no_work():
    made = answers("dart", 0.5, 30)
    made["measurement"]["accounting"] |= {"executor": "masked", "ffn_bytes_share": 1.0}
    assert comparison.rows([made])[0].bytes_share == pytest.approx(0.531)
    eight = answers("dense", 0.0, 30, name="dense q8_0")
    eight["label"], eight["facts"] = "dense q8_0", {"weight_bytes": 1, "ffn_bytes_share": 0.531}
    row = find(comparison.rows([answers("dense", 0.0, 30), eight]), "dense q8_0")
    assert (row.method, row.bytes_share, row.achieved) == ("dense q8_0", 0.531, 0)
    assert row.to_dense.estimate == 0 and row.to_griffin is None


def test_references_are_of_the_same_seed_model_and_protocol():
    cells = [
        answers(method, 0.5, good + better, seed=seed)
        for seed, good in ((1, 20), (2, 30))
        for method, better in (("dense", 4), ("random", 0))
    ]
    rows = comparison.rows(cells)
    assert [row.to_dense.estimate for row in rows if row.to_dense] == pytest.approx([-0.1, -0.1])
    assert tables(rows)[0].cells()[0][0].endswith(", seed 1")
    lone = comparison.rows([cells[0], cells[3]])[1]  # another seed's dense is better than none
    assert lone.to_dense and lone.to_dense.estimate == pytest.approx(6 / 40)
    for change in ({"model": "other"}, {"protocol": "full"}):
        other = {**answers("dart", 0.5, 10, **change), "checkpoint": {}}
        assert comparison.rows([answers("dense", 0.0, 20), other])[1].to_dense is None
    lost = {**failed("static", 0.5, "no memory left"), "checkpoint": {}}
    endless = answers("wanda", 0.5, 3)
    endless["measurement"]["metrics"]["acc"] = None
    rows = comparison.rows([answers("dense", 0, 20), lost, endless])
    assert len({row.group for row in rows}) == 1  # failed cells keep their place
    assert [row.error for row in rows] == [None, "no memory left", "acc is not a finite number"]


@pytest.mark.parametrize(
    ("metric", "item", "value"),
    [
        ("word_perplexity", {"mean_loss": 2.5, "tokens": 7}, (2.5, 7.0)),
        ("word_perplexity", {"word_perplexity": [-30.0, 12]}, (2.5, 12.0)),
        ("word_perplexity", {"word_perplexity": math.e}, (1.0, 1.0)),
        ("word_perplexity", {}, None),
        ("acc,none", {"acc": True}, 1.0),
        ("acc,none", {"acc,none": 0.25}, 0.25),
        ("acc", {"acc": math.nan}, None),
        ("bits_per_byte", {"bits_per_byte": [-math.log(2), 4]}, (0.25, 4.0)),
    ],
)
def test_items(metric, item, value):
    scores = comparison.scores({"metric": metric, "items": [{"id": "x", **item}]})
    assert scores.exponential == (metric == "word_perplexity")
    assert dict(scores.sample) == ({} if value is None else {"x": pytest.approx(value)})


def test_the_document(snapshot):
    cells = grid(methods=("griffin", "dart"), sparsities=(0.5,))
    cells += [answers("griffin", 0.5, 20 - n, layers=str(n), keep=0.5) for n in (2, 10)]
    cells.append(failed("wanda", 0.5, "the calibration text is too short"))
    rows, again = (comparison.rows(given) for given in (cells, json.loads(json.dumps(cells))))
    assert comparison_report.markdown(rows) == snapshot
    assert comparison_report.markdown(again) == comparison_report.markdown(rows)
    assert comparison_report.document(again) == comparison_report.document(rows)
    odd = comparison.rows([answers("dart", 0.5, 20, task="a|b <img>\nc")])
    assert "a\\|b \\<img>\\nc" in comparison_report.markdown(odd)


def test_headlines(snapshot):
    goods = {"griffin": {"a": 20, "b": 20, "c": 20}, "dart": {"a": 30, "b": 30, "c": 20}}
    several = [answers(m, 0.5, good, task=t) for m in goods for t, good in goods[m].items()]
    lower = json.loads(json.dumps(several))
    for made in lower:
        made["measurement"]["higher_is_better"] = False
    dense, griffin = answers("dense", 0, 30), answers("griffin", 0.5, 10)
    far = answers("dart", 0.5, 40, 0.3)
    alone = cell("dense", 0.0, measured(PPL, "dense", 0.0))
    cells = [[], several, lower, [griffin, far], [far], [dense, griffin], [alone]]
    assert [conclusion(comparison.rows(each)) for each in cells] == snapshot


def column(rows, start):
    """The cells of a column of the first table."""
    table = tables(rows)[0]
    (place,) = [n for n, head in enumerate(table.head) if head.startswith(start)]
    return [cells[place] for cells in table.cells()]


def test_each_interval_stands_once_beside_what_ran_dense():
    """Of the score itself, or, beside dense, the paired one, as in the picture."""
    rows = comparison.rows([answers("dense", 0.0, 20), answers("griffin", 0.3, 20, 0.132)])
    assert column(rows, "method") == ["dense", "griffin@0.3, 56 % of tokens dense"]
    assert column(rows, "against dense") == ["–", "40 of 40 alike"]
    score = f"0.500 ({rows[0].interval.words('{:.3f}'.format)})"
    assert column(rows, "acc") == [score, "0.500"]
    made = [answers("dense", 0.0, 1), answers("griffin", 0.5, 0), answers("dart", 0.5, 1)]
    for cut in made:
        cut["measurement"]["items"] = cut["measurement"]["items"][:2]
        cut["measurement"]["metrics"]["acc_norm"] = 0.25
    few = comparison.rows(made)
    assert column(few, "acc") == ["0.025 (too few: n = 2) §", "0.000", "0.025 §"]
    assert column(few, "against dense") == ["–", "-0.500 (too few: n = 2)", "2 of 2 alike"]
    assert column(few, "other metrics") == ["acc_norm 0.25"] * 3
    assert whiskers(axes_of(comparison_report.plots(few)[0])[1]) == []


WON = "dart at 50 % against griffin: better on 1 of 1 task"


@pytest.mark.contract("defects of the published scripts stay fixed")
def test_what_leaks_is_named_measured_on_the_same_items_and_no_headline():
    cells = [
        answers(method, 0.5, good, protocol=protocol)
        for protocol in ("decode", "published")
        for method, good in (("griffin", 20), ("dart", 30))
    ]
    assert conclusion(comparison.rows(cells)) == f"{WON}."
    assert conclusion(comparison.rows(cells[2:])) == f"LEAK: {WON}."
    cells = [answers("published", 0.5, n, protocol=p) for p, n in (("full", 20), ("published", 32))]
    cells[1]["measurement"]["notes"] = [LEAK]
    rows = comparison.rows(cells)
    (leak,) = comparison_report.leaks(rows)
    assert leak.interval.estimate == pytest.approx(0.3)
    assert leak.sentence.startswith("published@0.5 on arc_easy_local: published against full +0.3")
    assert leak.sentence.endswith("), flattered by the leak.")
    assert comparison_report.footnotes(rows)[0] == LEAK_NOTE
    assert [table.caption.startswith("LEAK, ") for table in tables(rows)] == [False, True]
    assert [row["leaks"] for row in comparison_report.document(rows)["rows"]] == [False, True]
    for text in (comparison_report.markdown(rows), page_of(cells).text.replace("\xa0", " ")):
        assert "What the published protocol leaks" in text and leak.sentence in text
    assert "LEAK" not in page_of([answers("dart", 0.5, 20)]).text


def whiskers(axes):
    """The whiskers of a panel, in its units."""
    lines = [line for drawn in axes.containers for line in drawn[2]]
    return [ends[:, 1].tolist() for line in lines for ends in line.get_segments() if len(ends)]


def test_one_panel_per_task_and_one_line_per_method(rows):
    (plot,) = comparison_report.plots(rows)
    drawn = axes_of(plot)[1:]
    titles = [axes.get_title(loc="left").partition(":")[0] for axes in drawn]
    assert titles == [ACC, "perplexity"]
    assert [axes.get_yscale() for axes in drawn] == ["linear", "log"]
    for axes in drawn:
        assert set(axes.get_legend_handles_labels()[1]) == {*METHODS, "dense"}
    dense, *pruned = [r for r in rows if r.method in ("dense", "dart") and r.task == PPL]
    handles, names = drawn[1].get_legend_handles_labels()
    data = handles[names.index("dart")][0]  # at the achieved sparsity
    assert list(data.get_xdata()) == pytest.approx([26.25, 43.75, 61.25], abs=1.3)
    assert list(data.get_ydata()) == pytest.approx([row.value for row in pruned])
    ends = [dense.value * end for end in pruned[-1].to_dense.ends]
    assert pytest.approx(ends) in whiskers(drawn[1])  # those of the table
    assert drawn[1].get_ylim()[1] < 1000 and "cut at 30 x dense" in drawn[1].get_ylabel()
    palette = [str(place) for place in range(100)]
    looks = figures.looks_of([*figures.METHODS, "griffin-refresh", "own-1", "own-2"], palette)
    assert len({look["marker"] for look in looks.values()}) == len(looks)
    assert figures.looks_of(["flap"], palette)["flap"] == looks["flap"]  # the same in every plot


def html_of(cells, **changes):
    return comparison_report.page_text({**config(), **changes}, comparison.rows(cells))


def page_of(cells, **changes):
    return Page(html_of(cells, **changes))


def test_the_page(monkeypatch):
    cells = grid(methods=("griffin", "dart"))
    cells += [failed("wanda", 0.5, "no <b>calibration</b> text")]
    html, rows = html_of(cells), comparison.rows(cells)
    check_alone(html)
    assert "no &lt;b&gt;calibration&lt;/b&gt; text" in html
    page = Page(html)
    text = page.text.replace("\xa0", " ")
    assert "3 methods compared on SmolLM2-135M-Instruct" in text and "14 done, 1 failed" in text
    assert page.row("torch")[1] == "2.13.0"
    cells_of_dart = [row for row in page.rows if row and row[0] == "dart@0.5"]
    known = find(rows, "dart@0.5", PPL)
    assert cells_of_dart[1][1:6] == ["50 %", "43.8 % †", "12.5 %", "0", f"{known.value:.1f}"]
    assert known.change(known.to_dense) in page.text  # with the interval of the picture
    (image,) = page.attributes("img")
    assert "dense on arc_easy_local: 0.553" in str(image["alt"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    without = page_of(cells)
    assert without.attributes("img") == []
    assert "No plots: this needs matplotlib" in without.text
    assert "This run is interrupted." in page_of([], status="interrupted").text
