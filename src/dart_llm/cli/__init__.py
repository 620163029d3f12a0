"""The command line: start with ``app.py``; ``options.py`` turns settings into flags."""
