"""Knowledge about transformers' models: loading, architectures, calls, read-only hooks.

Start with ``describe.py``; a new architecture is an entry of ``architectures.py``.
"""
