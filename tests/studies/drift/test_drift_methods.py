"""The methods of a drift study and its settings: names, variants of dart, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.settings import BaseSettings
from dart_llm.studies.drift.methods import DriftMethod, parse_methods
from dart_llm.studies.drift.settings import DriftSettings, collect

DART = PruneConfig.build("dart", sparsity=0.5)


def parse(text: str, moment: int = 64, **base: Any) -> dict[str, DriftMethod]:
    found = parse_methods(text, BaseSettings(**{"sparsity": 0.5, **base}), moment)
    return {method.label: method for method in found}


def given(**flags: Any) -> DriftSettings:
    return collect({"passages": "shipped", **flags}, environment={})


def test_the_default_is_six_methods_of_which_dense_is_the_first() -> None:
    found = given().method_list()
    names = "never interval:64 published paper dart"
    assert [m.label for m in found] == ["dense", *(f"{name}@0.5" for name in names.split())]
    assert found[0].config is None and found[0].sparsity == 0.0
    labels = [m.label for m in given(methods="dart,griffin@0.3").method_list()]
    assert labels == ["dense", "dart@0.5", "griffin@0.3"]


@pytest.mark.parametrize(
    ("name", "drift", "remask"),
    [
        ("never", ("never", "hidden", 64, 0.05, 32), ("decay", 32)),
        ("interval:7", ("interval 7", "hidden", 0, None, 0), ("decay", 32)),
        ("paper", ("paper", "attention", 0, None, 0), ("decay", 32)),
        ("fresh:1", ("never", "hidden", 64, 0.05, 32), ("fresh", 1)),
        ("decay:16", ("never", "hidden", 64, 0.05, 32), ("decay", 16)),
        ("dart", ("dart", "hidden", 64, 0.05, 32), ("decay", 32)),
    ],
)
def test_variants_differ_from_dart_in_re_masking_alone(
    name: str, drift: tuple[Any, ...], remask: tuple[Any, ...]
) -> None:
    (method,) = list(parse(name).values())[1:]
    config = method.config
    assert config is not None and config.method == name and method.name == name
    found = config.drift
    guards = (found.min_distance, found.max_dense_share, found.allowance)
    assert (found.rule, found.signal, *guards) == drift
    assert (config.remask.evidence, config.remask.observe_tokens) == remask
    assert config.remask.decay == 0.1
    shared = ("score", "budget", "prior", "skip_sinks", "compensation", "compensation_rank")
    for part in (*shared, "min_evidence", "sparsity"):
        assert getattr(config, part) == getattr(DART, part)


def test_settings_of_the_study_change_dart_and_its_variants_alone() -> None:
    found = parse("never,dart,published,griffin", budget="depth", compensation=False)
    for label in ("never@0.5", "dart@0.5"):
        config = found[label].config
        assert config is not None and (config.budget.name, config.compensation) == ("depth", False)
    for name in ("published", "griffin"):
        assert found[f"{name}@0.5"].config == PruneConfig.build(name, sparsity=0.5)


def test_a_method_may_name_its_own_sparsity() -> None:
    found = parse("dart@0.3,dart@0.7,interval:8@0.25,dense-8bit")
    assert list(found) == ["dense", "dart@0.3", "dart@0.7", "interval:8@0.25", "dense-8bit"]
    assert [m.sparsity for m in found.values()] == [0.0, 0.3, 0.7, 0.25, 0.0]
    table = parse("dart,griffin", sparsity=None, layer_topk="all:0.25")
    assert list(table) == ["dense", "dart@table", "griffin@0.5"]
    assert table["dart@table"].sparsity is None


def test_timed_methods_know_when() -> None:
    found = parse("fresh:1,decay:32", moment=48)
    assert [(m.observed, m.moment) for m in found.values()][1:] == [(1, 48), (32, 48)]
    with pytest.raises(ConfigError, match=r"decay:49 observes 49 .* give --remask-at-change 49 or"):
        parse("decay:49", moment=48)


NAMES = [
    ("drat", r"unknown method 'drat'; did you mean dart\?"),
    ("intervall:64", r"unknown method 'intervall:64'; did you mean interval:N\?"),
    ("interval", r'"interval" needs a whole number of tokens, 1 or more: write "interval:N"'),
    ("interval:0", r'"interval:0" needs a whole number of tokens'),
    ("decay:x", r'"decay:x" needs a whole number'),
    ("never:3", r'"never:3" takes no number: write "never"'),
    ("dart:3", "unknown method 'dart:3'; did you mean dart"),
    ("dart@half", r'"dart@half" needs a number after @'),
    ("dart@1.5", r"sparsity 1.5 must lie in \[0, 1\)"),
    ("dense@0.5", "method dense removes nothing: drop the @0.5"),
    ("dart,dart@0.5", r'"dart@0.5" was given twice'),
    (" , ", "no method is named"),
]
SETTINGS: list[tuple[dict[str, Any], str]] = [
    *(({"methods": text}, sentence) for text, sentence in NAMES),
    ({"passages": None}, "nothing to write about: give --prompt TEXT or --prompts shipped"),
    ({"passages": None, "prompt": " \n"}, "the prompt is empty: give at least one word"),
    ({"prompt": "a"}, "give one source: --prompt and --passages"),
    ({"mode": "forced", "passages": None, "prompt": "a"}, "reads passages, .* not --prompt"),
    ({"mode": "free"}, "nothing to write about"),
    ({"seeds": "1,x"}, '--seeds "1,x" must be whole numbers'),
    ({"seeds": ","}, "must be whole numbers"),
    ({"limit": 0}, "--limit 0 must be at least 1"),
    ({"prompt_tokens": 3}, "--prompt-tokens 3 must be at least 16"),
    ({"temperature": -1.0}, "--temperature -1.0 must be at least 0"),
    ({"remask_at_change": 32}, "--remask-at-change concerns fresh:N and decay:N"),
    ({"passages": None, "prompt": "a", "methods": "fresh:1"}, "fresh:1 makes new masks at a"),
    ({"sparsity": 0.5, "total_prune_percent": 50.0}, "not both"),
    ({"sparsity": 50.0}, r"did you mean 0.5\?"),
    ({"budget": "depht"}, "did you mean depth"),
    ({"mode": "force"}, "did you mean forced"),
    ({"sparsty": 0.5}, r'unknown setting "sparsty".*"sparsity"'),
]


@pytest.mark.parametrize(("flags", "sentence"), SETTINGS)
def test_settings_that_cannot_be_used(flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        given(**flags)


def test_the_sources_and_the_amount_have_defaults() -> None:
    assert (given().kind, given(mode="forced", passages=None).kind) == ("forced", "forced")
    assert given(passages=None, prompts="shipped").kind == "free"
    assert given(total_prune_percent=30.0).method_list()[1].sparsity == 0.3
    assert given(layer_topk="all:auto").method_list()[1].sparsity == 0.5
    assert given(prune_strategy="auto", budget="uniform").method_list()[1].label == "never@table"
    assert given(seeds="3,1,3").seed_list() == (3, 1)
    assert given(model="a/B-Model/").experiment == "drift-forced-b-model"


def test_flags_beat_the_environment_which_beats_a_file(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("passages: shipped\nseeds: '5'\nlimit: 9\nsparsity: 0.9\n")
    environment = {"DART_LIMIT": "4", "DART_TOTAL_PRUNE_PERCENT": "20", "DART_METHOD": "griffin"}
    found = collect({"limit": 2}, file, environment)
    assert (found.seeds, found.limit, found.sparsity) == ("5", 2, None)
    assert found.method_list()[1].sparsity == 0.2


def test_a_file_may_hold_lists(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("passages: shipped\nseeds: 3\nmethods: [never, dart@0.3]\n")
    found = collect({}, file, {})
    assert found.seed_list() == (3,)
    assert [m.label for m in found.method_list()] == ["dense", "never@0.5", "dart@0.3"]
    file.write_text("passages: shipped\nseeds: [1, 2]\n")
    assert collect({}, file, {}).seeds == "1,2"
