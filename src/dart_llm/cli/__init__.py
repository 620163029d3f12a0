"""The command line.  Start with ``app.py``; ``options.py`` builds flags from settings."""
