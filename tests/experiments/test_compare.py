"""Comparisons: what is paired with what, what is marked, and what is said of it."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from dart_llm.experiments import comparison as compare
from dart_llm.experiments import comparison as compare_items
from dart_llm.experiments import comparison_report as compare_tables
from dart_llm.experiments import comparison_report as compare_words
from dart_llm.experiments.comparison import Row
from dart_llm.experiments.comparison_report import footnotes
from fake_cells import (
    ACC,
    METHODS,
    PPL,
    ROUGE,
    accuracy,
    cell,
    failed,
    flags,
    grid,
    one,
    perplexity,
    report,
)

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return compare.rows(grid())


def find(rows: list[Row], label: str, task: str = ACC) -> Row:
    (found,) = [row for row in rows if row.label == label and row.task == task]
    return found


def test_rows_come_by_task_dense_first(rows: list[Row]) -> None:
    assert len(rows) == 4 * (1 + 3 * len(METHODS))
    assert list(dict.fromkeys(row.task for row in rows)) == [ACC, "mmlu_local", PPL, ROUGE]
    labels = [row.label for row in rows if row.task == ACC]
    assert labels[:4] == ["dense", "static@0.3", "static@0.5", "static@0.7"]
    assert labels[-1] == "dart@0.7"


def test_a_row_has_its_accounting_beside_it(rows: list[Row]) -> None:
    row = find(rows, "dart@0.5", ROUGE)
    assert (row.asked, row.achieved, row.dense_share) == pytest.approx((0.5, 0.4375, 0.125))
    assert row.while_pruned == pytest.approx(0.5)
    assert row.remasks == 0 and row.executor == "compact"
    assert row.bytes_share == pytest.approx(1 - 0.4375 + 0.031)
    assert row.weight_bytes == 538_060_032 and row.items == 10
    dense = find(rows, "dense")
    assert (dense.achieved, dense.dense_share, dense.remasks, dense.bytes_share) == (0, 1, 0, 1)
    assert dense.to_dense is None and dense.to_griffin is None


def test_metrics_and_differences_are_the_items_means(rows: list[Row]) -> None:
    row, dense, griffin = (find(rows, x) for x in ("dart@0.7", "dense", "griffin@0.7"))
    assert row.interval is not None and row.to_dense is not None and row.to_griffin is not None
    assert row.interval.estimate == pytest.approx(row.value)
    assert row.to_dense.estimate == pytest.approx((row.value or 0) - (dense.value or 0))
    assert row.to_griffin.estimate == pytest.approx((row.value or 0) - (griffin.value or 0))
    assert row.to_dense.n == 150 and row.verdict(row.to_griffin) == "better"


def test_perplexities_are_compared_as_ratios(rows: list[Row]) -> None:
    row, dense = find(rows, "dart@0.5", PPL), find(rows, "dense", PPL)
    assert row.to_dense is not None and row.to_griffin is not None
    assert row.to_dense.estimate == pytest.approx((row.value or 0) / (dense.value or 1))
    assert row.verdict(row.to_dense) == "worse" and row.verdict(row.to_griffin) == "better"
    assert row.to_griffin.low < row.to_griffin.high < 1


def test_more_than_a_point_from_griffin_is_marked(rows: list[Row]) -> None:
    row = find(rows, "dart@0.5", ROUGE)
    assert row.gap == pytest.approx(-0.0625) and row.unequal
    assert not find(rows, "dart@0.5", ACC).unequal
    near = compare.rows([one("griffin", 0.5, flags(20)), one("dart", 0.5, flags(22), 0.4905)])[1]
    assert near.gap == pytest.approx(-0.0095) and not near.unequal
    (cells,) = [r for r in compare_tables.tables(rows)[3].rows if r[0] == "dart@0.5"]
    assert cells[1:3] == ("50 %", "43.8 % †")
    assert cells[5].endswith(" †") and cells[6].endswith(" ‡") and cells[8] == "12.5 %"
    notes = " ".join(footnotes(rows))
    assert "† achieved sparsity differs" in notes and "‡ against a GRIFFIN that was not" in notes


def test_griffin_is_interpolated_item_by_item(rows: list[Row]) -> None:
    row = find(rows, "dart@0.5", ROUGE)
    low, high = find(rows, "griffin@0.3", ROUGE), find(rows, "griffin@0.5", ROUGE)
    equal = row.equal_sparsity
    assert equal is not None and equal.interval is not None
    assert equal.between == pytest.approx((0.3, 0.5))
    share = (0.4375 - 0.3) / 0.2
    line = (1 - share) * (low.value or 0) + share * (high.value or 0)
    assert equal.value == pytest.approx(line)
    assert equal.interval.estimate == pytest.approx((row.value or 0) - line)
    assert find(rows, "dart@0.3", ROUGE).equal_sparsity is None  # 26.25 %: below what was measured


def test_perplexity_is_interpolated_on_its_log_axis() -> None:
    noise = [random.Random(i).gauss(0, 0.1) for i in range(8)]
    cells = [
        cell(m, s, PPL, perplexity(PPL, [loss + n for n in noise], report=report(m, s, a)))
        for m, s, a, loss in (
            ("griffin", 0.4, None, 3.0),
            ("griffin", 0.6, None, 4.0),
            ("dart", 0.6, 0.5, 3.3),
        )
    ]
    row = compare.rows(cells)[2]
    equal = row.equal_sparsity
    assert equal is not None and equal.interval is not None
    shift = sum(noise) / 8
    assert equal.value == pytest.approx(math.exp(3.5 + shift))
    assert equal.interval.estimate == pytest.approx(math.exp(-0.2))


def test_where_griffin_was_measured_nothing_is_interpolated(rows: list[Row]) -> None:
    row = find(rows, "dart@0.5", ACC)
    assert row.equal_sparsity is not None and row.equal_sparsity.between == (0.5,)
    assert row.equal_sparsity.interval == row.to_griffin


def test_equal_bytes_use_compact_shares_unless_all_ran_compact() -> None:
    def run(executor: str) -> list[Row]:
        cells = [one("griffin", 0.5, flags(20)), one("dart", 0.5, flags(30))]
        masked = {"executor": executor, "ffn_bytes_share": 1.0}
        cells[1]["measurement"]["accounting"].update(masked)
        return compare.rows(cells)

    mixed = run("masked")
    assert [row.bytes_share for row in mixed] == pytest.approx([0.531, 0.531])
    assert mixed[1].equal_bytes is not None and mixed[1].equal_bytes.between == (0.531,)
    assert "if the compact executor ran" in footnotes(mixed)[-1]
    assert [row.bytes_share for row in run("compact")] == pytest.approx([0.531, 1.0])


def test_quantised_dense_models_meet_griffin_at_equal_bytes() -> None:
    eight = cell("dense-8bit", 0.0, ACC, accuracy(ACC, flags(30)))
    eight["label"] = "dense-8bit"
    eight["cell"]["method"] = "dense"
    eight["facts"] = {"weight_bytes": 143_000_000, "ffn_bytes_share": 0.531}
    cells = [one("dense", 0.0, flags(30)), one("griffin", 0.5, flags(20)), eight]
    found = {row.label: row for row in compare.rows(cells)}
    row = found["dense-8bit"]
    assert row.method == "dense-8bit" and row.bytes_share == 0.531 and row.achieved == 0
    assert row.equal_bytes is not None and row.equal_bytes.value == 0.5
    assert row.verdict(row.equal_bytes.interval) == "better"
    assert row.equal_sparsity is None and row.to_griffin is None
    assert row.to_dense is not None and row.to_dense.estimate == 0
    head = compare_tables.tables(list(found.values()))[0].head
    assert head[-1] == "weights"  # they differ now


def test_without_dense_and_griffin_the_columns_are_empty() -> None:
    found = compare.rows([one("dart", 0.5, flags(20))])
    assert found[0].to_dense is found[0].to_griffin is found[0].equal_sparsity is None
    note = "dense and GRIFFIN were not measured: the columns that compare with dense and GRIFFIN"
    assert any(line.startswith(note) for line in footnotes(found))
    assert compare_words.conclusion(found) == (
        "At 50 % dart has acc 0.500 on arc_easy_local; nothing was measured that it can be "
        "compared with."
    )


def test_a_failed_cell_stands_in_the_table_of_its_model() -> None:
    lost = failed("static", 0.5, ACC, "no memory left")
    lost["checkpoint"] = {}  # it failed before its model was known
    found = compare.rows([one("dense", 0, flags(20)), lost, one("dart", 0.5, flags(20))])
    assert len({row.group for row in found}) == 1
    (table,) = compare_tables.tables(found)
    assert [row[0] for row in table.rows] == ["dense", "static@0.5", "dart@0.5"]


def test_one_item_is_said_to_be_too_few() -> None:
    found = compare.rows([one("dense", 0, [1.0]), one("dart", 0.5, [1.0])])
    assert compare_tables.tables(found)[0].caption.count("; 1 item;") == 1
    assert compare_words.conclusion(found) == (
        "At 50 % dart has acc 1.000 on arc_easy_local; one item is too few to compare."
    )


def test_seeds_pair_with_their_own_references() -> None:
    cells = []
    for seed, good in ((1, 20), (2, 30)):
        for method, better in (("dense", 4), ("random", 0)):
            made = one(method, 0.5, flags(good + better))
            made["cell"]["seed"] = seed
            cells.append(made)
    found = compare.rows(cells)
    assert [row.to_dense.estimate for row in found if row.to_dense] == pytest.approx([-0.1, -0.1])
    table = compare_tables.tables(found)[0]
    assert [row[0] for row in table.rows] == [
        *("dense, seed 1", "dense, seed 2", "random@0.5, seed 1", "random@0.5, seed 2")
    ]
    lone = compare.rows([cells[0], cells[3]])[1]  # another seed's dense is better than none
    assert lone.to_dense is not None and lone.to_dense.estimate == pytest.approx(6 / 40)


def test_other_models_tasks_and_protocols_are_never_references() -> None:
    base = one("dense", 0.0, flags(20))
    for key, value in (("model", "other"), ("protocol", "full")):
        other = one("dart", 0.5, flags(10))
        other["cell"][key] = value
        other["checkpoint"] = {}
        other["measurement"]["protocol"] = value if key == "protocol" else "decode"
        assert compare.rows([base, other])[1].to_dense is None


def test_failed_cells_keep_their_sentence() -> None:
    bad = failed("wanda", 0.5, ACC, "the calibration text is too short")
    empty = {**one("flap", 0.5, flags(3)), "measurement": None}
    endless = one("static", 0.5, flags(3))
    endless["measurement"]["metrics"]["acc"] = None
    found = compare.rows([one("dense", 0.0, flags(20)), bad, empty, endless, {}])
    assert [row.status for row in found if row.method != "dense"] == ["failed"] * 4
    assert [row.error for row in found if row.error] == [
        "the calibration text is too short",
        "no measurement was written",
        "acc is not a finite number",
        "no measurement was written",
    ]
    text = compare_tables.markdown(found)
    assert "wanda@0.5, seed 0 on arc_easy_local" in text
    assert "failed: the calibration text is too short" in text
    assert compare_tables.summary(found).endswith("4 cells failed.")


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ({"losses": [1.0, 2.0, 6.0]}, (3.0, 3.0)),
        ({"mean_loss": 2.5, "tokens": 7}, (2.5, 7.0)),
        ({"loss_sum": 10.0, "scored_tokens": 4}, (2.5, 4.0)),
        ({"word_perplexity": [-30.0, 12]}, (2.5, 12.0)),
        ({"word_perplexity": math.e}, (1.0, 1.0)),
        ({"losses": [1.0, None]}, None),
        ({}, None),
    ],
)
def test_items_of_a_perplexity(item: dict[str, Any], value: tuple[float, float] | None) -> None:
    found = compare_items.scores({"metric": "word_perplexity", "items": [{"id": "x", **item}]})
    assert found.exponential
    assert dict(found.sample) == ({} if value is None else {"x": pytest.approx(value)})


def test_items_of_other_metrics() -> None:
    items = [{"id": 1, "acc": True}, {"id": 2, "acc": 0.25}, {"id": 3, "acc": None}, {"id": 4}]
    found = compare_items.scores({"metric": "acc,none", "items": items})
    assert dict(found.sample) == {"1": 1.0, "2": 0.25} and not found.exponential
    bits = {"metric": "bits_per_byte", "items": [{"id": "d", "bits_per_byte": [-math.log(2), 4]}]}
    assert dict(compare_items.scores(bits).sample) == {"d": pytest.approx((0.25, 4))}
    assert dict(compare_items.scores({}).sample) == {}
