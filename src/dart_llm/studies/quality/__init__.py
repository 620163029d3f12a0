"""``bench quality`` measures the share of GRIFFIN's gap to dense that each method closes.

Start with ``study.py``; ``gaps.py`` computes the shares of the gap.
"""
