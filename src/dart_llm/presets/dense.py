"""Dense: nothing is removed.  The baseline of every comparison."""

from dart_llm.config import PruneConfig

CONFIG = PruneConfig(method="dense", sparsity=0.0)
