"""What is changed on a model while it is pruned, and how it is put back.

Start with ``patch.py``, the only code that changes a model, and ``patched_ffn.py``.
"""
