"""``run`` and ``demo``: a text, dense and pruned, with its evaluations.

Start with ``study.py``.
"""
