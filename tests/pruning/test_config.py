"""Configurations: round trips, ranges, what excludes what, and errors that suggest the mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.pruning.config import (
    DEFAULT_SPARSITY,
    BudgetConfig,
    CalibrationConfig,
    DriftConfig,
    PruneConfig,
    RemaskConfig,
    ScoreConfig,
    check_sparsity,
)
from dart_llm.pruning.registry import BUDGETS, SCORES

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


@st.composite
def configs(draw: st.DrawFn) -> PruneConfig:
    table = draw(st.sampled_from([None, "all:auto", "0-1:auto,2:#5", "all:0.5"]))
    fixed = table == "all:0.5"
    masking = draw(whole)
    calibration = draw(st.none() | calibrations)
    prior = calibration is not None and calibration.purpose == "prior"
    sparsity = None if fixed else draw(st.none() | st.just(0.0) | shares)
    return PruneConfig(
        method=draw(st.sampled_from(["dart", "griffin", "mine"])),
        sparsity=sparsity,
        score=ScoreConfig(
            name=draw(st.sampled_from(SCORES.names())),
            ema_decay=draw(st.none() | shares),
            proxy_embedding=draw(st.sampled_from(["output", "input"])),
            prior_weight=draw(st.floats(0, 1)) if prior else None,
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
        batch=draw(st.sampled_from(["shared", "per_row"])),
        executor=draw(st.sampled_from(["auto", "masked"])),
        seed=draw(whole),
    )


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


@pytest.mark.parametrize(
    ("data", "wrong", "near"),
    [
        ({"sparsty": 0.5}, "sparsty", "sparsity"),
        ({"masking_steps": 1}, "masking_steps", "masking_step"),
        ({"compensate": True}, "compensate", "compensation"),
        ({"score": {"nam": "mean"}}, "nam", "name"),
        ({"score": {"ema": 0.5, "ema_decays": 0.5}}, "ema", "ema_decay"),
        ({"budget": {"tabel": "all:0.5"}}, "tabel", "table"),
        ({"drift": {"rules": "never"}}, "rules", "rule"),
        ({"drift": {"min_distanz": 4}}, "min_distanz", "min_distance"),
        ({"remask": {"evidense": "fresh"}}, "evidense", "evidence"),
        ({"remask": {"observed_tokens": 4}}, "observed_tokens", "observe_tokens"),
    ],
)
def test_an_unknown_key_suggests_the_near_one(data: dict[str, Any], wrong: str, near: str) -> None:
    for make in (PruneConfig.from_mapping, lambda d: PruneConfig.build("griffin", **d)):
        with pytest.raises(ConfigError) as caught:
            make(data)
        assert f'unknown setting "{wrong}"' in str(caught.value)
        assert f'did you mean "{near}"?' in str(caught.value)


def test_an_unknown_key_with_no_near_one_lists_all() -> None:
    with pytest.raises(ConfigError, match="known settings: multiple, name, refresh, table"):
        PruneConfig.from_mapping({"budget": {"zzz": 1}})


@pytest.mark.parametrize(
    ("data", "parts"),
    [
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
    ],
)
def test_out_of_range(data: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        PruneConfig.from_mapping(data)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


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


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (
            {"sparsity": 0.5, "budget": {"table": "all:0.5"}},
            ['"all:0.5"', "drop the sparsity", '"auto"'],
        ),
        ({"sparsity": 0.0, "budget": {"table": "0:#5"}}, ['"0:#5"', "drop the sparsity"]),
        (
            {"sparsity": 0.5, "score": {"strategy": "auto"}},
            ['strategy "auto"', "drop the sparsity"],
        ),
        (
            {"score": {"strategy": "auto"}, "budget": {"table": "all:auto"}},
            ['strategy "auto"', "drop the layer table"],
        ),
    ],
)
def test_what_sets_the_counts_twice_is_refused(data: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        PruneConfig.from_mapping(data)
    for part in parts:
        assert part in str(caught.value)


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


@pytest.mark.parametrize(
    ("data", "kind", "near"),
    [
        ({"score": "normalised"}, "score", "normalized"),
        ({"budget": "energie"}, "budget", "energy"),
        ({"budget": "blend energy dept"}, "budget", "depth"),
        ({"drift": "publised"}, "drift rule", "published"),
        ({"drift": "intervall 5"}, "drift rule", "interval"),
    ],
)
def test_unknown_names_suggest_the_near_one(data: dict[str, Any], kind: str, near: str) -> None:
    with pytest.raises(UnknownName) as caught:
        PruneConfig.from_mapping(data)
    assert f"unknown {kind}" in str(caught.value)
    assert near in str(caught.value)


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
