"""Texts, prompts, passages and data sets; ``shipped/`` contains those that come with the package.

Start with ``documents.py`` for texts to measure on and ``texts.py`` for prompts.
"""
