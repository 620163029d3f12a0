"""Comparisons: what is paired with what, what is marked, and which numbers come out."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dart_llm.experiments import comparison
from dart_llm.experiments.comparison import Row
from dart_llm.experiments.comparison_report import tables
from fake_cells import ACC, METHODS, PPL, ROUGE, accuracy, cell, failed, flags, grid, one


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return comparison.rows(grid())


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


def test_more_than_a_point_from_griffin_is_unequal_and_not_compared(rows: list[Row]) -> None:
    row = find(rows, "dart@0.5", ROUGE)
    assert row.gap == pytest.approx(-0.0625) and row.unequal
    assert row.equal_sparsity is None  # nothing is interpolated between measured points
    near = comparison.rows([one("griffin", 0.5, flags(20)), one("dart", 0.5, flags(22), 0.4905)])[1]
    assert near.gap == pytest.approx(-0.0095) and not near.unequal
    assert near.equal_sparsity is not None and near.equal_sparsity.at == 0.5


def test_equal_sparsity_is_the_nearest_griffin_that_was_measured(rows: list[Row]) -> None:
    row = find(rows, "dart@0.5", ACC)
    assert row.equal_sparsity is not None and row.equal_sparsity.at == 0.5
    assert row.equal_sparsity.interval == row.to_griffin
    cells = [one("griffin", s, flags(good)) for s, good in ((0.42, 30), (0.5, 20))]
    (*_, late) = comparison.rows([*cells, one("dart", 0.5, flags(25), 0.425)])
    assert late.equal_sparsity is not None and late.equal_sparsity.at == 0.42
    assert late.equal_sparsity.value == 0.75 and late.verdict(late.to_griffin) == "few differ"


def test_equal_bytes_use_compact_shares_unless_all_ran_compact() -> None:
    def run(executor: str) -> list[Row]:
        cells = [one("griffin", 0.5, flags(20)), one("dart", 0.5, flags(30))]
        masked = {"executor": executor, "ffn_bytes_share": 1.0}
        cells[1]["measurement"]["accounting"].update(masked)
        return comparison.rows(cells)

    mixed = run("masked")
    assert [row.bytes_share for row in mixed] == pytest.approx([0.531, 0.531])
    assert mixed[1].equal_bytes is not None and mixed[1].equal_bytes.at == 0.531
    assert [row.bytes_share for row in run("compact")] == pytest.approx([0.531, 1.0])


def test_quantised_dense_models_meet_griffin_at_equal_bytes() -> None:
    eight = cell("dense-8bit", 0.0, ACC, accuracy(ACC, flags(30)))
    eight["label"] = "dense-8bit"
    eight["cell"]["method"] = "dense"
    eight["facts"] = {"weight_bytes": 143_000_000, "ffn_bytes_share": 0.531}
    cells = [one("dense", 0.0, flags(30)), one("griffin", 0.5, flags(20)), eight]
    found = comparison.rows(cells)
    row = find(found, "dense-8bit")
    assert row.method == "dense-8bit" and row.bytes_share == 0.531 and row.achieved == 0
    assert row.equal_bytes is not None and row.equal_bytes.value == 0.5
    assert row.verdict(row.equal_bytes.interval) == "better"
    assert row.equal_sparsity is None and row.to_griffin is None
    assert row.to_dense is not None and row.to_dense.estimate == 0
    assert tables(found)[0].head[-1] == "weights"  # they differ now


def test_seeds_pair_with_their_own_references() -> None:
    cells = []
    for seed, good in ((1, 20), (2, 30)):
        for method, better in (("dense", 4), ("random", 0)):
            made = one(method, 0.5, flags(good + better))
            made["cell"]["seed"] = seed
            cells.append(made)
    found = comparison.rows(cells)
    assert [row.to_dense.estimate for row in found if row.to_dense] == pytest.approx([-0.1, -0.1])
    lone = comparison.rows([cells[0], cells[3]])[1]  # another seed's dense is better than none
    assert lone.to_dense is not None and lone.to_dense.estimate == pytest.approx(6 / 40)


@pytest.mark.parametrize(("key", "value"), [("model", "other"), ("protocol", "full")])
def test_other_models_and_protocols_are_never_references(key: str, value: str) -> None:
    other = one("dart", 0.5, flags(10))
    other["cell"][key] = value
    other["checkpoint"] = {}
    other["measurement"]["protocol"] = value if key == "protocol" else "decode"
    assert comparison.rows([one("dense", 0.0, flags(20)), other])[1].to_dense is None


def test_failed_cells_keep_their_sentence_and_their_place() -> None:
    lost = failed("static", 0.5, ACC, "no memory left")
    lost["checkpoint"] = {}  # it failed before its model was known
    empty = {**one("flap", 0.5, flags(3)), "measurement": None}
    endless = one("wanda", 0.5, flags(3))
    endless["measurement"]["metrics"]["acc"] = None
    found = comparison.rows([one("dense", 0, flags(20)), lost, empty, endless, {}])
    assert len({row.group for row in found}) == 2  # of the last, nothing is known at all
    assert [(row.method, row.error) for row in found] == [
        ("dense", None),
        ("static", "no memory left"),
        ("flap", "no measurement was written"),
        ("wanda", "acc is not a finite number"),
        ("unknown", "no measurement was written"),
    ]


@pytest.mark.parametrize(
    ("metric", "item", "value"),
    [
        ("word_perplexity", {"mean_loss": 2.5, "tokens": 7}, (2.5, 7.0)),
        ("word_perplexity", {"word_perplexity": [-30.0, 12]}, (2.5, 12.0)),
        ("word_perplexity", {"word_perplexity": math.e}, (1.0, 1.0)),
        ("word_perplexity", {}, None),
        ("acc,none", {"acc": True}, 1.0),
        ("acc,none", {"acc,none": 0.25}, 0.25),
        ("acc", {"acc": None}, None),
        ("acc", {"acc": math.nan}, None),
        ("bits_per_byte", {"bits_per_byte": [-math.log(2), 4]}, (0.25, 4.0)),
    ],
)
def test_items(metric: str, item: dict[str, Any], value: Any) -> None:
    found = comparison.scores({"metric": metric, "items": [{"id": "x", **item}]})
    assert found.exponential == (metric == "word_perplexity")
    assert dict(found.sample) == ({} if value is None else {"x": pytest.approx(value)})
    assert dict(comparison.scores({}).sample) == {}
