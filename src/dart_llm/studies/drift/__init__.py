"""``drift`` and ``detect``: how masks fare when a text's topic changes, and which rules notice.

Start with ``study.py`` (methods compared) or ``detect.py`` (drift rules on known topic changes).
"""
