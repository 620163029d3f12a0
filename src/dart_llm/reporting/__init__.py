"""Tables, words, figures, pages and the console: how results reach people.

Start with ``table.py``; templates of pages lie in ``templates/``.
"""
