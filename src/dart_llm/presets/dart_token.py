"""Token-level tracing: every token computes only its own strongest neurons.

4-bit copies of gate and up rank the neurons by ``abs(u~_i) * norm(w_i)``; the winners are computed
with the model's own weights.  The idea is that of Prox (arXiv 2607.27591) and WINA
(arXiv 2505.19427).  Uniform budget, no drift rule: there is no mask that could grow stale.
"""

from dart_llm.config import BudgetConfig, DriftConfig, PruneConfig, ScoreConfig, TokenConfig

CONFIG = PruneConfig(
    method="dart-token",
    score=ScoreConfig(name="normalized"),
    budget=BudgetConfig(name="uniform"),
    drift=DriftConfig(rule="never"),
    token=TokenConfig(bits=4, group=32),
)
