"""The command line: the application, its commands, chat.

Start with ``app.py``; ``options.py`` turns settings into flags.
"""
