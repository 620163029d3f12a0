"""Wanda (arXiv 2306.11695) for whole neurons: static masks from a calibration text.

The paper's criterion, weight magnitude times activation norm, summed over the weights of a neuron's
output column: ``||w_i||_1 * ||u_i||_2`` over 128 x 256 tokens.  Uniform budget.
"""

from dart_llm.config import BudgetConfig, CalibrationConfig, PruneConfig, ScoreConfig

CONFIG = PruneConfig(
    method="wanda",
    score=ScoreConfig(name="wanda"),
    budget=BudgetConfig(name="uniform"),
    calibration=CalibrationConfig(source="text", sequences=128, length=256, purpose="masks"),
)
