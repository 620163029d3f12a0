"""``bench quality``: the loss of every method on held-out slices.

Start with ``study.py``; ``gaps.py`` has the shares of GRIFFIN's gap.
"""
