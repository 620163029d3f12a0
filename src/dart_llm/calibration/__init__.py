"""Statistics that are collected from a model before its first token, and their cache.

Start with ``self_calibration.py``; ``collect.py`` sums activations, ``cache.py`` stores the sums.
"""
