"""The methods of a drift study and the settings of drift and detect: names, variants, refusals."""

import pytest

from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.settings import BaseSettings, merge
from dart_llm.studies.drift.detect import watchers
from dart_llm.studies.drift.settings import DetectSettings, collect, parse_methods

DART = PruneConfig.build("dart", sparsity=0.5)


def parse(text, **base):
    settings = BaseSettings(**{"method": "dart", "sparsity": 0.5, **base})
    return {method.label: method for method in parse_methods(text.split(","), settings)}


def drift(**flags):
    return collect({"passages": "shipped", **flags}, environment={})


def test_methods_of_a_study():
    assert (drift().kind, drift(passages=None, prompts="shipped").kind) == ("forced", "free")
    assert drift(seeds="3,1,3").seeds == (3, 1)
    methods = drift().candidates()
    names = "never interval:64 published paper dart"
    assert [m.label for m in methods] == ["dense", *(f"{name}@0.5" for name in names.split())]
    assert methods[0].config is None and methods[0].sparsity == 0.0
    mixed = parse("dart@0.3,interval:8@0.25,paper")
    assert [m.sparsity for m in mixed.values()] == [0.0, 0.3, 0.25, 0.5]
    assert "dart@table" in parse("dart,griffin", sparsity=None, layer_topk="all:0.25")
    changed = parse("never,dart,published,griffin", budget="depth", compensation=False)
    for label in ("never@0.5", "dart@0.5"):
        config = changed[label].config
        assert (config.budget.name, config.compensation) == ("depth", False)
    for name in ("published", "griffin"):
        assert changed[f"{name}@0.5"].config == PruneConfig.build(name, sparsity=0.5)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("never", ("never", "hidden", 64, 0.05, 32)),
        ("interval:7", ("interval 7", "hidden", 0, None, 0)),
        ("paper", ("paper", "attention", 0, None, 0)),
        ("dart", ("dart", "hidden", 64, 0.05, 32)),
    ],
)
def test_variants_differ_from_dart_in_their_drift_rule_alone(name, rule):
    (_, method) = parse(name).values()
    config = method.config
    assert config.method == name == method.name
    settings = config.drift
    guards = (settings.min_distance, settings.max_dense_share, settings.allowance)
    assert (settings.rule, settings.signal, *guards) == rule
    assert config == DART.model_copy(update={"method": name, "drift": settings})


UNREADABLE = ("interval:x", "dart@half", "interval:0", "a:b:1")
DRIFT = [
    *(({"methods": word}, f'cannot read the method "{word}"') for word in UNREADABLE),
    ({"methods": "drat"}, r"unknown method 'drat'; did you mean dart or cats\?"),
    ({"methods": "interval"}, r"did you mean interval:N"),
    ({"methods": "never:3"}, r"unknown method 'never:3'; did you mean never"),
    ({"methods": "dart@1.5"}, r"sparsity 1.5 must lie in \[0, 1\)"),
    ({"methods": "dense@0.5"}, "method dense removes nothing: drop the @0.5"),
    ({"methods": "dart,dart@0.5"}, r'"dart@0.5" was given twice'),
    ({"methods": " , "}, "methods .* at least 1 item"),
    ({"passages": None}, "mode free does not fit no source"),
    ({"passages": None, "prompt": " \n"}, "the prompt is empty: give at least one word"),
    ({"prompt": "a"}, r"does not fit 2 source\(s\): give one of --prompt TEXT, --prompts"),
    ({"mode": "forced", "passages": None, "prompt": "a"}, "mode forced does not fit 1 source"),
    ({"mode": "free"}, "mode free does not fit 1 source"),
    ({"seeds": "1,x"}, "seeds.1 = 'x': input should be a valid integer"),
    ({"seeds": "-1"}, "--seeds -1 must be at least 0"),
    ({"sparsity": 0.5, "total_prune_percent": 50.0}, "not both"),
    ({"mode": "force"}, "did you mean forced"),
]
DETECT = [
    ({"method": "dart"}, 'unknown setting "method"'),
    ({"signals": "hiden"}, "did you mean hidden"),
    ({"signals": " , "}, "signals .* at least 1 item"),
    ({"thresholds": "0,x"}, "thresholds.1 = 'x': input should be a valid number"),
    ({"thresholds": "0,inf"}, "finite"),
    ({"counts": "0,1"}, "--counts 0 must be at least 1"),
    ({"rules": "griffin"}, "griffin never re-masks"),
]


@pytest.mark.parametrize(("flags", "sentence"), DRIFT)
def test_drift_settings_that_cannot_be_used(flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        drift(**flags)


@pytest.mark.parametrize(("flags", "sentence"), DETECT)
def test_detect_settings_that_cannot_be_used(flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        watchers(merge(DetectSettings, flags, environment={}))
