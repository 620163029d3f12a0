"""Token-level tracing: every token computes only its own strongest neurons.

4-bit copies of gate and up rank the neurons by ``abs(u~_i)`` times the root of the loss's mean
squared gradient by u_i, learnt once from the model's own text; the winners are computed with the
model's own weights.  The idea of copies and winners is that of Prox (arXiv 2607.27591) and WINA
(arXiv 2505.19427).  How many a layer keeps comes from the prompt's tokens; no drift rule: there is
no mask that could grow stale.
"""

from dart_llm.config import (
    BudgetConfig,
    DriftConfig,
    PriorConfig,
    PruneConfig,
    ScoreConfig,
    TokenConfig,
)

CONFIG = PruneConfig(
    method="dart-token",
    score=ScoreConfig(name="fisher"),
    budget=BudgetConfig(name="blend uniform by-token"),
    drift=DriftConfig(rule="never"),
    prior=PriorConfig(tokens=32),
    skip_sinks=True,
    token=TokenConfig(bits=4, group=32),
)
