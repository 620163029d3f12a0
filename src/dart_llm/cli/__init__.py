"""The command line.  Start with ``app.py``; ``options.py`` turns settings into flags."""
