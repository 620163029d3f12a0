"""Pruning: scores, budgets, masks, drift detection, sequence states.  Uses torch, but no model.

Start with ``controller.py``.  New scores go into ``scores.py``, new methods into ``methods.py``.
"""
