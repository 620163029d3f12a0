"""Dense with 8-bit weights: what quantisation gives instead of pruning.

GGUF's format Q8_0, 8.5 bits a weight with its scales.  All neurons are kept.
"""

from dart_llm.config import PruneConfig

CONFIG = PruneConfig(method="dense-8bit", sparsity=0.0, weight_bits=8)
