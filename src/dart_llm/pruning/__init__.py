"""The method: scores, budgets, masks, drift, and the state of a sequence.  Torch, but no model.

Start with ``controller.py``; a new score goes into ``scores.py``, a new method into ``methods.py``.
"""
