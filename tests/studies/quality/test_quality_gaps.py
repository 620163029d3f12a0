"""Gap closed and pooled rows of ``bench quality``, against numbers worked out by hand."""

from __future__ import annotations

import csv
import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dart_llm.experiments import stats
from dart_llm.studies.quality import report as quality_table
from dart_llm.studies.quality.gaps import (
    ALL,
    Lines,
    account,
    cell_rows,
    matched_sparsity,
    pooled_rows,
    summarise,
)
from shells import ROOT

DENSE = {"m": [2.0, 3.0], "n": [1.0, 2.0]}
"""Losses of two slices under two models; every other loss is this plus a gap."""


def spent(sparsity: float, bytes_share: float, dense: float = 0.0, remasks: int = 0) -> Any:
    return {
        "decoded_tokens": 10,
        "achieved_sparsity": sparsity,
        "sparsity_while_pruned": sparsity / (1 - dense),
        "dense_token_share": dense,
        "remasks": remasks,
        "ffn_flops_share_if_compact": 1 - sparsity,
        "ffn_bytes_share_if_compact": bytes_share,
        "extra_memory_bytes": 7,
        "remask_steps": [],
    }


def lines(model: str, variant: str, sparsity: float, gaps: list[float], *parts: Any) -> list[Any]:
    accounting = list(parts) * (3 - len(parts)) if parts else [None, None]
    return [
        {
            "model": model,
            "cell": "continuation",
            "variant": variant,
            "sparsity": sparsity,
            "slice": f"{source}/0",
            "source": source,
            "loss": DENSE[model][place] + gap,
            "tokens": 5,
            "accounting": accounting[place],
        }
        for place, (source, gap) in enumerate(zip(("wiki", "news"), gaps, strict=True))
    ]


def measured(model: str = "m", factor: float = 1.0) -> list[Any]:
    """dart achieves 0.45 of 0.5 and 0.7 of 0.7; GRIFFIN's gaps are 1.0, 0.8 and 2.0, 1.5."""
    return [
        *lines(model, "dense", 0.0, [0.0, 0.0]),
        *lines(model, "griffin", 0.5, [1.2, 1.0], spent(0.5, 0.51)),
        *lines(model, "griffin", 0.7, [2.4, 1.6], spent(0.7, 0.31)),
        *lines(model, "dart", 0.5, [0.5 * factor, 0.3 * factor],
               spent(0.5, 0.52), spent(0.4, 0.62, 0.2, 1)),
        *lines(model, "dart", 0.7, [2.0 * factor, 1.0 * factor], spent(0.7, 0.33)),
        *lines(model, "griffin", 0.45, [1.1, 0.9], spent(0.45, 0.56)),
        *lines(model, "griffin", 0.43, [0.9, 0.7], spent(0.43, 0.58)),
        *lines(model, "griffin", 0.67, [1.8, 1.2], spent(0.67, 0.34)),
    ]  # fmt: skip


LABELS = ["griffin", "dart"]


def test_gap_closed_by_hand() -> None:
    rows = cell_rows(Lines(measured()), LABELS, [0.5, 0.7], 0)
    assert [(row["sparsity"], row["variant"]) for row in rows] == [
        *((0.5, label) for label in LABELS),
        *((0.7, label) for label in LABELS),
    ]
    griffin, dart, _, deep = rows
    assert griffin["equal_sparsity"] is None and griffin["equal_bytes"] is None
    assert griffin["gap"] == pytest.approx(1.1)
    assert dart["gap"] == pytest.approx(0.4)
    assert dart["dense_perplexity"] == pytest.approx(math.exp(2.5))
    assert dart["perplexity"] == pytest.approx(math.exp(2.9))
    assert dart["times_dense"] == pytest.approx(math.exp(0.4))
    assert dart["achieved_sparsity"] == pytest.approx(0.45)
    assert dart["dense_token_share"] == pytest.approx(0.1)
    assert dart["sparsity_while_pruned"] == pytest.approx(0.5)
    assert (dart["remasks"], dart["remasks_per_slice"], dart["slices"]) == (1, 0.5, 2)
    assert (dart["kinds"], dart["tokens"]) == (["wiki", "news"], 10)
    equal, other = dart["equal_sparsity"], dart["equal_bytes"]
    assert (equal["sparsity"], other["sparsity"]) == (0.45, 0.43)
    assert equal["griffin_gap"] == pytest.approx(1.0)
    assert equal["perplexity"] == pytest.approx(math.exp(3.5))
    assert equal["gap_closed"] == pytest.approx(1 - 0.4 / 1.0)
    assert other["gap_closed"] == pytest.approx(1 - 0.4 / 0.8)
    assert equal["by_kind"] == pytest.approx({"wiki": 1 - 0.5 / 1.1, "news": 1 - 0.3 / 0.9})
    assert deep["equal_sparsity"]["gap_closed"] == pytest.approx(1 - 1.5 / 2.0)
    assert deep["equal_bytes"]["gap_closed"] == pytest.approx(0.0)


