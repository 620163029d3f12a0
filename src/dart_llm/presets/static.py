"""Static: neurons ranked by the norms of their weights; the same mask for every text.

The classical magnitude-pruning baseline, for whole neurons: uniform budget, no activations.
"""

from dart_llm.config import BudgetConfig, PruneConfig, ScoreConfig

CONFIG = PruneConfig(
    method="static", score=ScoreConfig(name="weight"), budget=BudgetConfig(name="uniform")
)
