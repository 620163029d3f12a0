"""A folder for each command, or group of commands, that writes a results folder.

Start with ``inspection/study.py``, the shortest study.
"""
