"""``bench quality``: two tasks of the grid, and what each method closes of GRIFFIN's gap.

Start with ``study.py``; ``gaps.py`` has the shares of the gap.
"""
