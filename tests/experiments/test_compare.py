"""Comparisons: what is paired with what, what is said of it, and the files."""

import json
import math

import pytest
from rich.console import Console

from dart_llm.evaluation.measurement import LEAK
from dart_llm.experiments import comparison, comparison_report
from dart_llm.experiments import rows as measure_rows
from dart_llm.experiments.comparison_report import conclusion, footnotes, tables
from fake_cells import (
    ACC,
    METHODS,
    PPL,
    ROUGE,
    cell,
    failed,
    grid,
    layer_curve,
    measured,
    one,
)


@pytest.fixture(scope="module")
def rows():
    return comparison.rows(grid())


def find(rows, label, task=ACC):
    (found,) = [row for row in rows if row.label == label and row.task == task]
    return found


def test_rows_come_by_task_dense_first_with_their_accounting(rows):
    assert len(rows) == 4 * (1 + 3 * len(METHODS))
    assert list(dict.fromkeys(row.task for row in rows)) == [ACC, "mmlu_local", PPL, ROUGE]
    labels = [row.label for row in rows if row.task == ACC]
    assert [*labels[:3], labels[-1]] == ["dense", "static@0.3", "static@0.5", "dart@0.7"]
    row, dense = find(rows, "dart@0.5", ROUGE), find(rows, "dense")
    counted = (row.requested, row.achieved, row.dense_share, row.while_pruned, row.bytes_share)
    assert counted == pytest.approx((0.5, 0.4375, 0.125, 0.5, 1 - 0.4375 + 0.031))
    assert (row.remasks, row.executor, row.items) == (0, "compact", 10)
    assert row.weight_bytes == 538_060_032
    assert (dense.achieved, dense.dense_share, dense.remasks, dense.bytes_share) == (0, 1, 0, 1)
    assert dense.to_dense is None and dense.to_griffin is None


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
    far = find(rows, "dart@0.5", ROUGE)
    assert far.gap == pytest.approx(-0.0625) and far.unequal
    assert far.equal_sparsity is None  # nothing is interpolated between measured points
    same = find(rows, "dart@0.5", ACC)
    assert (same.equal_sparsity.at, same.equal_sparsity.interval) == (0.5, same.to_griffin)
    near = comparison.rows([one("griffin", 0.5, 20), one("dart", 0.5, 22, 0.4905)])[1]
    assert near.gap == pytest.approx(-0.0095) and not near.unequal
    assert near.equal_sparsity.at == 0.5
    points = [one("griffin", s, good) for s, good in ((0.42, 30), (0.428, 10), (0.5, 20))]
    for achieved, at, value in ((0.421, 0.42, 0.75), (0.426, 0.428, 0.25)):
        late = comparison.rows([*points, one("dart", 0.5, 25, achieved)])[-1]
        assert (late.equal_sparsity.at, late.equal_sparsity.value) == (at, value)
        assert late.verdict(late.to_griffin) == "few differ"


def test_equal_bytes_use_compact_shares_unless_all_ran_compact():
    for executor, shares in (("masked", [0.531, 0.531]), ("compact", [0.531, 1.0])):
        cells = [one("griffin", 0.5, 20), one("dart", 0.5, 30)]
        changes = {"executor": executor, "ffn_bytes_share": 1.0}
        cells[1]["measurement"]["accounting"].update(changes)
        rows = comparison.rows(cells)
        assert [row.bytes_share for row in rows] == pytest.approx(shares)
        assert executor == "compact" or rows[1].equal_bytes.at == 0.531


def test_quantised_dense_models_meet_griffin_at_equal_bytes():
    eight = one("dense q8_0", 0.0, 30, name="dense q8_0")
    eight["label"], eight["cell"]["method"] = "dense q8_0", "dense"
    eight["facts"] = {"weight_bytes": 143_000_000, "ffn_bytes_share": 0.531}
    found = comparison.rows([one("dense", 0.0, 30), one("griffin", 0.5, 20), eight])
    row = find(found, "dense q8_0")
    assert (row.method, row.bytes_share, row.achieved) == ("dense q8_0", 0.531, 0)
    assert row.equal_bytes.value == 0.5
    assert row.verdict(row.equal_bytes.interval) == "better"
    assert row.equal_sparsity is None and row.to_griffin is None
    assert row.to_dense.estimate == 0
    assert tables(found)[0].head[-1] == "weights"  # they differ now


