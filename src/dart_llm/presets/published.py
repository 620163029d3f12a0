"""DART as its scripts were published (arXiv 2601.22632), with their defects mended.

Magnitude scores, the depth budget, the scripts' drift rule, fresh evidence.  Departures, each a
defect of the scripts:

- masks are built from earlier tokens only; the scripts masked the forward that made the mask;
- a re-mask holds for all layers at once; the scripts lost every other layer's mask on a trigger;
- the reference of the drift rule is never a single token, whose deviation is undefined;
- the sensitivity behind the budget uses the FFN's output everywhere;
- budgets stay with their layers and meet the requested total; the scripts clipped it to 10-90 %;
- sums are float32, all rows and all tokens count, padding does not;
- the published rule never triggers after the release step.
"""

from dart_llm.config import BudgetConfig, DriftConfig, PruneConfig, RemaskConfig, ScoreConfig

CONFIG = PruneConfig(
    method="published",
    score=ScoreConfig(name="magnitude", proxy_embedding="input"),
    budget=BudgetConfig(name="depth"),
    drift=DriftConfig(rule="published"),
    remask=RemaskConfig(evidence="fresh"),
)
