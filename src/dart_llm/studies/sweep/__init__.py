"""``eval``, ``perplexity``, ``summarize``, ``compare`` and ``sweep``: cells of a grid, measured.

Start with ``settings.py`` and ``grid.py``, which make cells, then ``study.py``.
"""
