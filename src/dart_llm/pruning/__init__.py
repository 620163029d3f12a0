"""Pruning: scores, budgets, masks, drift, and the state of a sequence.  Uses torch, but no model.

Start with ``controller.py``; a new score goes into ``scores.py``, a new method into ``methods.py``.
"""
