"""Everything that depends on transformers: loading, architectures, calls, read-only hooks.

Start with ``describe.py``.  To support a new architecture, add an entry to ``architectures.py``.
"""
