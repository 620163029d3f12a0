"""Changes to a model while it is pruned, and how they are undone.

Start with ``patch.py``, the only code that changes a model, and ``patched_ffn.py``.
"""
