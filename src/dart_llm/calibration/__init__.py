"""Statistics of a model that are collected before it is pruned, and their cache.

Start with ``self_calibration.py``; ``collect.py`` sums activations, ``cache.py`` stores the sums.
"""
