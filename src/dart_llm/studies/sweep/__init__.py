"""``eval``, ``perplexity``, ``summarize``, ``compare`` and ``sweep``: measure the cells of a grid.

Start with ``settings.py`` and ``grid.py``, which make cells, then ``study.py``.
"""
