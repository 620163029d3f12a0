"""``inspect`` shows what a model's FFN neurons do on given texts.

Start with ``study.py``; ``readings.py`` records activations, ``sections.py`` evaluates them.
"""
