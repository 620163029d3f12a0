"""An OpenAI-compatible server, its window in a browser, and recordings.

Start with ``app.py``; the page's files are in ``static/``.
"""
