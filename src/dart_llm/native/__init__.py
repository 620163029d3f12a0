"""The C++ kernels in ``csrc/``, which are compiled on first use.

Start with ``build.py``.  ``csrc/ops.cpp`` lists the operators that Python calls.
"""
