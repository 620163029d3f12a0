"""``drift`` and ``detect``: what masks do while the topic of a text changes, and who notices.

Start with ``study.py`` (methods side by side) or ``detect.py`` (drift rules on known changes).
"""
