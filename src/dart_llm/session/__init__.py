"""``prune()`` and ``Run``: prune one model with one method, inside one ``with`` block.

Start with ``run.py``.  ``export.py`` writes narrower checkpoints, ``gguf_export.py`` narrower GGUF
files, and ``trace.py`` records which neurons run for each token.
"""
