"""Gap closed and pooled rows of ``bench quality``, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from dart_llm.experiments import stats
from dart_llm.studies.quality import report
from dart_llm.studies.quality.gaps import (
    ALL,
    account,
    cell_rows,
    groups,
    matched_sparsity,
    pooled_rows,
    summarise,
)

DENSE = {"m": [2.0, 3.0], "n": [1.0, 2.0]}
"""Losses of two slices under two models; every other loss is this plus a gap."""


def spent(sparsity, bytes_share, dense=0.0, remasks=0):
    found = {"achieved_sparsity": sparsity, "dense_token_share": dense, "remasks": remasks}
    found |= {"extra_memory_bytes": 7}
    return {**found, "ffn_bytes_share_if_compact": bytes_share, "decoded_tokens": 10}


def line(model, variant, sparsity, gaps, accounting=None):
    """The document of a cell: two slices under one model, ``gaps`` above the dense losses."""
    items = [
        {"id": f"{source}/0", "source": source, "tokens": 5, "mean_loss": loss + gap}
        for source, loss, gap in zip(("wiki", "news"), DENSE[model], gaps, strict=True)
    ]
    label = variant if variant == "dense" else f"{variant}@{sparsity:g}"
    cell = {"model": model, "task": "continuation:x#report"}
    cell["options"] = {"prompt_tokens": 8, "scored_tokens": 5}
    measurement = {"items": items, "accounting": accounting}
    return {"label": label, "cell": cell, "facts": {}, "measurement": measurement}


def measured(model="m", factor=1.0):
    """dart achieves 0.45 of 0.5 and 0.7 of 0.7; GRIFFIN's gaps are 1.0, 0.8 and 2.0, 1.5."""
    return [
        line(model, "dense", 0.0, [0.0, 0.0]),
        line(model, "griffin", 0.5, [1.2, 1.0], spent(0.5, 0.51)),
        line(model, "griffin", 0.7, [2.4, 1.6], spent(0.7, 0.31)),
        line(model, "dart", 0.5, [0.5 * factor, 0.3 * factor], spent(0.45, 0.57, 0.1, 1)),
        line(model, "dart", 0.7, [2.0 * factor, 1.0 * factor], spent(0.7, 0.33)),
        line(model, "griffin", 0.45, [1.1, 0.9], spent(0.45, 0.56)),
        line(model, "griffin", 0.43, [0.9, 0.7], spent(0.43, 0.58)),
        line(model, "griffin", 0.67, [1.8, 1.2], spent(0.67, 0.34)),
    ]


LABELS = ["griffin", "dart"]


def test_gap_closed_by_hand():
    rows = cell_rows(groups(measured()), LABELS, [0.5, 0.7], 0)
    assert [(row["sparsity"], row["variant"]) for row in rows] == [
        (sparsity, label) for sparsity in (0.5, 0.7) for label in LABELS
    ]
    griffin, dart, _, deep = rows
    assert griffin["equal_sparsity"] is None and griffin["equal_bytes"] is None
    assert griffin["gap"] == pytest.approx(1.1)
    wanted = {"gap": 0.4, "dense_perplexity": math.exp(2.5), "perplexity": math.exp(2.9)}
    wanted |= {"times_dense": math.exp(0.4), "achieved_sparsity": 0.45, "dense_token_share": 0.1}
    wanted |= {"sparsity_while_pruned": 0.5, "remasks": 1, "remasks_per_slice": 0.5}
    wanted |= {"slices": 2, "tokens": 10}
    assert {key: dart[key] for key in wanted} == pytest.approx(wanted)
    assert dart["kinds"] == ["wiki", "news"]
    equal, other = dart["equal_sparsity"], dart["equal_bytes"]
    assert (equal["sparsity"], other["sparsity"]) == (0.45, 0.43)
    assert equal["griffin_gap"] == pytest.approx(1.0)
    assert equal["perplexity"] == pytest.approx(math.exp(3.5))
    assert equal["gap_closed"] == pytest.approx(1 - 0.4 / 1.0)
    assert other["gap_closed"] == pytest.approx(1 - 0.4 / 0.8)
    assert equal["by_kind"] == pytest.approx({"wiki": 1 - 0.5 / 1.1, "news": 1 - 0.3 / 0.9})
    assert deep["equal_sparsity"]["gap_closed"] == pytest.approx(1 - 1.5 / 2.0)
    assert deep["equal_bytes"]["gap_closed"] == pytest.approx(0.0)


def test_pooled_sums_gaps_and_never_averages_ratios():
    both = groups([*measured(), *measured("n", factor=2.0)])
    rows = pooled_rows(both, LABELS, [0.5, 0.7], 0)
    found = [(row["model"], row["variant"], row["slices"]) for row in rows]
    assert found == [("m", "dart", 2), ("n", "dart", 2), (ALL, "dart", 4)]
    own, other, every = (row["equal_sparsity"] for row in rows)
    assert own["gap"] == pytest.approx(1.9) and own["griffin_gap"] == pytest.approx(3.0)
    assert own["gap_closed"] == pytest.approx(1 - 1.9 / 3.0)
    assert other["gap_closed"] == pytest.approx(1 - 3.8 / 3.0)
    assert every["gap_closed"] == pytest.approx(1 - 5.7 / 6.0)
    assert rows[0]["equal_bytes"]["gap_closed"] == pytest.approx(1 - 1.9 / 2.3)
    (deep, *_) = pooled_rows(both, LABELS, [0.7], 0)
    assert deep["equal_sparsity"]["gap_closed"] == pytest.approx(0.25)
    assert pooled_rows(both, LABELS, [], 0) == []
    assert pooled_rows(both, LABELS, [0.3, 0.5], 0) == []  # 0.3 was not measured


