"""Configurations: round trips, ranges, what excludes what, and errors that suggest the mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dart_llm.errors import ConfigError
from dart_llm.pruning.config import (
    DEFAULT_SPARSITY,
    BudgetConfig,
    CalibrationConfig,
    DriftConfig,
    PriorConfig,
    PruneConfig,
    RemaskConfig,
    ScoreConfig,
    TokenConfig,
    check_sparsity,
)
from dart_llm.pruning.registry import BUDGETS, SCORES
from dart_llm.session.run import prune
from prior_cases import CONFIG, SMALL
from steps import shared_model

shares = st.floats(0, 1, exclude_min=True, exclude_max=True)
whole = st.integers(0, 500)
budget_names = st.one_of(
    st.sampled_from(BUDGETS.names()),
    st.tuples(st.sampled_from(BUDGETS.names()), st.sampled_from(BUDGETS.names())).map(
        lambda pair: f"blend {pair[0]} {pair[1]}"
    ),
)
rules = st.one_of(
    st.sampled_from(["never", "published", "paper"]),
    st.integers(1, 999).map(lambda tokens: f"interval {tokens}"),
)


calibrations = st.builds(
    CalibrationConfig,
    source=st.sampled_from(["text", "self"]),
    sequences=st.integers(1, 999),
    length=st.integers(2, 999),
    purpose=st.sampled_from(["masks", "prior"]),
)


priors = st.builds(
    PriorConfig,
    sequences=st.integers(1, 999),
    length=st.integers(30, 999),
    opening=st.integers(0, 29),
    temperature=st.floats(0.01, 9),
    top_p=st.floats(0.01, 1),
    tokens=st.integers(0, 999),
)


@st.composite
def configs(draw: st.DrawFn) -> PruneConfig:
    table = draw(st.sampled_from([None, "all:auto", "0-1:auto,2:#5", "all:0.5"]))
    fixed = table == "all:0.5"
    masking = draw(whole)
    calibration = draw(st.none() | calibrations)
    mixed = calibration is not None and calibration.purpose == "prior"
    prior = draw(st.none() | priors)
    sparsity = None if fixed else draw(st.none() | st.just(0.0) | shares)
    return PruneConfig(
        method=draw(st.sampled_from(["dart", "griffin", "mine"])),
        sparsity=sparsity,
        score=ScoreConfig(
            name=draw(st.sampled_from(SCORES.names())),
            ema_decay=draw(st.none() | shares),
            proxy_embedding=draw(st.sampled_from(["output", "input"])),
            prior_weight=draw(st.floats(0, 1)) if mixed else None,
        ),
        budget=BudgetConfig(
            name=draw(budget_names),
            table=table,
            multiple=draw(st.integers(1, 128)),
            refresh=draw(st.sampled_from(["first", "every"])),
        ),
        drift=DriftConfig(
            rule=draw(rules), min_distance=draw(whole), max_dense_share=draw(st.none() | shares)
        ),
        remask=RemaskConfig(
            evidence=draw(st.sampled_from(["fresh", "decay"])),
            decay=draw(shares),
            observe_tokens=draw(st.none() | st.integers(1, 99)),
        ),
        calibration=calibration,
        weight_bits=draw(st.sampled_from([None, 4, 8])) if sparsity == 0 else None,
        masking_step=masking,
        release_step=draw(st.none() | st.integers(masking + 1, 1000)),
        min_evidence=draw(whole),
        compensation=draw(st.booleans()),
        prior=prior,
        compensation_rank=draw(st.sampled_from([0, 8])) if prior else 0,
        skip_sinks=draw(st.booleans()) if prior else False,
        batch=draw(st.sampled_from(["shared", "per_row"])),
        executor=draw(st.sampled_from(["auto", "masked"])),
        seed=draw(whole),
    )


@pytest.mark.contract("every parser round-trips")
@settings(deadline=None)
@given(configs())
def test_round_trips(tmp_path_factory: pytest.TempPathFactory, config: PruneConfig) -> None:
    data = config.to_dict()
    assert PruneConfig.from_mapping(data) == config
    assert PruneConfig.from_mapping(json.loads(json.dumps(data))) == config
    path = tmp_path_factory.mktemp("configs") / "run.yaml"
    config.save(path)
    assert PruneConfig.load(path) == config
    assert PruneConfig.build(config) == config
    assert config.replace({}) == config


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n", encoding="utf-8")
    assert PruneConfig.load(path) == PruneConfig()


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"sparsity": 1.0}, ["sparsity 1", "[0, 1)"]),
    ({"sparsity": -0.1}, ["sparsity -0.1", "[0, 1)"]),
    ({"sparsity": 50}, ["sparsity 50", "did you mean 0.5?"]),
    ({"sparsity": float("nan")}, ["sparsity nan", "[0, 1)"]),
    ({"sparsity": float("inf")}, ["sparsity inf", "[0, 1)"]),
    ({"sparsity": "half"}, ["sparsity", "'half'"]),
    ({"masking_step": -1}, ["masking step -1", "negative"]),
    ({"masking_step": 1.5}, ["masking_step", "1.5", "integer"]),
    ({"release_step": 0}, ["release step 0", "masking step 0"]),
    ({"masking_step": 8, "release_step": 8}, ["release step 8", "masking step 8"]),
    ({"min_evidence": -1}, ["min_evidence -1", "negative"]),
    ({"score": {"ema_decay": 0}}, ["ema_decay 0", "strictly between 0 and 1"]),
    ({"score": {"ema_decay": 1}}, ["ema_decay 1", "strictly between 0 and 1"]),
    ({"score": {"ema_decay": float("nan")}}, ["ema_decay nan"]),
    ({"score": {"strategy": "best"}}, ["strategy", "'best'", "'topk' or 'auto'"]),
    ({"score": {"proxy_embedding": "both"}}, ["proxy_embedding", "'output' or 'input'"]),
    ({"budget": {"multiple": 0}}, ["multiple 0", "at least 1"]),
    ({"budget": {"table": "0:1.5"}}, ['"0:1.5"', "(0, 1]"]),
    ({"budget": {"name": ""}}, ['""', "not a budget"]),
    ({"budget": {"name": "energy depth"}}, ['"energy depth"', "blend A B"]),
    ({"budget": {"name": "blend energy"}}, ['"blend energy"', "blend energy depth"]),
    ({"budget": {"name": "blend a b c"}}, ['"blend a b c"', "two budgets"]),
    ({"budget": {"refresh": "never"}}, ["refresh", "'first' or 'every'"]),
    ({"drift": {"rule": "interval"}}, ['"interval"', '"interval N"']),
    ({"drift": {"rule": "paper 5"}}, ['"paper 5"', "no other rule takes a number"]),
    ({"drift": {"rule": "interval 0"}}, ['"interval 0"', ">= 1"]),
    ({"drift": {"rule": "interval -4"}}, ['"interval -4"', ">= 1"]),
    ({"drift": {"rule": "interval 2.5"}}, ['"interval 2.5"', "whole number"]),
    ({"drift": {"min_distance": -1}}, ["min_distance -1"]),
    ({"drift": {"max_dense_share": 0}}, ["max_dense_share 0", "(0, 1]"]),
    ({"drift": {"max_dense_share": 1.1}}, ["max_dense_share 1.1", "(0, 1]"]),
    ({"remask": {"decay": 0}}, ["decay 0", "(0, 1]"]),
    ({"remask": {"decay": 1.01}}, ["decay 1.01", "(0, 1]"]),
    ({"remask": {"observe_tokens": 0}}, ["observe_tokens 0", "at least 1"]),
    ({"score": {"prior_weight": 1.5}}, ["prior_weight 1.5", "[0, 1]"]),
    ({"score": {"prior_weight": 0.5}}, ["prior_weight", "belong together"]),
    ({"calibration": {"purpose": "prior"}}, ["prior_weight", "belong together"]),
    ({"calibration": {"sequences": 0}}, ["sequences 0", "at least 1"]),
    ({"calibration": {"length": 1}}, ["length 1", "at least 2"]),
    ({"calibration": "hub"}, ["source", "'text' or 'self'"]),
    ({"weight_bits": 5, "sparsity": 0.0}, ["weight_bits", "4 or 8"]),
    ({"weight_bits": 4, "sparsity": 0.5}, ["weight_bits 4", "drop the sparsity"]),
    ({"weight_bits": 4}, ["weight_bits 4", "drop the sparsity"]),
    ({"batch": "each"}, ["batch", "'shared' or 'per_row'"]),
    ({"executor": "fast"}, ["executor", "'masked'"]),
    ({"executor": "compact", "batch": "per_row"}, ['"per_row"', '"masked" or "auto"']),
    ({"score": 3}, ["score", "3"]),
    # what sets the counts twice
    ({"sparsity": 0.5, "budget": {"table": "all:0.5"}}, ['"all:0.5"', "drop the sparsity"]),
    ({"sparsity": 0.0, "budget": {"table": "0:#5"}}, ['"0:#5"', "drop the sparsity"]),
    ({"sparsity": 0.5, "score": {"strategy": "auto"}}, ['strategy "auto"', "drop the sparsity"]),
    (
        {"score": {"strategy": "auto"}, "budget": {"table": "all:auto"}},
        ['strategy "auto"', "drop the layer table"],
    ),
    # names
    ({"sparsty": 0.5}, ['unknown setting "sparsty" in PruneConfig', 'mean "sparsity"?']),
    ({"compensate": True}, ['"compensate"', 'did you mean "compensation"?']),
    ({"score": {"nam": "mean"}}, ['unknown setting "nam"', 'did you mean "name"?']),
    ({"score": {"ema": 0.5, "ema_decays": 0.5}}, ['"ema"', 'did you mean "ema_decay"?']),
    ({"drift": {"min_distanz": 4}}, ['"min_distanz"', 'did you mean "min_distance"?']),
    ({"prior": {"lenght": 3}}, ['"lenght" in PriorConfig', 'did you mean "length"?']),
    ({"token": {"candidate": 0.5}}, ['did you mean "candidates"?']),
    ({"budget": {"zzz": 1}}, ["known settings: multiple, name, refresh, table"]),
    ({"score": "normalised"}, ["unknown score", "normalized"]),
    ({"budget": "energie"}, ["unknown budget", "energy"]),
    ({"budget": "blend energy dept"}, ["unknown budget", "depth"]),
    ({"drift": "publised"}, ["unknown drift rule", "published"]),
    ({"drift": "intervall 5"}, ["unknown drift rule", "interval"]),
    # priors and what needs them
    ({"skip_sinks": True}, ["skip_sinks needs a prior: give prior={} too"]),
    (
        {"compensation_rank": 8, "compensation": True},
        ["compensation_rank 8 needs a prior: give prior={} too"],
    ),
    ({"compensation_rank": -1, "prior": {}}, ["compensation_rank -1 must not be negative"]),
    ({"compensation_rank": 1.5}, ["compensation_rank = 1.5: "]),
    (
        {"compensation_rank": 8, "prior": {}, "token": {}},
        ["tokens that choose their own neurons have no low-rank compensation"],
    ),
    ({"prior": 3}, ["prior = 3: "]),
    ({"prior": {"sequences": 0}}, ["prior: sequences 0 must be at least 1"]),
    ({"prior": {"length": 15}}, ["prior: length 15 must be at least 16"]),
    ({"prior": {"length": "long"}}, ["length = 'long': "]),
    ({"prior": {"opening": -1}}, ["prior: opening -1 must be at least 0"]),
    ({"prior": {"opening": 128}}, ["prior: opening 128 must be less than length 128"]),
    ({"prior": {"length": 16}}, ["prior: opening 24 must be less than length 16"]),
    ({"prior": {"tokens": -1}}, ["prior: tokens -1 must be at least 0"]),
    ({"prior": {"temperature": 0}}, ["prior: temperature 0.0 must be more than 0"]),
    ({"prior": {"temperature": float("nan")}}, ["prior: temperature nan must be more than 0"]),
    ({"prior": {"top_p": 0}}, ["prior: top_p 0.0 must lie in (0, 1]"]),
    ({"prior": {"top_p": 1.5}}, ["prior: top_p 1.5 must lie in (0, 1]"]),
    # tokens that choose
    ({"token": {"bits": 5}}, ["bits = 5"]),
    ({"token": {"group": 0}}, ["group 0 must be at least 1"]),
    ({"token": {"candidates": 0.0}}, ["candidates 0 must lie in (0, 1]"]),
    ({"token": {"candidates": 1.5}}, ["candidates 1.5 must lie in (0, 1]"]),
    ({"token": {"candidates": 0.2}, "sparsity": 0.7}, ["at least 0.3, or None"]),
    ({"token": {"candidates": 0.5}}, ["sparsity 0.1 keeps: give at least 0.9"]),
]


@pytest.mark.parametrize(("data", "parts"), REFUSED, ids=[str(data) for data, _ in REFUSED])
def test_refused(data: dict[str, Any], parts: list[str]) -> None:
    """Whichever way a configuration is made, in one line that says how to mend it."""
    makers: tuple[Any, ...] = (PruneConfig.from_mapping, lambda d: PruneConfig(**d))
    for make in makers:
        with pytest.raises(ConfigError) as caught:
            make(data)
        assert "\n" not in str(caught.value)
        assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        {"sparsity": 0.0},
        {"sparsity": 0.999},
        {"masking_step": 0, "release_step": 1},
        {"score": {"ema_decay": 0.001}},
        {"drift": {"rule": "interval 1", "max_dense_share": 1}},
        {"remask": {"decay": 1, "observe_tokens": 1}},
        {"budget": {"multiple": 1}},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(data: dict[str, Any]) -> None:
    assert PruneConfig.from_mapping(data).sparsity == data.get("sparsity")


def test_what_sets_the_counts_once_is_accepted() -> None:
    assert PruneConfig(sparsity=0.5, budget={"table": "0:0.5,1-3:auto"}).target == 0.5
    assert PruneConfig(budget={"table": "all:0.5"}).sparsity is None
    assert PruneConfig(score={"strategy": "auto"}).sparsity is None
    assert PruneConfig().target == DEFAULT_SPARSITY
    assert PruneConfig(sparsity=0.0).target == 0.0


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"score": "contribution"}, {"score": {"name": "contribution"}}),
        ({"budget": "blend energy depth"}, {"budget": {"name": "blend energy depth"}}),
        ({"drift": "interval 8"}, {"drift": {"rule": "interval 8"}}),
        ({"remask": "decay"}, {"remask": {"evidence": "decay"}}),
        ({"calibration": "self"}, {"calibration": {"source": "self"}}),
    ],
)
def test_a_part_may_be_its_name(short: dict[str, Any], long: dict[str, Any]) -> None:
    assert PruneConfig(**short) == PruneConfig(**long) == PruneConfig.from_mapping(short)


def test_configurations_are_frozen() -> None:
    config = PruneConfig()
    with pytest.raises(ValidationError):
        config.sparsity = 0.5  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.score.name = "mean"  # type: ignore[misc]
    assert config == PruneConfig()


def test_check_sparsity() -> None:
    assert check_sparsity(0.0) == 0.0
    assert check_sparsity(0.5) == 0.5
    with pytest.raises(ConfigError, match=r"did you mean 0\.2\?"):
        check_sparsity(20)
    with pytest.raises(ConfigError, match="sparsity 100 must") as caught:
        check_sparsity(100)
    assert "did you mean" not in str(caught.value)


def test_strategy_auto_drops_the_presets_budget_and_refuses_one_of_its_own():
    config = PruneConfig.build("dart", score={"strategy": "auto"})
    assert (config.budget.name, config.score.strategy) == ("uniform", "auto")
    with pytest.raises(ConfigError, match='drop the budget "energy"'):
        PruneConfig.build("dart", score={"strategy": "auto"}, budget="energy")


# priors


def test_a_score_that_learns_without_a_prior() -> None:
    for more in ({}, {"sparsity": 0.0}):
        with pytest.raises(ConfigError, match=r'^score "fisher" needs a prior: give prior=\{\} to'):
            prune(shared_model(), "griffin", score="fisher", **more)


def test_the_ends_of_a_priors_ranges_are_allowed() -> None:
    part = PriorConfig(sequences=1, length=16, opening=15, temperature=1e-3, top_p=1, tokens=0)
    assert PruneConfig(prior=part, compensation_rank=0, skip_sinks=True).prior == part
    assert PruneConfig(token={}, prior={}, skip_sinks=True).token is not None
    assert PruneConfig(prior={}).prior == PriorConfig(
        sequences=32, length=128, opening=24, tokens=32, temperature=0.8, top_p=0.95
    )


def test_partial_mappings_change_only_what_they_hold() -> None:
    found = CONFIG.replace({"prior": {"tokens": 9}})
    assert found.prior == PriorConfig(**SMALL, tokens=9)
    longer = PriorConfig(sequences=2, length=50, opening=0, tokens=9)
    assert found.replace({"prior": {"length": 50}}).prior == longer
    assert CONFIG.replace({"prior": {}}) == CONFIG
    assert PruneConfig().replace({"prior": {"tokens": 9}}).prior == PriorConfig(tokens=9)
    assert PruneConfig.build(CONFIG, prior={"top_p": 0.5}).prior == PriorConfig(**SMALL, top_p=0.5)
    with pytest.raises(ConfigError, match="needs a prior"):
        CONFIG.replace({"prior": None})
    token = PruneConfig.build("dart-token", sparsity=0.7, token={"bits": 8})
    assert token.token == TokenConfig(bits=8, group=32)
    assert token.replace({"token": {"candidates": 0.5}}).token == TokenConfig(
        bits=8, group=32, candidates=0.5
    )
    assert PruneConfig.build("griffin", token={"group": 16}).token == TokenConfig(group=16)
    assert token.replace({"token": None}).token is None
