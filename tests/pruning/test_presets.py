"""Presets, and how changes are laid on top of them."""

from __future__ import annotations

import pytest

from dart_llm.errors import UnknownName
from dart_llm.pruning.config import (
    CalibrationConfig,
    DriftConfig,
    PriorConfig,
    PruneConfig,
    RemaskConfig,
    ScoreConfig,
    TokenConfig,
)
from dart_llm.pruning.registry import METHODS


def test_replace_changes_only_what_is_named() -> None:
    base = PruneConfig.build("dart")
    changed = PruneConfig.build("dart", sparsity=0.5, drift={"min_distance": 8}, remask="fresh")
    assert changed.drift == DriftConfig(
        rule="dart", signal="hidden", min_distance=8, max_dense_share=0.05, allowance=32
    )
    assert changed.remask == RemaskConfig(evidence="fresh", decay=0.1, observe_tokens=32)
    assert (
        changed.replace(
            {"sparsity": None, "drift": base.drift.model_dump(), "remask": base.remask.model_dump()}
        )
        == base
    )
    assert PruneConfig.build("griffin", sparsity=None, seed=None) == PruneConfig.build("griffin")


def test_presets_are_what_the_method_says() -> None:
    assert PruneConfig.build("dart") == PruneConfig(
        method="dart",
        score="fisher",
        budget="ranked",
        drift=DriftConfig(
            rule="dart", signal="hidden", min_distance=64, max_dense_share=0.05, allowance=32
        ),
        remask=RemaskConfig(evidence="decay", decay=0.1, observe_tokens=32),
        prior=PriorConfig(
            sequences=32, length=128, opening=24, temperature=0.8, top_p=0.95, tokens=32
        ),
        min_evidence=16,
        skip_sinks=True,
        compensation=True,
        compensation_rank=32,
    )
    assert PruneConfig.build("dart-prompt") == PruneConfig(
        method="dart-prompt",
        score="normalized",
        budget="blend energy depth",
        drift=DriftConfig(rule="paper", min_distance=64, max_dense_share=0.10),
        remask=RemaskConfig(evidence="decay", decay=0.1, observe_tokens=32),
        min_evidence=64,
        compensation=True,
    )
    assert PruneConfig.build("griffin") == PruneConfig(method="griffin", score="normalized")
    assert PruneConfig.build("published") == PruneConfig(
        method="published",
        score=ScoreConfig(name="magnitude", proxy_embedding="input"),
        budget="depth",
        drift="published",
    )
    assert PruneConfig.build("griffin-refresh") == PruneConfig(
        method="griffin-refresh",
        drift="interval 64",
        remask=RemaskConfig(evidence="fresh", observe_tokens=16),
    )
    text = CalibrationConfig(source="text", sequences=128, length=256, purpose="masks")
    assert PruneConfig.build("wanda") == PruneConfig(
        method="wanda", score="wanda", calibration=text
    )
    assert PruneConfig.build("flap") == PruneConfig(
        method="flap", score="flap", budget="standardized", calibration=text, compensation=True
    )
    assert PruneConfig.build("glass") == PruneConfig(
        method="glass",
        score=ScoreConfig(name="normalized", prior_weight=0.5),
        calibration=CalibrationConfig(source="self", sequences=64, length=128, purpose="prior"),
    )
    assert PruneConfig.build("random") == PruneConfig(method="random", score="random")
    for bits in (4, 8):
        assert PruneConfig.build(f"dense-{bits}bit") == PruneConfig(
            method=f"dense-{bits}bit", sparsity=0.0, weight_bits=bits
        )
    assert PruneConfig.build("dart-token") == PruneConfig(
        method="dart-token",
        score="fisher",
        prior=PriorConfig(tokens=32),
        skip_sinks=True,
        compensation=True,
        token=TokenConfig(bits=4, group=32, candidates=None),
    )
    assert PruneConfig.build("static") == PruneConfig(method="static", score="weight")
    assert PruneConfig.build("dense") == PruneConfig(method="dense", sparsity=0.0)
    for name in METHODS.names():
        assert PruneConfig.build(name).method == name


def test_an_unknown_method_suggests_the_near_one() -> None:
    with pytest.raises(UnknownName, match=r"unknown method 'grifin'; did you mean griffin"):
        PruneConfig.build("grifin")
