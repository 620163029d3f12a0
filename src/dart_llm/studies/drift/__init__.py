"""``drift`` compares methods on texts whose topic changes; ``detect`` tests only the drift rules.

A drift rule decides when masks are rebuilt.  Start with ``study.py`` (``drift``) or ``detect.py``.
"""