def test_pooled_sums_gaps_and_never_averages_ratios() -> None:
    both = [*measured(), *measured("n", factor=2.0)]
    rows = pooled_rows(Lines(both), LABELS, [0.5, 0.7], 0)
    assert [(row["model"], row["variant"], row["slices"]) for row in rows] == [
        ("m", "dart", 2),
        ("n", "dart", 2),
        (ALL, "dart", 4),
    ]
    own, other, every = (row["equal_sparsity"] for row in rows)
    assert own["gap"] == pytest.approx(1.9) and own["griffin_gap"] == pytest.approx(3.0)
    assert own["gap_closed"] == pytest.approx(1 - 1.9 / 3.0)
    assert other["gap_closed"] == pytest.approx(1 - 3.8 / 3.0)
    assert every["gap_closed"] == pytest.approx(1 - 5.7 / 6.0)
    assert rows[0]["equal_bytes"]["gap_closed"] == pytest.approx(1 - 1.9 / 2.3)
    assert pooled_rows(Lines(both), LABELS, [0.7], 0)[0]["equal_sparsity"][
        "gap_closed"
    ] == pytest.approx(0.25)
    assert pooled_rows(Lines(both), LABELS, [], 0) == []
    assert pooled_rows(Lines(both), LABELS, [0.3, 0.5], 0) == []  # 0.3 was not measured


def test_without_a_gap_of_griffins_there_is_no_ratio() -> None:
    found = [
        line for line in measured() if (line["variant"], line["sparsity"]) != ("griffin", 0.45)
    ]
    found += lines("m", "griffin", 0.45, [0.3, -0.3], spent(0.45, 0.56))
    rows = cell_rows(Lines(found), LABELS, [0.5], 0)
    equal = rows[1]["equal_sparsity"]
    assert (equal["gap_closed"], equal["interval"]) == (None, None)
    assert equal["gap"] == pytest.approx(0.4)
    assert quality_table.closed(equal) == "n/a"
    asked = {**HEAD, "sparsities": [0.5], "pool": [0.5]}
    told = quality_table.sentences(summarise(found, asked))
    assert told[0].endswith("GRIFFIN at equal sparsity loses nothing, so dart has no gap to close")


def test_more_bytes_than_dense_compare_with_dense() -> None:
    found = measured()
    found = [one for one in found if (one["variant"], one["sparsity"]) != ("dart", 0.5)]
    found += lines("m", "dart", 0.5, [0.5, 0.3], spent(0.45, 1.2))
    equal = cell_rows(Lines(found), LABELS, [0.5], 0)[1]["equal_bytes"]
    assert (equal["sparsity"], equal["griffin_gap"], equal["gap_closed"]) == (0.0, 0.0, None)


@pytest.mark.parametrize(
    ("value", "wanted"), [(0.4504, 0.45), (0.4506, 0.451), (-0.2, 0.0), (0.9999, 0.999)]
)
def test_the_sparsities_of_griffin(value: float, wanted: float) -> None:
    assert matched_sparsity(value) == wanted


def test_shares_are_weighted_by_decoded_tokens() -> None:
    long = {**spent(0.8, 0.2), "decoded_tokens": 30}
    found = account(lines("m", "dart", 0.5, [0, 0], spent(0.4, 0.6, 0.2), long))
    assert found.achieved_sparsity == pytest.approx((0.4 * 10 + 0.8 * 30) / 40)
    assert found.ffn_bytes_share == pytest.approx((0.6 * 10 + 0.2 * 30) / 40)
    assert found.dense_token_share == pytest.approx(0.05)


# intervals


def test_an_interval_is_that_of_the_resampled_ratio() -> None:
    draw = np.random.default_rng(1)
    b = draw.normal(1.0, 0.2, 48)
    a = 0.7 * b + draw.normal(0, 0.1, 48)
    found = stats.gap_closed_interval([(a, b)], seed=3)
    assert found is not None and found.estimate == pytest.approx(1 - a.sum() / b.sum())
    ids = draw.integers(0, 48, (20_000, 48))
    plain = np.quantile(1 - a[ids].sum(1) / b[ids].sum(1), [0.025, 0.975])
    assert [found.low, found.high] == pytest.approx(plain, abs=0.006)
    assert found == stats.gap_closed_interval([(a, b)], seed=3)
    unpaired = stats.gap_closed_interval([(a, b[::-1].copy())], seed=3)
    assert unpaired is not None  # the pairing is what makes the interval narrow
    assert unpaired.high - unpaired.low > 1.3 * (found.high - found.low)


