"""``run`` generates a text dense and pruned; ``demo`` also times other programs."""
