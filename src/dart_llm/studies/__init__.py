"""One folder or file for each command that keeps a results folder.

Start with ``inspection/study.py``, the shortest; studies do not import each other.
"""
