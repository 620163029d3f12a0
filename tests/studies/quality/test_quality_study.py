"""``dart-llm bench quality``: settings, variants, files, resuming, the command."""

from pathlib import Path

import pytest

from dart_llm.errors import ConfigError
from dart_llm.evaluation import tasks
from dart_llm.experiments.comparison import read_traffic
from dart_llm.models.packed_loading import round_weights_to
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting import figures
from dart_llm.session.prepare import MemoryStore
from dart_llm.session.run import BoundMethod
from dart_llm.settings import merge
from dart_llm.studies.quality.settings import QualitySettings
from lm_cases import call, loaded, place
from quality_cases import PROMPT, TOKENS, job, write_texts
from written import lines, read


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return job(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(figures, "save", lambda folder, wanted, style: [])


def losses_of(rows):
    """Mean losses by cell and label."""
    found = {}
    for row in rows:
        items = row["measurement"]["items"]
        key = row["cell"]["task"].partition(":")[0], row["label"]
        found[key] = sum(item["mean_loss"] for item in items) / len(items)
    return found


def test_griffin_is_measured_where_each_method_asks_for_it(whole):
    found, rows = read(whole.path / "quality.json"), lines(whole.path / "results.jsonl")
    names = [item["id"] for item in rows[0]["measurement"]["items"]]
    assert names == ["bees/0", "bees/1", "loans/0", "loans/1"]
    mean = losses_of(rows)
    asked = {"dense", *(f"{name}@{s}" for name in ("griffin", "dart") for s in (0.5, 0.7))}
    assert asked <= {label for kind, label in mean if kind == "continuation"}
    assert ("shift", "dart (oracle)@0.5") in mean and (
        "continuation",
        "dart (oracle)@0.5",
    ) not in mean
    for row in found["cells"]:
        kind = {"topic-shift": "shift"}.get(row["cell"], row["cell"])
        dense = mean[kind, "dense"]
        assert row["gap"] == pytest.approx(
            mean[kind, f"{row['variant']}@{row['sparsity']:g}"] - dense
        )
        wanted = {"equal_sparsity": row["achieved_sparsity"]}
        # low-rank maps weigh more than the FFN of this tiny model: then dense is as cheap
        wanted["equal_bytes"] = max(0.0, 1 - row["ffn_bytes_share"])
        for column, sparsity in wanted.items() if row["variant"] != "griffin" else ():
            at = row[column]["sparsity"]
            assert at == round(sparsity, 3)
            griffin = mean[kind, f"griffin@{at:g}" if at else "dense"] - dense
            assert row[column]["griffin_gap"] == pytest.approx(griffin)


def test_dense_weights_in_fewer_bits_are_rows(tmp_path):
    """Of each number of bits a row per cell, measured as a rounded copy is, at its bytes."""
    done = job(tmp_path, roundings="4,3", sparsities="0.5", methods="griffin,teal", oracle="none")
    rows = {(row["cell"], row["variant"]): row for row in done.summary["cells"]}
    labels = ["griffin", "teal", "dense, FFN 4 bits", "dense, FFN 3 bits"]
    assert [label for cell, label in rows if cell == "continuation"] == labels
    model, tokenizer = loaded()
    for bits in (4, 3):
        row = rows["continuation", f"dense, FFN {bits} bits"]
        assert (row["sparsity"], row["equal_sparsity"], row["achieved_sparsity"]) == (0, None, 0)
        rounded = round_weights_to(model, bits, ffn=True)
        (cell,) = [c for c in done.cells if c.name == row["variant"] and "continuation" in c.task]
        direct = tasks.measure(
            BoundMethod(rounded.model, tokenizer, None), cell.task, cell.options, MemoryStore()
        )
        assert row["perplexity"] == pytest.approx(direct.metrics["perplexity"])
        traffic = read_traffic(rounded.facts)
        assert row["token_bytes_share"] == pytest.approx(traffic.share(PROMPT - 1 + 41 / 2))
        # half of this FFN has rows of another multiple than 32, and stays
        assert row["ffn_bytes_share"] == pytest.approx((1 + (bits + 0.5) / 16) / 2)
    shares = [rows["continuation", label]["token_bytes_share"] for label in labels]
    assert 1 > shares[2] > shares[3] and shares[0] < 1
    assert [plot.name for plot in done.figures()] == ["quality", "quality-bytes"]


@pytest.mark.usefixtures("no_plots")
def test_two_models_have_rows_of_their_own_and_common_ones(tmp_path):
    models = [str(place() / name) for name in ("model", "chatty")]
    asked = {"cells": "continuation", "sparsities": "0.5", "slices": 1}
    done = job(tmp_path, model=models, **asked)
    assert [row["model"] for row in done.summary["pooled"]] == ["model", "chatty", "all models"]
    config = read(done.path / "config.json")
    assert config["checkpoint"] is None and list(config["checkpoints"]) == ["model", "chatty"]
    first, second, both = (row["equal_sparsity"] for row in done.summary["pooled"])
    assert both["gap"] == pytest.approx(first["gap"] + second["gap"])


def test_the_command_speaks_json(tmp_path):
    text, rows = write_texts(tmp_path)
    fixed = ["bench", "quality", "--model", place() / "model", "--device", "cpu", "--json"]
    fixed += ["--results-dir", tmp_path / "results", "--dtype", "float32", "--text", text]
    fixed += ["--prompt-tokens", PROMPT, "--tokens", TOKENS, "--slices", 1, "--sparsities", "0.5"]
    fixed += ["--roundings", "none"]
    done = call(*fixed, "--text", f"{rows}:text", "--cells", "continuation")
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 1)
    found = done.json
    assert [one["label"] for one in found["texts"]] == ["bees", "loans:text"]
    assert [row["variant"] for row in found["cells"]] == ["griffin", "dart-token"]
    assert found["versions"]["torch"] and found["checkpoints"]["model"]["sha256"]
    kept = read(Path(found["folder"], "quality.json"))
    assert {name: found[name] for name in kept} == kept and found["timing"]["total_s"] > 0
    bad = call(*fixed, "--slices", 90)
    assert (bad.code, bad.out, bad.err.count("\n")) == (2, "", 1)
    assert bad.err.startswith('ConfigError: the text "bees" has 8 slices of 134 tokens in its set')


