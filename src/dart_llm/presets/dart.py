"""DART for LLMs: this project's default.

Fisher scores (arXiv 2204.09656) ranked over all layers at once, with the activations of the prompt
and gradients that are learnt once from the model's own text; low-rank compensation, after FLAP's
mean (arXiv 2312.11983); re-masks from decayed evidence when the last hidden state leaves the
topic.  docs/method.md has the formulas and what each part is worth.
"""

from dart_llm.config import (
    BudgetConfig,
    DriftConfig,
    PriorConfig,
    PruneConfig,
    RemaskConfig,
    ScoreConfig,
)

CONFIG = PruneConfig(
    method="dart",
    score=ScoreConfig(name="fisher"),
    budget=BudgetConfig(name="ranked"),
    drift=DriftConfig(
        rule="dart", signal="hidden", min_distance=64, max_dense_share=0.05, allowance=32
    ),
    remask=RemaskConfig(evidence="decay", decay=0.1, observe_tokens=32),
    prior=PriorConfig(tokens=32),
    min_evidence=16,
    skip_sinks=True,
    compensation=True,
    compensation_rank=32,
)
