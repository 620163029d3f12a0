"""``prune()`` and ``Run``: one model, one method, one block of code.

Start with ``run.py``; ``export.py`` writes narrow checkpoints, ``trace.py`` the neurons per token.
"""
