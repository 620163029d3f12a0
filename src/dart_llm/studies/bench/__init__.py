"""``bench speed`` and ``tune``: candidates, timed in interleaved repetitions, and scored.

Start with ``study.py``; ``speed.py`` and ``tune.py`` are the two commands.
"""
