"""Rules by which every token selects its neurons or inputs; each is in a file of its own.

Start with ``rule.py``; ``cats.py`` is the shortest rule.
"""
