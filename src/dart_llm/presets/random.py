"""Random: neurons are drawn by lot, from the seed; the floor under every other method.

The same mask for every text, uniform budget, never a re-mask.
"""

from dart_llm.config import BudgetConfig, PruneConfig, ScoreConfig

CONFIG = PruneConfig(
    method="random", score=ScoreConfig(name="random"), budget=BudgetConfig(name="uniform")
)
