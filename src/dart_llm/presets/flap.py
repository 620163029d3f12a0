"""FLAP (arXiv 2312.11983): static masks from a calibration text, with compensation.

``Var(u_i) * ||w_i||_2^2`` over 128 x 256 tokens, standardised per layer and ranked over all layers
at once; at least 10 % of a layer stay.  The paper prunes attention heads too; this does not.
"""

from dart_llm.config import BudgetConfig, CalibrationConfig, PruneConfig, ScoreConfig

CONFIG = PruneConfig(
    method="flap",
    score=ScoreConfig(name="flap"),
    budget=BudgetConfig(name="standardized"),
    calibration=CalibrationConfig(source="text", sequences=128, length=256, purpose="masks"),
    compensation=True,
)
