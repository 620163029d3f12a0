"""The settings of ``dart-llm bench quality``, and its variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.settings import merge
from dart_llm.studies.quality.settings import QualitySettings


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"cells": "continuaton"}, "unknown cell 'continuaton'; did you mean continuation"),
        ({"cells": " , "}, "--cells is empty: give continuation or topic-shift"),
        ({"set": "test"}, "unknown set 'test'; known: choose, report"),
        ({"sparsities": "0.5,x"}, '--sparsities "0.5,x" must be numbers'),
        ({"sparsities": "0"}, "--sparsities 0 must lie between 0 and 1"),
        ({"sparsities": "50"}, "--sparsities 50 must lie between 0 and 1"),
        ({"sparsities": ""}, "--sparsities is empty"),
        ({"pool": "2"}, "--pool 2 must lie between 0 and 1"),
        ({"slices": 0}, "--slices 0 must be at least 1"),
        ({"tokens": 0}, "--tokens 0 must be at least 1"),
        ({"prompt_tokens": 15}, "--prompt-tokens 15 must be at least 16"),
        ({"methods": "drat"}, "unknown method 'drat'; did you mean dart"),
        ({"methods": "dense"}, "method dense removes nothing"),
        ({"methods": "dense-8bit"}, "method dense-8bit removes nothing"),
        ({"methods": "dart,dart"}, 'the label "dart" is taken'),
        ({"oracle": "grifin"}, "unknown variant for --oracle 'grifin'"),
        ({"model": ["a/x", "b/x"]}, 'the model "x" was given twice'),
        ({"seed": -1}, "--seed -1 must be a whole number"),
        ({"slice": 3}, 'unknown setting "slice" in QualitySettings; did you mean "slices"'),
        ({"variants": "nowhere.yaml"}, "cannot read the settings file nowhere.yaml"),
        ({"executor": "fast"}, "executor"),
    ],
)
def test_bad_settings_are_one_sentence(given: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        merge(QualitySettings, given, environment={}).names()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("- a\n- b\n", "must hold names and values"),
        ("a: [\n", "cannot read the settings file"),
        ("a: 3\n", 'the variant "a" of .* must hold settings'),
        ("a: {sparsity: 0.5}\n", "sets the sparsity, which --sparsities does: drop it"),
        ("a: {compensaton: true}\n", 'variant "a" of .*: unknown setting "compensaton"'),
        ("a: {method: grifin}\n", 'variant "a" of .*: unknown method'),
        ("a: {budget: {table: '0:0.5'}}\n", 'the variant "a" cannot be run so: the layer table'),
        ("a: {score: {strategy: auto}}\n", 'the variant "a" cannot be run so: strategy "auto"'),
        ("griffin: {}\n", 'the label "griffin" is taken'),
        ("dense: {}\n", 'the label "dense" is taken'),
        ("x (oracle): {}\n", '"x \\(oracle\\)" cannot be the label'),
        ("{}\n", "is empty: write LABEL"),
    ],
)
def test_a_broken_variants_file_is_one_sentence(tmp_path: Path, text: str, error: str) -> None:
    file = tmp_path / "v.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=error) as found:
        merge(QualitySettings, {"variants": str(file)}, environment={})
    assert "\n" not in str(found.value)


def test_variants_change_their_presets(tmp_path: Path) -> None:
    file = tmp_path / "v.yaml"
    text = "uniform: {budget: uniform}\nbare:\ng+c: {method: griffin, compensation: true}\n"
    file.write_text(text, encoding="utf-8")
    found = merge(
        QualitySettings, {"variants": str(file), "seed": 5}, environment={}
    ).variant_list()
    labels = ["griffin", "dart", "uniform", "bare", "g+c"]
    told = [f"{name} (oracle)" for name in ("dart", "uniform", "bare")]
    assert [one.label for one in found] == [*labels, *told]
    dart = PruneConfig.build("dart", seed=5)
    configs = {one.label: one.config for one in found}
    assert configs["dart"] == configs["bare"] == dart
    assert configs["uniform"] == dart.replace({"budget": "uniform"})
    assert configs["g+c"] == PruneConfig.build("griffin", seed=5, compensation=True)
    assert configs["dart (oracle)"] == dart.replace({"drift": {"rule": "never"}})
    assert found[1].at(0.3).sparsity == 0.3
    plain = merge(QualitySettings, {"oracle": "none"}, environment={}).variant_list()
    assert [one.label for one in plain] == ["griffin", "dart"]


def test_defaults_and_lists(tmp_path: Path) -> None:
    asked = merge(QualitySettings, {}, environment={})
    assert asked.cell_list() == ("continuation", "topic-shift")
    assert (asked.sparsity_list(), asked.pool_list()) == ((0.3, 0.5, 0.7), (0.5, 0.7))
    assert (asked.set, asked.text, asked.slices) == ("report", ["embedded"], None)
    assert (asked.prompt_tokens, asked.tokens) == (256, 256)
    assert asked.experiment == "quality-report-smollm2-135m"
    labels = [one.label for one in asked.variant_list()]
    assert labels == ["griffin", "dart", "dart (oracle)"]
    file = tmp_path / "s.yaml"
    file.write_text("text: [a.txt, b.txt]\nsparsities: [0.5, 0.9]\nmodel: one\n", encoding="utf-8")
    asked = merge(
        QualitySettings, {"text": None}, file, {"DART_MODEL": "x,y", "DART_SET": "choose"}
    )
    assert (asked.text, asked.model, asked.set) == (["a.txt", "b.txt"], ["x", "y"], "choose")
    assert (asked.sparsity_list(), asked.pool_list()) == ((0.5, 0.9), (0.5,))
