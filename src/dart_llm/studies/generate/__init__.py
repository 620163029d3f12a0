"""``run`` and ``demo``: a text, dense and pruned, its accounting and its times."""
