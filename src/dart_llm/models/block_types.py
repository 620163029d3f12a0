"""Names of the low-bit block types that weights are stored in."""

BLOCKS = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")
"""GGUF's block types that the native kernels read."""

ROUNDED = ("q8_0", "q4_0", "q4_1")
"""Block types that weights of another dtype can be rounded to."""
