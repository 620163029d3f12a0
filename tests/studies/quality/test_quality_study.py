"""``dart-llm bench quality``: settings, variants, files, the command; its gaps by hand."""

import math
from itertools import cycle

import numpy as np
import pytest

from dart_llm.errors import ConfigError
from dart_llm.experiments import stats
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting import figures
from dart_llm.settings import merge
from dart_llm.studies.quality.gaps import closed, headlines, make_rows, matched_sparsities, tables
from dart_llm.studies.quality.settings import QualitySettings
from quality_cases import job
from written import lines, read


def test_griffin_is_measured_where_each_method_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda folder, wanted, style: [])
    study = job(tmp_path)
    document, rows = read(study.path / "quality.json"), lines(study.path / "results.jsonl")
    names = [item["id"] for item in rows[0]["measurement"]["items"]]
    assert names == ["bees/0", "bees/1", "loans/0", "loans/1"]
    mean = {}  # losses by task and label
    for row in rows:
        losses = [item["mean_loss"] for item in row["measurement"]["items"]]
        mean[row["cell"]["task"].partition(":")[0], row["label"]] = sum(losses) / len(losses)
    wanted = {"dense", *(f"{name}@{s}" for name in ("griffin", "dart") for s in (0.5, 0.7))}
    assert wanted <= {label for kind, label in mean if kind == "continuation"}
    oracles = {kind for kind, label in mean if label == "dart (oracle)@0.5"}
    assert oracles == {"shift"}
    for row in document["rows"]:
        if len(row["sparsities"]) > 1:
            continue
        dense, (sparsity,) = mean[row["task"], "dense"], row["sparsities"]
        loss = mean[row["task"], f"{row['variant']}@{sparsity:g}"]
        assert row["gap"] == pytest.approx(loss - dense)
        wanted = {"equal_sparsity": row["achieved_sparsity"]}
        # low-rank maps weigh more than the FFN of this tiny model: then dense is as cheap
        wanted["equal_bytes"] = max(0.0, 1 - row["ffn_bytes_share"])
        for name, sparsity in wanted.items() if row["variant"] != "griffin" else ():
            (at,) = row[f"{name}_sparsities"]
            assert at == round(sparsity, 3)
            griffin = mean[row["task"], f"griffin@{at:g}" if at else "dense"] - dense
            assert row[f"{name}_griffin_gap"] == pytest.approx(griffin)
    assert [plot.name for plot in study.figures()] == ["quality"]
    assert "equal_sparsity_gap_closed" in (study.path / "quality-shift.csv").read_text("utf-8")


def asked(flags):
    return merge(QualitySettings, flags, environment={})


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"tasks": "continuaton"}, "unknown task 'continuaton'; did you mean continuation"),
        ({"tasks": " , "}, "--tasks is empty: give at least one"),
        ({"set": "test"}, "unknown set 'test'; known: choose, report"),
        ({"sparsities": "0.5,1"}, "1 must be between 0 and 1: the fraction to remove"),
        ({"methods": "dense"}, "method dense removes no neurons"),
        ({"oracle": "grifin"}, "unknown variant for --oracle 'grifin'"),
        ({"variants": "nowhere.yaml"}, "cannot read the settings file nowhere.yaml"),
    ],
)
def test_bad_settings_are_one_sentence(given, error):
    with pytest.raises(ConfigError, match=error):
        asked(given)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("- a\n- b\n", "must contain a mapping of names to values"),
        ("a: 3\n", 'the variant "a" of .* must be a mapping of settings: write a'),
        ("a: {sparsity: 0.5}\n", "sets sparsity, which only --sparsities may set: remove it"),
        ("a: {compensaton: true}\n", 'variant "a" of .*: unknown setting "compensaton"'),
        ("a: {budget: {table: '0:0.5'}}\n", 'the variant "a" cannot be used: the layer table'),
        ("dense: {}\n", 'the label "dense" is already used'),
        ("x (oracle): {}\n", 'the label "x \\(oracle\\)" is empty or ends with'),
        ("{}\n", "is empty: write LABEL"),
    ],
)
def test_a_broken_variants_file_is_one_sentence(tmp_path, text, error):
    file = tmp_path / "v.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=error) as raised:
        asked({"variants": str(file)})
    assert "\n" not in str(raised.value)


def test_variants_change_their_presets(tmp_path):
    file = tmp_path / "v.yaml"
    text = "uniform: {budget: uniform}\nbare:\ng+c: {method: griffin, compensation: true}\n"
    file.write_text(text, encoding="utf-8")
    variants = asked({"methods": "dart", "variants": str(file), "seed": 5}).variant_list()
    labels = ["griffin", "dart", "uniform", "bare", "g+c"]
    oracles = [f"{name} (oracle)" for name in ("dart", "uniform", "bare")]
    assert [variant.label for variant in variants] == [*labels, *oracles]
    dart, configs = PruneConfig.build("dart", seed=5), {v.label: v.config for v in variants}
    assert configs["dart"] == configs["bare"] == dart
    assert configs["uniform"] == dart.replace({"budget": "uniform"})
    assert configs["g+c"] == PruneConfig.build("griffin", seed=5, compensation=True)
    assert configs["dart (oracle)"] == dart.replace({"drift": {"rule": "never"}})
    assert variants[1].at(0.3).sparsity == 0.3


