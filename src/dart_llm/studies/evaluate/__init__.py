"""``eval``, ``perplexity``, ``summarize``: one method on some tasks.

Start with ``study.py``, the shortest of the studies.
"""
