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


def detect(**flags):
    return watchers(merge(DetectSettings, flags, environment={}))


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


UNGUARDED = {"min_distance": 0, "max_dense_share": None, "allowance": 0}


@pytest.mark.parametrize(
    ("name", "drift"),
    [
        ("never", {"rule": "never"}),
        ("interval:7", {"rule": "interval 7", **UNGUARDED}),
        ("paper", {"rule": "paper", "signal": "attention", **UNGUARDED}),
        ("dart", {}),
    ],
)
def test_variants_differ_from_dart_in_their_drift_rule_alone(name, drift):
    (_, method) = parse(name).values()
    assert method.name == name
    assert method.config == DART.replace({"method": name, "drift": drift})


DRIFT = [
    ({"methods": "interval:0"}, 'cannot read the method "interval:0"'),
    ({"methods": "dart@half"}, 'cannot read the method "dart@half"'),
    ({"methods": "drat"}, r"unknown method 'drat'; did you mean dart or cats\?"),
    ({"methods": "dart@1.5"}, r"sparsity 1.5 must lie in \[0, 1\)"),
    ({"methods": "dense@0.5"}, "method dense removes nothing: drop the @0.5"),
    ({"methods": "dart,dart@0.5"}, r'"dart@0.5" was given twice'),
    ({"methods": " , "}, "methods .* at least 1 item"),
    ({"passages": None}, "mode free does not fit no source"),
    ({"prompt": "a"}, r"does not fit 2 source\(s\): give one of --prompt TEXT, --prompts"),
    ({"seeds": "-1"}, "--seeds -1 must be at least 0"),
]
DETECT = [
    ({"method": "dart"}, 'unknown setting "method"'),
    ({"signals": "hiden"}, "did you mean hidden"),
    ({"thresholds": "0,inf"}, "finite"),
    ({"counts": "0,1"}, "--counts 0 must be at least 1"),
    ({"rules": "griffin"}, "griffin never re-masks"),
]


@pytest.mark.parametrize(
    ("make", "flags", "sentence"),
    [*((drift, *case) for case in DRIFT), *((detect, *case) for case in DETECT)],
)
def test_settings_that_cannot_be_used(make, flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make(**flags)
