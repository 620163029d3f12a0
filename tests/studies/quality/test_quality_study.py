"""``dart-llm bench quality``: settings, variants, files, the command."""

from pathlib import Path

import pytest

from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.reporting import figures
from dart_llm.settings import merge
from dart_llm.studies.quality.settings import QualitySettings
from lm_cases import call, place
from quality_cases import PROMPT, TOKENS, job, write_texts
from written import lines, read


def losses_of(rows):
    """Mean losses by task and label."""
    losses = {}
    for row in rows:
        items = row["measurement"]["items"]
        key = row["cell"]["task"].partition(":")[0], row["label"]
        losses[key] = sum(item["mean_loss"] for item in items) / len(items)
    return losses


def test_griffin_is_measured_where_each_method_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda folder, wanted, style: [])
    study = job(tmp_path)
    document, rows = read(study.path / "quality.json"), lines(study.path / "results.jsonl")
    names = [item["id"] for item in rows[0]["measurement"]["items"]]
    assert names == ["bees/0", "bees/1", "loans/0", "loans/1"]
    mean = losses_of(rows)
    asked = {"dense", *(f"{name}@{s}" for name in ("griffin", "dart") for s in (0.5, 0.7))}
    assert asked <= {label for kind, label in mean if kind == "continuation"}
    oracles = {kind for kind, label in mean if label == "dart (oracle)@0.5"}
    assert oracles == {"shift"}
    for row in document["rows"]:
        if len(row["sparsities"]) > 1:
            continue
        dense, (sparsity,) = mean[row["task"], "dense"], row["sparsities"]
        own = mean[row["task"], f"{row['variant']}@{sparsity:g}"]
        assert row["gap"] == pytest.approx(own - dense)
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


def test_the_command_speaks_json(tmp_path):
    text, rows = write_texts(tmp_path)
    fixed = ["bench", "quality", "--model", place() / "model", "--device", "cpu", "--json"]
    fixed += ["--results-dir", tmp_path / "results", "--dtype", "float32", "--text", text]
    fixed += ["--prompt-tokens", PROMPT, "--tokens", TOKENS, "--slices", 1, "--sparsities", "0.5"]
    done = call(*fixed, "--text", f"{rows}:text", "--tasks", "continuation")
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 1)
    answer = done.json
    assert [row["variant"] for row in answer["rows"]] == ["griffin", "dart-token"]
    assert answer["checkpoint"]["sha256"] and answer["timing"]["total_s"] > 0
    document = read(Path(answer["folder"], "quality.json"))
    assert {name: answer[name] for name in document} == document
    bad = call(*fixed, "--slices", 90)
    assert (bad.code, bad.out, bad.err.count("\n")) == (2, "", 1)
    assert bad.err.startswith('ConfigError: the text "bees" has 8 slices of 134 tokens in its set')


def asked(given):
    return merge(QualitySettings, given, environment={})


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"tasks": "continuaton"}, "unknown task 'continuaton'; did you mean continuation"),
        ({"tasks": " , "}, "--tasks is empty: give at least one"),
        ({"set": "test"}, "unknown set 'test'; known: choose, report"),
        ({"sparsities": "0.5,1"}, "1 must be between 0 and 1: the fraction to remove"),
        ({"methods": "dense"}, "method dense removes nothing"),
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
        ("- a\n- b\n", "must hold names and values"),
        ("a: 3\n", 'the variant "a" of .* has no settings: write a'),
        ("a: {sparsity: 0.5}\n", "sets the sparsity, which --sparsities does: drop it"),
        ("a: {compensaton: true}\n", 'variant "a" of .*: unknown setting "compensaton"'),
        ("a: {budget: {table: '0:0.5'}}\n", 'the variant "a" cannot be used: the layer table'),
        ("dense: {}\n", 'the label "dense" is taken'),
        ("x (oracle): {}\n", '"x \\(oracle\\)" cannot be the label'),
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
