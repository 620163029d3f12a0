"""All methods, and the listing of everything that can be chosen by name.

``dart-llm methods`` prints the first paragraph of the text below each method.  The formulas are in
the modules of the scores, budgets and rules, and in docs/reference.md.  That page also says how
bytes are counted, and which parts of their papers the per-token methods do not implement.
"""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path
from typing import Any

from dart_llm.pruning.config import (
    DEFAULT_METHOD,
    BudgetConfig,
    CalibrationConfig,
    DriftConfig,
    PruneConfig,
    RemaskConfig,
    ScoreConfig,
    SelfStatsConfig,
    TokenConfig,
)
from dart_llm.pruning.registry import BUDGETS, DRIFT_RULES, METHODS, SCORES, TOKEN_RULES, Registry


def _per_token(rule: str, learned: SelfStatsConfig | None = None, **options: Any) -> PruneConfig:
    """Per-token selection by ``rule``, without evidence from the prompt."""
    return PruneConfig(
        method=rule,
        score=ScoreConfig(name="weight"),  # not used; this score needs no observed tokens
        self_stats=learned,
        token=TokenConfig(rule=rule, **options),
    )


CATS = _per_token("cats")
"""CATS (arXiv 2404.08763): each token selects the neurons with the largest gate outputs."""

COUNTDOWN = _per_token("countdown")
"""CountDown (arXiv 2505.17701), variant M: each token selects neurons by its up projection."""

DART = PruneConfig(
    method="dart",
    score=ScoreConfig(name="fisher"),
    budget=BudgetConfig(name="ranked"),
    drift=DriftConfig(
        rule="dart", signal="hidden", min_distance=64, max_dense_share=0.05, allowance=32
    ),
    remask=RemaskConfig(evidence="decay", decay=0.1, observe_tokens=32),
    self_stats=SelfStatsConfig(tokens=32),
    min_evidence=16,
    skip_sinks=True,
    compensation=True,
    compensation_rank=32,
)
"""DART for LLMs: one mask per sequence, rebuilt on drift.

Fisher scores (arXiv 2204.09656), from activations of the prompt and from gradients that are learned
once from self-generated text, rank the neurons of all layers together.  Low-rank compensation,
which extends FLAP's mean (arXiv 2312.11983), replaces the removed neurons' output.  When the last
hidden states drift from those that the mask was made from, a new mask is made from new tokens and
decayed older ones.  docs/reference.md has the formulas and the gain from each part.
"""

DART_PROMPT = PruneConfig(
    method="dart-prompt",
    score=ScoreConfig(name="normalized"),
    budget=BudgetConfig(name="blend energy depth"),
    drift=DriftConfig(rule="paper", min_distance=64, max_dense_share=0.10),
    remask=RemaskConfig(evidence="decay", decay=0.1, observe_tokens=32),
    min_evidence=64,
    compensation=True,
)
"""DART for LLMs from the prompt alone, without statistics that are learned in advance."""

DART_TOKEN = PruneConfig(
    method="dart-token",
    score=ScoreConfig(name="fisher"),
    self_stats=SelfStatsConfig(tokens=32),
    skip_sinks=True,
    compensation=True,
    token=TokenConfig(bits=4, group=32),
)
"""Token-level tracing: every token computes only its own strongest neurons.

4-bit proxies (rough copies) of gate and up estimate the activations u~.  Neurons are ranked by
``abs(u~_i)`` times the root of the loss's mean squared gradient with respect to u_i, which is
learned once from self-generated text.  The neurons that a token selects are computed from the
model's weights.  The activation of each other neuron is replaced by the neuron's mean over tokens
that do not select the neuron.  The selection follows Prox (arXiv 2607.27591) and WINA (arXiv
2505.19427).  Every layer keeps the same share.  There is no drift rule, because there is no mask
that could become outdated.
"""

DENSE = PruneConfig(method="dense", sparsity=0.0)
"""Dense: nothing is removed.  This is the baseline of every comparison."""

FLAP = PruneConfig(
    method="flap",
    score=ScoreConfig(name="flap"),
    budget=BudgetConfig(name="standardized"),
    calibration=CalibrationConfig(source="text", sequences=128, length=256, purpose="masks"),
    compensation=True,
)
"""FLAP (arXiv 2312.11983): static masks from a calibration text, with compensation."""

GATE = _per_token("gate", SelfStatsConfig())
"""Like CATS, but each gate output is multiplied by the learned size of the up projection and by the
norm of the output column."""

GLASS = PruneConfig(
    method="glass",
    score=ScoreConfig(name="normalized", prior_weight=0.5),
    calibration=CalibrationConfig(source="self", sequences=64, length=128, purpose="prior"),
)
"""GLASS (arXiv 2508.14302): the mean of GRIFFIN's ranking of neurons and a global ranking."""

