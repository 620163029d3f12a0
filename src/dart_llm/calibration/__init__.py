"""Statistics collected of a model before its first token, and where they are cached.

Start with ``self_calibration.py``; ``collect.py`` sums what forwards show, ``cache.py`` keeps it.
"""
