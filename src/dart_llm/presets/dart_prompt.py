"""DART for LLMs from the prompt alone: nothing is learnt of the model beforehand.

The first default of this project.

GRIFFIN's scores (arXiv 2404.01365), the mean of the energy and the depth budget, the paper's drift
rule (arXiv 2601.22632) with guards, decayed evidence, and compensation after FLAP
(arXiv 2312.11983).  docs/method.md has the formulas and the measurements behind each choice.
"""

from dart_llm.config import BudgetConfig, DriftConfig, PruneConfig, RemaskConfig, ScoreConfig

CONFIG = PruneConfig(
    method="dart-prompt",
    score=ScoreConfig(name="normalized"),
    budget=BudgetConfig(name="blend energy depth"),
    drift=DriftConfig(rule="paper", min_distance=64, max_dense_share=0.10),
    remask=RemaskConfig(evidence="decay", decay=0.1, observe_tokens=32),
    min_evidence=64,
    compensation=True,
)
