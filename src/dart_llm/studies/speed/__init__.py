"""``bench speed``: the time of every method, in turns with dense.

Start with ``study.py``; ``timing.py`` is the clock.
"""