def test_what_runs_by_default():
    usual = asked({})
    assert (usual.sparsities, usual.pooled) == ((0.3, 0.5, 0.7), (0.5, 0.7))
    assert asked({"text": ["a,b", "c"]}).text == ["a", "b", "c"]
    assert usual.experiment == "quality-report-smollm2-135m"
    assert [variant.label for variant in usual.variant_list()] == ["griffin", "dart-token"]
    alone = asked({"methods": "dart", "oracle": "none"}).variant_list()
    assert [variant.label for variant in alone] == ["griffin", "dart"]


DENSE = [2.0, 3.0]
"""Losses of two slices; every other loss is this plus a gap."""


def spent(sparsity, bytes_share, dense=0.0, remasks=0):
    accounting = {"achieved_sparsity": sparsity, "dense_token_share": dense, "remasks": remasks}
    return {**accounting, "ffn_bytes_share_if_compact": bytes_share, "token_bytes_share": 0.5}


def line(label, gaps, accounting=None):
    """The document of a cell: slices in turn of two texts, ``gaps`` above the dense losses."""
    slices = zip(cycle(("wiki", "news")), cycle(DENSE), gaps, strict=False)
    items = [
        {"id": f"{source}/{n}", "source": source, "tokens": 5, "mean_loss": loss + gap}
        for n, (source, loss, gap) in enumerate(slices)
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
    assert {key: dart[key] for key in wanted} == pytest.approx(wanted, abs=1e-3)
    assert (dart["equal_sparsity_sparsities"], dart["equal_bytes_sparsities"]) == ([0.45], [0.43])
    assert deep["equal_sparsity_gap_closed"] == pytest.approx(1 - 1.5 / 2.0)
    assert deep["equal_bytes_gap_closed"] == pytest.approx(0.0)
    # pooled: gaps are summed, ratios never averaged
    wanted = {"equal_sparsity_gap": 1.9, "equal_sparsity_griffin_gap": 3.0}
    wanted |= {"equal_sparsity_gap_closed": 1 - 1.9 / 3.0, "equal_bytes_gap_closed": 1 - 1.9 / 2.3}
    assert {key: pooled[key] for key in wanted} == pytest.approx(wanted, abs=1e-3)
    assert pooled["sparsities"] == [0.5, 0.7]
    assert len(rows_of(measured(), pool=(0.3, 0.5))) == 4  # 0.3 was not measured
    (table,) = tables(rows, "how")
    cells = table.cells()
    assert len(cells) == 5 and cells[4][1] == "50 % + 70 %"
    assert cells[1][8] == "60 % too few (n = 2)" == closed(dart, "equal_sparsity")
    (headline,) = headlines(rows)
    assert headline.startswith("continuation, 50 % + 70 %: dart closes 36.7 % too few (n = 2) of")


def test_a_row_has_the_interval_of_its_own_gaps():
    gaps, griffin = np.linspace(0.2, 0.6, 8), np.linspace(0.9, 1.3, 8) ** 2
    lines = {"dense": ([0.0] * 8,), "griffin@0.5": (griffin, spent(0.5, 0.5))}
    lines |= {"dart@0.5": (gaps, spent(0.5, 0.5))}
    row = rows_of([line(label, *values) for label, values in lines.items()], [0.5], [])[1]
    wanted = stats.gap_closed_interval(gaps, griffin, 0).ends
    assert (row["equal_bytes_low"], row["equal_bytes_high"]) == pytest.approx(wanted, abs=1e-3)


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
    interval = stats.gap_closed_interval(a, b, seed=3)
    assert interval.estimate == stats.gap_closed(a, b)
    plain = np.quantile(1 - a[ids].mean(1) / b[ids].mean(1), [0.025, 0.975])
    assert list(interval.ends) == pytest.approx(list(plain), abs=0.01)
    assert interval == stats.gap_closed_interval(a, b, seed=3)
    unpaired = stats.gap_closed_interval(a, b[::-1].copy(), 3)  # pairing makes it narrow
    width, wide = (each.ends[1] - each.ends[0] for each in (interval, unpaired))
    assert wide > 1.3 * width


def test_where_there_is_no_interval():
    a, b = np.array([0.5, 0.2, 0.4] * 2), np.array([1.0, -0.9, 0.4] * 2)
    assert stats.gap_closed(a, b) == pytest.approx(1 - 1.1 / 0.5)
    assert stats.gap_closed(a, -np.abs(b)) is None
    # GRIFFIN loses nothing in too many draws; or in all; or there are too few items
    for pair in ((a, b), (a, -np.abs(b)), (a[:5], np.abs(b[:5]))):
        assert stats.gap_closed_interval(*pair) is None
    same = stats.gap_closed_interval(a, a)
    assert tuple(same.ends) == (0.0, 0.0)
