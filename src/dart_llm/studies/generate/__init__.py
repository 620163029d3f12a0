"""``run`` and ``demo``: a text generated dense and pruned, with its accounting and times."""
