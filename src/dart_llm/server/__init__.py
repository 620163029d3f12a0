"""An OpenAI-compatible server, its web page (the "window"), and recorded answers.

Start with ``app.py``; the page's files are in ``static/``.
"""
