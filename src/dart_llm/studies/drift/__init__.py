"""``drift``: what masks do while the topic of a text changes.

Start with ``study.py``; ``view.py`` reads a folder back for figures and pages.
"""