def test_references_are_of_the_same_seed_model_and_protocol():
    cells = [
        one(method, 0.5, good + better, seed=seed)
        for seed, good in ((1, 20), (2, 30))
        for method, better in (("dense", 4), ("random", 0))
    ]
    found = comparison.rows(cells)
    assert [row.to_dense.estimate for row in found if row.to_dense] == pytest.approx([-0.1, -0.1])
    assert tables(found)[0].cells()[0][0].endswith(", seed 1")
    lone = comparison.rows([cells[0], cells[3]])[1]  # another seed's dense is better than none
    assert lone.to_dense and lone.to_dense.estimate == pytest.approx(6 / 40)
    for change in ({"model": "other"}, {"protocol": "full"}):
        other = {**one("dart", 0.5, 10, **change), "checkpoint": {}}
        assert comparison.rows([one("dense", 0.0, 20), other])[1].to_dense is None


def test_failed_cells_keep_their_sentence_and_their_place():
    lost = {**failed("static", 0.5, ACC, "no memory left"), "checkpoint": {}}
    endless = one("wanda", 0.5, 3)
    endless["measurement"]["metrics"]["acc"] = None
    empty = {**one("flap", 0.5, 3), "measurement": None}
    found = comparison.rows([one("dense", 0, 20), lost, empty, endless, {}])
    assert len({row.group for row in found}) == 2  # of the last, nothing is known at all
    assert [(row.method, row.error) for row in found] == [
        ("dense", None),
        ("static", "no memory left"),
        ("flap", "no measurement was written"),
        ("wanda", "acc is not a finite number"),
        ("unknown", "no measurement was written"),
    ]
    assert len(comparison_report.failures(found)) == 4


def test_items():
    for metric, item, value in (
        ("word_perplexity", {"mean_loss": 2.5, "tokens": 7}, (2.5, 7.0)),
        ("word_perplexity", {"word_perplexity": [-30.0, 12]}, (2.5, 12.0)),
        ("word_perplexity", {"word_perplexity": math.e}, (1.0, 1.0)),
        ("word_perplexity", {}, None),
        ("acc,none", {"acc": True}, 1.0),
        ("acc,none", {"acc,none": 0.25}, 0.25),
        ("acc", {"acc": math.nan}, None),
        ("bits_per_byte", {"bits_per_byte": [-math.log(2), 4]}, (0.25, 4.0)),
    ):
        found = comparison.scores({"metric": metric, "items": [{"id": "x", **item}]})
        assert found.exponential == (metric == "word_perplexity")
        assert dict(found.sample) == ({} if value is None else {"x": pytest.approx(value)})
    assert dict(comparison.scores({}).sample) == {}


def test_the_documents(snapshot):
    cells = grid(methods=("static", "griffin", "dart"), sparsities=(0.5, 0.7))
    assert comparison_report.markdown(comparison.rows(cells)) == snapshot(name="whole")
    lost = failed("wanda", 0.5, ACC, "the calibration text is too short")
    layers = comparison.rows([*layer_curve(count=3), one("dense", 0.0, 20), lost])
    assert comparison_report.markdown(layers) == snapshot(name="layers")
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        for table in tables(comparison.rows(grid(tasks=(ACC, PPL), methods=("griffin", "dart")))):
            console.print(table)
    assert "…" not in capture.get() and capture.get() == snapshot(name="terminal")


def of_tasks(lower=False):
    goods = {"griffin": {"a": 20, "b": 20, "c": 20}, "dart": {"a": 30, "b": 30, "c": 20}}
    cells = [one(m, 0.5, good, task=t) for m in goods for t, good in goods[m].items()]
    for made in cells:
        made["measurement"]["higher_is_better"] = not lower
    return cells


def test_conclusions(snapshot):
    cells = [
        [],
        of_tasks(),
        of_tasks(lower=True),
        [one("griffin", 0.5, 20), one("dart", 0.5, 40, 0.3)],
        [one("griffin", 0.5, 20), one("dart", 0.5, 25)],
        [one("dart", 0.5, 20)],
        [one("dense", 0, 30), one("griffin", 0.5, 10)],
        [cell("dense", 0.0, measured(PPL, "dense", 0.0))],
    ]
    assert [conclusion(comparison.rows(one)) for one in cells] == snapshot


