"""Pruning: scores, budgets, masks, drift detection, and the state of each sequence.

The modules use torch, but never run a model.  Start with ``controller.py``.  Add a new score to
``scores.py`` and a new method to ``methods.py``.
"""
