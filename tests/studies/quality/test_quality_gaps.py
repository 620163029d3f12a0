"""Gap closed and pooled rows of ``bench quality``, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from dart_llm.experiments import stats
from dart_llm.studies.quality.gaps import closed, headlines, make_rows, matched_sparsities, tables

DENSE = [2.0, 3.0]
"""Losses of two slices; every other loss is this plus a gap."""


def spent(sparsity, bytes_share, dense=0.0, remasks=0):
    accounting = {"achieved_sparsity": sparsity, "dense_token_share": dense, "remasks": remasks}
    return {**accounting, "ffn_bytes_share_if_compact": bytes_share, "token_bytes_share": 0.5}


def line(label, gaps, accounting=None):
    """The document of a cell: two slices, ``gaps`` above the dense losses."""
    items = [
        {"id": f"{source}/0", "source": source, "tokens": 5, "mean_loss": loss + gap}
        for source, loss, gap in zip(("wiki", "news"), DENSE, gaps, strict=True)
    ]
    measurement = {"items": items, "accounting": accounting}
    return {"label": label, "cell": {"task": "continuation:x#report"}, "measurement": measurement}


def measured(**changed):
    """dart achieves 0.45 of 0.5 and 0.7 of 0.7; GRIFFIN's gaps are 1.0, 0.8 and 2.0, 1.5."""
    lines = {
        "dense": ([0.0, 0.0],),
        "griffin@0.5": ([1.2, 1.0], spent(0.5, 0.51)),
        "griffin@0.7": ([2.4, 1.6], spent(0.7, 0.31)),
        "dart@0.5": ([0.5, 0.3], spent(0.45, 0.57, 0.1, 1)),
        "dart@0.7": ([2.0, 1.0], spent(0.7, 0.33)),
        "griffin@0.45": ([1.1, 0.9], spent(0.45, 0.56)),
        "griffin@0.43": ([0.9, 0.7], spent(0.43, 0.58)),
        "griffin@0.67": ([1.8, 1.2], spent(0.67, 0.34)),
    }
    return [line(label, *values) for label, values in {**lines, **changed}.items()]


def rows_of(lines, sparsities=(0.5, 0.7), pool=(0.5, 0.7)):
    return make_rows(lines, ["griffin", "dart"], sparsities, pool, 0)


def test_gap_closed_by_hand():
    rows = rows_of(measured())
    griffin, dart, _, deep, pooled = rows
    assert [row["variant"] for row in rows] == ["griffin", "dart", "griffin", "dart", "dart"]
    assert griffin["gap"] == pytest.approx(1.1) and closed(griffin, "equal_bytes") is None
    wanted = {"gap": 0.4, "dense_perplexity": math.exp(2.5), "perplexity": math.exp(2.9)}
    wanted |= {"times_dense": math.exp(0.4), "achieved_sparsity": 0.45, "dense_token_share": 0.1}
    wanted |= {"remasks_per_slice": 0.5, "slices": 2, "ffn_bytes_share": 0.57}
    wanted |= {"equal_sparsity_griffin_gap": 1.0, "equal_sparsity_gap_closed": 1 - 0.4 / 1.0}
    wanted |= {"equal_bytes_griffin_gap": 0.8, "equal_bytes_gap_closed": 1 - 0.4 / 0.8}
    assert {key: dart[key] for key in wanted} == pytest.approx(wanted)
    assert (dart["equal_sparsity_sparsities"], dart["equal_bytes_sparsities"]) == ([0.45], [0.43])
    assert deep["equal_sparsity_gap_closed"] == pytest.approx(1 - 1.5 / 2.0)
    assert deep["equal_bytes_gap_closed"] == pytest.approx(0.0)
    # pooled: gaps are summed, ratios never averaged
    wanted = {"equal_sparsity_gap": 1.9, "equal_sparsity_griffin_gap": 3.0}
    wanted |= {"equal_sparsity_gap_closed": 1 - 1.9 / 3.0, "equal_bytes_gap_closed": 1 - 1.9 / 2.3}
    assert {key: pooled[key] for key in wanted} == pytest.approx(wanted)
    assert pooled["sparsities"] == [0.5, 0.7]
    assert len(rows_of(measured(), pool=(0.3, 0.5))) == 4  # 0.3 was not measured
    (table,) = tables(rows, "how")
    cells = table.cells()
    assert len(cells) == 5 and cells[4][1] == "50 % + 70 %"
    assert cells[1][8] == "60 % too few (n = 2)" == closed(dart, "equal_sparsity")
    (headline,) = headlines(rows)
    assert headline.startswith("continuation, 50 % + 70 %: dart closes 36.7 % too few (n = 2) of")


def test_where_there_is_no_gap_to_close():
    changed = {"griffin@0.45": ([0.3, -0.3], spent(0.45, 0.56))}
    row = rows_of(measured(**changed), [0.5], [])[1]
    assert (row["equal_sparsity_gap_closed"], row["equal_sparsity_low"]) == (None, None)
    assert closed(row, "equal_sparsity") == "n/a"
    # more bytes than dense compare with dense
    changed = {"dart@0.5": ([0.5, 0.3], spent(0.45, 1.2))}
    row = rows_of(measured(**changed), [0.5], [])[1]
    numbers = [row[f"equal_bytes_{key}"] for key in ("sparsities", "griffin_gap", "gap_closed")]
    assert numbers == [[0.0], 0.0, None]
    for achieved, sparsity in ((0.4504, 0.45), (0.4506, 0.451), (-0.2, 0.0), (0.9999, 0.999)):
        matched = matched_sparsities(line("dart@0.5", [0, 0], spent(achieved, 1.0)))
        assert matched["equal_sparsity"] == sparsity


def test_an_interval_is_that_of_the_resampled_ratio():
    draw = np.random.default_rng(1)
    b = draw.normal(1.0, 0.2, 48)
    a = 0.7 * b + draw.normal(0, 0.1, 48)
    ids = draw.integers(0, 48, (20_000, 48))
    interval = stats.gap_closed_interval([(a, b)], seed=3)
    assert interval is not None and interval.estimate == stats.gap_closed([(a, b)])
    plain = np.quantile(1 - a[ids].mean(1) / b[ids].mean(1), [0.025, 0.975])
    assert list(interval.ends) == pytest.approx(list(plain), abs=0.01)
    assert interval == stats.gap_closed_interval([(a, b)], seed=3)
    unpaired = stats.gap_closed_interval([(a, b[::-1].copy())], 3)
    assert unpaired is not None  # the pairing makes the interval narrow
    width, wide = (each.ends[1] - each.ends[0] for each in (interval, unpaired))
    assert wide > 1.3 * width


def test_where_there_is_no_interval():
    a, b = np.array([0.5, 0.2, 0.4] * 2), np.array([1.0, -0.9, 0.4] * 2)
    assert stats.gap_closed([(a, b)]) == pytest.approx(1 - 1.1 / 0.5)
    assert stats.gap_closed([(a, -np.abs(b))]) is None
    # GRIFFIN loses nothing in too many draws; or in all; or there are too few items
    for pair in ((a, b), (a, -np.abs(b)), (a[:5], np.abs(b[:5]))):
        assert stats.gap_closed_interval([pair]) is None
    same = stats.gap_closed_interval([(a, a)])
    assert same is not None and tuple(same.ends) == (0.0, 0.0)
