"""``bench quality``: two tasks, and the share of GRIFFIN's gap that each method closes.

Start with ``study.py``; ``gaps.py`` computes the shares of the gap.
"""
