"""The settings of ``dart-llm bench quality``, and its variants."""

import pytest

from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.settings import merge
from dart_llm.studies.quality.settings import QualitySettings


def asked(given):
    return merge(QualitySettings, given, environment={})


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"cells": "continuaton"}, "unknown cell 'continuaton'; did you mean continuation"),
        ({"cells": " , "}, "--cells is empty: give continuation or topic-shift"),
        ({"set": "test"}, "unknown set 'test'; known: choose, report"),
        ({"sparsities": "0.5,x"}, '--sparsities "0.5,x" must be numbers'),
        ({"sparsities": "0"}, "--sparsities 0 must lie between 0 and 1"),
        ({"pool": "2"}, "--pool 2 must lie between 0 and 1"),
        ({"methods": "dense-8bit"}, "method dense-8bit removes nothing"),
        ({"methods": "dart,dart"}, 'the label "dart" is taken'),
        ({"oracle": "grifin"}, "unknown variant for --oracle 'grifin'"),
        ({"model": ["a/x", "b/x"]}, 'the model "x" was given twice'),
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
        ("a: [\n", "cannot read the settings file"),
        ("a: 3\n", 'the variant "a" of .* must hold settings'),
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
    found = asked({"variants": str(file), "seed": 5}).variant_list()
    labels = ["griffin", "dart", "uniform", "bare", "g+c"]
    told = [f"{name} (oracle)" for name in ("dart", "uniform", "bare")]
    assert [one.label for one in found] == [*labels, *told]
    dart, configs = PruneConfig.build("dart", seed=5), {one.label: one.config for one in found}
    assert configs["dart"] == configs["bare"] == dart
    assert configs["uniform"] == dart.replace({"budget": "uniform"})
    assert configs["g+c"] == PruneConfig.build("griffin", seed=5, compensation=True)
    assert configs["dart (oracle)"] == dart.replace({"drift": {"rule": "never"}})
    assert found[1].at(0.3).sparsity == 0.3
    assert [one.label for one in asked({"oracle": "none"}).variant_list()] == ["griffin", "dart"]


def test_lists_come_with_commas_or_from_a_file(tmp_path):
    usual = asked({})
    assert (usual.sparsity_list(), usual.pool_list()) == ((0.3, 0.5, 0.7), (0.5, 0.7))
    assert usual.experiment == "quality-report-smollm2-135m"
    assert [one.label for one in usual.variant_list()] == ["griffin", "dart", "dart (oracle)"]
    file = tmp_path / "s.yaml"
    file.write_text("text: [a.txt, b.txt]\nsparsities: [0.5, 0.9]\nmodel: one\n", encoding="utf-8")
    environment = {"DART_MODEL": "x,y", "DART_SET": "choose"}
    found = merge(QualitySettings, {"text": None}, file, environment)
    assert (found.text, found.model, found.set) == (["a.txt", "b.txt"], ["x", "y"], "choose")
    assert (found.sparsity_list(), found.pool_list()) == ((0.5, 0.9), (0.5,))
