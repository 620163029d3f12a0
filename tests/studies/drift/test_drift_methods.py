"""The methods of a drift study and its settings: names, variants of dart, refusals."""

import pytest

from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.settings import BaseSettings
from dart_llm.studies.drift.settings import collect, parse_methods

DART = PruneConfig.build("dart", sparsity=0.5)


def parse(text, moment=64, **base):
    settings = BaseSettings(**{"method": "dart", "sparsity": 0.5, **base})
    found = parse_methods(text.split(","), settings, moment)
    return {method.label: method for method in found}


def given(**flags):
    return collect({"passages": "shipped", **flags}, environment={})


def test_methods_of_a_study():
    assert (given().kind, given(passages=None, prompts="shipped").kind) == ("forced", "free")
    assert given(seeds="3,1,3").seeds == (3, 1)
    found = given().candidates()
    names = "never interval:64 published paper dart"
    assert [m.label for m in found] == ["dense", *(f"{name}@0.5" for name in names.split())]
    assert found[0].config is None and found[0].sparsity == 0.0
    own = parse("dart@0.3,interval:8@0.25,fresh:1", moment=48)
    assert list(own) == ["dense", "dart@0.3", "interval:8@0.25", "fresh:1@0.5"]
    assert [m.sparsity for m in own.values()] == [0.0, 0.3, 0.25, 0.5]
    assert (own["fresh:1@0.5"].observed, own["fresh:1@0.5"].moment) == (1, 48)
    with pytest.raises(ConfigError, match=r"decay:49 observes 49 .* give --remask-at-change 49 or"):
        parse("decay:49", moment=48)
    assert "dart@table" in parse("dart,griffin", sparsity=None, layer_topk="all:0.25")
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


UNREADABLE = ("decay:x", "dart@half", "interval:0", "a:b:1")
SETTINGS = [
    *(({"methods": word}, f'cannot read the method "{word}"') for word in UNREADABLE),
    ({"methods": "drat"}, r"unknown method 'drat'; did you mean dart or cats\?"),
    ({"methods": "intervall:64"}, r"did you mean interval:N"),
    ({"methods": "interval"}, r"did you mean interval:N"),
    ({"methods": "never:3"}, r"unknown method 'never:3'; did you mean never"),
    ({"methods": "dart@1.5"}, r"sparsity 1.5 must lie in \[0, 1\)"),
    ({"methods": "dense@0.5"}, "method dense removes nothing: drop the @0.5"),
    ({"methods": "dart,dart@0.5"}, r'"dart@0.5" was given twice'),
    ({"methods": " , "}, "--methods is empty"),
    ({"passages": None}, "mode free does not fit no source"),
    ({"passages": None, "prompt": " \n"}, "the prompt is empty: give at least one word"),
    ({"prompt": "a"}, r"does not fit 2 source\(s\): give one of --prompt TEXT, --prompts"),
    ({"mode": "forced", "passages": None, "prompt": "a"}, "mode forced does not fit 1 source"),
    ({"mode": "free"}, "mode free does not fit 1 source"),
    ({"seeds": "1,x"}, "seeds.1 = 'x': input should be a valid integer"),
    ({"seeds": "-1"}, "--seed -1 must be a whole number from 0"),
    ({"remask_at_change": 32}, "--remask-at-change concerns fresh:N and decay:N"),
    ({"passages": None, "prompt": "a", "methods": "fresh:1"}, "fresh:1 makes new masks at a"),
    ({"sparsity": 0.5, "total_prune_percent": 50.0}, "not both"),
    ({"mode": "force"}, "did you mean forced"),
]


@pytest.mark.parametrize(("flags", "sentence"), SETTINGS)
def test_settings_that_cannot_be_used(flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        given(**flags)