GRIFFIN = PruneConfig(method="griffin", score=ScoreConfig(name="normalized"))
"""GRIFFIN (arXiv 2404.01365): the prompt's normalised activations select neurons, once."""

GRIFFIN_REFRESH = PruneConfig(
    method="griffin-refresh",
    score=ScoreConfig(name="normalized"),
    drift=DriftConfig(rule="interval 64"),
    remask=RemaskConfig(evidence="fresh", observe_tokens=16),
)
"""GRIFFIN (arXiv 2404.01365), with a new mask from 16 dense tokens after every 64 pruned ones."""

PROX = _per_token("prox", bits=4, group=32, inputs=0.5)
"""Prox (arXiv 2607.27591): tokens select neurons by low-bit estimates from the largest inputs.

The paper has no public code.  This is its idea with this project's proxies and half of the inputs.
"""

PUBLISHED = PruneConfig(
    method="published",
    score=ScoreConfig(name="magnitude", proxy_embedding="input"),
    budget=BudgetConfig(name="depth"),
    drift=DriftConfig(rule="published"),
    remask=RemaskConfig(evidence="fresh"),
)
"""DART as its scripts were published (arXiv 2601.22632), with their defects fixed."""

RANDOM = PruneConfig(method="random", score=ScoreConfig(name="random"))
"""Random: a seeded random subset of neurons, which every method should beat."""

STATIC = PruneConfig(method="static", score=ScoreConfig(name="weight"))
"""Static: neurons are ranked by the norms of their weights, so every text has the same mask."""

TEAL = _per_token("teal")
"""TEAL (arXiv 2408.14690) on the FFNs: each token uses the largest inputs of each matrix; sparsity
is the fraction of inputs dropped.

The inputs of the down projection are the neurons.
"""

TEAL_ATTENTION = _per_token("teal-attention")
"""TEAL (arXiv 2408.14690) on FFNs and attention, as in the paper; sparsity is the fraction of
inputs dropped."""

WANDA = PruneConfig(
    method="wanda",
    score=ScoreConfig(name="wanda"),
    calibration=CalibrationConfig(source="text", sequences=128, length=256, purpose="masks"),
)
"""Wanda (arXiv 2306.11695) for whole neurons: static masks from a calibration text."""

WINA = _per_token("wina")
"""WINA (arXiv 2505.19427) on the FFNs: like TEAL, but inputs are weighted by column norms; sparsity
is the fraction of inputs dropped."""


def _first_paragraphs() -> dict[str, str]:
    """The first paragraph of the string below each constant of this module, by constant name."""
    body = ast.parse(Path(__file__).read_text("utf-8")).body
    return {
        node.targets[0].id: text.value.value.split("\n\n")[0].strip().replace("\n", " ")
        for node, text in pairwise(body)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(text.value.value, str)
    }


def summaries() -> dict[str, str]:
    """One line about each method of this package."""
    lines = {}
    for constant, text in _first_paragraphs().items():
        name = constant.lower().replace("_", "-")
        token = METHODS.get(name).token
        if token is not None and not TOKEN_RULES.get(token.rule).native:
            text = f"{text[:-1]}; without native kernels."
        if name == DEFAULT_METHOD:
            text += "  The default of every command and of prune."
        lines[name] = text
    return lines


def listing() -> dict[str, list[dict[str, str]]]:
    """The name, one-line description and source of everything that can be chosen by name."""

    def entries(table: Registry) -> list[dict[str, str]]:
        return [{"name": name, **_described(table.get(name))} for name in table.names()]

    lines = summaries()
    blend = {"summary": "The mean of two budgets' keep counts.", "source": "this project"}
    return {
        "methods": [
            {"name": name, "summary": lines.get(name, ""), "source": _settings(METHODS.get(name))}
            for name in METHODS.names()
        ],
        "scores": entries(SCORES),
        "budgets": [*entries(BUDGETS), {"name": "blend A B", **blend}],
        "drift_rules": entries(DRIFT_RULES),
        "token_rules": entries(TOKEN_RULES),
    }


def _described(value: Any) -> dict[str, str]:
    """An object's source, and the first line of its docstring (for a score, its function's)."""
    text = getattr(value, "function", value).__doc__ or ""
    return {"summary": text.strip().split("\n")[0], "source": getattr(value, "source", "")}


def _settings(config: PruneConfig) -> str:
    """The main settings of a method, which the listing shows as its source."""
    parts = [f"score {config.score.name}", f"budget {config.budget.name}"]
    parts += [f"drift {config.drift.rule}"] + ["compensation"] * config.compensation
    parts += [f"token rule {config.token.rule}"] if config.token is not None else []
    return ", ".join(parts)
