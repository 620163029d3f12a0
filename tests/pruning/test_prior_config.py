"""Settings of priors, low-rank compensation and sinks: ranges, what needs what, round trips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PriorConfig, PruneConfig
from dart_llm.session.run import prune
from prior_cases import CONFIG, SMALL
from steps import shared_model


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"skip_sinks": True}, "skip_sinks needs a prior: give prior={} too"),
        ({"compensation_rank": 8}, "compensation_rank 8 needs a prior: give prior={} too"),
        (
            {"compensation_rank": 8, "compensation": True},
            "compensation_rank 8 needs a prior: give prior={} too",
        ),
        (
            {"compensation_rank": 8, "skip_sinks": True},
            "compensation_rank 8 needs a prior: give prior={} too",
        ),
        ({"compensation_rank": -1}, "compensation_rank -1 must not be negative"),
        ({"compensation_rank": -1, "prior": {}}, "compensation_rank -1 must not be negative"),
        (
            {"compensation_rank": 8, "prior": {}, "token": {}},
            "tokens that choose their own neurons have no low-rank compensation: drop "
            "compensation_rank",
        ),
        ({"prior": {"sequences": 0}}, "prior: sequences 0 must be at least 1"),
        ({"prior": {"length": 15}}, "prior: length 15 must be at least 16"),
        ({"prior": {"opening": -1}}, "prior: opening -1 must be at least 0"),
        ({"prior": {"opening": 128}}, "prior: opening 128 must be less than length 128"),
        ({"prior": {"length": 16}}, "prior: opening 24 must be less than length 16"),
        ({"prior": {"tokens": -1}}, "prior: tokens -1 must be at least 0"),
        ({"prior": {"temperature": 0}}, "prior: temperature 0.0 must be more than 0"),
        ({"prior": {"temperature": -2}}, "prior: temperature -2.0 must be more than 0"),
        ({"prior": {"temperature": float("nan")}}, "prior: temperature nan must be more than 0"),
        ({"prior": {"top_p": 0}}, "prior: top_p 0.0 must lie in (0, 1]"),
        ({"prior": {"top_p": 1.5}}, "prior: top_p 1.5 must lie in (0, 1]"),
        ({"prior": {"top_p": float("nan")}}, "prior: top_p nan must lie in (0, 1]"),
        (
            {"prior": {"sequence": 3}},
            'unknown setting "sequence" in PriorConfig; did you mean "sequences"?',
        ),
        (
            {"prior": {"lenght": 3}},
            'unknown setting "lenght" in PriorConfig; did you mean "length"?',
        ),
        (
            {"prior": {"zzz": 3}},
            'unknown setting "zzz" in PriorConfig; known settings: length, opening, sequences, '
            "temperature, tokens, top_p",
        ),
        ({"priors": {}}, 'unknown setting "priors" in PruneConfig; did you mean "prior"?'),
        (
            {"skip_sink": True},
            'unknown setting "skip_sink" in PruneConfig; did you mean "skip_sinks"?',
        ),
        (
            {"compensation_ranks": 3},
            'unknown setting "compensation_ranks" in PruneConfig; did you mean '
            '"compensation_rank"?',
        ),
    ],
)
def test_refusals(data: dict[str, Any], said: str) -> None:
    for make in (PruneConfig.from_mapping, lambda d: PruneConfig(**d)):
        with pytest.raises(ConfigError) as caught:
            make(data)
        assert str(caught.value) == said
    with pytest.raises(ConfigError) as caught:
        PruneConfig.build("griffin", **data)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("data", "start"),
    [
        ({"prior": {"sequences": 2.5}}, "sequences = 2.5: "),
        ({"prior": {"length": "long"}}, "length = 'long': "),
        ({"prior": 3}, "prior = 3: "),
        ({"compensation_rank": 1.5}, "compensation_rank = 1.5: "),
        ({"skip_sinks": "perhaps"}, "skip_sinks = 'perhaps': "),
    ],
)
def test_values_of_another_kind(data: dict[str, Any], start: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PruneConfig.from_mapping(data)
    assert str(caught.value).startswith(start) and "\n" not in str(caught.value)


def test_a_score_that_learns_without_a_prior() -> None:
    with pytest.raises(ConfigError, match=r'^score "fisher" needs a prior: give prior=\{\} too$'):
        prune(shared_model(), "griffin", score="fisher")
    with pytest.raises(ConfigError, match="needs a prior"):
        prune(shared_model(), "griffin", score="fisher", sparsity=0.0)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    part = PriorConfig(sequences=1, length=16, opening=15, temperature=1e-3, top_p=1, tokens=0)
    assert PruneConfig(prior=part, compensation_rank=0, skip_sinks=True).prior == part
    assert PruneConfig(compensation_rank=0).prior is None
    assert PruneConfig(token={}, prior={}, skip_sinks=True).token is not None


def test_defaults() -> None:
    part = PriorConfig()
    assert (part.sequences, part.length, part.opening, part.tokens) == (32, 128, 24, 32)
    assert (part.temperature, part.top_p) == (0.8, 0.95)
    assert PruneConfig(prior={}).prior == part
    config = PruneConfig()
    assert (config.prior, config.compensation_rank, config.skip_sinks) == (None, 0, False)


def test_partial_mappings_change_only_what_they_hold() -> None:
    found = CONFIG.replace({"prior": {"tokens": 9}})
    assert found.prior == PriorConfig(**SMALL, tokens=9)
    assert found.replace({"prior": {"length": 50}}).prior == PriorConfig(
        sequences=2, length=50, opening=0, tokens=9
    )
    assert CONFIG.replace({"prior": {}}) == CONFIG
    assert PruneConfig().replace({"prior": {"tokens": 9}}).prior == PriorConfig(tokens=9)
    assert PruneConfig.build(CONFIG, prior={"top_p": 0.5}).prior == PriorConfig(**SMALL, top_p=0.5)
    whole = PriorConfig(tokens=1)
    assert CONFIG.replace({"prior": whole}).prior == whole
    without = CONFIG.replace(
        {"prior": None, "skip_sinks": False, "compensation_rank": 0, "score": "normalized"}
    )
    assert without.prior is None and without.budget.name == "ranked"
    with pytest.raises(ConfigError, match="needs a prior"):
        CONFIG.replace({"prior": None})


priors = st.builds(
    PriorConfig,
    sequences=st.integers(1, 999),
    length=st.integers(30, 999),
    opening=st.integers(0, 29),
    temperature=st.floats(0.01, 9),
    top_p=st.floats(0.01, 1),
    tokens=st.integers(0, 999),
)


@settings(deadline=None, max_examples=50)
@given(priors, st.integers(0, 500), st.booleans(), st.booleans())
def test_round_trips(
    tmp_path_factory: pytest.TempPathFactory, prior: PriorConfig, rank: int, skip: bool, some: bool
) -> None:
    config = PruneConfig(
        sparsity=0.5, prior=prior, compensation_rank=rank, skip_sinks=skip, compensation=some
    )
    data = config.to_dict()
    assert data["prior"] == prior.model_dump() and data["compensation_rank"] == rank
    assert PruneConfig.from_mapping(json.loads(json.dumps(data))) == config
    path: Path = tmp_path_factory.mktemp("configs") / "run.yaml"
    config.save(path)
    assert PruneConfig.load(path) == config
    assert config.replace({}) == config
