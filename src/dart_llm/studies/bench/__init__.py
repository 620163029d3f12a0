"""``bench speed`` (study.py) times pruning methods; ``tune`` (tune.py) also scores their loss."""
