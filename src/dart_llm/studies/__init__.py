"""Each package here implements a command, or a group of commands, that writes a results folder.

The command's class, a subclass of ``Study``, is in ``study.py``.  To see how a study is written,
start with ``inspection/study.py``, which is short.
"""
