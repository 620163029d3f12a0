"""``bench speed`` (``study.py``) times pruning methods; ``tune`` also scores their loss."""
