"""All names that you need to add scores, budgets, drift or token rules, methods or architectures.

For example: ``from dart_llm.extend import SCORES, score``.
"""

from __future__ import annotations

from dart_llm.models.architectures import LayerNames
from dart_llm.pruning.budgets import LayerView, budget
from dart_llm.pruning.config import PruneConfig
from dart_llm.pruning.drift import Rule
from dart_llm.pruning.registry import BUDGETS, DRIFT_RULES, METHODS, SCORES, TOKEN_RULES
from dart_llm.pruning.scores import score
from dart_llm.pruning.token_rules.rule import LayerCost, TokenRule
from dart_llm.pruning.weights import FfnWeights

__all__ = [
    "BUDGETS",
    "DRIFT_RULES",
    "METHODS",
    "SCORES",
    "TOKEN_RULES",
    "FfnWeights",
    "LayerCost",
    "LayerNames",
    "LayerView",
    "PruneConfig",
    "Rule",
    "TokenRule",
    "budget",
    "score",
]
