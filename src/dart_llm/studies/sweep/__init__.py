"""``sweep`` and ``compare``: a grid of cells, each measured once.

Start with ``cells.py``, then ``study.py``.
"""
