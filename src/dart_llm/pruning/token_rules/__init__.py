"""Rules by which every token selects what it reads, one file each.

Start with ``rule.py``; ``cats.py`` is the shortest rule.
"""
