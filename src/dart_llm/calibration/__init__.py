"""What is learnt of a model before its first token, and where it is kept.

Start with ``learn.py``; ``calibrate.py`` chooses masks from a text.
"""
