"""``inspect``: what a model's FFN neurons do on given texts.

Start with ``study.py``; ``analyses.py`` has what is computed.
"""
