"""GRIFFIN (arXiv 2404.01365), chosen anew every 64 pruned tokens from 16 dense ones.

Only the newly observed tokens count.  Another period N is ``--drift "interval N"``.  The dense
tokens lower the achieved sparsity, which the report gives.
"""

from dart_llm.config import BudgetConfig, DriftConfig, PruneConfig, RemaskConfig, ScoreConfig

CONFIG = PruneConfig(
    method="griffin-refresh",
    score=ScoreConfig(name="normalized"),
    budget=BudgetConfig(name="uniform"),
    drift=DriftConfig(rule="interval 64"),
    remask=RemaskConfig(evidence="fresh", observe_tokens=16),
)
