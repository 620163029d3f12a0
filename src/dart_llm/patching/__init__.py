"""Changes a model while it is pruned, and undoes the changes.

Start with ``patch.py``, the only code that changes a model, and ``patched_ffn.py``.
"""
