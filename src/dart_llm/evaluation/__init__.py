"""Evaluations, which all return a ``Measurement``: perplexity, lm-eval tasks, summaries.

Start with ``measurement.py``, then ``tasks.py``, which selects the module for a task's name.
"""
