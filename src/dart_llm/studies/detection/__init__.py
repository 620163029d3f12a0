"""``detect``: how well drift rules notice known changes of topic.

Start with ``study.py``; ``replay.py`` has the rates.
"""
