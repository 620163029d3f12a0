"""``inspect``: what a model's FFN neurons do on given texts.

Start with ``study.py``; ``sections.py`` has what is computed, ``readings.py`` what is recorded.
"""