def asked(given):
    return merge(QualitySettings, given, environment={})


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"cells": "continuaton"}, "unknown cell 'continuaton'; did you mean continuation"),
        ({"cells": " , "}, "--cells is empty: give at least one"),
        ({"set": "test"}, "unknown set 'test'; known: choose, report"),
        ({"sparsities": "0.5,1"}, "1 must be between 0 and 1: the fraction to remove"),
        ({"methods": "dense"}, "method dense removes nothing"),
        ({"oracle": "grifin"}, "unknown variant for --oracle 'grifin'"),
        ({"model": ["a/x", "b/x"]}, 'the model "x" was given twice'),
        ({"roundings": "4,9"}, '--roundings "4,9" must be whole numbers of bits, 2 to 8, or none'),
        ({"rounded": "attention"}, "unknown part for --rounded 'attention'"),
        ({"variants": "nowhere.yaml"}, "cannot read the settings file nowhere.yaml"),
    ],
)
def test_bad_settings_are_one_sentence(given, error):
    with pytest.raises(ConfigError, match=error):
        asked(given).names()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("- a\n- b\n", "must hold names and values"),
        ("a: 3\n", 'the variant "a" of .* has no settings: write a'),
        ("a: {sparsity: 0.5}\n", "sets the sparsity, which --sparsities does: drop it"),
        ("a: {compensaton: true}\n", 'variant "a" of .*: unknown setting "compensaton"'),
        ("a: {budget: {table: '0:0.5'}}\n", 'the variant "a" cannot be run so: the layer table'),
        ("a: {score: {strategy: auto}}\n", 'the variant "a" cannot be run so: strategy "auto"'),
        ("dense: {}\n", 'the label "dense" is taken'),
        ("x (oracle): {}\n", '"x \\(oracle\\)" cannot be the label'),
        ("{}\n", "is empty: write LABEL"),
    ],
)
def test_a_broken_variants_file_is_one_sentence(tmp_path, text, error):
    file = tmp_path / "v.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=error) as found:
        asked({"variants": str(file)})
    assert "\n" not in str(found.value)


def test_variants_change_their_presets(tmp_path):
    file = tmp_path / "v.yaml"
    text = "uniform: {budget: uniform}\nbare:\ng+c: {method: griffin, compensation: true}\n"
    file.write_text(text, encoding="utf-8")
    found = asked({"methods": "dart", "variants": str(file), "seed": 5}).variant_list()
    labels = ["griffin", "dart", "uniform", "bare", "g+c"]
    told = [f"{name} (oracle)" for name in ("dart", "uniform", "bare")]
    assert [one.label for one in found] == [*labels, *told]
    dart, configs = PruneConfig.build("dart", seed=5), {one.label: one.config for one in found}
    assert configs["dart"] == configs["bare"] == dart
    assert configs["uniform"] == dart.replace({"budget": "uniform"})
    assert configs["g+c"] == PruneConfig.build("griffin", seed=5, compensation=True)
    assert configs["dart (oracle)"] == dart.replace({"drift": {"rule": "never"}})
    assert found[1].at(0.3).sparsity == 0.3
    alone = asked({"methods": "dart", "oracle": "none"}).variant_list()
    assert [one.label for one in alone] == ["griffin", "dart"]


def test_lists_come_with_commas_or_from_a_file(tmp_path):
    usual = asked({})
    assert (usual.sparsities, usual.pooled) == ((0.3, 0.5, 0.7), (0.5, 0.7))
    assert asked({"text": ["a,b", "c"]}).text == ["a", "b", "c"]
    assert usual.experiment == "quality-report-smollm2-135m"
    assert [one.label for one in usual.variant_list()] == ["griffin", "dart-token"]
    told = asked({"methods": "dart"}).variant_list()
    assert [one.label for one in told] == ["griffin", "dart", "dart (oracle)"]
