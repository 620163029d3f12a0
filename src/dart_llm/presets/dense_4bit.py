"""Dense with 4-bit weights: what quantisation gives instead of pruning.

GGUF's format Q4_1, 5 bits a weight with its scales; as in such files, token embedding and output
head have 8 (Q8_0).  All neurons are kept.
"""

from dart_llm.config import PruneConfig

CONFIG = PruneConfig(method="dense-4bit", sparsity=0.0, weight_bits=4)
