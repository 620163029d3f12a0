"""Texts, prompts, passages and data sets; ``shipped/`` contains the package's own data.

Start with ``documents.py`` for texts to measure on and ``texts.py`` for prompts.
"""
