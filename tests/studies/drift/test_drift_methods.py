"""The methods of a drift study and its settings: names, variants of dart, refusals."""

import pytest

from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.settings import BaseSettings
from dart_llm.studies.drift.methods import parse_methods
from dart_llm.studies.drift.settings import collect

DART = PruneConfig.build("dart", sparsity=0.5)


def parse(text, moment=64, **base):
    found = parse_methods(text, BaseSettings(**{"sparsity": 0.5, **base}), moment)
    return {method.label: method for method in found}


def given(**flags):
    return collect({"passages": "shipped", **flags}, environment={})


def test_methods_of_a_study():
    found = given().method_list()
    names = "never interval:64 published paper dart"
    assert [m.label for m in found] == ["dense", *(f"{name}@0.5" for name in names.split())]
    assert found[0].config is None and found[0].sparsity == 0.0
    own = parse("dart@0.3,interval:8@0.25,dense-8bit,fresh:1", moment=48)
    assert list(own) == ["dense", "dart@0.3", "interval:8@0.25", "dense-8bit", "fresh:1@0.5"]
    assert [m.sparsity for m in own.values()] == [0.0, 0.3, 0.25, 0.0, 0.5]
    assert (own["fresh:1@0.5"].observed, own["fresh:1@0.5"].moment) == (1, 48)
    with pytest.raises(ConfigError, match=r"decay:49 observes 49 .* give --remask-at-change 49 or"):
        parse("decay:49", moment=48)
    table = parse("dart,griffin", sparsity=None, layer_topk="all:0.25")
    assert list(table) == ["dense", "dart@table", "griffin@0.5"]
    assert table["dart@table"].sparsity is None
    changed = parse("never,dart,published,griffin", budget="depth", compensation=False)
    for label in ("never@0.5", "dart@0.5"):
        config = changed[label].config
        assert config is not None and (config.budget.name, config.compensation) == ("depth", False)
    for name in ("published", "griffin"):
        assert changed[f"{name}@0.5"].config == PruneConfig.build(name, sparsity=0.5)


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
def test_variants_differ_from_dart_in_re_masking_alone(name, drift, remask):
    (_, method) = parse(name).values()
    config = method.config
    assert config is not None and config.method == name == method.name
    found = config.drift
    guards = (found.min_distance, found.max_dense_share, found.allowance)
    assert (found.rule, found.signal, *guards) == drift
    assert (config.remask.evidence, config.remask.observe_tokens) == remask
    own = {"method": name, "drift": config.drift, "remask": config.remask}
    assert config == DART.model_copy(update=own)


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
SETTINGS = [
    *(({"methods": text}, sentence) for text, sentence in NAMES),
    ({"passages": None}, "nothing to write about: give --prompt TEXT or --prompts shipped"),
    ({"passages": None, "prompt": " \n"}, "the prompt is empty: give at least one word"),
    ({"prompt": "a"}, "give one source: --prompt and --passages"),
    ({"mode": "forced", "passages": None, "prompt": "a"}, "reads passages, .* not --prompt"),
    ({"mode": "free"}, "nothing to write about"),
    ({"seeds": "1,x"}, '--seeds "1,x" must be whole numbers'),
    ({"seeds": ","}, "must be whole numbers"),
    ({"remask_at_change": 32}, "--remask-at-change concerns fresh:N and decay:N"),
    ({"passages": None, "prompt": "a", "methods": "fresh:1"}, "fresh:1 makes new masks at a"),
    ({"sparsity": 0.5, "total_prune_percent": 50.0}, "not both"),
    ({"mode": "force"}, "did you mean forced"),
]


@pytest.mark.parametrize(("flags", "sentence"), SETTINGS)
def test_settings_that_cannot_be_used(flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        given(**flags)


def test_the_sources_and_the_amount_have_defaults():
    assert (given().kind, given(mode="forced", passages=None).kind) == ("forced", "forced")
    assert given(passages=None, prompts="shipped").kind == "free"
    for amount, label in (
        ({"total_prune_percent": 30.0}, "never@0.3"),
        ({"layer_topk": "all:auto"}, "never@0.5"),
        ({"prune_strategy": "auto", "budget": "uniform"}, "never@table"),
    ):
        assert given(**amount).method_list()[1].label == label
    assert given(seeds="3,1,3").seed_list() == (3, 1)
    assert given(model="a/B-Model/").experiment == "drift-forced-b-model"


def test_flags_beat_the_environment_which_beats_a_file(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("passages: shipped\nseeds: [5, 6]\nlimit: 9\nsparsity: 0.9\nmethods: [dart]\n")
    environment = {"DART_LIMIT": "4", "DART_TOTAL_PRUNE_PERCENT": "20", "DART_METHOD": "griffin"}
    found = collect({"limit": 2}, file, environment)
    assert (found.seeds, found.limit, found.sparsity) == ("5,6", 2, None)
    assert [(m.label, m.sparsity) for m in found.method_list()][1:] == [("dart@0.2", 0.2)]
