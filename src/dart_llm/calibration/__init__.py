"""What is learned of a model before its first token, and where it is cached.

Start with ``self_calibration.py``; ``calibrate.py`` chooses masks from a text.
"""
