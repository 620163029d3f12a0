"""``prune()`` and ``Run``: one model, one method, one block of code.

Start with ``run.py``; ``prepare.py`` makes what a run needs ahead of it.
"""
