"""Rules by which every token selects its neurons or inputs, one file each.

Start with ``rule.py``; ``cats.py`` is the shortest rule.
"""
