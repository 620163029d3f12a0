"""Perplexity, lm-eval, summaries and text metrics, each as a ``Measurement``.

Start with ``measurement.py``, then ``tasks.py``, which knows them all by name.
"""
