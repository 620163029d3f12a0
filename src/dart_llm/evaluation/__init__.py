"""Perplexity, lm-eval, summaries and text metrics, each as a ``Measurement``.

Start with ``measurement.py``, then ``tasks.py``, which selects the module for a task's name.
"""
