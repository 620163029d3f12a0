"""One short file per method: a ``PruneConfig`` and where it comes from."""