def test_where_there_is_no_gap_to_close():
    found = [one for one in measured() if one["label"] != "griffin@0.45"]
    found.append(line("m", "griffin", 0.45, [0.3, -0.3], spent(0.45, 0.56)))
    equal = cell_rows(groups(found), LABELS, [0.5], 0)[1]["equal_sparsity"]
    assert (equal["gap_closed"], equal["interval"]) == (None, None)
    assert equal["gap"] == pytest.approx(0.4) and report.closed(equal) == "n/a"
    (told,) = report.sentences(summarise(found, {**HEAD, "sparsities": [0.5], "pool": [0.5]}))
    assert "dart closes n/a of GRIFFIN's gap at equal sparsity" in told
    # more bytes than dense compare with dense
    found = [one for one in measured() if one["label"] != "dart@0.5"]
    found.append(line("m", "dart", 0.5, [0.5, 0.3], spent(0.45, 1.2)))
    equal = cell_rows(groups(found), LABELS, [0.5], 0)[1]["equal_bytes"]
    assert (equal["sparsity"], equal["griffin_gap"], equal["gap_closed"]) == (0.0, 0.0, None)


def test_sparsities_of_griffin_and_what_dense_models_cost():
    wanted = {0.4504: 0.45, 0.4506: 0.451, -0.2: 0.0, 0.9999: 0.999}
    assert {value: matched_sparsity(value) for value in wanted} == wanted
    dense = account(line("m", "dense", 0.0, [0, 0]))
    assert (dense["dense_token_share"], dense["ffn_bytes_share"]) == (1.0, 1.0)
    assert dense["sparsity_while_pruned"] == 0.0 and dense["token_bytes_share"] is None


def test_an_interval_is_that_of_the_resampled_ratio():
    """Items of a group are drawn together, groups for themselves; their means are added."""
    draw = np.random.default_rng(1)
    b = draw.normal(1.0, 0.2, 48)
    a = 0.7 * b + draw.normal(0, 0.1, 48)
    c, d = draw.normal(0.5, 0.1, 20), draw.normal(1.0, 0.1, 20)
    one, two = (draw.integers(0, n, (20_000, n)) for n in (48, 20))
    for own, drawn in (
        ([(a, b)], 1 - a[one].mean(1) / b[one].mean(1)),
        (
            [(a, b), (c, d)],
            1 - (a[one].mean(1) + c[two].mean(1)) / (b[one].mean(1) + d[two].mean(1)),
        ),
    ):
        found = stats.gap_closed_interval(own, seed=3)
        assert found is not None and found.estimate == stats.gap_closed(own)
        plain = np.quantile(drawn, [0.025, 0.975])
        assert [found.ends[0], found.ends[1]] == pytest.approx(plain, abs=0.01)
        assert found == stats.gap_closed_interval(own, seed=3)
    paired, unpaired = (stats.gap_closed_interval([(a, x)], 3) for x in (b, b[::-1].copy()))
    assert paired is not None and unpaired is not None  # the pairing makes the interval narrow
    assert unpaired.ends[1] - unpaired.ends[0] > 1.3 * (paired.ends[1] - paired.ends[0])


def test_where_there_is_no_interval():
    a, b = np.array([0.5, 0.2, 0.4] * 2), np.array([1.0, -0.9, 0.4] * 2)
    assert stats.gap_closed([(a, b)]) == pytest.approx(1 - 1.1 / 0.5)
    assert stats.gap_closed([(a, -np.abs(b))]) is None
    # GRIFFIN loses nothing in too many draws; or in all; or there are too few items
    for own in ((a, b), (a, -np.abs(b)), (a[:5], np.abs(b[:5]))):
        assert stats.gap_closed_interval([own]) is None
    same = stats.gap_closed_interval([(a, a)])
    assert same is not None and (same.ends[0], same.ends[1]) == (0.0, 0.0)


HEAD = {"set": "report", "seed": 0, "prompt_tokens": 8, "tokens": 5, "lead_tokens": 64}
HEAD |= {"sparsities": [0.5, 0.7], "pool": [0.5, 0.7], "texts": [], "slices": {"m": 2}}
HEAD |= {"variants": {"griffin": {}, "dart": {}}}
HEAD["checkpoints"] = {"m": {"name": "M", "dtype": "float32", "file_quantisation": "Q4_1"}}


def test_tables_show_the_rows(snapshot):
    found = summarise(measured(), HEAD)
    assert report.markdown(found) == snapshot
    assert report.sentences(found) == snapshot
