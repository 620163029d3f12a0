"""Means over ids with intervals, beside what was really removed."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from rich.console import Console

from dart_llm import stats
from dart_llm.metrics_table import means, table
from dart_llm.text_metrics import NAMES, NUMBERS
from fake_results import accounting

pytest.importorskip("scipy")


def cell(source: str, label: str, seed: int, metrics: Any, achieved: float = 0.45) -> dict:
    report = None
    if achieved:
        report = accounting(label, 0.5, achieved, 0.1, decoded=100, masks=())
    return {
        "key": f"free/{source}/{label}/{seed}",
        "label": label,
        "cell": {"source": source, "seed": seed},
        "metrics": metrics,
        "accounting": report and {k: v for k, v in report.items() if k != "sequences"},
    }


def numbers(value: float | None, **more: float | None) -> dict[str, float | None]:
    return {**dict.fromkeys(NAMES, value), **more}


CELLS = [
    cell("a", "dense", 0, None, achieved=0),
    cell("a", "dart@0.5", 0, numbers(0.2)),
    cell("a", "dart@0.5", 1, numbers(0.4, sentence_order=None), achieved=0.35),
    cell("b", "dart@0.5", 0, numbers(0.9, sentence_order=None)),
    cell("c", "dart@0.5", 0, numbers(0.6)),
    cell("a", "never@0.5", 0, numbers(0.5, sentence_order=None)),
]


def test_seeds_are_averaged_within_an_id_and_ids_weigh_the_same() -> None:
    dart, never = means(CELLS)
    assert [row.method for row in (dart, never)] == ["dart@0.5", "never@0.5"]
    assert (dart.texts, never.texts) == (4, 1)
    assert dart.means["bleu"] == pytest.approx((0.3 + 0.9 + 0.6) / 3)
    assert dart.n["bleu"] == 3
    expected = stats.interval({"a": 0.3, "b": 0.9, "c": 0.6})
    assert dart.intervals["bleu"].low == pytest.approx(expected.low)
    assert dart.intervals["bleu"].high == pytest.approx(expected.high)


def test_numbers_that_are_not_defined_do_not_count() -> None:
    dart, never = means(CELLS)
    assert dart.means["sentence_order"] == pytest.approx((0.2 + 0.6) / 2)
    assert dart.n["sentence_order"] == 2
    assert (never.means["sentence_order"], never.n["sentence_order"]) == (None, 0)
    assert never.intervals["sentence_order"] is None
    assert (never.means["bleu"], never.intervals["bleu"]) == (0.5, None)  # one id has no interval


def test_every_mean_stands_beside_what_was_removed() -> None:
    dart = means(CELLS)[0].to_dict()
    assert dart["achieved_sparsity"] == pytest.approx((3 * 0.45 + 0.35) / 4)
    assert dart["dense_token_share"] == pytest.approx(0.1)
    assert dart["remasks"] == 0
    assert list(dart["numbers"]) == list(NAMES)
    assert dart["numbers"]["sentence_order"]["n"] == 2


def test_without_metrics_there_are_no_rows() -> None:
    assert means([]) == []
    assert means(CELLS[:1]) == []


def test_without_accounting_nothing_is_claimed() -> None:
    (row,) = means([cell("a", "dense", 0, numbers(0.5), achieved=0)])
    assert row.accounting is None
    assert row.to_dict()["achieved_sparsity"] is None


def test_without_scipy_the_means_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    dart = means(CELLS)[0]
    assert dart.means["bleu"] == pytest.approx(0.6)
    assert dart.intervals["bleu"] is None


def test_the_table_shows_every_number_of_every_method() -> None:
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(table(means(CELLS), "against dense [free]"))
    shown = console.export_text()
    assert "against dense [free]" in shown
    for number in NUMBERS:
        assert shown.count(f"│ {number.title} ") == 2
    (line,) = [line for line in shown.splitlines() if "dart@0.5" in line]
    assert [part.strip() for part in line.strip("│").split("│")] == [
        "dart@0.5",
        "ROUGE-1",
        "0.600",
        f"{means(CELLS)[0].intervals['rouge1'].low:.3f}-"
        f"{means(CELLS)[0].intervals['rouge1'].high:.3f}",
        "3",
        "42.5%",
        "10.0%",
        "0",
    ]
