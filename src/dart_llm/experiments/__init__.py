"""Code that all studies share: results folders, provenance, statistics, comparisons.

Start with ``study.py`` and ``store.py``; ``index.py`` reads finished folders.
"""
