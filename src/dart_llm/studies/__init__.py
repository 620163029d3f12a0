"""Each package here implements a command, or a group of commands, that writes a results folder.

The class of the command, a ``Study``, is in ``study.py``.  The shortest is ``inspection/study.py``.
"""