def test_groups_are_drawn_for_themselves_and_their_means_added() -> None:
    draw = np.random.default_rng(2)
    groups = [(draw.normal(0.5, 0.1, n), draw.normal(1.0, 0.1, n)) for n in (40, 20)]
    found = stats.gap_closed_interval(groups)
    (a, b), (c, d) = groups
    want = 1 - (a.mean() + c.mean()) / (b.mean() + d.mean())
    assert found is not None and found.estimate == pytest.approx(want)
    one, two = (draw.integers(0, n, (20_000, n)) for n in (40, 20))
    ratios = 1 - (a[one].mean(1) + c[two].mean(1)) / (b[one].mean(1) + d[two].mean(1))
    assert [found.low, found.high] == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.01)


def test_where_there_is_no_interval() -> None:
    a, b = np.array([0.5, 0.2, 0.4]), np.array([1.0, -0.9, 0.4])
    assert stats.gap_closed([(a, b)]) == pytest.approx(1 - 1.1 / 0.5)
    assert stats.gap_closed_interval([(a, b)]) is None  # GRIFFIN loses nothing in too many draws
    assert (
        stats.gap_closed([(a, -np.abs(b))]) is stats.gap_closed_interval([(a, -np.abs(b))]) is None
    )
    assert stats.gap_closed_interval([(a[:1], b[:1])]) is None
    same = stats.gap_closed_interval([(a, a)])
    assert same is not None and (same.low, same.high) == (0.0, 0.0)


# tables


HEAD: dict[str, Any] = {
    "set": "report",
    "seed": 0,
    "prompt_tokens": 8,
    "tokens": 5,
    "lead_tokens": 64,
    "sparsities": [0.5, 0.7],
    "pool": [0.5, 0.7],
    "texts": [],
    "variants": {"griffin": {}, "dart": {}},
    "slices": {"m": 2},
    "checkpoints": {"m": {"name": "M", "dtype": "float32", "file_quantisation": "Q4_1"}},
}


def test_tables_show_the_rows(tmp_path: Path) -> None:
    found = summarise(measured(), HEAD)
    quality_table.csv_table(found).write_csv(tmp_path)
    text = quality_table.markdown(found)
    assert "m (file quantisation Q4_1, float32), continuation: 2 slices of wiki, news" in text
    row = next(line for line in text.splitlines() if line.startswith("| dart | 50 %"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    named = dict(zip(quality_table.HEADS, cells, strict=True))
    assert named["achieved"] == "45 %" and named["dense tokens"] == "10 %"
    assert named["re-masks per slice"] == "0.5" and named["FFN bytes"] == "0.570"
    assert named["GRIFFIN at equal sparsity"] == "33.1 (45 %)"
    assert named["gap closed"].startswith("60 %")
    assert "| dart | pooled 50 + 70 % |" in text
    with (tmp_path / "quality.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 5  # four cells and a pooled row
    assert float(table[1]["equal_sparsity.gap_closed"]) == pytest.approx(0.6)
    assert table[0]["equal_sparsity.gap_closed"] == ""
    assert table[4]["sparsities"] == "0.5;0.7"
    told = quality_table.sentences(found)
    assert len(told) == 3
    assert told[0].startswith("m, continuation, 50 %: dart - GRIFFIN = 60 % of the gap")
    assert told[2].startswith("m, continuation, pooled over 50 + 70 %: dart - GRIFFIN = 36.7 %")


def test_runs_on_different_models_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    joined = importlib.import_module("keep").joined
    other = {**HEAD, "slices": {"n": 2}, "checkpoints": {"n": {"dtype": "float32"}}}
    both = [*measured(), *measured("n")]
    documents = [summarise(measured(), HEAD), summarise(measured("n"), other)]
    found = summarise(both, joined(documents))
    assert found["slices"] == {"m": 2, "n": 2} and list(found["checkpoints"]) == ["m", "n"]
    assert found["pooled"][-1]["model"] == ALL
    assert found["cells"][:4] == documents[0]["cells"]
    with pytest.raises(SystemExit, match="the runs differ in tokens"):
        joined([documents[0], {**documents[1], "tokens": 9}])
    with pytest.raises(SystemExit, match="the runs share a model"):
        joined([documents[0], documents[0]])
