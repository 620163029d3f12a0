"""GLASS (arXiv 2508.14302): GRIFFIN's prompt statistic and a global prior, by mean rank.

The prior is the same statistic over 64 sequences of 128 tokens that the model writes itself.
``score={"prior_weight": w}``: 0 is GRIFFIN, 1 the prior alone.  Uniform budget, never a re-mask.
"""

from dart_llm.config import BudgetConfig, CalibrationConfig, PruneConfig, ScoreConfig

CONFIG = PruneConfig(
    method="glass",
    score=ScoreConfig(name="normalized", prior_weight=0.5),
    budget=BudgetConfig(name="uniform"),
    calibration=CalibrationConfig(source="self", sequences=64, length=128, purpose="prior"),
)
