"""GRIFFIN (arXiv 2404.01365): the prompt's normalised activations choose, once.

Uniform budget, never a re-mask.
"""

from dart_llm.config import BudgetConfig, DriftConfig, PruneConfig, ScoreConfig

CONFIG = PruneConfig(
    method="griffin",
    score=ScoreConfig(name="normalized"),
    budget=BudgetConfig(name="uniform"),
    drift=DriftConfig(rule="never"),
)
