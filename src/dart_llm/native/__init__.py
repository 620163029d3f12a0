"""The C++ kernels in ``csrc/``, compiled on first use.

Start with ``build.py``; ``csrc/ops.cpp`` lists what Python calls.
"""
