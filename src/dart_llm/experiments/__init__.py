"""Code that all studies (commands with a results folder) share.

Start with ``study.py`` and ``store.py``; ``index.py`` lists the results folders of past runs.
"""