def test_what_is_alike_and_what_ran_dense_is_said_where_it_stands():
    cells = [one("dense", 0.0, 20), one("griffin", 0.3, 20, 0.132)]
    rows = comparison.rows(cells)
    table = tables(rows)[0]
    assert [row[0] for row in table.cells()] == ["dense", "griffin@0.3, 56 % of tokens dense"]
    assert table.cells()[1][6] == "40 of 40 alike"
    told = "better on 0 of 1 task, no clear difference on 1"
    assert conclusion(rows) == f"griffin at 30 % against dense: {told}."


def test_the_table_of_scores_has_each_interval_once():
    """That of the score itself, or, beside dense, the paired one, as pictures have it."""
    cells = grid(tasks=(PPL,), methods=("griffin",), sparsities=(0.5,))
    known = comparison.rows(cells)
    table = measure_rows.table(cells)
    found = [dict(zip(table.head, row, strict=True)) for row in table.cells()]
    assert [row["n"] for row in found] == ["16", "16"]
    ends = "-".join(f"{end:.3g}" for end in known[0].interval.ends)
    assert [row["95 % of the value"] for row in found] == [ends, "–"]
    told = known[1].change(known[1].to_dense)
    assert [row["against dense (95 %, paired)"] for row in found] == ["–", told]
    assert "against dense (95 %, paired)" not in measure_rows.table(cells[:1]).head
    few = [one("dense", 0.0, 20), one("griffin", 0.3, 20, 0.132)]
    for cut in few:
        cut["measurement"]["items"] = cut["measurement"]["items"][:2]
        cut["measurement"]["metrics"]["acc"] = 1.0
    table = measure_rows.table(few)
    found = [dict(zip(table.head, row, strict=True)) for row in table.cells()]
    assert [row["method"] for row in found] == ["dense", "griffin@0.3, 56 % of tokens dense"]
    assert [row["95 % of the value"] for row in found] == ["too few (n = 2)", "–"]
    assert [row["against dense (95 %, paired)"] for row in found] == ["–", "2 of 2 alike"]


WON = "dart at 50 % against griffin: better on 1 of 1 task"


@pytest.mark.contract("defects of the published scripts stay fixed")
def test_what_leaks_is_named_measured_on_the_same_items_and_no_headline():
    cells = [
        one(method, 0.5, good, protocol=protocol)
        for protocol in ("decode", "published")
        for method, good in (("griffin", 20), ("dart", 30))
    ]
    assert conclusion(comparison.rows(cells)) == f"protocol decode: {WON}."
    assert conclusion(comparison.rows(cells[2:])) == f"LEAK: {WON}."
    cells = [one("published", 0.5, n, protocol=p) for p, n in (("full", 20), ("published", 32))]
    cells[1]["measurement"]["notes"] = [LEAK]
    rows = comparison.rows(cells)
    (leak,) = comparison_report.leaks(rows)
    assert leak.interval.estimate == pytest.approx(0.3)
    assert leak.sentence.startswith("published@0.5 on arc_easy_local: published against full +0.3")
    assert leak.sentence.endswith("), flattered by the leak.")
    assert footnotes(rows)[0] == comparison_report.LEAK_NOTE
    assert [table.caption.startswith("LEAK, ") for table in tables(rows)] == [False, True]
    assert "What the published protocol leaks" in comparison_report.markdown(rows)
    assert [row["leaks"] for row in comparison_report.document(rows)["rows"]] == [False, True]


def test_equal_cells_give_equal_files():
    cells = grid(tasks=(ACC, ROUGE), methods=("griffin", "dart"))
    once, again = (comparison.rows(one) for one in (cells, json.loads(json.dumps(cells))))
    for write in (
        comparison_report.markdown,
        comparison_report.document,
        lambda rows: list(comparison_report.csv_table(rows).csv()),
    ):
        assert write(once) == write(again)
    odd = comparison.rows([one("dart", 0.5, 20, task="a|b <img>\nc")])
    assert "a\\|b \\<img>\\nc" in comparison_report.markdown(odd)
