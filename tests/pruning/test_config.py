"""Configurations: round trips, ranges, what excludes what, and errors that suggest the mend."""

import json
from math import nan

import pytest

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.pruning.config import (
    PruneConfig,
    SelfStatsConfig,
    TokenConfig,
)
from dart_llm.pruning.registry import METHODS
from prior_cases import CONFIG

FULL = PruneConfig(
    method="mine",
    sparsity=0.25,
    score={"name": "mean", "ema_decay": 1 / 3, "proxy_embedding": "input", "prior_weight": 0.5},
    budget={"name": "blend energy depth", "table": "2:auto"},
    drift={"rule": "interval 7", "signal": "hidden", "min_distance": 3, "max_dense_share": 1e-9},
    remask={"evidence": "decay", "decay": 0.7, "observe_tokens": 9},
    calibration={"source": "self", "sequences": 5, "length": 50, "purpose": "prior"},
    self_stats={"sequences": 5, "length": 50, "opening": 7, "temperature": 1.1, "top_p": 0.3},
    masking_step=4,
    release_step=99,
    min_evidence=8,
    skip_sinks=True,
    compensation=True,
    compensation_rank=4,
    batch="per_row",
    executor="masked",
    seed=2**40,
)
"""Another value than the default in nearly every field."""


@pytest.mark.contract("every parser round-trips")
@pytest.mark.parametrize(
    "config", [FULL, *map(METHODS.get, METHODS.names())], ids=lambda c: c.method
)
def test_round_trips(config):
    assert PruneConfig.from_mapping(json.loads(json.dumps(config.to_dict()))) == config
    assert PruneConfig.build(config) == config == config.replace({})


REFUSED = (
    *({"sparsity": value} for value in (1.0, -0.1, 50, nan, "half")),
    *({"release_step": 0}, {"masking_step": 8, "release_step": 8}, {"score": {"ema_decay": 1}}),
    *({"budget": {"name": name}} for name in ("energy depth", "blend energy", "blend a b c")),
    *({"drift": f"interval{value}"} for value in ("", " 0", " -4", " 2.5")),
    *({"drift": f"windows {value}"} for value in ("10 1", "10 1 2 3", "1 1 2", "10 0 2")),
    *({"drift": f"windows {value}"} for value in ("10 1 -2", "10 1 nan", "10  1 2", "\u00b2 1 2")),
    *({"drift": "paper 5"}, {"drift": {"min_distanz": 4}}, {"self_stats": {"lenght": 3}}),
    *({"self_stats": {"length": 15}}, {"self_stats": {"opening": 128}}, {"token": {"bits": 5}}),
    # what excludes or needs something else
    {"sparsity": 0.5, "budget": {"table": "all:0.5"}},
    {"sparsity": 0.0, "budget": {"table": "0:#5"}},
    {"sparsity": 0.5, "score": {"strategy": "auto"}},
    {"score": {"strategy": "auto"}, "budget": {"table": "all:auto"}},
    {"score": {"strategy": "auto"}, "budget": "energy"},
    *({"score": {"prior_weight": 0.5}}, {"calibration": {"purpose": "prior"}}),
    {"skip_sinks": True},
    {"executor": "compact", "batch": "per_row"},
    {"compensation_rank": 8, "compensation": True},
    {"compensation_rank": 8, "self_stats": {}, "token": {}},
    {"token": {}, "drift": "paper"},
    # names
    *({"sparsty": 0.5}, {"compensate": True}, {"score": {"prior_weigt": 0.5}}),
    *({"score": "normalised"}, {"budget": "energie"}, {"budget": "blend energy dept"}),
    *({"drift": "publised"}, {"drift": "intervall 5"}),
)


def test_refused(snapshot):
    messages = {}
    for data in REFUSED:
        for make in (PruneConfig.from_mapping, lambda given: PruneConfig(**given)):
            with pytest.raises(ConfigError) as caught:
                make(data)
        messages[str(data)] = str(caught.value)
        assert "\n" not in messages[str(data)]
    assert messages == snapshot


def test_the_methods(snapshot):
    """What differs from the default configuration."""
    result = {name: METHODS.get(name).model_dump(exclude_defaults=True) for name in METHODS.names()}
    assert result == snapshot
    assert all(PruneConfig.build(name).method == name for name in result)
    with pytest.raises(UnknownName, match=r"unknown method 'grifin'; did you mean griffin"):
        PruneConfig.build("grifin")


def test_changes_are_laid_on_top():
    """A partial mapping changes only what it holds; a change to None is none."""
    base = PruneConfig.build("dart")
    result = PruneConfig.build("dart", sparsity=0.5, drift={"min_distance": 8}, remask="fresh")
    wanted = base.to_dict()
    wanted["sparsity"], wanted["drift"]["min_distance"] = 0.5, 8
    wanted["remask"]["evidence"] = "fresh"
    assert result.to_dict() == wanted
    longer = CONFIG.replace({"self_stats": {"tokens": 9}}).replace({"self_stats": {"length": 50}})
    assert longer.self_stats == SelfStatsConfig(sequences=2, length=50, opening=0, tokens=9)
    with pytest.raises(ConfigError, match="need learned statistics"):
        CONFIG.replace({"self_stats": None})
    token = PruneConfig.build("dart-token", sparsity=0.7, token={"bits": 8})
    assert token.token == TokenConfig(bits=8, group=32)
    assert token.replace({"token": None}).token is None
    # the preset's budget has no part in the strategy that sets the counts itself
    auto = PruneConfig.build("dart", score={"strategy": "auto"})
    assert (auto.budget.name, auto.score.strategy) == ("uniform", "auto")
    assert PruneConfig(executor="slim").executor == "native", "the earlier name"
