"""Tables, text, figures, pages and the console: how results are presented.

Start with ``table.py``; the pages' templates are in ``templates/``.
"""
