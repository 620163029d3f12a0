"""Token-level tracing: every token computes only its own strongest neurons.

4-bit copies of gate and up rank the neurons by ``abs(u~_i)`` times the root of the loss's mean
squared gradient by u_i, learnt once from the model's own text; the winners are computed with the
model's own weights.  The idea of copies and winners is that of Prox (arXiv 2607.27591) and WINA
(arXiv 2505.19427).  The others stand at what they are worth on average where tokens leave them out.
Uniform budget, no drift rule: there is no mask that could grow stale.
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
    budget=BudgetConfig(name="uniform"),
    drift=DriftConfig(rule="never"),
    prior=PriorConfig(tokens=32),
    skip_sinks=True,
    compensation=True,
    token=TokenConfig(bits=4, group=32),
)
